"""A part of a tile of scores in registers, and what the terms of a request say about it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper.elementwise import missing_operations
from pallas_flash.backends.hopper.leaves import Kind, Leaf, Terms, leaves_of, used
from pallas_flash.backends.hopper.storage import MATRIX
from pallas_flash.backends.hopper.tile_arrays import (
    Brought,
    Place,
    aligned,
    read_columns,
    read_mask_rows,
)
from pallas_flash.backends.hopper.tiling import Tiling, is_brought
from pallas_flash.scores.score_mod import NEAR, ScoreMod
from pallas_flash.spec import AttentionSpec
from pallas_flash.terms import Q, floating


class Zone(NamedTuple):
    """What holds for a whole tile: whether the mask counts, and where it lies for the score mod.

    where: `NEAR` may be anywhere.
    """

    is_masked: bool
    where: str = NEAR


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a tile that one warpgroup works on.

    shape: rows and columns. values: of the terms' arrays, what was read of them without SMEM.
    is_wide: of `masking.read_wide`.
    """

    tiling: Tiling
    place: Place
    shape: tuple[int, int]
    zone: Zone
    values: Terms
    is_wide: Any

    @classmethod
    def of(
        cls,
        tiling: Tiling,
        gmem: Terms,
        of_rows: Terms,
        place: Place,
        shape: tuple[int, int],
        zone: Zone,
        is_wide: Any,
    ) -> "Part":
        """Reads what the producer does not bring; early, it comes from memory.

        of_rows: from `read_rows`.
        """
        found: list[list[Any]] = []
        if zone.is_masked and of_rows.mask is None:
            of_rows = of_rows._replace(mask=read_mask_rows(tiling, gmem, place, shape[0]))
        for term, arrays, values in zip(_terms(tiling, zone), gmem, of_rows, strict=True):
            if term is None:
                found.append([])
                continue
            columns = read_columns(tiling, term, arrays, place, zone.where)
            found.append([columns.get(i, value) for i, value in enumerate(values)])
        return cls(tiling, place, shape, zone, Terms(*found), is_wide)

    @property
    def is_masked(self) -> bool:
        return self.zone.is_masked

    def terms(self, tiles: Terms, stage: Any, own: Any) -> Terms:
        """Mask, score mod and dropout with matrices for their arrays.

        tiles: what the producer brings, in SMEM; own: which of a tile's rows these are.
        """
        shape, where = self.shape, self.zone.where
        of_terms = zip(_terms(self.tiling, self.zone), self.values, tiles, strict=True)
        return Terms(
            *(
                None
                if term is None
                else aligned(self.tiling, term, values, Brought(parts, stage, own), shape, where)
                for term, values, parts in of_terms
            )
        )

    @property
    def reads_smem(self) -> bool:
        """Whether `terms` reads what the producer has brought."""
        return any(is_brought(self.tiling, leaf) for leaf in self._leaves())

    @property
    def is_near(self) -> bool:
        """Whether `terms` reads what the producer brings for near tiles alone."""
        return any(leaf.near is not None for leaf in self._leaves())

    def _leaves(self) -> list[Leaf]:
        """The arrays that are used here."""
        return [
            leaf
            for term in _terms(self.tiling, self.zone)
            for i, leaf in enumerate(leaves_of(term, self.tiling.rows))
            if i in used(term, self.zone.where)
        ]

    def positions(self) -> tuple[Any, Any]:
        """Of queries and keys, [rows, columns] int32."""
        starts = self.place.row_start, self.place.column_start
        at = [
            plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=MATRIX) + start
            for axis, start in enumerate(starts)
        ]
        return (at[0], at[1]) if self.tiling.rows == Q else (at[1], at[0])

    def addend(self) -> Any:
        """The number that the score mod adds to all scores here, None if it does anything else."""
        mod, where = self.tiling.spec.score_mod, self.zone.where
        leaves = leaves_of(mod, self.tiling.rows)
        if mod is None or any(leaves[i].kind is not Kind.NUMBER for i in used(mod, where)):
            return None
        numbers = [None if x is None else x.astype(jnp.float32) for x in self.values.score_mod]
        return jax.tree.unflatten(jax.tree.structure(mod), numbers).at(where).addend

    def mask_of_rows(self) -> Any:
        """The mask with numbers and vectors along the rows in int32, None for its other arrays."""
        arrays = [None if x is None else x.astype(jnp.int32) for x in self.values.mask]
        return jax.tree.unflatten(jax.tree.structure(self.tiling.spec.mask), arrays)


def is_kept(terms: Terms, shape: tuple[int, int]) -> Any:
    """Which probabilities dropout keeps, or None without it."""
    # A number where there is one query and one key.
    return None if terms.dropout is None else jnp.broadcast_to(terms.dropout.keep(), shape)


def keep(terms: Terms, p: Any) -> Any:
    """Probabilities with zeros where dropout drops them, not rescaled."""
    return p if terms.dropout is None else jnp.where(is_kept(terms, p.shape), p, 0.0)


def dropout_factor(spec: AttentionSpec) -> float:
    """What probabilities that `Part.keep` has kept are multiplied with."""
    return 1.0 if spec.dropout is None else 1.0 / (1.0 - spec.dropout.rate)


def _terms(tiling: Tiling, zone: Zone) -> Terms:
    terms = Terms.of(tiling.spec)
    return terms if zone.is_masked else terms._replace(mask=None)


def with_weights(
    mod: ScoreMod, s: Any, q_pos: Any, kv_pos: Any, probabilities: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """P of scaled scores s, and what their gradients are multiples of.

    Everything is elementwise. So with ``x = dP - delta``, and the gradient ``P * x`` of the logits,
    that of the scores is ``w * x``, where w is the vjp of the mod at P: known before dP is.

    probabilities: of logits.
    """
    logits, vjp = jax.vjp(lambda s: mod.apply(s, q_pos, kv_pos), s)
    p = probabilities(logits)
    return p, *vjp(p)


def gradients_of_arrays(mod: ScoreMod, s: Any, q_pos: Any, kv_pos: Any, d_logits: Any) -> list[Any]:
    """What every score adds to the gradients of the mod's float arrays, given as matrices."""
    arrays, rebuild = floating(mod)
    return jax.vjp(lambda arrays: rebuild(arrays).apply(s, q_pos, kv_pos), arrays)[1](d_logits)[0]


def missing_in_terms(spec: AttentionSpec) -> list[str]:
    """The names of the operations of mask and score mod that the kernels do not have."""
    shape = (8, 8)

    def matrix(x: Any) -> Any:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(shape, jnp.float32 if is_float else x.dtype)

    mask, mod = jax.tree.map(matrix, (spec.mask, spec.score_mod))
    at = [jax.ShapeDtypeStruct(shape, jnp.int32)] * 2
    missing = []
    if mask is not None:
        missing += missing_operations(lambda mask, *at: mask.allowed(*at), mask, *at)
    if mod is not None:
        s = jax.ShapeDtypeStruct(shape, jnp.float32)
        missing += missing_operations(partial(with_weights, probabilities=jnp.exp2), mod, s, *at)
        missing += missing_operations(gradients_of_arrays, mod, s, *at, s)
    return sorted(set(missing))
