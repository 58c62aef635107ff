"""KVCache: the keys and values of the tokens so far, in one array, or in a ring of a window."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash.decoding import rows

# Slots are whole tiles of TMA, so that no kernel has to copy the cache.
SLOT_MULTIPLE = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of a batch of sequences of different lengths; made by `KVCache.create`.

    A pytree: it works in `jit` (donate it, or every step copies it), `scan` and under sharding over
    batch and heads. Methods return a new cache.

    A row whose tokens did not fit is lost: its length becomes ``max_len + 1``, and attention gives
    NaN for it until `release`. Where lengths are known (outside of `jit`) this raises instead.

    Fields:
      k: [B, slots, Hkv, D]; position p is in slot ``p % slots``.
      v: [B, slots, Hkv, Dv].
      lengths: [B] int32, number of tokens of each row.
      max_len: the longest row, in tokens.
      window: how many keys a query sees, itself included, or None for all of them.
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    max_len: int = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        batch: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        *,
        value_dim: int | None = None,
        window: int | None = None,
        max_queries: int = 64,
    ) -> "KVCache":
        """An empty cache of zeros.

        Args:
          window: keys that a query sees, itself included: ``SlidingWindow(window - 1, 0)``. The
            cache then holds about that many tokens and not max_len.
          max_queries: with a window, the most tokens that are asked about at once; the ring has
            room for so many more.

        Raises:
          ValueError: if a size is not positive.
        """
        value_dim = head_dim if value_dim is None else value_dim
        rows.check_sizes(batch=batch, max_len=max_len, num_kv_heads=num_kv_heads)
        rows.check_sizes(head_dim=head_dim, value_dim=value_dim, max_queries=max_queries)
        slots = max_len
        if window is not None:
            rows.check_sizes(window=window)
            slots = min(slots, window + max_queries - 1)
        slots = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE
        return cls(
            jnp.zeros((batch, slots, num_kv_heads, head_dim), dtype),
            jnp.zeros((batch, slots, num_kv_heads, value_dim), dtype),
            jnp.zeros(batch, jnp.int32),
            # Not NumPy's: they would carry their dtype into lengths.
            int(max_len),
            None if window is None else int(window),
        )

    @property
    def num_slots(self) -> int:
        return self.k.shape[1]

    @property
    def is_ring(self) -> bool:
        """Whether old tokens give their slots to new ones."""
        return self.num_slots < self.max_len

    @property
    def max_queries(self) -> int:
        """The most queries of a row that find all their keys."""
        return self.num_slots - (self.window or 0) + 1 if self.is_ring else self.max_len

    @property
    def is_valid(self) -> jax.Array:
        """[B] bool: whether a row has lost nothing."""
        return self.lengths <= self.max_len

    def append(self, k: jax.Array, v: jax.Array, lengths: Any = None) -> "KVCache":
        """The cache with new tokens behind those of each row.

        Args:
          k: [B, T, Hkv, D] of the cache's dtype.
          v: [B, T, Hkv, Dv].
          lengths: [B] integer, how many of the T tokens of each row are real, the first ones; None
            for all of them. Traced numbers outside of 0..T are clipped.

        Raises:
          ValueError: if shapes or dtypes do not fit the cache, or, outside of `jit`, if lengths are
            not in 0..T or a row would grow beyond max_len.
        """
        rows.check_new_tokens(k, v, self.k, self.v)
        count = rows.check_counts(lengths, "lengths", *k.shape[:2])
        rows.check_room(self.lengths, count, self.max_len)
        return _append(self, k, v, count)

    def rewind(self, counts: Any) -> "KVCache":
        """The cache without the last `counts` ([B] or one integer) tokens of each row.

        For drafted tokens that were not accepted. A ring can go back by `max_queries` tokens; a
        lost row stays lost.

        Raises:
          ValueError: outside of `jit`, if counts are negative or more than that.
        """
        limit = jnp.minimum(self.lengths, self.max_queries)
        return dataclasses.replace(self, lengths=rows.rewound(self, counts, limit))

    def release(self, which: Any) -> "KVCache":
        """The cache with some rows (their numbers, or [B] bool) empty again."""
        is_released = rows.selected(which, len(self.lengths))
        return dataclasses.replace(self, lengths=jnp.where(is_released, 0, self.lengths))

    def read(self, start: Any, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """k, v and positions [B, size] of slots from `start` on; a negative one is empty."""
        k, v = (lax.dynamic_slice_in_dim(x, start, size, 1) for x in (self.k, self.v))
        slot = start + jnp.arange(size, dtype=jnp.int32)
        newest = self.lengths[:, None] - 1
        return k, v, newest - (newest - slot) % self.num_slots

    def in_order(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """k, v [B, slots, ...] with positions that rise by one, and the first of them [B]."""
        if not self.is_ring:
            return self.k, self.v, jnp.zeros_like(self.lengths)
        first = self.lengths - self.num_slots
        slot = (first[:, None] + jnp.arange(self.num_slots)) % self.num_slots
        k, v = (jnp.take_along_axis(x, slot[..., None, None], 1) for x in (self.k, self.v))
        return k, v, first


@jax.jit
def _append(cache: KVCache, k: jax.Array, v: jax.Array, count: jax.Array) -> KVCache:
    """The cache with the first count[b] tokens of row b behind those that it has."""
    pos, is_real = rows.new_positions(cache.lengths, count, k.shape[1])
    fits = is_real & (pos < cache.max_len)
    # Of more tokens than a ring has slots the last ones stay.
    stays = pos >= (cache.lengths + count)[:, None] - cache.num_slots
    slot = jnp.where(fits & stays, pos % cache.num_slots, cache.num_slots)
    row = jnp.arange(k.shape[0])[:, None]

    def put(array, new):
        return array.at[row, slot].set(new, mode="drop", unique_indices=True)

    return dataclasses.replace(
        cache,
        k=put(cache.k, k),
        v=put(cache.v, v),
        lengths=rows.grown(cache.lengths, count, (is_real & ~fits).any(1), cache.max_len),
    )
