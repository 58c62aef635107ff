"""Rows of an array that nobody uses: they may hold NaN, which a product with zeros would spread.

Most tiles have none of them. So the array stays as it is, and beside it comes another in which only
the tiles with unused rows are written, with zeros in these rows; a kernel loads a tile from the one
or the other. It costs what the tiles at the edge of the padding cost, not a pass over the array.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.backends.hopper.copies import Tile, copied, load, num_copies, store
from pallas_flash.backends.hopper.storage import (
    MATRIX,
    PER_ROW,
    Columns,
    read_scalar,
    round_up,
)
from pallas_flash.masks import BlockKind, Mask
from pallas_flash.masks.schedule import Blocks, block_kinds

# Rows of a tile of the kernel below: those of the layout in registers.
ROWS = 64


class Source(NamedTuple):
    """An array [B, T, H, D], and how its unused rows are left out.

    clean: like `array`, written where needs_clean says so, or None if every row is in use.
    needs_clean: [B, H or 1, tiles] int32, whether a tile has unused rows; of_rows: [B] int32,
    whether any tile of a row of the batch has.
    """

    array: Any
    clean: Any = None
    needs_clean: Any = None
    of_rows: Any = None

    def looks(self, batch: Any) -> Any:
        """Whether to look which tiles of a row of the batch are clean: to be asked early."""
        return None if self.clean is None else read_scalar(self.of_rows, batch) != 0

    def load(self, looks: Any, batch: Any, head: Any, tile: Any, smem: Tile, ready: Any) -> None:
        """Starts the load of a tile into SMEM, whose rows it fills. looks: from `looks`."""
        start = tile * smem.whole.shape[0]

        def load_from(array: Any) -> None:
            load(array, batch, start, head, smem, ready)

        if self.clean is None:
            load_from(self.array)
            return
        flag_head = head if self.needs_clean.shape[1] > 1 else batch * 0

        def load_either() -> None:
            needs_clean = read_scalar(self.needs_clean, batch, flag_head, tile)
            pl.when(needs_clean == 0)(lambda: load_from(self.array))
            pl.when(needs_clean != 0)(lambda: load_from(self.clean))

        pl.when(looks)(load_either)
        pl.when(looks == False)(lambda: load_from(self.array))  # noqa: E712


def unused_keys(mask: Mask | None, batch: int, q_len: int, kv_len: int) -> Any:
    """Which keys no query may attend to, as far as the mask tells: [B, 1, Tkv], None if none."""
    if mask is None:
        return None
    # Every key as a block of its own, with all queries.
    one_key = Blocks(q_len, kv_len, q_len, 1, batch)
    numbers = np.arange(1, dtype=np.int32), np.arange(kv_len, dtype=np.int32)
    unused = (block_kinds(mask, one_key, *numbers) == BlockKind.SKIP).all(1)
    if isinstance(unused, np.ndarray) and not unused.any():
        return None
    return jnp.broadcast_to(jnp.asarray(unused), (batch, 1, kv_len))


def without_unused(x: jax.Array, unused: Any, columns: Columns, block: int) -> Source:
    """`x`, as it is copied, for a kernel that loads it in tiles of `block` rows.

    unused: [B, H or 1, T] bool, or None.
    """
    if unused is None:
        return Source(x)
    length = unused.shape[-1]
    whole = round_up(round_up(length, block), ROWS)
    # Integers from here on: XLA makes no kernels that convert them.
    unused = jnp.pad(unused.astype(jnp.int32), ((0, 0), (0, 0), (0, whole - length)))
    of_tiles = unused[..., : round_up(length, block)].reshape(*unused.shape[:2], -1, block).max(-1)
    flags = Flags(unused, of_tiles, of_tiles.max((1, 2)))
    return Source(x, _clean(x, flags, columns, block), of_tiles, flags.of_rows)


class Flags(NamedTuple):
    """What `_clean` is told, int32.

    unused: [B, h, T over whole tiles of `ROWS`]; of_tiles: [B, h, tiles], which are to be written;
    of_rows: [B], whether there are any.
    """

    unused: Any
    of_tiles: Any
    of_rows: Any


def _clean(x: jax.Array, flags: Flags, columns: Columns, block: int) -> jax.Array:
    """`x` with zeros in unused rows, in those tiles of `block` rows that are to be written."""
    batch, length, num_heads = x.shape[:3]
    num_tiles = flags.unused.shape[-1] // ROWS
    # How many tiles of `block` rows one of `ROWS` may reach into.
    most = 1 if block % ROWS == 0 else (ROWS - 2) // block + 2
    num_blocks = flags.of_tiles.shape[-1]

    def clean_tiles(x_gmem, gmem, out_gmem, smem, ready):
        staging = Tile.of(smem, length)
        index = lax.axis_index("block")
        row, tile = lax.div(index, jnp.int32(num_tiles)), lax.rem(index, jnp.int32(num_tiles))

        def one_head(head, _):
            at = row, head if flags.unused.shape[1] > 1 else row * 0
            first = lax.div(tile * ROWS, jnp.int32(block))
            last = jnp.minimum(lax.div(tile * ROWS + ROWS - 1, jnp.int32(block)), num_blocks - 1)
            tiles = (jnp.minimum(first + i, last) for i in range(most))
            written = [read_scalar(gmem.of_tiles, *at, each) for each in tiles]
            is_written = functools.reduce(operator.or_, written) != 0
            pl.when(is_written)(lambda: clean_tile(head, at))

        def clean_tile(head, at):
            load(x_gmem, row, tile * ROWS, head, staging, ready)
            plgpu.barrier_wait(ready)
            value = plgpu.load(staging.whole, layout=MATRIX, optimized=False)
            unused = gmem.unused.at[*at, pl.ds(tile * ROWS, ROWS)]
            unused = plgpu.load(unused, layout=PER_ROW, optimized=False)
            is_unused = lax.broadcast_in_dim(unused, value.shape, [0]) != 0
            staging.whole[...] = jnp.where(is_unused, jnp.zeros_like(value), value)
            plgpu.commit_smem()
            store(staging, out_gmem, row, tile * ROWS, head)
            plgpu.wait_smem_to_gmem(0)

        # Asked first, as most rows have none: a look at every head takes its time.
        @pl.when(read_scalar(gmem.of_rows, row) != 0)
        def _():
            lax.fori_loop(jnp.int32(0), jnp.int32(num_heads), one_head, None)

    return plgpu.kernel(
        clean_tiles,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(batch * num_tiles,),
        grid_names=("block",),
        scratch_types=(
            copied((ROWS, columns.smem), x.dtype, columns, length),
            plgpu.Barrier(num_arrivals=num_copies(length, ROWS, columns)),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x, flags)
