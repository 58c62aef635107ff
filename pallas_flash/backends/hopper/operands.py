"""Arrays of masks, score mods and dropout in the kernels: how each reaches a tile of scores.

By the axes that it really spans, an array gives a tile of one batch row and head a number or a
vector along the tile's rows (read from GMEM by the warpgroups), or a vector along its columns or a
matrix (brought to SMEM by the producer). An array over distances is a matrix too: it is expanded
once to a band, one row for each row of a tile, each shifted by one; linear memory, and every tile
is a plain slice of it.

Rows are the queries in the forward and the keys in the backward, whose scores are transposed.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.storage import (
    L2_BYTES_PER_GROUP,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    read_scalar,
    round_up,
    tiled,
    tma_rows,
)
from pallas_flash.dropout import KeepBits
from pallas_flash.masks import Mask
from pallas_flash.scores.score_mod import AFTER, BEFORE, ScoreMod
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import (
    BATCH,
    DISTANCE,
    HEADS,
    KV,
    SCORE_AXES,
    Axes,
    Q,
    leaf_axes,
    spread_distances,
    sum_distances,
)

# Rows of a band, about.
BAND_ROWS = 128
# Bytes of a row of the widest and of the narrowest swizzle tile.
SWIZZLE_BYTES, NARROWEST_SWIZZLE = 128, 32


class Kind(enum.Enum):
    """What an array gives a tile of scores."""

    NUMBER = enum.auto()
    PER_ROW = enum.auto()
    PER_COLUMN = enum.auto()
    MATRIX = enum.auto()
    BAND = enum.auto()

    @property
    def is_matrix(self) -> bool:
        return self in (Kind.MATRIX, Kind.BAND)


class Leaf(NamedTuple):
    """What is static about one array of a term.

    batch, heads: its sizes along these axes, 1 where broadcast. dtype: in the kernel's memory.
    is_bool: whether its numbers stand for bools. is_float: whether it may have a gradient. of_mask:
    whether it is a mask's. near: of a band that only tiles near it read (`ScoreMod.near`), or None.
    """

    kind: Kind
    batch: int
    heads: int
    dtype: Any
    is_bool: bool
    is_float: bool
    of_mask: bool
    near: tuple[int, int] | None = None


class Terms(NamedTuple):
    """One thing for each term of a request: the term itself, or what its arrays became."""

    mask: Any
    score_mod: Any
    dropout: Any

    @classmethod
    def of(cls, owner: AttentionSpec | Operands) -> "Terms":
        return cls(owner.mask, owner.score_mod, owner.dropout)


def leaves_of(term: Any, rows: str) -> list[Leaf]:
    """The arrays of a term, in the order of ``jax.tree.leaves``."""
    pairs = zip(jax.tree.leaves(term), leaf_axes(term), strict=True)
    found = [_leaf(x, axes, rows)._replace(of_mask=isinstance(term, Mask)) for x, axes in pairs]
    near = near_of(term)
    if near is None:
        return found
    elsewhere = {*used(term, BEFORE), *used(term, AFTER)}
    return [
        leaf._replace(near=near) if leaf.kind is Kind.BAND and i not in elsewhere else leaf
        for i, leaf in enumerate(found)
    ]


def near_of(term: Any) -> tuple[int, int] | None:
    """`ScoreMod.near` of any term."""
    return term.near if isinstance(term, ScoreMod) else None


def used(term: Any, where: str) -> list[int]:
    """Which of a term's arrays it uses there, in the order of what it is there."""
    structure = jax.tree.structure(term)
    numbers = jax.tree.unflatten(structure, range(len(jax.tree.leaves(term))))
    return jax.tree.leaves(numbers.at(where) if isinstance(term, ScoreMod) else numbers)


def _leaf(x: Any, axes: Axes, rows: str) -> Leaf:
    sizes = dict(zip(axes, x.shape, strict=True))
    along = {axis for axis in (Q, KV, DISTANCE) if sizes.get(axis, 1) > 1}
    if DISTANCE in along:
        kind = Kind.BAND
    elif len(along) == 2:
        kind = Kind.MATRIX
    elif along:
        kind = Kind.PER_ROW if along == {rows} else Kind.PER_COLUMN
    else:
        kind = Kind.NUMBER
    is_bool = x.dtype == jnp.bool_
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if is_float:
        narrow = kind.is_matrix and x.dtype.itemsize <= 4
        dtype = x.dtype if narrow else jnp.dtype(jnp.float32)
    elif is_bool and kind.is_matrix:
        dtype = jnp.dtype(jnp.int8)
    elif jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        dtype = jnp.dtype(jnp.uint32)
    else:
        dtype = jnp.dtype(jnp.int32)
    shared = sizes.get(BATCH, 1), sizes.get(HEADS, 1)
    return Leaf(kind, *shared, dtype, is_bool, is_float, of_mask=False)


