"""Rope: rotary position embeddings of queries and keys, and positions of packed documents."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotates pairs of a head's features by angles that grow with the position.

    Pair i turns by ``position * base ** (-2 i / dim)``; scores then depend on distances alone. For
    other frequencies (a stretched context, say) a subclass defines `frequencies`.

    Args:
      base: of the frequencies; a larger one turns more slowly.
      dim: the first features of a head that are rotated, an even number; None for all.
      interleaved: pairs are neighbours (2i, 2i + 1), as in the paper and GPT-J; else they are
        (i, i + dim / 2), as in GPT-NeoX, Llama and `flax.nnx.RoPE`.

    Raises:
      ValueError: if `base` is not positive; when used, if `dim` is odd or exceeds the head.

    Source: Su et al. 2021 (arXiv:2104.09864), section 3.2.2, equation 34.
    """

    base: float = 10_000.0
    dim: int | None = None
    interleaved: bool = False

    def __post_init__(self):
        if not self.base > 0:
            raise ValueError(f"base={self.base} must be positive")

    def frequencies(self, dim: int) -> jax.Array:
        """Radians per position of each pair, [dim / 2] float32."""
        return self.base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns x [batch..., T, H, D] rotated, for integer positions broadcastable to
        [batch..., T]. Angles are float32 at least, whatever the dtype of x."""
        head_dim = x.shape[-1]
        dim = head_dim if self.dim is None else self.dim
        if dim % 2 or not 0 < dim <= head_dim:
            raise ValueError(f"{dim=} must be even and at most {head_dim=}")
        wide = jnp.promote_types(x.dtype, jnp.float32)
        angles = positions[..., None, None].astype(wide) * self.frequencies(dim).astype(wide)
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        turned, rest = x[..., :dim].astype(wide), x[..., dim:]
        # Pairs side by side in the last axis, or in the one before it.
        axis = -1 if self.interleaved else -2
        shape = (dim // 2, 2) if self.interleaved else (2, dim // 2)
        a, b = jnp.moveaxis(turned.reshape(*x.shape[:-1], *shape), axis, 0)
        turned = jnp.stack((a * cos - b * sin, b * cos + a * sin), axis).reshape(turned.shape)
        return jnp.concatenate((turned.astype(x.dtype), rest), -1)


def document_positions(segment_ids: jax.Array) -> jax.Array:
    """Returns the position of each token in its document, int32, shaped like the ids.

    segment_ids: [..., T] integer; a document is a run of equal ids.
    """
    index = lax.broadcasted_iota(jnp.int32, segment_ids.shape, segment_ids.ndim - 1)
    before = jnp.roll(segment_ids, 1, -1)
    starts = jnp.where((segment_ids != before) | (index == 0), index, 0)
    return index - lax.cummax(starts, axis=segment_ids.ndim - 1)
