"""Alibi: a penalty that grows with the distance between query and key."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.scores.score_mod import ScoreMod
from pallas_flash.terms import operand, term


@term
class Alibi(ScoreMod):
    """``s - slopes[h] * |q_pos + offset - kv_pos|``.

    Args:
      slopes: [Hq] or [B, Hq] floating point, usually `alibi_slopes`; gets its gradient.
      align: where distance 0 lies when the lengths differ, as in `Causal`: "top_left" at query 0
        and key 0, "bottom_right" at the last query and the last key.
      offset: by how much every query stands later than its number.

    Raises:
      ValueError: if `align` is neither name.

    Source: Press et al. 2022 (arXiv:2108.12409), section 3.
    """

    slopes: jax.Array = operand("batch", "heads", dtype=jnp.floating)
    align: Literal["top_left", "bottom_right"] = "top_left"
    offset: int = 0

    def __post_init__(self):
        if self.align not in ("top_left", "bottom_right"):
            raise ValueError(f"align={self.align!r} must be 'top_left' or 'bottom_right'")

    def bind(self, q_len, kv_len):
        if self.align == "top_left":
            return self
        return Alibi(self.slopes, offset=self.offset + kv_len - q_len)

    def apply(self, s, q_pos, kv_pos):
        # Converted before they meet: once for a row and for a column, not for every score.
        distance = jnp.abs((q_pos + self.offset).astype(s.dtype) - kv_pos.astype(s.dtype))
        return s - self.slopes.astype(s.dtype) * distance

    @property
    def lipschitz(self):
        return 1.0


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The paper's slopes [num_heads] float32: ``2 ** (-8 i / n)`` for head i = 1..n.

    If `num_heads` is no power of two, n is the next lower one, and the heads beyond it take every
    other slope of the next higher one.

    Raises:
      ValueError: if `num_heads` is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1")
    n = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    slopes += [2.0 ** (-4.0 * i / n) for i in range(1, 2 * (num_heads - n), 2)]
    return np.array(slopes, np.float32)
