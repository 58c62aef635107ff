"""Copies of tiles between GMEM and SMEM, by TMA.

A tile lies in SMEM in swizzled tiles of 8 rows. TMA copies all of it at once, from or to an array
[B, T, H, D] whose T is a multiple of 8. Other lengths it would have to cut inside of such 8 rows,
which it cannot. Then the copy takes 8 rows at a time, as they begin: the array is seen as [B, T, H,
tiles along D, columns of a tile], the SMEM as [T / 8, tiles along D, 8, columns of a tile], and its
bytes are the same.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.storage import TMA_ROWS, Columns, tiled, tma_rows, window


def is_split(length: int) -> bool:
    """Whether an array of so many positions is copied 8 rows at a time."""
    return length != tma_rows(length)


def _rows_of_piece(rows: int, columns: Columns) -> int:
    """How many rows of a tile that is split are copied at a time: all if they lie in a row."""
    return rows if columns.smem == columns.tile else TMA_ROWS


def num_copies(length: int, rows: int, columns: Columns, part: int | None = None) -> int:
    """Of a tile of so many rows: its barrier is arrived at so often. part: as in `copied`."""
    return rows // _rows_of_piece(part or rows, columns) if is_split(length) else 1


# Of a warpgroup.
NUM_WARPS = 4


class Tile(NamedTuple):
    """A tile in SMEM as it is copied: in `pieces`, or None where it is copied whole."""

    whole: Any
    pieces: Any

    @classmethod
    def of(cls, allocated: Any, length: int) -> "Tile":
        """The tiles of what `copied` has allocated for that length."""
        return cls(*allocated) if is_split(length) else cls(allocated, None)

    def part(self, *index: Any) -> "Tile":
        """The tile at an index of the axes in front."""
        return Tile(self.whole.at[index], None if self.pieces is None else self.pieces.at[index])

    def rows(self, nth: Any, rows: int) -> "Tile":
        """The nth part of a tile, of so many rows: it consists of whole pieces."""
        whole = self.whole.at[pl.ds(nth * rows, rows)]
        if self.pieces is None:
            return Tile(whole, None)
        count = rows // self.pieces.shape[2]
        return Tile(whole, self.pieces.at[pl.ds(nth * count, count)])


def split(smem: Any, of: Any, spec: Any) -> tuple[Any, Any]:
    """What a kernel has allocated, with whole tiles, and how those are copied that `of` names.

    smem, of: named tuples; k and v are as long as the keys, other tiles as the queries.
    """
    tiles = {}
    for name in of._fields:
        allocated = getattr(smem, name)
        length = spec.kv_len if name in ("k", "v") else spec.q_len
        tiles[name] = None if allocated is None else Tile.of(allocated, length)
    whole = {name: None if tile is None else tile.whole for name, tile in tiles.items()}
    return smem._replace(**whole), of(**tiles)


def copied(
    shape: tuple[int, ...], dtype: Any, columns: Columns, length: int, part: int | None = None
) -> Any:
    """SMEM for tiles [.., rows, columns] of an array of so many positions, see `Tile.of`.

    part: rows of the smallest `Tile.rows` that is copied on its own, if it is not the whole tile.
    """
    whole = tiled(shape, dtype, columns.tile)
    if not is_split(length):
        return whole
    *stages, rows, _ = shape
    some = _rows_of_piece(part or rows, columns)
    pieces = (*stages, rows // some, columns.smem // columns.tile, some, columns.tile)
    swizzle = plgpu.SwizzleTransform(columns.tile * jnp.dtype(dtype).itemsize)
    return plgpu.RefUnion(whole, plgpu.SMEM(pieces, dtype, transforms=(swizzle,)))


def shape_in_gmem(shape: tuple[int, ...], columns: Columns) -> tuple[int, ...]:
    """Of an array [B, T, H, D] that is copied."""
    if not is_split(shape[1]):
        return *shape[:3], columns.gmem
    tile = min(columns.tile, columns.gmem)
    return *shape[:3], columns.gmem // tile, tile


def in_gmem(x: Any, columns: Columns) -> Any:
    """[B, T, H, D] as it is copied: itself, unless an odd dimension needs zeros; see above."""
    width = columns.gmem - x.shape[3]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width))) if width else x
    return x.reshape(shape_in_gmem(x.shape, columns))


def out_of_gmem(x: Any, dim: int) -> Any:
    """[B, T, H, dim] of an array that was copied."""
    return x.reshape(*x.shape[:3], -1)[..., :dim]


def _piece(array: Any, batch: Any, start: Any, head: Any, pieces: Any, i: Any) -> tuple[Any, Any]:
    """The i-th piece of a window, in GMEM and in SMEM: [rows, tiles along D, columns of a tile]."""
    _, tiles, rows, columns = pieces.shape
    # Never a constant: Pallas refuses a slice that it can see is too wide.
    zero = batch * 0
    part = array.at[
        batch, pl.ds(start + i * rows, rows), head, pl.ds(zero, tiles), pl.ds(zero, columns)
    ]
    return part, pieces.at[i].transpose((1, 0, 2))


def load(array: Any, batch: Any, start: Any, head: Any, tile: Tile, ready: Any) -> None:
    """Starts the load of a tile, from position `start` on."""
    whole, pieces = tile
    if pieces is None:
        plgpu.copy_gmem_to_smem(window(array, batch, start, head, whole), whole, ready)
        return

    def load_piece(i, _=None):
        plgpu.copy_gmem_to_smem(*_piece(array, batch, start, head, pieces, i), ready)

    count = pieces.shape[0]
    if count == 1 or jax.typeof(array).manual_axis_type.varying:
        # Inside of shard_map with check_vma there is no map over warps.
        lax.fori_loop(jnp.int32(0), jnp.int32(count), load_piece, None)
        return

    # Each warp some of them: one after the other they would take longer than the products, 1.028 ms
    # for 0.847 at 4 x 4095 x 16 x 128, H100, JAX 0.11.2.
    @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
    def _():
        for first in range(0, count, NUM_WARPS):
            i = first + lax.axis_index("warp")
            if first + NUM_WARPS <= count:
                load_piece(i)
            else:
                pl.when(i < count)(partial(load_piece, i))


def store(tile: Tile, array: Any, batch: Any, start: Any, head: Any) -> None:
    """Starts the store of a tile, to position `start` on."""
    whole, pieces = tile
    if pieces is None:
        plgpu.copy_smem_to_gmem(whole, window(array, batch, start, head, whole))
        return

    def store_piece(i, _):
        part, piece = _piece(array, batch, start, head, pieces, i)
        plgpu.copy_smem_to_gmem(piece, part)

    lax.fori_loop(jnp.int32(0), jnp.int32(pieces.shape[0]), store_piece, None)
