"""How a kernel cuts the scores into tiles, and how the terms' arrays lie in memory for that."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper.leaves import Kind, Leaf, Terms, leaves_of, reads_matrices
from pallas_flash.backends.hopper.storage import TMA_SMEM_ALIGNMENT, round_up, tiled, tma_rows
from pallas_flash.spec import AttentionSpec
from pallas_flash.terms import KV, SCORE_AXES, Q, leaf_axes, spread_distances, sum_distances

# Bytes of a row of the widest and of the narrowest swizzle tile.
SWIZZLE_BYTES, NARROWEST_SWIZZLE = 128, 32


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
            width = round_up(tiling.num_columns, TMA_SMEM_ALIGNMENT // leaf.dtype.itemsize)
            return plgpu.SMEM((num_stages, width), leaf.dtype)
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
