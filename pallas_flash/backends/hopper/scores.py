"""A part of a tile of scores in registers, and what the terms of a request say about it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.elementwise import missing_operations, written_out
from pallas_flash.backends.hopper.operands import Place, Terms, Tiling, aligned, read
from pallas_flash.backends.hopper.storage import MATRIX, PER_COLUMN, PER_ROW
from pallas_flash.scores import ScoreMod
from pallas_flash.spec import AttentionSpec
from pallas_flash.terms import KV, Q, floating


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a tile that one warpgroup works on.

    shape: rows and columns. is_masked: whether the mask counts here. values: of the terms' arrays,
    what was read of them without SMEM.
    """

    tiling: Tiling
    place: Place
    shape: tuple[int, int]
    is_masked: bool
    values: Terms

    @classmethod
    def of(
        cls, tiling: Tiling, gmem: Terms, place: Place, shape: tuple[int, int], is_masked: bool
    ) -> "Part":
        """Reads the numbers and vectors; early, they come from memory."""
        found = [
            () if term is None else read(tiling, term, arrays, place, shape)
            for term, arrays in zip(_terms(tiling, is_masked), gmem, strict=True)
        ]
        return cls(tiling, place, shape, is_masked, Terms(*found))

    def terms(self, tiles: Terms) -> Terms:
        """Mask and score mod with matrices for their arrays.

        tiles: where in SMEM those of the arrays lie that are matrices themselves.
        """
        terms = _terms(self.tiling, self.is_masked)
        mask, score_mod = (
            None if term is None else aligned(self.tiling, term, values, parts, self.shape)
            for term, values, parts in list(zip(terms, self.values, tiles, strict=True))[:2]
        )
        return Terms(mask, score_mod, None)

    def positions(self) -> tuple[Any, Any]:
        """Of queries and keys, [rows, columns] int32."""
        starts = self.place.row_start, self.place.column_start
        at = [
            plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=MATRIX) + start
            for axis, start in enumerate(starts)
        ]
        return (at[0], at[1]) if self.tiling.rows == Q else (at[1], at[0])

    def allowed(self, terms: Terms) -> Any:
        """Where the mask allows, or None without one: [rows, columns] bool."""
        if terms.mask is None:
            return None
        return written_out(lambda mask: mask.allowed(*self.positions()))(terms.mask)

    def keep(self, p: Any) -> Any:
        """Probabilities, or their gradients, with zeros where dropout drops them, not rescaled."""
        dropout = self.tiling.spec.dropout
        if dropout is None:
            return p
        # It holds numbers only, no floats.
        dropout = jax.tree.unflatten(jax.tree.structure(dropout), self.values.dropout)
        numbers = [dropout.of_queries, dropout.of_keys]
        if self.tiling.rows == KV:
            numbers.reverse()
        starts = self.place.row_start, self.place.column_start
        wide = []
        for axis, layout in enumerate((PER_ROW, PER_COLUMN)):
            at = plgpu.broadcasted_iota(jnp.int32, (self.shape[axis],), 0, layout=layout)
            found = numbers[axis](at + starts[axis])
            wide.append(lax.broadcast_in_dim(found, self.shape, [axis]))
        return jnp.where(dropout.meet(*wide), p, 0.0)


def dropout_factor(spec: AttentionSpec) -> float:
    """What probabilities that `Part.keep` has kept are multiplied with."""
    return 1.0 if spec.dropout is None else spec.dropout.factor


def _terms(tiling: Tiling, is_masked: bool) -> Terms:
    terms = Terms.of(tiling.spec)
    return terms if is_masked else terms._replace(mask=None)


def with_weights(
    mod: ScoreMod, s: Any, q_pos: Any, kv_pos: Any, probabilities: Callable[[Any], Any]
) -> tuple[Any, Any, list[Any]]:
    """P of scaled scores s, and what their gradients are multiples of.

    Everything is elementwise. So with ``x = dP - delta``, and the gradient ``P * x`` of the logits,
    that of the scores is ``w * x`` and that of each float array of the mod ``w_i * x``, where w and
    the w_i are the vjp of the mod at P. They are known before dP is.

    probabilities: of logits.
    """
    arrays, rebuild = floating(mod)

    def logits(s: Any, arrays: list[Any]) -> Any:
        return rebuild(arrays).apply(s, q_pos, kv_pos)

    found, vjp = jax.vjp(logits, s, arrays)
    p = probabilities(found)
    return p, *vjp(p)


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
    return sorted(set(missing))
