"""MaskMod: a mask from a function of one's own."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_flash.masks.mask import Mask
from pallas_flash.terms import operand, term


@term
class MaskMod(Mask):
    """Allowed where ``fn(q_pos, kv_pos, *arrays)`` is True.

    `fn` is elementwise: it is called for each tile, with int32 positions and each array cut to the
    tile, all of which broadcast against the tile's scores. It never indexes. Every block counts as
    partly masked; join it with a mask that skips blocks: ``Causal() & MaskMod(fn, array)``.

    Args:
      fn: the function. It is part of what a compiled program is known by: define it once, not
        anew for each call. It may capture numbers but no arrays.
      arrays: what it reads, of any dtype, each broadcastable to [B, Hq, Tq, Tkv]; broadcast
        dimensions are never expanded, so an array [B, 1, Tq, 1] is linear memory.
    """

    fn: Callable[..., Any]
    arrays: tuple[jax.Array, ...] = operand("batch", "heads", "q", "kv", dtype=None)

    def __init__(self, fn: Callable[..., Any], *arrays: Any):
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "arrays", arrays)

    def allowed(self, q_pos, kv_pos):
        return self.fn(q_pos, kv_pos, *self.arrays)
