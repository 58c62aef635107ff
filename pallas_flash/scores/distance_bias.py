"""DistanceBias: a number for every distance between query and key, added to the scores."""

import jax
import jax.numpy as jnp

from pallas_flash.scores.score_mod import ScoreMod
from pallas_flash.terms import operand, term


@term
class DistanceBias(ScoreMod):
    """``s + values[..., kv_pos - q_pos + Tq - 1]``.

    Args:
      values: floating point, broadcastable to [B, Hq, Tq + Tkv - 1], from the distance ``1 - Tq``
        to ``Tkv - 1``; gets its gradient. A tile reads a slice of it: linear memory.
    """

    values: jax.Array = operand("batch", "heads", "distance", dtype=jnp.floating)

    def apply(self, s, q_pos, kv_pos):
        return s + self.values.astype(s.dtype)
