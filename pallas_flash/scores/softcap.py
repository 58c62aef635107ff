"""Softcap: scores pressed smoothly into an interval (Gemma 2, Riviere et al. 2024, section 2)."""

import math

import jax.numpy as jnp

from pallas_flash.scores.score_mod import ScoreMod
from pallas_flash.terms import term


@term
class Softcap(ScoreMod):
    """``cap * tanh(s / cap)``.

    On a GPU tanh is the hardware's, with a relative error of up to 2**-11 (PTX ISA, tanh.approx).

    Args:
      cap: bound of the scores' absolute value, a positive finite number.

    Raises:
      ValueError: if `cap` is not positive and finite.
    """

    cap: float

    def __post_init__(self):
        if not (self.cap > 0 and math.isfinite(self.cap)):
            raise ValueError(f"cap={self.cap} must be positive and finite")

    def apply(self, s, q_pos, kv_pos):
        return self.cap * jnp.tanh(s * (1.0 / self.cap))

    @property
    def bound(self):
        return self.cap

    @property
    def lipschitz(self):
        return 1.0
