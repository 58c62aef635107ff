"""A GPT in Flax whose attention is a choice, and its training step: what `train_step` measures."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import flax_layers.linen
import pallas_flash as pf
from benchmarks import peers
from benchmarks.cases import Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The default is GPT-2's smallest model: 124 M parameters, the embedding tied to the output."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50304

    def case(self, batch: int, length: int) -> Case:
        """The attention of one layer."""
        head_dim = self.width // self.heads
        return Case(
            batch=batch,
            q_len=length,
            kv_len=length,
            num_q_heads=self.heads,
            num_kv_heads=self.heads,
            head_dim=head_dim,
            value_dim=head_dim,
            causal=True,
        )


# Those that hold T x S scores.
QUADRATIC = {"flax"}


class Attention(NamedTuple):
    """A layer with Flax's arguments, and what it takes as a mask to be causal."""

    layer: Callable[..., nn.Module]
    make_mask: Callable[[jax.Array], Any]


def attention(impl: str, case: Case) -> Attention:
    """Flax's layer as it comes, ours in its place, or Flax's layer with a peer's function."""
    if impl == "flax":
        return Attention(nn.MultiHeadDotProductAttention, nn.make_causal_mask)
    if impl == "ours":
        return Attention(flax_layers.linen.MultiHeadDotProductAttention, lambda tokens: pf.Causal())
    function = peers.PEERS[impl].make(case)

    def attention_fn(query, key, value):
        return function(query, key, value)

    layer = partial(nn.MultiHeadDotProductAttention, attention_fn=attention_fn)
    return Attention(layer, lambda tokens: None)


class Block(nn.Module):
    """One layer of the Transformer, in the form that `nn.scan` takes."""

    sizes: Sizes
    attention: Attention

    @nn.compact
    def __call__(self, x, _):
        # The backward pass makes what is elementwise anew, as XLA does without a scan.
        norm = partial(nn.remat(nn.LayerNorm, prevent_cse=False), use_bias=False, dtype=x.dtype)
        gelu = jax.checkpoint(nn.gelu, prevent_cse=False)
        dense = partial(nn.Dense, use_bias=False, dtype=x.dtype)
        attend = self.attention.layer(self.sizes.heads, use_bias=False, dtype=x.dtype)
        x = x + attend(norm()(x), mask=self.attention.make_mask(x[..., 0]))
        y = gelu(dense(4 * self.sizes.width)(norm()(x)))
        return x + dense(self.sizes.width)(y), None


class GPT(nn.Module):
    """Next-token logits [B, T, vocabulary] for tokens [B, T]; bfloat16, float32 parameters.

    Positions are added as waves: a table of parameters would end somewhere.
    """

    sizes: Sizes
    attention: Attention
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens):
        sizes = self.sizes
        embed = nn.Embed(
            sizes.vocabulary,
            sizes.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        x = embed(tokens) + waves(tokens.shape[1], sizes.width).astype(self.dtype)
        # One layer is compiled, not twelve.
        layers = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=sizes.layers
        )
        x, _ = layers(sizes, self.attention)(x, None)
        return embed.attend(nn.LayerNorm(use_bias=False, dtype=self.dtype)(x))


def waves(length: int, width: int) -> jax.Array:
    """Sinusoidal codes of positions, [length, width] float32 (Vaswani et al. 2017, 3.5)."""
    frequencies = 10_000.0 ** -jnp.linspace(0, 1, width // 2)
    angles = jnp.arange(length)[:, None] * frequencies
    return 0.02 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


OPTIMIZER = optax.adamw(3e-4, b2=0.95, weight_decay=0.1)


def initial_state(sizes: Sizes) -> Any:
    """Parameters and the optimizer's state. Every implementation starts from the same."""

    @jax.jit
    def init(key):
        # A few tokens, and Flax's own layer: the parameters know nothing of lengths and kernels.
        model = GPT(sizes, attention("flax", sizes.case(1, 8)))
        params = model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        return params, OPTIMIZER.init(params)

    return init(jax.random.key(0))


def train_step(model: GPT) -> Any:
    """Jitted: (state, tokens [B, T + 1]) -> (new state in the old one's memory, loss in nats)."""

    def loss_fn(params, tokens):
        logits: Any = model.apply({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens[:, 1:]
        )
        return losses.mean()

    @partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        params, optimizer = state
        loss, gradients = jax.value_and_grad(loss_fn)(params, tokens)
        updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
        return (optax.apply_updates(params, updates), optimizer), loss

    return step
