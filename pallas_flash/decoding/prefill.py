"""Many new queries at once over a cache: dense attention with a mask for where the rows stand."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_flash.masks.mask import Mask, kind_of
from pallas_flash.terms import operand, term


@term
class NewTokens(Mask):
    """Query i of row b stands at ``starts[b] + i`` among the keys and sees none behind it.

    Args:
      starts: [B] int32; firsts: [B] int32, the first key that holds a token; counts: [B] int32, how
        many of the queries are real; window: how many keys a query sees, or None for all.
    """

    starts: jax.Array = operand("batch", dtype=jnp.integer)
    firsts: jax.Array = operand("batch", dtype=jnp.integer)
    counts: jax.Array = operand("batch", dtype=jnp.integer)
    window: int | None

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        seen = kv_pos - self.starts
        ok = (seen <= q_pos) & (kv_pos >= self.firsts) & (q_pos < self.counts)
        return ok if self.window is None else ok & (seen > q_pos - self.window)

    def block_kind(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> Any:
        lo, hi = kv_lo - self.starts, kv_hi - self.starts
        some = (lo <= q_hi) & (kv_hi >= self.firsts) & (q_lo < self.counts)
        every = (hi <= q_lo) & (kv_lo >= self.firsts) & (q_hi < self.counts)
        if self.window is not None:
            some, every = some & (hi > q_lo - self.window), every & (lo > q_hi - self.window)
        return kind_of(some, some & every)
