"""Dropout of attention probabilities, from bits that need no memory.

Every query and every key of a batch row and head gets a random odd number, a hash of its seed and
position; a probability is kept where the product of its two numbers, modulo 2**32, reaches a
threshold. So any tile of any backend computes its own bits, forward and backward, and all agree.
The products of random odd numbers are uniform, and those of two queries are correlated only if the
queries' ratio modulo 2**32 is a fraction of small numbers, which hardly ever happens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.terms import Tile, map_operands, operand, parameter, term


@term
class Dropout:
    """Drops each probability with probability `rate`; the kept ones are scaled by 1 / (1 - rate).

    It comes after the softmax: ``out = dropout(softmax(...)) @ v``, and the lse knows nothing of
    it. The same key drops the same probabilities in every backend, with every tile size, and
    however batch and heads are split over devices by ``jit``. (Inside ``shard_map`` a key that all
    devices share gives all of them the same bits, as with ``jax.random``: fold in the device.)

    Args:
      rate: a number from 0 up to but not including 1, known when the function is traced.
      key: a key of ``jax.random``.
      shared: one pattern [Tq, Tkv] for all batch rows and heads (Flax's `broadcast_dropout`).

    Raises:
      TypeError, ValueError: if `rate` is not such a number; when it is used, if `key` is not a key.
    """

    rate: float
    key: jax.Array = parameter()
    shared: bool = False

    def __post_init__(self):
        if isinstance(self.rate, jax.core.Tracer) or not isinstance(
            self.rate, (int, float, np.floating)
        ):
            raise TypeError(f"rate={self.rate!r} must be a number known when it is traced")
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate={self.rate} must be at least 0 and below 1")

    def bind(self, batch: int, num_q_heads: int) -> "KeepBits | None":
        """The bits of a problem, or None if nothing is dropped."""
        if self.rate == 0:
            return None
        dtype = getattr(self.key, "dtype", None)
        is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        is_raw = dtype == jnp.uint32 and self.key.ndim == 1
        if not is_raw and not (is_typed and self.key.ndim == 0):
            raise TypeError(f"Dropout.key must be one key of jax.random, got {self.key!r}")
        shape = (1, 1) if self.shared else (batch, num_q_heads)
        seeds = jax.random.bits(self.key, shape, jnp.uint32)
        return KeepBits(float(self.rate), jnp.broadcast_to(seeds, (batch, num_q_heads)))

    def keep_mask(self, batch: int, num_q_heads: int, q_len: int, kv_len: int) -> jax.Array:
        """What is kept: bool [B, Hq, Tq, Tkv]. For looking at; attention never makes it."""
        bits = self.bind(batch, num_q_heads)
        if bits is None:
            return jnp.ones((batch, num_q_heads, q_len, kv_len), bool)
        whole = Tile(batch, 0, q_len, 0, kv_len, q_len)
        return map_operands(whole.align, bits).keep(*whole.positions())


@term
class KeepBits:
    """Dropout of one problem: ``keep`` where a hash reaches a threshold.

    seeds: [B, Hq] uint32.
    """

    rate: float
    seeds: jax.Array = operand("batch", "heads", dtype=jnp.unsignedinteger)

    @property
    def factor(self) -> float:
        """What kept probabilities are multiplied with."""
        return 1.0 / (1.0 - self.rate)

    def numbers(self, q_pos: Any, kv_pos: Any) -> "Numbers":
        """Those of some queries and keys, by int32 positions that broadcast with the seeds."""
        of_query = _mix(q_pos.astype(jnp.uint32) ^ self.seeds) | jnp.uint32(1)
        of_key = _mix(kv_pos.astype(jnp.uint32) ^ ~self.seeds) | jnp.uint32(1)
        return Numbers(self.rate, of_query, of_key)

    def spelled_out(self, q_len: int, kv_len: int) -> "Numbers":
        """All numbers of a problem, for kernels that would rather read them."""
        batch, heads = self.seeds.shape
        whole = Tile(batch, 0, q_len, 0, kv_len, q_len)
        numbers = map_operands(whole.align, self).numbers(*whole.positions())
        of_query = numbers.of_query.reshape(batch, heads, q_len)
        return Numbers(self.rate, of_query, numbers.of_key.reshape(batch, heads, kv_len))

    def keep(self, q_pos: Any, kv_pos: Any) -> Any:
        """Which probabilities are kept, elementwise over int32 positions."""
        return self.numbers(q_pos, kv_pos).keep()

    def apply(self, p: Any, q_pos: Any, kv_pos: Any) -> Any:
        """Probabilities, or their gradients, after dropout."""
        numbers = self.numbers(q_pos, kv_pos)
        return jnp.where(numbers.keep(), p * self.factor, 0)


@term
class Numbers:
    """The odd numbers of queries and keys, and which pairs of them keep their probability.

    of_query: [B, Hq, Tq] uint32; of_key: [B, Hq, Tkv] uint32.
    """

    rate: float
    of_query: jax.Array = operand("batch", "heads", "q", dtype=jnp.unsignedinteger)
    of_key: jax.Array = operand("batch", "heads", "kv", dtype=jnp.unsignedinteger)

    def keep(self) -> Any:
        """Which probabilities are kept, elementwise.

        Products modulo 2**32 of random odd numbers: one operation for each element, where a hash
        of its own would take a GPU longer than all else that happens to a score.
        """
        threshold = min(round(self.rate * 2**32), 2**32 - 1)
        return self.of_query * self.of_key >= jnp.uint32(threshold)


def _mix(x: Any) -> Any:
    """A one-to-one map of uint32 whose bits all depend on all of x's: MurmurHash3's finalizer."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
