"""A small language model over bytes, in linen and in nnx: one checkpoint fits both.

Only its attention is not Flax's own: `Attention` of this project, which takes the mask, the rotary
embeddings and the cache as arguments. `train_lm.py` trains the model, `generate.py` lets it write.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

import flax_layers.linen
import flax_layers.nnx
from flax_layers import Rope
from pallas_flash import Causal, KVCache, SlidingWindow

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a model is made of."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    # Each group of query heads shares one head of keys and values.
    kv_heads: int = 4
    # Bytes that each position looks back over, itself included.
    window: int = 128
    dtype: Any = jnp.float32

    @property
    def attention(self) -> dict[str, Any]:
        """Arguments of this project's layer, linen's or nnx's."""
        return {
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.width // self.heads,
            # A condition, not an array of length x length; and the cache need not keep more.
            "mask": Causal() & SlidingWindow(self.window - 1, 0),
            "rope": Rope(),
            "use_bias": False,
            "dtype": self.dtype,
        }

    def make_caches(self, batch: int, max_len: int, max_queries: int = 64) -> list[KVCache]:
        """An empty cache for each layer."""
        layer = flax_layers.linen.Attention(**self.attention)
        return [
            layer.make_cache(batch, max_len, max_queries=max_queries) for _ in range(self.layers)
        ]


class Transformer(nn.Module):
    """Next-byte logits [batch, length, 256] float32 for bytes [batch, length].

    With caches it takes the next bytes of each row, and returns the new caches too; of `length`
    bytes the first `lengths` [batch] are real.
    """

    sizes: Sizes
    # In its place, another layer with the same parameters.
    attention: Any = flax_layers.linen.Attention

    @nn.compact
    def __call__(self, tokens, caches=None, lengths=None):
        sizes = self.sizes
        norm = partial(nn.RMSNorm, dtype=sizes.dtype)
        dense = partial(nn.Dense, use_bias=False, dtype=sizes.dtype)
        new_caches = []
        x = nn.Embed(
            VOCABULARY, sizes.width, embedding_init=nn.initializers.normal(1.0), name="embed"
        )(tokens).astype(sizes.dtype)
        for i in range(sizes.layers):
            attend = self.attention(**sizes.attention, name=f"attention_{i}")
            y = norm(name=f"norm_{i}")(x)
            if caches is None:
                x = x + attend(y)
            else:
                y, cache = attend(y, cache=caches[i], lengths=lengths)
                x, new_caches = x + y, [*new_caches, cache]
            y = dense(4 * sizes.width, name=f"up_{i}")(norm(name=f"mlp_norm_{i}")(x))
            x = x + dense(sizes.width, kernel_init=nn.initializers.zeros, name=f"down_{i}")(
                nn.gelu(y)
            )
        logits = dense(VOCABULARY, name="logits")(norm(name="last_norm")(x)).astype(jnp.float32)
        return logits if caches is None else (logits, new_caches)


class NnxTransformer(nnx.Module):
    """The same in nnx; `nnx.update(model, params)` loads linen's parameters."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.sizes = sizes
        width, dtype = sizes.width, sizes.dtype
        dense = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        norm = partial(nnx.RMSNorm, width, dtype=dtype, rngs=rngs)
        for i in range(sizes.layers):
            layer = flax_layers.nnx.Attention(in_features=width, **sizes.attention, rngs=rngs)
            setattr(self, f"attention_{i}", layer)
            setattr(self, f"norm_{i}", norm())
            setattr(self, f"mlp_norm_{i}", norm())
            setattr(self, f"up_{i}", dense(width, 4 * width))
            setattr(self, f"down_{i}", dense(4 * width, width))
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.last_norm = norm()
        self.logits = dense(width, VOCABULARY)

    def __call__(self, tokens, caches=None, lengths=None):
        new_caches = []
        x = self.embed(tokens).astype(self.sizes.dtype)
        for i in range(self.sizes.layers):
            attend, up, down = (getattr(self, f"{n}_{i}") for n in ("attention", "up", "down"))
            y = getattr(self, f"norm_{i}")(x)
            if caches is None:
                x = x + attend(y)
            else:
                y, cache = attend(y, cache=caches[i], lengths=lengths)
                x, new_caches = x + y, [*new_caches, cache]
            x = x + down(nnx.gelu(up(getattr(self, f"mlp_norm_{i}")(x))))
        logits = self.logits(self.last_norm(x)).astype(jnp.float32)
        return logits if caches is None else (logits, new_caches)
