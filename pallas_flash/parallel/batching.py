"""vmap: a mapped axis becomes part of the batch, so that no kernel ever sees one."""

import functools
import math
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

Axes = tuple[str, ...]
ArrayFunction = Callable[..., tuple[jax.Array, ...]]
Wrapper = Callable[[ArrayFunction, Sequence[Axes], Sequence[Axes]], ArrayFunction]


def foldable(
    fn: ArrayFunction,
    axes_in: Sequence[Axes],
    axes_out: Sequence[Axes],
    *,
    shared: Collection[int] = (),
    wrap: Wrapper | None = None,
) -> ArrayFunction:
    """Returns `fn` with a rule for vmap: n instances of batch B are one call of batch n * B.

    Every array starts with the axis "batch". The mapped axes stay apart, as leading axes of their
    own, until right before `fn`: `wrap` sees them (named "vmap0" for the innermost, and so on) and
    may split each over devices, which would be lost in a merged axis.

    Args:
      fn: function of arrays that returns a tuple of arrays.
      axes_in, axes_out: names of the axes of every argument and every result.
      shared: indices of the arguments whose batch size may be any divisor ``b`` of B, row ``i`` of
        the batch using row ``i // (B // b)``. Where the mapped axis leaves such an argument
        alone it keeps batch size 1. Every other argument is given a row for each of the n * B;
        so must be one whose gradient `fn` returns, since every instance has its own.
      wrap: applied as ``wrap(fn, axes_in, axes_out)`` outside of the folding, e.g. `partitioned`.
    """

    @functools.cache
    def mapped(depth: int) -> ArrayFunction:
        """`fn` of arrays with `depth` mapped axes in front, each of size 1 (broadcast) or n."""
        vmap_axes = tuple(f"vmap{i}" for i in reversed(range(depth)))
        inner = _folded(fn, depth, shared) if depth else fn
        if wrap:
            inner = wrap(
                inner,
                [vmap_axes + axes for axes in axes_in],
                [vmap_axes + axes for axes in axes_out],
            )
        call = custom_vmap(lambda *arrays: tuple(inner(*arrays)))

        @call.def_vmap
        def rule(axis_size, in_batched, *arrays):
            del axis_size
            pairs = zip(arrays, in_batched, strict=True)
            results = mapped(depth + 1)(*(x if batched else x[None] for x, batched in pairs))
            return results, (True,) * len(axes_out)

        return call

    return mapped(0)


def _folded(fn: ArrayFunction, depth: int, shared: Collection[int]) -> ArrayFunction:
    """`fn` of arrays ``[n_1, ..., n_depth, batch, ...]``: folds them, and unfolds the results."""

    def folded(*arrays):
        mapped = tuple(max(sizes) for sizes in zip(*(x.shape[:depth] for x in arrays), strict=True))
        results = fn(*(_fold(x, mapped, i in shared) for i, x in enumerate(arrays)))
        return tuple(
            x.reshape(*mapped, x.shape[0] // math.prod(mapped), *x.shape[1:]) for x in results
        )

    return folded


def _fold(x: jax.Array, mapped: tuple[int, ...], is_shared: bool) -> jax.Array:
    """``[n_1 or 1, ..., batch, ...]`` -> ``[rows, ...]``; shared arrays keep trailing ones."""
    outer = x.shape[: len(mapped) + 1]
    # The rows a shared array needs: up to its last axis that isn't broadcast.
    used = len(outer)
    while is_shared and used and outer[used - 1] == 1:
        used -= 1
    rows = (*mapped, outer[-1])[:used]
    inner = x.shape[len(outer) :]
    return jnp.broadcast_to(x.reshape(*outer[:used], *inner), (*rows, *inner)).reshape(-1, *inner)
