"""Sums over the tiles of the scores, differentiable in both modes as often as one likes.

What attention's derivatives are made of: from arrays over batch, heads and positions, each tile
computes what it adds to other such arrays. The derivatives of a sum, forward and backward, are sums
of the same kind, of the derivative of the tile's function; so their memory is linear too, in any
order. Plain JAX, tile by tile in float32 at least, for the results of any backend.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends import blockwise, tile
from pallas_flash.backends.blockwise import BlockwiseConfig, Grid
from pallas_flash.linear_map import both_modes
from pallas_flash.masks import schedule
from pallas_flash.parallel import distributed, vary_together
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import Axes, Tile, floating, map_operands


class View(NamedTuple):
    """One tile, as its function sees it."""

    grid: Grid
    i: Any
    j: Any

    def weighed(self, lse: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *arrays: jax.Array):
        """``drop(P) @ v`` [B, q, Hq, Dv] and ``rowsum(P)`` [B, Hq, q, 1] with ``P = exp(S - lse)``.

        lse: [B, Hq, q, 1]; q, k, v: [B, positions, heads, dim]; arrays: of the score mod, aligned.
        """
        grid, spec = self.grid, self.grid.spec
        here = grid.tile(self.i, self.j)
        ok = grid.allowed(self.i, self.j)
        used_q, used_kv = (x.swapaxes(1, 2) for x in tile.in_use(ok, spec.num_kv_heads))
        # Padding may hold NaN, and so may its tangents and cotangents.
        q, k, v = jnp.where(used_q, q, 0), jnp.where(used_kv, k, 0), jnp.where(used_kv, v, 0)
        q = q.reshape(*q.shape[:2], spec.num_kv_heads, spec.group, -1)
        s = jnp.einsum("btkgd,bskd->bkgts", q, k)
        s = s.reshape(spec.batch, spec.num_q_heads, *s.shape[3:])
        score_mod = floating(map_operands(here.align, grid.operands.score_mod))[1](list(arrays))
        s = tile.logits(s, *here.positions(), spec.scale, score_mod)
        # Inside as well: the gradient of exp at an empty row's lse of -inf would be NaN.
        p = jnp.where(ok, jnp.exp(jnp.where(ok, s - lse, 0)), 0)
        dropped = grid.dropped(self.i, self.j, p)
        dropped = dropped.reshape(spec.batch, spec.num_kv_heads, spec.group, *p.shape[2:])
        out = jnp.einsum("bkgts,bskd->btkgd", dropped, v)
        out = out.reshape(*out.shape[:2], spec.num_q_heads, -1)
        return jnp.where(used_q, out, 0), p.sum(-1, keepdims=True)


class TileSum(NamedTuple):
    """Results that are sums over tiles.

    function: ``(View, *parts) -> parts of the results``, of the arrays' parts in this tile.
    axes: of the arrays; those of q, k, v and the score mod's floating point arrays come first.
    like: for each result, the array whose shape, dtype and axes it has, as an index.
    """

    function: Callable[..., Any]
    axes: tuple[Axes, ...]
    like: tuple[int, ...]

    def tangent(self, moved: tuple[int, ...]) -> "TileSum":
        """Of the arrays and the tangents of those that move: the tangents of the results."""

        def function(view: View, *parts):
            x, dx = parts[: len(self.axes)], parts[len(self.axes) :]

            def of_moved(*values):
                new = dict(enumerate(x)) | dict(zip(moved, values, strict=True))
                return tuple(self.function(view, *new.values()))

            return jax.jvp(of_moved, [x[i] for i in moved], list(dx))[1]

        return TileSum(function, self.axes + tuple(self.axes[i] for i in moved), self.like)

    def transposed(self) -> "TileSum":
        """Of the arrays and the cotangents of the results: the cotangents of the arrays."""

        def function(view: View, *parts):
            x, cotangents = parts[: len(self.axes)], parts[len(self.axes) :]
            _, vjp = jax.vjp(lambda *x: tuple(self.function(view, *x)), *x)
            return vjp(tuple(cotangents))

        axes = self.axes + tuple(self.axes[i] for i in self.like)
        return TileSum(function, axes, tuple(range(len(self.axes))))


class Request(NamedTuple):
    """What is static in a sum of a call.

    config: of the backend that the user named; tile sizes are those of `blockwise`, or its default.
    """

    tile_sum: TileSum
    scale: float
    config: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_tiles(request: Request, operands: Operands, arrays: tuple[jax.Array, ...]):
    leaves, tree = jax.tree.flatten(operands)
    of, num_leaves = request.tile_sum, len(leaves)

    def local(*everything):
        operands = jax.tree.unflatten(tree, everything[:num_leaves])
        return _loop_over_tiles(request, operands, everything[num_leaves:])

    axes = [of.axes[i] for i in of.like]
    shared = operands.shared
    run = distributed(local, [*operands.axes, *of.axes], axes, shared=shared)
    return tuple(run(*leaves, *arrays))


def _forward(request: Request, operands: Operands, arrays: tuple[jax.Array, ...]):
    return sum_tiles(request, operands, arrays), (operands, arrays)


def _backward(request: Request, residuals: Any, cotangents: tuple[jax.Array, ...]):
    operands, arrays = residuals
    request = request._replace(tile_sum=request.tile_sum.transposed())
    found = sum_tiles(request, operands, (*arrays, *cotangents))
    return jax.tree.map(lambda x: None, operands), found


def _tangent(request: Request, residuals: Any, tangents: list[Any]) -> tuple[jax.Array, ...]:
    operands, arrays = residuals
    tangents = tangents[len(jax.tree.leaves(operands)) :]
    moved = tuple(i for i, x in enumerate(tangents) if x is not None)
    request = request._replace(tile_sum=request.tile_sum.tangent(moved))
    return sum_tiles(request, operands, (*arrays, *(tangents[i] for i in moved)))


_sum_tiles.defvjp(_forward, _backward)
_both = both_modes(_sum_tiles, _tangent)


def sum_tiles(request: Request, operands: Operands, arrays: tuple[jax.Array, ...]):
    """The results of a `TileSum` as a tuple; differentiable in the arrays.

    operands: of the call, for all that is not differentiated: sizes, mask, dropout, integers.
    """
    return _both(request, lax.stop_gradient(operands), arrays)


def _loop_over_tiles(request: Request, operands: Operands, arrays: Any) -> tuple[jax.Array, ...]:
    of, spec = request.tile_sum, AttentionSpec.of(operands, request.scale)
    config = request.config
    if not isinstance(config, BlockwiseConfig):
        config = blockwise.default_config(spec)
    grid = Grid.of(spec, config, operands)
    first, last = grid.bounds(schedule.kv_schedule)

    def visit(i, j, totals):
        here = grid.tile(i, j)
        parts = [_part(here, x, axes) for x, axes in zip(arrays, of.axes, strict=True)]
        found = of.function(View(grid, i, j), *(x.astype(spec.state_dtype) for x in parts))
        return tuple(
            here.add(total, of.axes[index], part)
            for total, index, part in zip(totals, of.like, found, strict=True)
        )

    def query_tile(i, totals):
        return lax.fori_loop(first[i], last[i], lambda j, totals: visit(i, j, totals), totals)

    zeros = tuple(jnp.zeros(arrays[i].shape, spec.state_dtype) for i in of.like)
    # As in `blockwise`: inside shard_map.
    zeros = vary_together(zeros, like=arrays)
    totals = lax.fori_loop(0, grid.blocks.num_q, query_tile, zeros)
    return tuple(x.astype(arrays[i].dtype) for x, i in zip(totals, of.like, strict=True))


def _part(here: Tile, x: jax.Array, axes: Axes) -> jax.Array:
    """What a tile sees of an array: aligned with the scores, or cut, if it spans a head_dim."""
    return here.cut(x, axes) if axes[-1].endswith("dim") else here.align(x, axes)
