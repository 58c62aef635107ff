"""MaskMod: a mask from a function of one's own."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_flash.masks.intervals import Interval, bounds
from pallas_flash.masks.mask import Mask, kind_of
from pallas_flash.terms import operand, term


@term
class MaskMod(Mask):
    """Allowed where ``fn(q_pos, kv_pos, *arrays)`` is True.

    `fn` is elementwise: it is called for each tile, with int32 positions and each array cut to the
    tile, all of which broadcast against the tile's scores. It never indexes. Where it reads no
    arrays and is integer arithmetic and comparisons, blocks that it forbids are skipped and those
    that it allows are not masked. Else every block counts as partly masked; join it with a mask
    that skips blocks: ``Causal() & MaskMod(fn, array)``.

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

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        given = (q_lo, q_hi, kv_lo, kv_hi)
        if not self.arrays and all(isinstance(x, np.ndarray) for x in given):
            q_lo, q_hi, kv_lo, kv_hi = (x.astype(np.int64) for x in given)
            found = bounds(self.fn, Interval(q_lo, q_hi), Interval(kv_lo, kv_hi))
            if found is not None and found.is_bool:
                none = np.zeros(q_lo.shape, bool)
                return kind_of(found.hi | none, found.lo | none)
        return super().block_kind(*given)
