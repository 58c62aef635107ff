"""SlidingWindow: a query attends to keys near its own position."""

from typing import Any

from pallas_flash.masks.mask import Mask, Range, kind_of
from pallas_flash.terms import term


@term
class SlidingWindow(Mask):
    """Allowed where ``q_pos - left <= kv_pos <= q_pos + right``; None leaves a side open.

    Args:
      left: number of earlier keys that a query sees, or None.
      right: number of later keys that a query sees, or None.

    Raises:
      ValueError: if a width is negative.
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self):
        for name, width in (("left", self.left), ("right", self.right)):
            if width is not None and width < 0:
                raise ValueError(f"{name}={width} must be 0 or more, or None for no limit")

    def allowed(self, q_pos, kv_pos):
        distance = kv_pos - q_pos
        left = distance >= distance if self.left is None else distance >= -self.left
        return left if self.right is None else left & (distance <= self.right)

    def kv_range(self, q_pos):
        return _around(q_pos, self.left, self.right)

    def q_range(self, kv_pos):
        return _around(kv_pos, self.right, self.left)

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        nearest, farthest = kv_lo - q_hi, kv_hi - q_lo
        some = every = nearest <= farthest
        if self.left is not None:
            some, every = some & (farthest >= -self.left), every & (nearest >= -self.left)
        if self.right is not None:
            some, every = some & (nearest <= self.right), every & (farthest <= self.right)
        return kind_of(some, every)


def _around(pos: Any, before: int | None, after: int | None) -> Range:
    first = None if before is None else pos - before
    return Range(first, None if after is None else pos + (after + 1))
