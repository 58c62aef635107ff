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

    @property
    def needs_smem(self) -> bool:
        """Whether the producer brings a part of it for every tile."""
        return self.is_matrix or self is Kind.PER_COLUMN


class Leaf(NamedTuple):
    """What is static about one array of a term.

    batch, heads: its sizes along these axes, 1 where broadcast. dtype: in the kernel's memory.
    is_bool: whether its numbers stand for bools. is_float: whether it may have a gradient.
    """

    kind: Kind
    batch: int
    heads: int
    dtype: Any
    is_bool: bool
    is_float: bool


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
    return [_leaf(x, axes, rows) for x, axes in pairs]


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
    return Leaf(kind, sizes.get(BATCH, 1), sizes.get(HEADS, 1), dtype, is_bool, is_float)


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

    # Bands. With the numbers over distances padded so that both lengths are whole tiles, and turned
    # round if rows are keys, ``band[r, j] = numbers[j - r + num_rows - 1]``.

    @property
    def band_length(self) -> int:
        return self._over_whole_tiles(Q) + self._over_whole_tiles(KV) - self.num_rows

    def band_start(self, row_start: Any, column_start: Any) -> Any:
        """The column of a band at which a tile's part of it begins."""
        return column_start - row_start + (self._over_whole_tiles(self.rows) - self.num_rows)

    def band(self, numbers: jax.Array) -> jax.Array:
        """[b, h, distances] to [b, h, num_rows, band_length]."""
        pad = [self._over_whole_tiles(Q) - self.spec.q_len]
        pad += [self._over_whole_tiles(KV) - self.spec.kv_len]
        numbers = jnp.pad(numbers, ((0, 0), (0, 0), pad))
        if self.rows == KV:
            numbers = numbers[..., ::-1]
        return spread_distances(numbers, self.num_rows, self.band_length)

    def distances(self, band: jax.Array) -> jax.Array:
        """The transpose of `band`: sums along its diagonals."""
        numbers = sum_distances(band)
        if self.rows == KV:
            numbers = numbers[..., ::-1]
        first = self._over_whole_tiles(Q) - self.spec.q_len
        return numbers[..., first : first + self.spec.q_len + self.spec.kv_len - 1]

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
                found.append(self.band(x.reshape(leaf.batch, leaf.heads, -1)))
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
        if leaf.kind is Kind.PER_COLUMN:
            return plgpu.SMEM((num_stages, tiling.num_columns), leaf.dtype)
        if not leaf.kind.is_matrix:
            return None
        shape = (num_stages, tiling.num_rows, tiling.num_columns)
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
        if leaf.kind.is_matrix and leaf.batch < spec.batch
    )
    return shared > L2_BYTES_PER_GROUP


def num_brought(spec: AttentionSpec, rows: str) -> int:
    """How many arrays of a request the producer brings."""
    return sum(leaf.kind.needs_smem for term in Terms.of(spec) for leaf in leaves_of(term, rows))


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
            if not leaf.kind.needs_smem:
                continue
            if leaf.kind is Kind.PER_COLUMN:
                columns = pl.ds(place.column_start, tiling.num_columns)
                part = array.at[*place_in(leaf, tiling.spec, place), columns]
            else:
                part = array.at[matrix_part(tiling, leaf, place)]
            plgpu.copy_gmem_to_smem(part, tile.at[stage], ready)


def matrix_part(tiling: Tiling, leaf: Leaf, place: Place) -> tuple[Any, ...]:
    """Which part of a matrix or band in GMEM belongs to a tile.

    Or of the gradient of a vector along the columns, with a row for each row of a tile.
    """
    rows, columns = place.row_start, place.column_start
    if leaf.kind is Kind.PER_COLUMN:
        rows = place.batch * 0
    if leaf.kind is Kind.BAND:
        rows, columns = place.batch * 0, tiling.band_start(rows, columns)
    at = place_in(leaf, tiling.spec, place)
    return *at, pl.ds(rows, tiling.num_rows), pl.ds(columns, tiling.num_columns)


def read(
    tiling: Tiling, term: Any, arrays: Sequence[Any], place: Place, shape: tuple[int, int]
) -> list[Any]:
    """Numbers, and vectors along rows, of a part of a tile; None for what the producer brings."""
    values: list[Any] = []
    for leaf, array in zip(leaves_of(term, tiling.rows), arrays, strict=True):
        at = place_in(leaf, tiling.spec, place)
        if leaf.kind is Kind.NUMBER:
            values.append(read_scalar(array, *at))
        elif leaf.kind is Kind.PER_ROW:
            part = array.at[*at, pl.ds(place.row_start, shape[0])]
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

    def load(self, index: int, kind: Kind) -> Any:
        tile = self.tiles[index]
        if kind is Kind.PER_COLUMN:
            return plgpu.load(tile.at[self.stage], layout=PER_COLUMN, optimized=False)
        return plgpu.load(tile.at[self.stage, self.own], layout=MATRIX, optimized=False)


def aligned(
    tiling: Tiling, term: Any, values: Sequence[Any], brought: Brought, shape: tuple[int, int]
) -> Any:
    """The term with every array as a matrix, or a number that is no float.

    values: from `read`.
    """
    arrays = []
    for i, leaf in enumerate(leaves_of(term, tiling.rows)):
        x = brought.load(i, leaf.kind) if leaf.kind.needs_smem else values[i]
        if leaf.kind in (Kind.PER_ROW, Kind.PER_COLUMN):
            x = lax.broadcast_in_dim(x, shape, [0 if leaf.kind is Kind.PER_ROW else 1])
        elif leaf.kind is Kind.NUMBER and leaf.is_float:
            # It gets its gradient from every score.
            x = lax.broadcast_in_dim(x, shape, [])
        if leaf.is_float:
            x = x.astype(jnp.float32)
        arrays.append(x.astype(jnp.int32) != 0 if leaf.is_bool else x)
    return jax.tree.unflatten(jax.tree.structure(term), arrays)
