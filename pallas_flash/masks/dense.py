"""DenseMask: a boolean array says it all."""

import jax
import jax.numpy as jnp

from pallas_flash.masks.mask import Mask
from pallas_flash.terms import operand, term


@term
class DenseMask(Mask):
    """Allowed where `array` is True.

    Args:
      array: bool, broadcastable to [B, Hq, Tq, Tkv]; broadcast dimensions are never expanded.
    """

    array: jax.Array = operand("batch", "heads", "q", "kv", dtype=jnp.bool_)

    def allowed(self, q_pos, kv_pos):
        return self.array
