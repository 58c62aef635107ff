"""What both caches do with the rows of a batch: checks, positions and lengths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def known(*arrays: Any) -> list[np.ndarray] | None:
    """The arrays' numbers, or None if one of them is traced, or lies on another host."""
    if any(isinstance(x, jax.core.Tracer) or not x.is_fully_addressable for x in arrays):
        return None
    return [np.asarray(x) for x in arrays]


def check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name}={size!r} must be an integer of at least 1")


def check_new_tokens(k: jax.Array, v: jax.Array, k_cache: jax.Array, v_cache: jax.Array) -> None:
    """Raises unless k and v are [B, T, Hkv, D or Dv] with the dtype and sizes of the cache.

    k_cache, v_cache: [..., Hkv, D or Dv].
    """
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.ndim != 4 or new.shape[2:] != cache.shape[-2:] or new.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"{name} must be [batch, new tokens, {cache.shape[-2]}, {cache.shape[-1]}] as in "
                f"the cache, got k {k.shape}, v {v.shape}"
            )
        if new.dtype != cache.dtype:
            raise ValueError(f"{name} must have the cache's dtype={cache.dtype}, got {new.dtype}")


def check_counts(counts: Any, name: str, batch: int, most: int) -> jax.Array:
    """[B] int32 in 0..most, from [B], one number, or None for `most`."""
    counts = jnp.asarray(most if counts is None else counts)
    if not jnp.issubdtype(counts.dtype, jnp.integer) or counts.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} must be an integer or [batch] = [{batch}] integers, got "
            f"{counts.dtype}{list(counts.shape)}"
        )
    if (numbers := known(counts)) and ((numbers[0] < 0) | (numbers[0] > most)).any():
        raise ValueError(f"{name}={numbers[0]} must be from 0 to {most}")
    return jnp.broadcast_to(jnp.clip(counts, 0, most).astype(jnp.int32), (batch,))


def check_room(lengths: jax.Array, counts: jax.Array, max_len: int) -> None:
    """Raises if a row is known to grow beyond max_len."""
    if numbers := known(lengths, counts):
        for row, (length, count) in enumerate(zip(*numbers, strict=True)):
            if count and length + count > max_len:
                raise ValueError(
                    f"the cache is full: row {row} has {length} tokens, {count} more do not fit "
                    f"max_len={max_len}"
                )


def new_positions(lengths: jax.Array, counts: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Positions [B, size] of tokens behind those of each row, and which of them are real."""
    i = jnp.arange(size, dtype=jnp.int32)
    return lengths[:, None] + i, i < counts[:, None]


def grown(lengths: jax.Array, counts: jax.Array, is_lost: jax.Array, max_len: int) -> jax.Array:
    """New lengths [B]; that of a row which lost a token is max_len + 1, for good."""
    return jnp.where(is_lost | (lengths > max_len), max_len + 1, lengths + counts)


def rewound(cache: Any, counts: Any, limit: jax.Array) -> jax.Array:
    """Lengths [B] with `counts` tokens less, at most `limit` [B]; a lost row stays lost."""
    counts = jnp.broadcast_to(jnp.asarray(counts), cache.lengths.shape)
    if numbers := known(counts, limit, cache.is_valid):
        counts_, limit_, is_valid = numbers
        if (((counts_ < 0) | (counts_ > limit_)) & is_valid).any():
            raise ValueError(f"counts={counts_} must be from 0 to {limit_}, row by row")
    is_lost = ~cache.is_valid | (counts < 0) | (counts > limit)
    return jnp.where(is_lost, cache.max_len + 1, cache.lengths - counts).astype(jnp.int32)


def selected(which: Any, batch: int) -> jax.Array:
    """[B] bool: which rows are meant, by their numbers or by [B] bool.

    Traced numbers of rows that do not exist mean none.
    """
    which = jnp.asarray(which)
    if which.dtype != bool:
        if (numbers := known(which)) and ((numbers[0] < 0) | (numbers[0] >= batch)).any():
            raise ValueError(f"rows={numbers[0]} must be from 0 to {batch - 1}")
        which = jnp.where(which < 0, batch, which)
        return jnp.zeros(batch, bool).at[which].set(True)
    if which.shape != (batch,):
        raise ValueError(f"rows must be their numbers or [{batch}] bool, got {which.shape} bool")
    return which
