"""ScoreFunction: a score mod from a function of one's own."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_flash.scores.score_mod import ScoreMod
from pallas_flash.terms import operand, term


@term
class ScoreFunction(ScoreMod):
    """``fn(s, q_pos, kv_pos, *arrays)``.

    `fn` is elementwise: it is called for each tile, with its scores, int32 positions and each
    array cut to the tile, all of which broadcast against the scores. It never indexes. The
    backward pass differentiates it by itself, so it may use the scores more than once.

    Args:
      fn: the function. It is part of what a compiled program is known by: define it once, not
        anew for each call. It may capture numbers but no arrays.
      arrays: what it reads, of any dtype, each broadcastable to [B, Hq, Tq, Tkv]; broadcast
        dimensions are never expanded. Floating point arrays come as float32 at least, and get
        gradients in their own shape and dtype.
    """

    fn: Callable[..., Any]
    arrays: tuple[jax.Array, ...] = operand("batch", "heads", "q", "kv", dtype=None)

    def __init__(self, fn: Callable[..., Any], *arrays: Any):
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "arrays", arrays)

    def apply(self, s, q_pos, kv_pos):
        return self.fn(s, q_pos, kv_pos, *self.arrays)
