"""Attention of the newest queries over a cache in plain JAX: linear memory, any device, any dtype.

Source: FlashAttention-2 (Dao 2023), algorithm 1, with the rows of a batch at their own positions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash import softmax_state
from pallas_flash.backends import tile
from pallas_flash.decoding.request import DecodeOperands, DecodeSpec
from pallas_flash.terms import BATCH, DISTANCE, HEADS, KV, SCORE_AXES, Axes, Q, map_operands

# Slots of a step, and the most queries whose scores are held at a time.
BLOCK = 256
MOST_QUERIES = 128


def forward(spec: DecodeSpec, operands: DecodeOperands) -> tuple[jax.Array, jax.Array]:
    """out [B, Tq, Hq, Dv] in q's dtype and lse [B, Hq, Tq]; rows that are not real are empty."""
    if spec.q_len <= MOST_QUERIES:
        return _some_queries(spec, operands, operands.q, jnp.int32(0))
    size = MOST_QUERIES
    count = -(-spec.q_len // size)
    q = jnp.pad(operands.q, ((0, 0), (0, count * size - spec.q_len), (0, 0), (0, 0)))
    chunks = q.reshape(spec.batch, count, size, *q.shape[2:]).swapaxes(0, 1)
    first = jnp.arange(count, dtype=jnp.int32) * size
    out, lse = lax.map(lambda x: _some_queries(spec, operands, *x), (chunks, first))
    out = out.swapaxes(0, 1).reshape(spec.batch, -1, *out.shape[3:])
    lse = jnp.moveaxis(lse, 0, 2).reshape(*lse.shape[1:3], -1)
    return out[:, : spec.q_len], lse[:, :, : spec.q_len]


def _some_queries(
    spec: DecodeSpec, operands: DecodeOperands, q: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same for the queries `q` [B, t, Hq, D] from number `first` on."""
    cache, num_slots = operands.cache, spec.cache.num_slots
    batch, size, num_q_heads, head_dim = q.shape
    index = first + jnp.arange(size, dtype=jnp.int32)
    q_pos = operands.starts[:, None] + index
    is_real = index < operands.counts[:, None]
    q = q.reshape(batch, size, spec.num_kv_heads, spec.group, head_dim)
    lines = (batch, spec.num_kv_heads, spec.group, size)
    block = min(BLOCK, num_slots)

    def step(j, state):
        start = jnp.minimum(j * block, num_slots - block)
        k, v, kv_pos = cache.read(start, block)
        # The last block starts earlier: what came before is done.
        is_new = start + jnp.arange(block) >= j * block
        positions = q_pos[:, None, :, None], kv_pos[:, None, None, :]
        ok = _allowed(spec, operands, *positions) & is_new & is_real[:, None, :, None]
        _, used_keys = tile.in_use(ok, spec.num_kv_heads)
        v = jnp.where(used_keys.swapaxes(1, 2), v, 0)
        s = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=spec.state_dtype)
        s = s.reshape(batch, num_q_heads, size, block)
        score_mod = _aligned(spec, operands.score_mod, *positions)
        s = tile.logits(s, *positions, spec.scale, score_mod)
        s = jnp.where(ok, s, -jnp.inf).reshape(*lines, block)
        m = jnp.maximum(state.m, s.max(-1))
        p = softmax_state.exp_shifted(s, m[..., None])
        alpha = softmax_state.exp_shifted(state.m, m)
        pv = jnp.einsum(
            "bkgts,bskd->bkgtd", p.astype(spec.dtype), v, preferred_element_type=spec.state_dtype
        )
        return softmax_state.SoftmaxState(
            state.acc * alpha[..., None] + pv, m, state.l * alpha + p.sum(-1)
        )

    state = softmax_state.init(lines, spec.value_dim, spec.state_dtype)
    used_slots = jnp.minimum(cache.lengths.max(), num_slots)
    state = lax.fori_loop(0, (used_slots + block - 1) // block, step, state)
    out, lse = softmax_state.finalize(state)
    out = jnp.moveaxis(out, 3, 1).reshape(batch, size, num_q_heads, spec.value_dim)
    return out.astype(spec.dtype), lse.reshape(batch, num_q_heads, size)


def _allowed(spec: DecodeSpec, operands: DecodeOperands, q_pos: Any, kv_pos: Any) -> jax.Array:
    """Where the queries attend: [B, Hq or 1, t, slots]."""
    ok = (kv_pos >= 0) & (kv_pos <= q_pos) & (kv_pos < spec.cache.max_len)
    if spec.cache.window is not None:
        ok &= kv_pos > q_pos - spec.cache.window
    if operands.mask is None:
        return ok
    return ok & _aligned(spec, operands.mask, q_pos, kv_pos).allowed(q_pos, kv_pos)


def _aligned[T](spec: DecodeSpec, term: T, q_pos: jax.Array, kv_pos: jax.Array) -> T:
    """A term whose arrays over whole sequences are replaced by what they hold at positions.

    Every array of the result broadcasts against the scores of q_pos [B, 1, t, 1] and kv_pos
    [B or 1, 1, 1, slots].
    """

    def align(x: jax.Array, axes: Axes) -> jax.Array:
        if x.shape[0] not in (1, spec.batch):
            x = jnp.repeat(x, spec.batch // x.shape[0], axis=0)
        if axes[-1:] == (DISTANCE,):
            return _at_distances(x, axes, kv_pos - q_pos)
        by_axis = dict(zip(axes, x.shape, strict=True))
        x = x.reshape([by_axis.get(axis, 1) for axis in SCORE_AXES])
        for axis, positions in ((Q, q_pos), (KV, kv_pos)):
            if by_axis.get(axis, 1) > 1:
                x = jnp.take_along_axis(x, positions, SCORE_AXES.index(axis), mode="clip")
        return x

    return map_operands(align, term)


def _at_distances(x: jax.Array, axes: Axes, distance: jax.Array) -> jax.Array:
    """What an array over distances, the first for ``1 - max_len``, holds at [B, 1, t, slots]."""
    by_axis = dict(zip(axes, x.shape, strict=True))
    rows, heads, size = (by_axis.get(axis, 1) for axis in (BATCH, HEADS, DISTANCE))
    x = x.reshape(rows, heads, size)
    if size == 1:
        return x[..., None]
    flat = distance.reshape(distance.shape[0], 1, -1) + (size + 1) // 2 - 1
    return jnp.take_along_axis(x, flat, 2, mode="clip").reshape(-1, heads, *distance.shape[2:])
