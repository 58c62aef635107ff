"""DistanceBias: a number for every distance between query and key, added to the scores."""

import jax
import jax.numpy as jnp

from pallas_flash.scores.bias import Bias
from pallas_flash.scores.score_mod import AFTER, NEAR, ScoreMod
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

    @property
    def lipschitz(self):
        return 1.0


@term
class FlatEndedBias(ScoreMod):
    """A `DistanceBias` whose numbers are all the same from two distances on.

    A backend may read and give the gradients of these to `before` and `after`: who makes the arrays
    of something smaller must add both up.

    Args:
      values: of `DistanceBias`.
      before, after: floating point, broadcastable to [B, Hq]; the numbers for the distances from
        ``near[0]`` down and from ``near[1]`` up.
      near: the two distances.
    """

    values: jax.Array = operand("batch", "heads", "distance", dtype=jnp.floating)
    before: jax.Array = operand("batch", "heads", dtype=jnp.floating)
    after: jax.Array = operand("batch", "heads", dtype=jnp.floating)
    near: tuple[int, int] = (0, 0)

    def apply(self, s, q_pos, kv_pos):
        return self.at(NEAR).apply(s, q_pos, kv_pos)

    @property
    def lipschitz(self):
        return 1.0

    def at(self, where):
        if where == NEAR:
            return DistanceBias(self.values)
        return Bias(self.after if where == AFTER else self.before)
