"""The state of an online softmax: (acc, m, l), and what LSE means.

For the scores ``s_j`` seen so far of one query row, ``m = max_j s_j``, ``l = sum_j exp(s_j - m)``
and ``acc = sum_j exp(s_j - m) v_j``. At the end ``out = acc / l`` and ``lse = m + log(l)``, the
natural log of the softmax denominator. A row that has seen no score has m = -inf, l = 0, acc = 0
and ends with out = 0, lse = -inf.

Source: FlashAttention-2 (Dao 2023), section 3.1, equations for one division at the end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SoftmaxState(NamedTuple):
    """acc: [..., q, Dv]; m, l: [..., q]; one dtype, at least float32."""

    acc: jax.Array
    m: jax.Array
    l: jax.Array  # noqa: E741


def init(rows: tuple[int, ...], value_dim: int, dtype) -> SoftmaxState:
    """The state of rows that have seen no score."""
    return SoftmaxState(
        jnp.zeros((*rows, value_dim), dtype),
        jnp.full(rows, -jnp.inf, dtype),
        jnp.zeros(rows, dtype),
    )


def exp_shifted(x: jax.Array, shift: jax.Array) -> jax.Array:
    """``exp(x - shift)``, and 0 where the shift is -inf (then x is, too)."""
    return jnp.exp(x - jnp.where(shift == -jnp.inf, 0, shift))


def finalize(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """out [..., q, Dv] and lse [..., q]."""
    seen = state.l != 0
    denominator = jnp.where(seen, state.l, 1)
    return state.acc / denominator[..., None], jnp.where(
        seen, state.m + jnp.log(denominator), -jnp.inf
    )
