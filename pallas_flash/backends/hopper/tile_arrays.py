"""What a tile of scores gets of the terms' arrays: brought by the producer, or read from GMEM."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.leaves import Kind, Leaf, Terms, leaves_of, used
from pallas_flash.backends.hopper.storage import MATRIX, PER_COLUMN, PER_ROW, read_scalar
from pallas_flash.backends.hopper.tiling import Tiling, is_brought
from pallas_flash.scores.score_mod import ScoreMod
from pallas_flash.spec import AttentionSpec


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
                target = tile.at[stage, pl.ds(0, tiling.num_columns)]
            else:
                part = array.at[matrix_part(tiling, leaf, place)]
                target = tile.at[stage]
            plgpu.copy_gmem_to_smem(part, target, ready)


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

    def load(self, index: int, leaf: Leaf, num_columns: int) -> Any:
        tile, stage = self.tiles[index], self.stage if leaf.near is None else 0
        if leaf.kind is Kind.PER_COLUMN:
            part = tile.at[stage, pl.ds(0, num_columns)]
            return plgpu.load(part, layout=PER_COLUMN, optimized=False)
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
        x = brought.load(i, leaf, shape[1]) if is_brought(tiling, leaf) else values[i]
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
