"""A request for attention of the newest queries over a cache, and the check of user input."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.decoding import rows
from pallas_flash.decoding.cache import KVCache
from pallas_flash.decoding.paged_cache import PagedKVCache
from pallas_flash.masks import Mask
from pallas_flash.scores import ScoreMod, Sink
from pallas_flash.spec import AttentionSpec, bind_terms, check_functions, check_scale, describe

Cache = KVCache | PagedKVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOperands:
    """The arrays of a request.

    q: [B, Tq, Hq, D]; counts: [B] int32, how many of the Tq queries are real, the first ones; mask,
    score_mod: terms bound to sequences of max_len tokens, or None.
    """

    q: Any
    counts: Any
    cache: Any
    mask: Mask | None = None
    score_mod: ScoreMod | None = None

    @property
    def starts(self) -> jax.Array:
        """[B] int32, position of the first query."""
        return self.cache.lengths - self.counts


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """What is static in a request; `cache`, `mask` and `score_mod` hold shapes for arrays."""

    batch: int
    q_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    scale: float
    cache: Any
    mask: Mask | None
    score_mod: ScoreMod | None

    @classmethod
    def of(cls, operands: DecodeOperands, scale: float) -> "DecodeSpec":
        """The spec of operands that have been checked."""
        batch, q_len, num_q_heads, head_dim = operands.q.shape
        _, v = _keys_and_values(operands.cache)
        return cls(
            batch=batch,
            q_len=q_len,
            num_q_heads=num_q_heads,
            num_kv_heads=v.shape[-2],
            head_dim=head_dim,
            value_dim=v.shape[-1],
            dtype=operands.q.dtype,
            scale=scale,
            cache=describe(operands.cache),
            mask=describe(operands.mask),
            score_mod=describe(operands.score_mod),
        )

    @property
    def group(self) -> int:
        """Number of query heads that share a key head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def state_dtype(self) -> np.dtype:
        """Of scores, running maximum, denominator and accumulators: at least float32."""
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)


class DecodeRequest(NamedTuple):
    """What a user asks for, checked. sinks: what joins the softmax outside of the backends."""

    operands: DecodeOperands
    scale: float
    sinks: tuple[Sink, ...]


def _keys_and_values(cache: Cache) -> tuple[Any, Any]:
    """[..., Hkv, D] and [..., Hkv, Dv]."""
    if isinstance(cache, KVCache):
        return cache.k, cache.v
    return cache.k_pages, cache.v_pages


def make_decode_request(q, cache, *, lengths, mask, score_mod, scale) -> DecodeRequest:
    """The request of a call.

    Raises:
      TypeError: if cache, mask, score_mod or scale is not of the documented kind.
      ValueError: if a shape, dtype or number breaks its rule; the message has both.
    """
    if not isinstance(cache, KVCache | PagedKVCache):
        raise TypeError(f"cache must be a KVCache or PagedKVCache, got {type(cache).__name__}")
    q = jnp.asarray(q)
    _check_queries(q, cache)
    batch, q_len, num_q_heads, head_dim = q.shape
    counts = rows.check_counts(lengths, "lengths", batch, q_len)
    if numbers := rows.known(cache.lengths, counts, cache.is_valid):
        for row, (length, count, is_valid) in enumerate(zip(*numbers, strict=True)):
            if not is_valid:
                raise ValueError(f"row {row} of the cache is lost: a token did not fit")
            if length < count:
                raise ValueError(
                    f"row {row} of the cache has {length} tokens, fewer than {count} queries: "
                    "append their keys and values before"
                )
    # Terms speak of whole sequences, of which this call computes some rows.
    sizes = {"batch": batch, "heads": num_q_heads, "q": cache.max_len, "kv": cache.max_len}
    mask, score_mod, sinks = bind_terms(mask, score_mod, sizes)
    operands = DecodeOperands(q, counts, cache, mask, score_mod)
    spec = DecodeSpec.of(operands, check_scale(scale, head_dim))
    check_functions(_whole(spec))
    return DecodeRequest(operands, spec.scale, sinks)


def _whole(spec: DecodeSpec) -> AttentionSpec:
    """The request for every token of the sequence at once."""
    fields = {f.name for f in dataclasses.fields(AttentionSpec)}
    same = {name: value for name, value in vars(spec).items() if name in fields}
    lengths = {"q_len": spec.cache.max_len, "kv_len": spec.cache.max_len}
    return AttentionSpec(**(same | lengths), dropout=None)


def _check_queries(q: jax.Array, cache: Cache) -> None:
    k, _ = _keys_and_values(cache)
    batch, (num_kv_heads, head_dim) = len(cache.lengths), k.shape[-2:]
    if q.ndim != 4 or q.shape[0] != batch or q.shape[3] != head_dim or 0 in q.shape:
        raise ValueError(
            f"q must be [batch, new tokens, heads, head_dim] = [{batch}, 1 or more, a multiple of "
            f"{num_kv_heads}, {head_dim}] as the cache has it, got {q.shape}"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"q must have the cache's dtype={k.dtype}, got {q.dtype}")
    if q.shape[2] % num_kv_heads:
        raise ValueError(
            f"num_q_heads={q.shape[2]} must be a multiple of num_kv_heads={num_kv_heads}"
        )
    if q.shape[1] > cache.max_queries:
        raise ValueError(
            f"{q.shape[1]} queries at once need a cache made with max_queries={q.shape[1]}, this "
            f"one has {cache.max_queries}; or take flash_attention with Causal() & SlidingWindow"
            f"({(cache.window or 1) - 1}, 0) for a prompt, and append its keys and values"
        )
