"""PrefixLM: a prefix that everyone sees, and causal attention after it."""

import jax
import jax.numpy as jnp

from pallas_flash.masks.mask import BEFORE_ALL, Mask, Range, kind_of
from pallas_flash.terms import operand, term


@term
class PrefixLM(Mask):
    """Allowed where ``kv_pos <= q_pos`` or ``kv_pos < prefix_lengths[b]``.

    Args:
      prefix_lengths: [B] integer, how many of the first keys every query of the row sees.

    Source: T5 (Raffel et al. 2020, arXiv:1910.10683), section 3.2.1.
    """

    prefix_lengths: jax.Array = operand("batch", dtype=jnp.integer)

    def allowed(self, q_pos, kv_pos):
        return (kv_pos <= q_pos) | (kv_pos < self.prefix_lengths)

    def kv_range(self, q_pos):
        return Range(end=jnp.maximum(q_pos + 1, self.prefix_lengths))

    def q_range(self, kv_pos):
        return Range(first=jnp.where(kv_pos < self.prefix_lengths, BEFORE_ALL, kv_pos))

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        return kind_of(
            (kv_lo <= q_hi) | (kv_lo < self.prefix_lengths),
            (kv_hi <= q_lo) | (kv_hi < self.prefix_lengths),
        )
