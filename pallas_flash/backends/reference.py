"""Algorithm 0: attention with the whole matrix of scores in memory. The definition of correct.

Forward: S = mod(scale Q K^T), P = softmax(S), O = drop(P) V. Backward: dV = drop(P)^T dO,
dP = drop(dO V^T), dS = P * (dP - delta), and dQ, dK and the score mod's gradients from dS.
Source: FlashAttention-2 (Dao 2023), section 2.2. Everything is computed in float32, or in float64
for float64 inputs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends import tile
from pallas_flash.backends.backend import Backend, delta_of
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import Tile, floating, floating_axes, map_operands


@dataclass(frozen=True)
class ReferenceConfig:
    """Nothing to configure."""


def _einsum(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, precision=lax.Precision.HIGHEST)


def _per_q_head(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """[B, T, H, D] to [B, Hq, T, D] in the state's dtype."""
    x = x.astype(spec.state_dtype).transpose(0, 2, 1, 3)
    return jnp.repeat(x, spec.num_q_heads // x.shape[1], axis=1)


def _prepare(spec: AttentionSpec, operands: Operands):
    """q, k, v per query head with unused rows zeroed, where they may attend, the rule of the logits
    and of dropout, and the aligned score mod.
    """
    whole = Tile(spec.batch, 0, spec.q_len, 0, spec.kv_len, spec.q_len)
    mask = map_operands(whole.align, operands.mask)
    score_mod = map_operands(whole.align, operands.score_mod)
    q, k, v = (_per_q_head(x, spec) for x in (operands.q, operands.k, operands.v))
    q_pos, kv_pos = whole.positions()
    ok = tile.allowed(mask, q_pos, kv_pos)
    used_q, used_kv = tile.in_use(ok, spec.num_q_heads)
    q, k, v = jnp.where(used_q, q, 0), jnp.where(used_kv, k, 0), jnp.where(used_kv, v, 0)

    def logits(q, k, score_mod):
        s = _einsum("bhqd,bhkd->bhqk", q, k)
        return tile.logits(s, q_pos, kv_pos, spec.scale, score_mod)

    def drop(p):
        return tile.dropped(p, map_operands(whole.align, operands.dropout), q_pos, kv_pos)

    return q, k, v, ok, logits, drop, score_mod


def forward(spec: AttentionSpec, config: ReferenceConfig, operands: Operands):
    """out [B, Tq, Hq, Dv] and lse [B, Hq, Tq]."""
    q, k, v, ok, logits, drop, score_mod = _prepare(spec, operands)
    s = jnp.where(ok, logits(q, k, score_mod), -jnp.inf)
    row_max = lax.stop_gradient(s.max(-1, keepdims=True))
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    p = jnp.where(ok, jnp.exp(s - row_max), 0)
    attends = ok.any(-1, keepdims=True)
    denominator = jnp.where(attends, p.sum(-1, keepdims=True), 1)
    out = _einsum("bhqk,bhkd->bqhd", drop(p / denominator), v)
    lse = jnp.where(attends, row_max + jnp.log(denominator), -jnp.inf)[..., 0]
    return out.astype(spec.dtype), lse


def backward(
    spec: AttentionSpec, config: ReferenceConfig, operands: Operands, out, lse, dout, dlse
):
    """dq, dk, dv and the gradients of the score mod's arrays."""
    delta = delta_of(out, dout, dlse)
    q, k, v, ok, logits, drop, score_mod = _prepare(spec, operands)
    arrays, rebuild = floating(score_mod)
    arrays = [x.astype(spec.state_dtype) for x in arrays]
    s, logits_vjp = jax.vjp(lambda q, k, arrays: logits(q, k, rebuild(arrays)), q, k, arrays)
    dout = jnp.where(ok.any(-1, keepdims=True), _per_q_head(dout, spec), 0)
    p = tile.probabilities(s, lse, ok)
    dv = _einsum("bhqk,bhqd->bhkd", drop(p), dout)
    dp = drop(_einsum("bhqd,bhkd->bhqk", dout, v))
    ds = jnp.where(ok, p * (dp - delta[..., None]), 0)
    dq, dk, d_arrays = logits_vjp(ds)

    def per_kv_head(x):
        x = x.reshape(spec.batch, spec.num_kv_heads, spec.group, *x.shape[2:]).sum(2)
        return x.transpose(0, 2, 1, 3).astype(spec.dtype)

    whole = Tile(spec.batch, 0, spec.q_len, 0, spec.kv_len, spec.q_len)
    own, axes = floating(operands.score_mod)[0], floating_axes(operands.score_mod)
    d_score_mod = [
        whole.add(jnp.zeros(x.shape, d.dtype), a, d).astype(x.dtype)
        for x, a, d in zip(own, axes, d_arrays, strict=True)
    ]
    return (
        dq.transpose(0, 2, 1, 3).astype(spec.dtype),
        per_kv_head(dk),
        per_kv_head(dv),
        d_score_mod,
    )


BACKEND = Backend(
    name="reference",
    platform=None,
    unsuited=lambda device: None,
    config_type=ReferenceConfig,
    unsupported=lambda spec: None,
    default_config=lambda spec: ReferenceConfig(),
    forward=forward,
    backward=backward,
)
