"""Schedule: the blocks that a tile has to visit, and the run of them that needs no mask."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.masks.mask import BlockKind, Bounds, Mask
from pallas_flash.terms import SCORE_AXES, map_operands

# Columns of a schedule: a tile visits the blocks first..last (end exclusive), those in
# full_first..full_last without mask. A tile with nothing to visit has first == last.
FIRST, FULL_FIRST, FULL_LAST, LAST = range(4)

# Blocks classified at a time: what bounds the memory of a schedule.
BLOCKS_AT_A_TIME = 2**20


class Blocks(NamedTuple):
    """How the scores are cut into blocks, and for how many rows of a batch.

    Sizes are in positions.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    batch: int

    @property
    def num_q(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def num_kv(self) -> int:
        return -(-self.kv_len // self.block_kv)


def block_kinds(mask: Mask | None, blocks: Blocks, q_index: Any, kv_index: Any) -> Any:
    """`BlockKind` of the blocks with the given numbers: [B or 1, Hq or 1, len(q), len(kv)] int32.

    A numpy array if mask and numbers hold no JAX arrays, else computed at run time. A block over
    the end of the keys is at most PARTIAL, so that a kernel masks what lies beyond them; a block
    over the end of the queries is not, since rows beyond them are never stored.
    """
    q_index, kv_index = q_index.reshape(1, 1, -1, 1), kv_index.reshape(1, 1, 1, -1)
    # Both span all blocks: a mask need not look at both.
    none = (q_index + kv_index) * 0
    q_lo, kv_lo = q_index * blocks.block_q + none, kv_index * blocks.block_kv + none
    xp: Any = np if isinstance(none, np.ndarray) else jnp
    if mask is None:
        kinds = none + BlockKind.FULL
    else:
        # Parts of a mask that hold no arrays are classified when the program is traced.
        q_hi = xp.minimum(q_lo + blocks.block_q, blocks.q_len) - 1
        kv_hi = xp.minimum(kv_lo + blocks.block_kv, blocks.kv_len) - 1
        kinds = _per_block(mask, blocks, {"q": q_index, "kv": kv_index}).block_kind(
            q_lo, q_hi, kv_lo, kv_hi
        )
    over_the_end = (kv_lo + blocks.block_kv > blocks.kv_len) & (kinds > BlockKind.PARTIAL)
    xp = np if xp is np and not jax.tree.leaves(mask) else jnp
    return xp.asarray(kinds - over_the_end.astype(np.int32), np.int32)


def _per_block(mask: Mask, blocks: Blocks, index: dict[str, Any]) -> Mask:
    """The mask with its arrays shaped to broadcast against [B, Hq, q, kv] blocks.

    What `Mask.block_kind` says of its arrays: numbers for each row of the batch as they are,
    integers along one of the positions as `Bounds` of the blocks in `index`, others as None.
    """

    def align(array, axes):
        sizes = dict(zip(axes, array.shape, strict=True))
        along = [axis for axis in axes if axis in index and sizes[axis] > 1]
        is_integer = jnp.issubdtype(array.dtype, jnp.integer)
        if len(set(axes) & set(index)) == 2 or (along and not is_integer):
            return None
        array = jnp.asarray(array).reshape([sizes.get(axis, 1) for axis in SCORE_AXES])
        rows = array.shape[0]
        if rows not in (1, blocks.batch):
            array = jnp.repeat(array, blocks.batch // rows, axis=0)
        if not set(axes) & set(index):
            return array
        if not along:
            return Bounds(array, array)
        (axis,) = along
        return Bounds(
            *(_of_blocks(f, array, axis, blocks, index[axis]) for f in (jnp.min, jnp.max))
        )

    return map_operands(align, mask)


def _of_blocks(reduce: Callable, x: jax.Array, axis: str, blocks: Blocks, index: Any) -> jax.Array:
    """``reduce`` over each of the blocks with the given numbers along an axis of the scores."""
    at = SCORE_AXES.index(axis)
    size, count = {
        "q": (blocks.block_q, blocks.num_q),
        "kv": (blocks.block_kv, blocks.num_kv),
    }[axis]
    pad = [(0, count * size - x.shape[at] if i == at else 0) for i in range(x.ndim)]
    x = jnp.pad(x, pad, mode="edge")
    found = reduce(x.reshape(*x.shape[:at], count, size, *x.shape[at + 1 :]), axis=at + 1)
    return jnp.take(found, index.reshape(-1), axis=at, mode="clip")


def runs(kinds: Any) -> Any:
    """Four numbers a tile, [..., 4] int32, from its blocks' kinds along the last axis."""
    xp = np if isinstance(kinds, np.ndarray) else jnp
    count = kinds.shape[-1]
    index = np.arange(count, dtype=np.int32).reshape((1,) * (kinds.ndim - 1) + (count,))

    def first(condition):
        return xp.min(xp.where(condition, index, count), axis=-1)

    visited, full = kinds > BlockKind.SKIP, kinds == BlockKind.FULL
    ends = [(0, 0)] * (kinds.ndim - 1) + [(0, 1)]
    next_is_full = xp.pad(full, ends)[..., 1:]
    # None of these waits for another: XLA makes one kernel of them.
    last = xp.max(xp.where(visited, index + 1, 0), axis=-1)
    found = first(visited), first(full), first(full & (next_is_full == False)) + 1  # noqa: E712
    return xp.stack([*(xp.minimum(x, last) for x in found), last], axis=-1).astype(np.int32)


def runs_around(kinds: Any, leads: np.ndarray, trails: np.ndarray) -> Any:
    """Four numbers a tile where blocks at both ends of the visited ones are simpler.

    The first block, the first and the last (exclusive) of those in between, the last. At least one
    lies in between, unless there is nothing to visit.

    leads, trails: which blocks are simpler if they are FULL too, before and behind the others.
    """
    xp = np if isinstance(kinds, np.ndarray) else jnp
    first, _, _, last = (runs(kinds)[..., i, None] for i in range(4))
    index = np.arange(kinds.shape[-1], dtype=np.int32)
    is_full = kinds == BlockKind.FULL
    stops = (index >= first) & ((is_full & leads) == False)  # noqa: E712
    begin = xp.min(xp.where(stops, index, last), axis=-1, keepdims=True)
    begin = xp.minimum(begin, last)
    goes_on = (index < last) & ((is_full & trails) == False)  # noqa: E712
    end = xp.max(xp.where(goes_on, index + 1, begin), axis=-1, keepdims=True)
    is_empty = begin == end
    has_room = begin > first
    begin, end = (
        xp.where(is_empty & has_room, begin - 1, begin),
        xp.where(is_empty & (has_room == False) & (end < last), end + 1, end),  # noqa: E712
    )
    return xp.concatenate([first, begin, end, last], axis=-1).astype(np.int32)


def _sides(blocks: Blocks, near: tuple[int, int], q: Any, kv: Any) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks lie wholly before and after `ScoreMod.near`: [len(q), len(kv)] bool."""
    q_lo, kv_lo = q[:, None] * blocks.block_q, kv[None, :] * blocks.block_kv
    q_hi, kv_hi = q_lo + blocks.block_q - 1, kv_lo + blocks.block_kv - 1
    return kv_hi - q_lo <= near[0], kv_lo - q_hi >= near[1]


def kv_schedule(mask: Mask | None, blocks: Blocks, near: tuple[int, int] | None = None) -> Any:
    """For every query tile the key blocks to visit: [B or 1, Hq or 1, num_q_blocks, 4] int32.

    near: of the score mod; if it is given the numbers are those of `runs_around`.
    """
    everything = np.arange(blocks.num_kv, dtype=np.int32)

    def part(tiles):
        kinds = block_kinds(mask, blocks, tiles, everything)
        if near is None:
            return runs(kinds)
        return runs_around(kinds, *_sides(blocks, near, tiles, everything))

    return _in_parts(mask, blocks, blocks.num_q, part)


def q_schedule(mask: Mask | None, blocks: Blocks, near: tuple[int, int] | None = None) -> Any:
    """For every key tile the query blocks to visit: [B or 1, Hq or 1, num_kv_blocks, 4] int32."""
    everything = np.arange(blocks.num_q, dtype=np.int32)

    def part(tiles):
        kinds = block_kinds(mask, blocks, everything, tiles).swapaxes(-1, -2)
        if near is None:
            return runs(kinds)
        before, after = _sides(blocks, near, everything, tiles)
        # The first queries come before the keys.
        return runs_around(kinds, after.T, before.T)

    return _in_parts(mask, blocks, blocks.num_kv, part)


def _in_parts(mask: Mask | None, blocks: Blocks, count: int, part: Callable[[Any], Any]) -> Any:
    """``part`` of the tiles 0..count, some at a time, joined along the tiles."""
    is_static = not jax.tree.leaves(mask)
    tables = 1 if is_static else blocks.batch
    size = max(1, BLOCKS_AT_A_TIME * count // (blocks.num_q * blocks.num_kv * tables))
    if count <= size:
        return part(np.arange(count, dtype=np.int32))
    tiles = np.arange(-(-count // size) * size, dtype=np.int32).reshape(-1, size)
    if is_static:
        return np.concatenate([part(some) for some in tiles], axis=-2)[..., :count, :]
    found = jnp.moveaxis(jax.lax.map(part, jnp.asarray(tiles)), 0, -3)
    return found.reshape(*found.shape[:-3], -1, found.shape[-1])[..., :count, :]
