"""What the Hopper kernels share: how tiles lie in memory, products, and schedules."""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Multiprocessors of an H100.
NUM_SMS = 132
# What heads that run side by side may take of the 50 MB of an H100's L2 cache.
L2_BYTES_PER_GROUP = 16 * 2**20
# What a block of an H100 may have, in bytes.
SHARED_MEMORY_LIMIT = 232448
# Every allocation starts at a multiple of this.
SMEM_ALIGNMENT = 1024
# What TMA reads or writes in SMEM starts at a multiple of so many bytes.
TMA_SMEM_ALIGNMENT = 128
# TMA cuts arrays into tiles of 8 rows: a longer array must be a multiple of them.
TMA_ROWS = 8
MATRIX = plgpu.Layout.WGMMA
# A vector with one number for each row, or each column, of a matrix.
PER_ROW = MATRIX.reduce(1)
PER_COLUMN = MATRIX.reduce(0)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def divmod_of(x: Any, n: int) -> tuple[Any, Any]:
    """Quotient and remainder of an int32 that is not negative."""
    return lax.div(x, jnp.int32(n)), lax.rem(x, jnp.int32(n))


# ---------------------------------------------------------------------------------------------
# Tiles


@dataclasses.dataclass(frozen=True)
class Columns:
    """How a head dimension lies in memory.

    Fields:
      gmem: its size in the kernel's arrays: the dimension, rounded up to 16 where TMA needs it.
      smem: its size in a tile; TMA fills the difference with zeros and never stores it.
      tile: columns of a swizzle tile.
    """

    gmem: int
    smem: int
    tile: int


def head_columns(dim: int, widest_tile: int = 64) -> Columns:
    """The narrowest layout of `dim` in whole swizzle tiles, of so many columns at most."""
    for gmem in (dim, round_up(dim, 16)):
        for smem in range(round_up(gmem, 16), round_up(gmem, 64) + 1, 16):
            for tile in (64, 32, 16):
                if tile <= widest_tile and smem % tile == 0 and tma_can_tile(gmem, tile):
                    return Columns(gmem, smem, tile)
    raise AssertionError(f"no layout for head dimension {dim} in tiles of {widest_tile} columns")


def tma_can_tile(columns: int, tile: int) -> bool:
    """Whether TMA can cut an array of so many columns: into whole tiles, or a part of one."""
    return columns <= tile or columns % tile == 0


def tiled(shape: tuple[int, ...], dtype: Any, tile: int) -> Any:
    """SMEM in swizzled tiles of 8 rows x `tile` columns, as TMA writes and wgmma reads them."""
    swizzle = tile * jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(swizzle)),
    )


def shared_memory_bytes(allocations: Any) -> int:
    """SMEM that Pallas requests for scratch types: buffers aligned, 8 bytes a barrier."""
    total = 0
    kinds = plgpu.Barrier, plgpu.RefUnion
    for item in jax.tree.leaves(allocations, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(item, plgpu.RefUnion):
            total += max(map(shared_memory_bytes, item.refs))
        elif isinstance(item, plgpu.Barrier):
            total += 8 * int(np.prod(item.num_barriers))
        else:
            size = math.prod(item.shape) * jnp.dtype(item.dtype).itemsize
            total += round_up(size, SMEM_ALIGNMENT)
    return total


def tma_rows(length: int) -> int:
    """Number of positions that an array needs for TMA to read and write it."""
    return length if length <= TMA_ROWS else round_up(length, TMA_ROWS)


def window(array: Any, batch: Any, start: Any, head: Any, tile: Any) -> Any:
    """The part of a GMEM array [B, T, H, D] from position `start` on that fills the SMEM `tile`.

    It may reach over the ends of T and D: TMA reads zeros and writes nothing there.
    """
    rows, columns = tile.shape
    # Never a constant: Pallas refuses a slice that it can see is too wide.
    zero = batch * 0
    return array.at[batch, pl.ds(start, rows), head, pl.ds(zero, columns)]


def locate(index: Any, num_tiles: int, num_heads: int, heads_per_group: int) -> tuple[Any, Any]:
    """Head and tile of block `index`: group by group of heads, in each the first tiles first.

    The heads of a group run side by side and share the L2 cache.
    """
    group_size = min(heads_per_group, num_heads)
    group = lax.div(index, jnp.int32(num_tiles * group_size))
    within = index - group * (num_tiles * group_size)
    first_head = group * group_size
    size = jnp.int32(group_size)
    if num_heads % group_size:
        size = jnp.minimum(size, num_heads - first_head)
    return first_head + lax.rem(within, size), lax.div(within, size)


# ---------------------------------------------------------------------------------------------
# Products and vectors


def load_accumulator(acc: Any, wait_n: int) -> Any:
    """The accumulator's value, awaited until at most `wait_n` later products are in flight."""
    # Without the barrier the use of the value could be traced across the issue of later products.
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=wait_n))


def constant_per_row(rows: int, value: float) -> Any:
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), PER_ROW)


def zero_matrix(rows: int, columns: int) -> Any:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), MATRIX)


def widen_rows(row: Any, shape: tuple[int, int]) -> Any:
    """A matrix whose rows are constant, from one number per row."""
    return lax.broadcast_in_dim(row, shape, [0])


# ---------------------------------------------------------------------------------------------
# Masks


def read_scalar(ref: Any, *index: Any) -> Any:
    """One number of an array in GMEM."""
    # Inside shard_map an array in GMEM varies over the mesh in its type, and what a kernel computes
    # does not: the sum takes that off, or else no loop could start from the number.
    return ref[index] + jnp.zeros((), ref.dtype)


def schedule_bound(schedule: Any, batch: Any, head: Any, tile: Any, column: int) -> Any:
    """One number of a schedule [B or 1, Hq or 1, tiles, 4] in GMEM."""
    batch_index = batch if schedule.shape[0] > 1 else batch * 0
    head_index = head if schedule.shape[1] > 1 else batch * 0
    return read_scalar(schedule, batch_index, head_index, tile, column)
