"""Lengths: rows of a batch that are shorter than the array that holds them."""

import jax
import jax.numpy as jnp

from pallas_flash.masks.mask import BEFORE_ALL, BEHIND_ALL, Mask, Range, kind_of
from pallas_flash.terms import operand, term


@term
class KvLengths(Mask):
    """Allowed where ``kv_pos < lengths[b]``; `lengths`: [B] int32, number of real keys."""

    lengths: jax.Array = operand("batch", dtype=jnp.integer)

    def allowed(self, q_pos, kv_pos):
        return kv_pos < self.lengths

    def kv_range(self, q_pos):
        return Range(end=self.lengths)

    def q_range(self, kv_pos):
        return Range(end=jnp.where(kv_pos < self.lengths, BEHIND_ALL, BEFORE_ALL))

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        return kind_of(kv_lo < self.lengths, kv_hi < self.lengths)


@term
class QLengths(Mask):
    """Allowed where ``q_pos < lengths[b]``; `lengths`: [B] int32, number of real queries."""

    lengths: jax.Array = operand("batch", dtype=jnp.integer)

    def allowed(self, q_pos, kv_pos):
        return q_pos < self.lengths

    def kv_range(self, q_pos):
        return Range(end=jnp.where(q_pos < self.lengths, BEHIND_ALL, BEFORE_ALL))

    def q_range(self, kv_pos):
        return Range(end=self.lengths)

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        return kind_of(q_lo < self.lengths, q_hi < self.lengths)
