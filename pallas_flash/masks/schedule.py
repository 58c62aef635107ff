"""Schedule: the blocks that a tile has to visit, and the run of them that needs no mask."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.masks.mask import BlockKind, Mask
from pallas_flash.terms import SCORE_AXES, map_operands

# Columns of a schedule: a tile visits the blocks first..last (end exclusive), those in
# full_first..full_last without mask. A tile with nothing to visit has first == last.
FIRST, FULL_FIRST, FULL_LAST, LAST = range(4)


def block_kinds(
    mask: Mask | None, q_len: int, kv_len: int, block_q: int, block_kv: int, batch: int
) -> Any:
    """`BlockKind` of every block: [B or 1, Hq or 1, num_q_blocks, num_kv_blocks] int32.

    A numpy array if the mask holds no arrays, else computed at run time. A block over the end of
    the keys is at most PARTIAL, so that a kernel masks what lies beyond them; a block over the
    end of the queries is not, since rows beyond them are never stored.
    """

    def bounds(n, block, shape):
        lo = np.arange(0, n, block, dtype=np.int32).reshape(shape)
        return lo, np.minimum(lo + block, n) - 1

    q_lo, q_hi = bounds(q_len, block_q, (1, 1, -1, 1))
    kv_lo, kv_hi = bounds(kv_len, block_kv, (1, 1, 1, -1))
    if mask is None:
        kinds: Any = np.full((1, 1, q_lo.size, kv_lo.size), BlockKind.FULL, np.int32)
    else:
        kinds = _per_row(mask, batch).block_kind(q_lo, q_hi, kv_lo, kv_hi)
        shape = np.broadcast_shapes(np.shape(kinds), (1, 1, q_lo.size, kv_lo.size))
        xp = jnp if jax.tree.leaves(mask) else np
        kinds = xp.broadcast_to(xp.asarray(kinds, np.int32), shape)
    over_the_end = (kv_lo + block_kv > kv_len) & (kinds > BlockKind.PARTIAL)
    return kinds - over_the_end.astype(np.int32)


def _per_row(mask: Mask, batch: int) -> Mask:
    """The mask with its per-row numbers shaped to broadcast against [B, Hq, q, kv] blocks."""

    def align(array, axes):
        if not set(axes) <= {"batch", "heads"}:
            return None  # a mask whose arrays span positions must not read them in block_kind
        sizes = dict(zip(axes, array.shape, strict=True))
        array = jnp.asarray(array).reshape([sizes.get(axis, 1) for axis in SCORE_AXES])
        rows = array.shape[0]
        return array if rows in (1, batch) else jnp.repeat(array, batch // rows, axis=0)

    return map_operands(align, mask)


def runs(kinds: Any) -> Any:
    """Four numbers a tile, [..., 4] int32, from its blocks' kinds along the last axis."""
    xp = np if isinstance(kinds, np.ndarray) else jnp
    count = kinds.shape[-1]
    index = np.arange(count, dtype=np.int32).reshape((1,) * (kinds.ndim - 1) + (count,))

    def first(condition, default):
        return xp.min(xp.where(condition, index, default), axis=-1)

    visited, full = kinds > BlockKind.SKIP, kinds == BlockKind.FULL
    last = xp.max(xp.where(visited, index + 1, 0), axis=-1)
    start = xp.minimum(first(visited, count), last)
    full_first = xp.minimum(first(full, count), last)
    full_last = first((index >= full_first[..., None]) & ~full, last[..., None])
    full_last = xp.maximum(full_last, full_first)
    return xp.stack([start, full_first, full_last, last], axis=-1).astype(np.int32)


def kv_schedule(
    mask: Mask | None, q_len: int, kv_len: int, block_q: int, block_kv: int, batch: int
) -> Any:
    """For every query tile the key blocks to visit: [B or 1, Hq or 1, num_q_blocks, 4] int32."""
    return runs(block_kinds(mask, q_len, kv_len, block_q, block_kv, batch))


def q_schedule(
    mask: Mask | None, q_len: int, kv_len: int, block_q: int, block_kv: int, batch: int
) -> Any:
    """For every key tile the query blocks to visit: [B or 1, Hq or 1, num_kv_blocks, 4] int32."""
    kinds = block_kinds(mask, q_len, kv_len, block_q, block_kv, batch)
    return runs(kinds.swapaxes(-1, -2))
