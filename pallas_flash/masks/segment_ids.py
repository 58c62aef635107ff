"""SegmentIds: several documents in one row, each attending only to itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.masks.mask import Mask, kind_of
from pallas_flash.terms import operand, term


@term
class SegmentIds(Mask):
    """Allowed where ``q[b, q_pos] == kv[b, kv_pos]`` and the id is not negative.

    A negative id marks padding: it attends to nothing and nothing attends to it. Ids need no
    order, but blocks are skipped by the lowest and highest id in each, so sorted ids skip most.

    Args:
      q: [B, Tq] integer, broadcastable; the id of each query.
      kv: [B, Tkv] of the same dtype, the id of each key; None if they are the queries' ids.

    Raises:
      ValueError: if `kv` is missing and the two sequences differ in length.
    """

    q: jax.Array = operand("batch", "q", dtype=jnp.integer)
    kv: jax.Array | None = operand("batch", "kv", dtype=jnp.integer, default=None)

    def bind(self, q_len, kv_len):
        if self.kv is not None:
            return self
        if q_len != kv_len:
            raise ValueError(
                f"SegmentIds.kv must be given where q_len={q_len} and kv_len={kv_len} differ"
            )
        return SegmentIds(self.q, self.q)

    def allowed(self, q_pos, kv_pos):
        return (self.q == self.kv) & (self.q >= 0)

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        q: Any = self.q
        kv: Any = self.kv
        meet = (q.lo <= kv.hi) & (kv.lo <= q.hi) & (q.hi >= 0) & (kv.hi >= 0)
        one = (q.lo == q.hi) & (kv.lo == kv.hi)
        return kind_of(meet, meet & one)


def segment_ids_from_cu_seqlens(cu_seqlens: Any, length: int) -> jax.Array:
    """Segment ids [length] int32 of documents laid end to end, from their cumulative lengths.

    Document i takes the positions ``cu_seqlens[i] <= pos < cu_seqlens[i + 1]``; what no document
    takes gets the id -1, padding.

    Args:
      cu_seqlens: [n + 1] integer, from 0 upwards; repeated numbers are empty documents.
      length: number of positions of the row.

    Raises:
      ValueError: if `cu_seqlens` is not of this kind, or (where its numbers are known when the
        function is called) does not start at 0, falls, or ends beyond `length`.
    """
    if not isinstance(cu_seqlens, jax.Array):
        cu_seqlens = np.asarray(cu_seqlens)
    if cu_seqlens.ndim != 1 or not jnp.issubdtype(cu_seqlens.dtype, jnp.integer):
        raise ValueError(
            f"cu_seqlens must be [n + 1] integers, got {cu_seqlens.dtype}{list(cu_seqlens.shape)}"
        )
    if not isinstance(cu_seqlens, jax.core.Tracer):
        known = np.asarray(cu_seqlens)
        if not known.size or known[0] != 0 or (known[1:] < known[:-1]).any() or known[-1] > length:
            raise ValueError(f"cu_seqlens={known} must rise from 0 to at most length={length}")
    pos = jnp.arange(length, dtype=jnp.int32)
    ids = jnp.searchsorted(jnp.asarray(cu_seqlens, jnp.int32), pos, side="right") - 1
    return jnp.where(pos < cu_seqlens[-1], ids, -1).astype(jnp.int32)