# ---------------------------------------------------------------------------------------------
# Outside of the kernel


def spelled_out(spec: AttentionSpec) -> AttentionSpec:
    """The spec as the kernels have it: with dropout's numbers for each query and key."""
    if not isinstance(spec.dropout, KeepBits):
        return spec
    make = functools.partial(KeepBits.spelled_out, q_len=spec.q_len, kv_len=spec.kv_len)
    numbers: Any = jax.eval_shape(make, spec.dropout)
    return dataclasses.replace(spec, dropout=numbers)


def with_numbers(operands: Operands) -> Operands:
    """The operands of a spec that is `spelled_out`."""
    if operands.dropout is None:
        return operands
    numbers: Any = operands.dropout.spelled_out(operands.q.shape[1], operands.k.shape[1])
    return dataclasses.replace(operands, dropout=numbers)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel cuts the scores into tiles.

    rows: the axis of the scores along a tile's rows, "q" or "kv". num_rows, num_columns: of a tile.
    """

    spec: AttentionSpec
    rows: str
    num_rows: int
    num_columns: int

    def _over_whole_tiles(self, axis: str) -> int:
        length = self.spec.q_len if axis == Q else self.spec.kv_len
        return round_up(length, self.num_rows if axis == self.rows else self.num_columns)

    def swizzle_tile(self, kind: Kind, dtype: Any) -> int:
        """Columns of a swizzle tile: bands begin at any multiple of a tile's sides."""
        whole = math.gcd(self.num_rows, self.num_columns) if kind is Kind.BAND else self.num_columns
        return math.gcd(SWIZZLE_BYTES // jnp.dtype(dtype).itemsize, whole)

    # Bands: ``band[r, j]`` is the number for ``j - r + lowest`` from row to column, where `lowest`
    # is the least that a tile's first column is ahead of its first row.

    def _band_ends(self, near: tuple[int, int] | None) -> tuple[int, int]:
        """The least and the most that the first column of a tile is ahead of its first row."""
        columns = KV if self.rows == Q else Q
        lowest = self.num_rows - self._over_whole_tiles(self.rows)
        highest = self._over_whole_tiles(columns) - self.num_columns
        if near is None:
            return lowest, highest
        # The first tiles that hold one number only: others beyond them hold the same.
        low, high = near if self.rows == Q else (-near[1], -near[0])
        step = math.gcd(self.num_rows, self.num_columns)
        low = (low - self.num_columns + 1) // step * step
        high = -(-(high + self.num_rows - 1) // step) * step
        lowest = min(max(lowest, low), highest)
        return lowest, max(min(highest, high), lowest)

    def band_length(self, near: tuple[int, int] | None) -> int:
        lowest, highest = self._band_ends(near)
        return highest - lowest + self.num_columns

    def band_start(self, near: tuple[int, int] | None, row_start: Any, column_start: Any) -> Any:
        """The column of a band at which a tile's part of it begins."""
        lowest, highest = self._band_ends(near)
        ahead = column_start - row_start
        if near is not None:
            ahead = jnp.clip(ahead, jnp.int32(lowest), jnp.int32(highest))
        return ahead - lowest

    def _on_band(self, near: tuple[int, int] | None, numbers: jax.Array) -> jax.Array:
        """The numbers [b, h, distances] that a band holds, from row to column."""
        lowest, highest = self._band_ends(near)
        first, last = lowest - self.num_rows + 1, highest + self.num_columns - 1
        if self.rows == KV:
            first, last = -last, -first
        start, stop = (x + self.spec.q_len - 1 for x in (first, last + 1))
        # Beyond the ends of the array are rows or columns that do not count, or one number.
        begin = min(max(start, 0), numbers.shape[-1] - 1)
        end = max(min(stop, numbers.shape[-1]), begin + 1)
        left = min(max(begin - start, 0), stop - start - (end - begin))
        pad = left, stop - start - (end - begin) - left
        found = jnp.pad(numbers[..., begin:end], ((0, 0), (0, 0), pad), mode="edge")
        return found[..., ::-1] if self.rows == KV else found

    def band(self, near: tuple[int, int] | None, numbers: jax.Array) -> jax.Array:
        """[b, h, distances] to [b, h, num_rows, band_length]."""
        numbers = self._on_band(near, numbers)
        return spread_distances(numbers, self.num_rows, self.band_length(near))

    def distances(self, near: tuple[int, int] | None, band: jax.Array) -> jax.Array:
        """The transpose of `band`: sums along its diagonals."""
        count = self.spec.q_len + self.spec.kv_len - 1
        numbers = jnp.zeros((*band.shape[:2], count), band.dtype)
        return jax.vjp(functools.partial(self._on_band, near), numbers)[1](sum_distances(band))[0]

    def in_gmem(self, term: Any) -> tuple[jax.Array, ...]:
        """The arrays of a term as the kernel reads them.

        Numbers [b, h]; vectors [b, h, n] over whole tiles; matrices [b, h, rows, columns], with
        zeros at their ends as far as TMA needs them; bands [b, h, num_rows, band_length].
        """
        found = []
        leaves = leaves_of(term, self.rows)
        for x, axes, leaf in zip(jax.tree.leaves(term), leaf_axes(term), leaves, strict=True):
            x = x.astype(leaf.dtype)
            sizes = dict(zip(axes, x.shape, strict=True))
            if leaf.kind is Kind.BAND:
                found.append(self.band(leaf.near, x.reshape(leaf.batch, leaf.heads, -1)))
                continue
            x = x.reshape([sizes.get(axis, 1) for axis in SCORE_AXES])
            x = x.swapaxes(2, 3) if self.rows == KV else x
            found.append(self._padded(x, leaf))
        return tuple(found)

    def _padded(self, x: jax.Array, leaf: Leaf) -> jax.Array:
        """What a leaf's kind keeps of [b, h, rows, columns], over whole tiles."""
        rows, columns = x.shape[2:]
        if leaf.kind is Kind.NUMBER:
            return x[..., 0, 0]
        if leaf.kind is Kind.PER_ROW:
            return _ending_in_zeros(x[..., 0], round_up(rows, self.num_rows))
        if leaf.kind is Kind.PER_COLUMN:
            return _ending_in_zeros(x[..., 0, :], round_up(columns, self.num_columns))
        width = round_up(columns, self.swizzle_tile(leaf.kind, leaf.dtype))
        return _ending_in_zeros(x, tma_rows(rows), width)


def _ending_in_zeros(x: jax.Array, *sizes: int) -> jax.Array:
    """`x` with its last dimensions padded to `sizes`.

    What lies beyond the ends is masked, or belongs to rows that are never stored.
    """
    pad = [(0, 0)] * (x.ndim - len(sizes))
    pad += [(0, size - n) for size, n in zip(sizes, x.shape[-len(sizes) :], strict=True)]
    return jnp.pad(x, pad) if any(n for _, n in pad) else x


def in_smem(tiling: Tiling, num_stages: int) -> Terms:
    """Scratch types of what the producer brings of each term, None for its other arrays."""

    def scratch(leaf: Leaf) -> Any:
        if not is_brought(tiling, leaf):
            return None
        if leaf.kind is Kind.PER_COLUMN:
            return plgpu.SMEM((num_stages, tiling.num_columns), leaf.dtype)
        # Near tiles are few and read it early.
        stages = num_stages if leaf.near is None else 1
        shape = (stages, tiling.num_rows, tiling.num_columns)
        return tiled(shape, leaf.dtype, tiling.swizzle_tile(leaf.kind, leaf.dtype))

    terms = Terms.of(tiling.spec)
    return Terms(*(tuple(map(scratch, leaves_of(term, tiling.rows))) for term in terms))


def fits_swizzle(tiling: Tiling) -> bool:
    """Whether the rows of all matrices' tiles are wide enough to be swizzled."""
    return all(
        tiling.swizzle_tile(leaf.kind, leaf.dtype) * leaf.dtype.itemsize >= NARROWEST_SWIZZLE
        for term in Terms.of(tiling.spec)
        for leaf in leaves_of(term, tiling.rows)
        if leaf.kind.is_matrix
    )


def reads_matrices(spec: AttentionSpec) -> bool:
    """Whether every tile reads an array over queries and keys."""
    return any(
        leaf.kind.is_matrix and leaf.near is None
        for term in Terms.of(spec)
        for leaf in leaves_of(term, Q)
    )


def rows_share_matrices(spec: AttentionSpec) -> bool:
    """Whether the rows of a batch read arrays over queries and keys that outgrow the L2 cache.

    Then all rows should come to a head before the next one does.
    """
    # As gradients: in float32, and with a band's row for each row of a tile.
    numbers = {
        Kind.MATRIX: spec.q_len * spec.kv_len,
        Kind.BAND: (spec.q_len + spec.kv_len) * BAND_ROWS,
    }
    shared = sum(
        4 * leaf.heads * numbers[leaf.kind]
        for term in Terms.of(spec)
        for leaf in leaves_of(term, Q)
        if leaf.kind.is_matrix and leaf.near is None and leaf.batch < spec.batch
    )
    return shared > L2_BYTES_PER_GROUP


def is_brought(tiling: Tiling, leaf: Leaf) -> bool:
    """Whether the producer brings a part of an array to SMEM, for every tile or for near ones.

    SMEM that was read by ordinary loads wants a fence before it is free again. The backward has one
    anyway, the forward only for matrices, and a mask is hardly ever read. Other vectors along its
    columns come from GMEM: 0.537 ms for 0.576 with dropout, 4 x 4096 x 16 x 128 causal, but 1.71
    for 1.60 beside a bias, 768 x 768 x 4 x 64, H100, JAX 0.11.2.
    """
    if leaf.kind is not Kind.PER_COLUMN:
        return leaf.kind.is_matrix
    return leaf.of_mask or tiling.rows == KV or reads_matrices(tiling.spec)


def num_brought(tiling: Tiling, near: bool = False) -> int:
    """How many arrays of a request the producer brings for every tile, or for near tiles alone."""
    leaves = [leaf for term in Terms.of(tiling.spec) for leaf in leaves_of(term, tiling.rows)]
    return sum(is_brought(tiling, leaf) and (leaf.near is not None) == near for leaf in leaves)


# ---------------------------------------------------------------------------------------------
# In the kernel


class Place(NamedTuple):
    """Where a part of a tile lies: its row of the batch and query head, and its first position."""

    batch: Any
    q_head: Any
    row_start: Any
    column_start: Any


def place_in(leaf: Leaf, spec: AttentionSpec, place: Place) -> tuple[Any, Any]:
    """The first two indices of a leaf's array in GMEM."""
    batch = lax.div(place.batch, jnp.int32(spec.batch // leaf.batch))
    zero = place.batch * 0
    return batch if leaf.batch > 1 else zero, place.q_head if leaf.heads > 1 else zero


def bring(tiling: Tiling, gmem: Terms, smem: Terms, stage: Any, place: Place, ready: Any) -> None:
    """The producer: starts the loads of what belongs to a tile."""
    for term, arrays, tiles in zip(Terms.of(tiling.spec), gmem, smem, strict=True):
        for leaf, array, tile in zip(leaves_of(term, tiling.rows), arrays, tiles, strict=True):
            if not is_brought(tiling, leaf) or leaf.near is not None:
                continue
            if leaf.kind is Kind.PER_COLUMN:
                columns = pl.ds(place.column_start, tiling.num_columns)
                part = array.at[*place_in(leaf, tiling.spec, place), columns]
            else:
                part = array.at[matrix_part(tiling, leaf, place)]
            plgpu.copy_gmem_to_smem(part, tile.at[stage], ready)


def bring_near(
    tiling: Tiling, gmem: Terms, smem: Terms, place: Place, own: tuple[int, int], ready: Any
) -> None:
    """The producer: starts the loads of what only near tiles read; own: first row and count."""
    for term, arrays, tiles in zip(Terms.of(tiling.spec), gmem, smem, strict=True):
        for leaf, array, tile in zip(leaves_of(term, tiling.rows), arrays, tiles, strict=True):
            if leaf.near is not None:
                row, column, _, columns = matrix_part(tiling, leaf, place)
                part = array.at[row, column, pl.ds(place.batch * 0 + own[0], own[1]), columns]
                plgpu.copy_gmem_to_smem(part, tile.at[0, pl.ds(*own)], ready)


def matrix_part(tiling: Tiling, leaf: Leaf, place: Place) -> tuple[Any, ...]:
    """Which part of a matrix or band in GMEM belongs to a tile.

    Or of the gradient of a vector along the columns, with a row for each row of a tile.
    """
    rows, columns = place.row_start, place.column_start
    if leaf.kind is Kind.PER_COLUMN:
        rows = place.batch * 0
    if leaf.kind is Kind.BAND:
        rows, columns = place.batch * 0, tiling.band_start(leaf.near, rows, columns)
    at = place_in(leaf, tiling.spec, place)
    return *at, pl.ds(rows, tiling.num_rows), pl.ds(columns, tiling.num_columns)


def read_rows(tiling: Tiling, gmem: Terms, place: Place, count: int) -> Terms:
    """Of each term's arrays the numbers, and the vectors along `count` rows; None for others.

    None for the mask: it may hardly ever count, see `read_mask_rows`.
    """
    found = [
        _of_rows(tiling, term, arrays, place, count)
        for term, arrays in zip(Terms.of(tiling.spec), gmem, strict=True)
    ]
    return Terms(*found)._replace(mask=None)


def read_mask_rows(tiling: Tiling, gmem: Terms, place: Place, count: int) -> list[Any]:
    """The same of the mask: in registers all the time it would cost tiles without mask, too."""
    return _of_rows(tiling, tiling.spec.mask, gmem.mask, place, count)


def rows_differ_by_head(spec: AttentionSpec, rows: str) -> bool:
    """Whether `read_rows` gives query heads of one kv head different values."""
    return spec.group > 1 and any(
        leaf.heads > 1 and leaf.kind in (Kind.NUMBER, Kind.PER_ROW)
        for term in Terms.of(spec)
        for leaf in leaves_of(term, rows)
    )


def read_columns(
    tiling: Tiling, term: Any, arrays: Sequence[Any], place: Place, where: str
) -> dict[int, Any]:
    """Of the arrays that a term uses there the vectors along columns that nobody brings."""
    values = {}
    leaves = leaves_of(term, tiling.rows)
    for i in used(term, where):
        if leaves[i].kind is Kind.PER_COLUMN and not is_brought(tiling, leaves[i]):
            at = place_in(leaves[i], tiling.spec, place)
            part = arrays[i].at[*at, pl.ds(place.column_start, tiling.num_columns)]
            values[i] = plgpu.load(part, layout=PER_COLUMN, optimized=False)
    return values


def _of_rows(
    tiling: Tiling, term: Any, arrays: Sequence[Any], place: Place, count: int
) -> list[Any]:
    values: list[Any] = []
    for leaf, array in zip(leaves_of(term, tiling.rows), arrays, strict=True):
        at = place_in(leaf, tiling.spec, place)
        if leaf.kind is Kind.NUMBER:
            values.append(read_scalar(array, *at))
        elif leaf.kind is Kind.PER_ROW:
            part = array.at[*at, pl.ds(place.row_start, count)]
            values.append(plgpu.load(part, layout=PER_ROW, optimized=False))
        else:
            values.append(None)
    return values


class Brought(NamedTuple):
    """Where in SMEM lies what the producer has brought for a part of a tile.

    tiles: of a term, with a stage in front; own: the part's rows.
    """

    tiles: Sequence[Any]
    stage: Any
    own: Any

    def load(self, index: int, leaf: Leaf) -> Any:
        tile, stage = self.tiles[index], self.stage if leaf.near is None else 0
        if leaf.kind is Kind.PER_COLUMN:
            return plgpu.load(tile.at[stage], layout=PER_COLUMN, optimized=False)
        return plgpu.load(tile.at[stage, self.own], layout=MATRIX, optimized=False)


def aligned(
    tiling: Tiling,
    term: Any,
    values: Sequence[Any],
    brought: Brought,
    shape: tuple[int, int],
    where: str,
) -> Any:
    """What the term is there, with every array as a matrix, or a number that is no float.

    values: of the arrays that the producer does not bring.
    """
    arrays: list[Any] = []
    here = used(term, where)
    for i, leaf in enumerate(leaves_of(term, tiling.rows)):
        if i not in here:
            arrays.append(None)
            continue
        x = brought.load(i, leaf) if is_brought(tiling, leaf) else values[i]
        if leaf.kind in (Kind.PER_ROW, Kind.PER_COLUMN):
            x = lax.broadcast_in_dim(x, shape, [0 if leaf.kind is Kind.PER_ROW else 1])
        elif leaf.kind is Kind.NUMBER and leaf.is_float:
            # It gets its gradient from every score.
            x = lax.broadcast_in_dim(x, shape, [])
        if leaf.is_float:
            x = x.astype(jnp.float32)
        arrays.append(x.astype(jnp.int32) != 0 if leaf.is_bool else x)
    whole = jax.tree.unflatten(jax.tree.structure(term), arrays)
    return whole.at(where) if isinstance(term, ScoreMod) else whole
