"""New tokens that join a cache, and what a layer's mask asks of one."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash import (
    Causal,
    ChunkedCausal,
    KVCache,
    Mask,
    PagedKVCache,
    SlidingWindow,
    decode_attention,
)
from pallas_flash.decoding import rows
from pallas_flash.masks.mask import And

Cache = KVCache | PagedKVCache


def window_of(mask: Mask | None) -> int | None:
    """Returns how many keys a query sees by the windows of a causal mask, itself included."""
    windows = [part for part in _parts(mask) if isinstance(part, SlidingWindow)]
    return min((part.left + 1 for part in windows if part.left is not None), default=None)


def extend(
    cache: Cache, q, k, v, *, lengths, mask: Mask | None, **options
) -> tuple[jax.Array, Cache]:
    """Returns attention of new tokens, which see those before them, and the cache with them.

    More tokens than a ring has room for go in one after another in parts of ``cache.max_queries``.

    Args:
        q, k, v: [B, T, heads, head_dim].
        lengths: [B], how many of the T tokens are real, the first ones; None for all.
        mask: causal; what the cache implies of it is dropped, the rest sees positions in the row.
        options: of `decode_attention`.

    Raises:
        ValueError: a mask that is not causal, or whose window is not the cache's; what
            `decode_attention` and the cache raise.
    """
    _check_causal(mask)
    if cache.window not in (None, window_of(mask)):
        raise ValueError(
            f"a cache of window={cache.window} does not serve a layer whose mask has a window of "
            f"{window_of(mask)}"
        )
    mask = besides(mask, cache.window)

    def step(cache, part):
        q, k, v, lengths = part
        cache = cache.append(k, v, lengths)
        return cache, decode_attention(q, cache, lengths=lengths, mask=mask, **options)

    length, size = q.shape[1], cache.max_queries
    if length <= size:
        cache, out = step(cache, (q, k, v, lengths))
        return out, cache
    counts = rows.check_counts(lengths, "lengths", *q.shape[:2])
    rows.check_room(cache.lengths, counts, cache.max_len)
    first = jnp.arange(0, length, size)
    parts = [_in_parts(x, size) for x in (q, k, v)]
    cache, out = lax.scan(step, cache, (*parts, jnp.clip(counts - first[:, None], 0, size)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(len(out), -1, *out.shape[3:])[:, :length], cache


def _in_parts(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] as [parts, B, size, ...], the last one padded."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)


def _parts(mask: Mask | None) -> Iterator[Mask]:
    """The masks that are joined by & in a mask."""
    if isinstance(mask, And):
        yield from _parts(mask.left)
        yield from _parts(mask.right)
    elif mask is not None:
        yield mask


def _check_causal(mask: Mask | None) -> None:
    def is_causal(part):
        if isinstance(part, Causal):
            return part.offset <= 0
        return isinstance(part, ChunkedCausal) or (
            isinstance(part, SlidingWindow) and part.right == 0
        )

    if not any(map(is_causal, _parts(mask))):
        raise ValueError(
            f"a cache needs a causal mask, such as Causal() or Causal() & other, got {mask}"
        )


def besides(mask: Mask | None, window: int | None) -> Mask | None:
    """The mask without what a cache of this window implies: each token sees those before it."""

    def is_implied(part):
        if isinstance(part, SlidingWindow):
            return part.left is None or (window is not None and part.left + 1 >= window)
        return isinstance(part, Causal) and part.offset == 0

    rest = None
    for part in _parts(mask):
        if not is_implied(part):
            rest = part if rest is None else rest & part
    return rest
