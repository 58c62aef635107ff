"""Causal: a query attends to keys at or before its own position."""

from typing import Literal

from pallas_flash.masks.mask import Mask, Range, kind_of
from pallas_flash.terms import term


@term
class Causal(Mask):
    """Allowed where ``kv_pos <= q_pos + offset``.

    Args:
      align: where the diagonal lies when the lengths differ. "top_left" (as in ``jax.nn``): query 0
        sees key 0. "bottom_right": the last query sees the last key, i.e. `offset` grows by
        ``kv_len - q_len``.
      offset: how many more keys every query sees.

    Raises:
      ValueError: if `align` is neither name.
    """

    align: Literal["top_left", "bottom_right"] = "top_left"
    offset: int = 0

    def __post_init__(self):
        if self.align not in ("top_left", "bottom_right"):
            raise ValueError(f"align={self.align!r} must be 'top_left' or 'bottom_right'")

    def bind(self, q_len, kv_len):
        if self.align == "top_left":
            return self
        return Causal(offset=self.offset + kv_len - q_len)

    def allowed(self, q_pos, kv_pos):
        return kv_pos <= q_pos + self.offset

    def kv_range(self, q_pos):
        return Range(end=q_pos + (self.offset + 1))

    def q_range(self, kv_pos):
        return Range(first=kv_pos - self.offset)

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        return kind_of(kv_lo <= q_hi + self.offset, kv_hi <= q_lo + self.offset)
