"""What every backend does to a tile: raw scores to logits, dropout, which rows are in use."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_flash.dropout import KeepBits
from pallas_flash.masks import Mask
from pallas_flash.scores import ScoreMod


def logits(s: Any, q_pos: Any, kv_pos: Any, scale: float, score_mod: ScoreMod | None) -> Any:
    """Scaled, then modified scores, before the mask, from ``q @ k.T`` of a tile."""
    s = s * scale
    return s if score_mod is None else score_mod.apply(s, q_pos, kv_pos)


def allowed(mask: Mask | None, q_pos: Any, kv_pos: Any) -> jax.Array:
    """Where a tile may attend: bool, [B or 1, Hq or 1, q, kv]."""
    ok = True if mask is None else mask.allowed(q_pos, kv_pos)
    return ok & jnp.ones((1, 1, q_pos.shape[2], kv_pos.shape[3]), bool)


def in_use(ok: jax.Array, num_kv_heads: int) -> tuple[jax.Array, jax.Array]:
    """Which queries attend at all and which keys are attended to.

    What is not in use may hold NaN and has to be set to zero, because a product with the zeros of
    P and dS would spread it.

    Args:
      ok: bool [B or 1, Hq or 1, q, kv].

    Returns:
      queries: [B or 1, Hq or 1, q, 1]; keys: [B or 1, Hkv or 1, kv, 1].
    """
    rows, heads, _, kv_size = ok.shape
    keys = ok.any(2)
    if heads > 1:
        keys = keys.reshape(rows, num_kv_heads, -1, kv_size).any(2)
    return ok.any(3)[..., None], keys[..., None]


def probabilities(logits: jax.Array, lse: jax.Array, ok: jax.Array) -> jax.Array:
    """``exp(logits - lse)`` where allowed, else 0; `lse` [B, Hq, q], -inf for an empty row."""
    return jnp.where(ok, jnp.exp(logits - lse[..., None]), 0)


def dropped(p: jax.Array, dropout: KeepBits | None, q_pos: Any, kv_pos: Any) -> jax.Array:
    """Probabilities, or their gradients, after dropout with aligned seeds."""
    return p if dropout is None else dropout.apply(p, q_pos, kv_pos)
