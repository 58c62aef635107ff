"""Many new queries at once over a cache: dense attention with terms for where the rows stand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.masks.mask import Mask, kind_of
from pallas_flash.scores import ScoreMod
from pallas_flash.terms import BATCH, HEADS, leaf_axes, operand, subterm, term


def is_shiftable(*terms: Any) -> bool:
    """Whether no array of these terms spans positions: then they may be asked at others."""
    return all({*axes} <= {BATCH, HEADS} for x in terms for axes in leaf_axes(x))


@term
class NewTokens(Mask):
    """Query i and key j of row b stand at ``q_starts[b] + i`` and ``kv_starts[b] + j``; causal.

    Args:
      q_starts, kv_starts: [B] int32; a key at a negative position does not exist.
      counts: [B] int32, how many of the queries are real.
      mask: what else must allow, by position, or None.
      window: how many keys a query sees, or None for all.
    """

    q_starts: jax.Array = operand("batch", dtype=jnp.integer)
    kv_starts: jax.Array = operand("batch", dtype=jnp.integer)
    counts: jax.Array = operand("batch", dtype=jnp.integer)
    mask: Mask | None = subterm()
    window: int | None

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        q, kv = q_pos + self.q_starts, kv_pos + self.kv_starts
        ok = (kv <= q) & (kv >= 0) & (q_pos < self.counts)
        if self.window is not None:
            ok = ok & (kv > q - self.window)
        return ok if self.mask is None else ok & self.mask.allowed(q, kv)

    def block_kind(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> Any:
        first, last = q_lo + self.q_starts, q_hi + self.q_starts
        lo, hi = kv_lo + self.kv_starts, kv_hi + self.kv_starts
        some = (lo <= last) & (hi >= 0) & (q_lo < self.counts)
        every = (hi <= first) & (lo >= 0) & (q_hi < self.counts)
        if self.window is not None:
            some, every = some & (hi > first - self.window), every & (lo > last - self.window)
        kind = kind_of(some, some & every)
        if self.mask is None:
            return kind
        inner = self.mask.block_kind(first, last, lo, hi)
        return (jnp if isinstance(kind + inner, jax.Array) else np).minimum(kind, inner)


@term
class AtPositions(ScoreMod):
    """A score mod that is asked at positions in the sequence, as `NewTokens` has them."""

    q_starts: jax.Array = operand("batch", dtype=jnp.integer)
    kv_starts: jax.Array = operand("batch", dtype=jnp.integer)
    score_mod: ScoreMod = subterm()

    def apply(self, s: Any, q_pos: Any, kv_pos: Any) -> Any:
        return self.score_mod.apply(s, q_pos + self.q_starts, kv_pos + self.kv_starts)
