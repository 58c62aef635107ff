"""Bias: an array that is added to the scores."""

import jax
import jax.numpy as jnp

from pallas_flash.scores.score_mod import ScoreMod
from pallas_flash.terms import operand, term


@term
class Bias(ScoreMod):
    """``s + array``.

    Args:
      array: floating point, broadcastable to [B, Hq, Tq, Tkv]; broadcast dimensions are never
        expanded, and its gradient comes in the same shape and dtype, added up in float32.
    """

    array: jax.Array = operand("batch", "heads", "q", "kv", dtype=jnp.floating)

    def apply(self, s, q_pos, kv_pos):
        return s + self.array.astype(s.dtype)

    @property
    def lipschitz(self):
        return 1.0

    @property
    def addend(self):
        # A subclass may do more.
        return self.array if type(self) is Bias else None
