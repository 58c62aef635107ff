"""What happens between the projections of `linen.Attention` and `nnx.Attention`: here, once.

Arrays are [batch..., T, heads, head_dim] with any number of leading batch axes.
"""

import functools
import math
import operator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from flax_layers import adapter, cached
from flax_layers.rope import Rope, document_positions
from pallas_flash import Chain, Dropout, KVCache, Mask, ScoreMod, SegmentIds, Sink


class Settings(Protocol):
    """The attributes of a layer that say what it computes; `linen.Attention` describes them."""

    num_heads: int
    num_kv_heads: int | None
    head_dim: int | None
    mask: Mask | None
    score_mod: ScoreMod | None
    rope: Rope | None
    scale: float | None
    dropout_rate: float
    dtype: Any
    param_dtype: Any
    precision: Any
    backend: str | None


class Call(NamedTuple):
    """The arguments of a layer's call beside its inputs; `linen.Attention` describes them."""

    mask: Any = None
    score_mod: ScoreMod | None = None
    is_causal: bool = False
    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None
    cache: cached.Cache | None = None
    lengths: jax.Array | None = None


class Heads(NamedTuple):
    """How many heads of what size a layer has."""

    num_q: int
    num_kv: int
    dim: int


def heads_of(layer: Settings, features: int | None) -> Heads:
    """Returns the sizes of a layer's heads; `features` of its input, None if it has seen none.

    Raises:
        ValueError: counts that do not go together, or a head_dim that cannot be known.
    """
    num_heads = layer.num_heads
    num_kv_heads = num_heads if layer.num_kv_heads is None else layer.num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
    if layer.head_dim is not None:
        return Heads(num_heads, num_kv_heads, layer.head_dim)
    if features is None:
        raise ValueError("head_dim=None follows from the input's features: give it a number here")
    if features % num_heads:
        raise ValueError(
            f"{features=} must be a multiple of {num_heads=}, or head_dim must be given"
        )
    return Heads(num_heads, num_kv_heads, features // num_heads)


def key_value_inputs(layer: Settings, inputs, inputs_kv, call: Call):
    """Returns what keys and values are made of.

    Raises:
        ValueError: an argument that speaks of one sequence, where there are two.
    """
    if inputs_kv is None:
        return inputs
    given = {
        "rope": layer.rope,
        "segment_ids": call.segment_ids,
        "positions": call.positions,
        "cache": call.cache,
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} does not go with inputs_kv: it is of one sequence that attends to itself"
                + ("; say mask=SegmentIds(q_ids, kv_ids)" if name == "segment_ids" else "")
            )
    return inputs_kv


def make_cache(
    layer: Settings, batch: int, max_len: int, dtype: Any, features: int | None, **options: Any
) -> KVCache:
    """Returns an empty cache for a layer: a ring if its mask has a window."""
    _, num_kv_heads, head_dim = heads_of(layer, features)
    dtype = dtype or layer.dtype or layer.param_dtype
    window = cached.window_of(layer.mask)
    return KVCache.create(batch, max_len, num_kv_heads, head_dim, dtype, window=window, **options)


def attend(
    layer: Settings, query, key, value, call: Call, *, sinks=None, dropout_key=None
) -> tuple[jax.Array, cached.Cache | None]:
    """Returns attention as a layer's settings and its call's arguments ask for it, and the cache.

    Args:
        query: [batch..., Tq, Hq, D], projected and normalised.
        key, value: [batch..., Tkv, Hkv, D].
        sinks: [Hq], or None.
        dropout_key: of `jax.random`; None drops nothing.

    Raises:
        ValueError: arguments that exclude each other, or do not fit the inputs.
    """
    if not 0 <= layer.dropout_rate < 1:
        raise ValueError(f"dropout_rate={layer.dropout_rate} must be in [0, 1)")
    if call.positions is not None and layer.rope is None:
        raise ValueError("positions needs rope: masks go by the order of the tokens")
    sink = None if sinks is None else Sink(sinks)
    mods = tuple(mod for mod in (layer.score_mod, call.score_mod, sink) if mod is not None)
    score_mod = Chain(mods) if mods else None
    if call.cache is not None:
        return _attend_to_cache(layer, query, key, value, call, score_mod, dropout_key)
    if call.lengths is not None:
        raise ValueError("lengths needs a cache; for padded inputs say mask=KvLengths(lengths)")
    if layer.rope is not None:
        query, key = _rotate(layer.rope, query, key, call)
    dropout = None if dropout_key is None else Dropout(layer.dropout_rate, dropout_key)
    out = adapter.flash(
        query,
        key,
        value,
        mask=_mask(layer, call, query, key),
        score_mod=score_mod,
        scale=layer.scale,
        dropout=dropout,
        precision=layer.precision,
        backend=layer.backend,
    )
    return out, None


def _mask(layer: Settings, call: Call, query, key) -> Mask | None:
    """Returns the masks of the layer, of the call and of its documents, joined."""
    mask = adapter.as_mask(call.mask, query, key, is_causal=call.is_causal)
    masks: list[Mask | None] = [layer.mask, mask]
    if call.segment_ids is not None:
        ids = _per_token("segment_ids", call.segment_ids, query)
        masks.append(SegmentIds(ids.reshape(-1, ids.shape[-1])))
    return join(masks)


def join(masks) -> Mask | None:
    """Returns the masks that are not None joined by &, or None."""
    masks = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, masks) if masks else None


def _rotate(rope: Rope, query, key, call: Call):
    """Returns queries and keys of one sequence, rotated by their positions."""
    if call.positions is not None:
        positions = _per_token("positions", call.positions, query)
    elif call.segment_ids is not None:
        positions = document_positions(_per_token("segment_ids", call.segment_ids, query))
    else:
        positions = jnp.arange(query.shape[-3])
    return rope(query, positions), rope(key, positions)


def _per_token(name: str, array, query) -> jax.Array:
    """Returns an integer array broadcast to [batch..., T]."""
    array, shape = jnp.asarray(array), query.shape[:-2]
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: dtype={array.dtype} must be an integer dtype")
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} of shape {array.shape} must be broadcastable to [batch..., T] = {shape}"
        ) from None


def _attend_to_cache(layer: Settings, query, key, value, call: Call, score_mod, dropout_key):
    """Returns attention of new tokens to the cache that they join, and the cache."""
    cache, batch, length = call.cache, query.shape[:-3], query.shape[-3]
    assert cache is not None
    if call.segment_ids is not None:
        raise ValueError("segment_ids does not go with a cache, each row of which is one document")
    if dropout_key is not None:
        raise ValueError("dropout does not go with a cache: pass deterministic=True")
    if layer.rope is not None:
        positions = cache.lengths.reshape(*batch, 1) + jnp.arange(length)
        if call.positions is not None:
            positions = _per_token("positions", call.positions, query)
        query, key = layer.rope(query, positions), layer.rope(key, positions)
    whole = jax.ShapeDtypeStruct((*batch, cache.max_len, *query.shape[-2:]), query.dtype)
    masks = [layer.mask, adapter.as_mask(call.mask, whole, whole, is_causal=call.is_causal)]
    query, key, value = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    with adapter.matmul_precision(layer.precision, query.dtype):
        out, cache = cached.extend(
            cache,
            query,
            key,
            value,
            lengths=call.lengths,
            mask=join(masks),
            score_mod=score_mod,
            scale=layer.scale,
            backend=layer.backend,
        )
    return out.reshape(*batch, *out.shape[-3:]), cache
