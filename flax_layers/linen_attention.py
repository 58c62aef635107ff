"""`flax_layers.linen.Attention`: the parameters; `layer` has what is computed from them."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import default_kernel_init

from flax_layers import layer
from flax_layers.rope import Rope
from pallas_flash import KVCache, Mask, ScoreMod


class Attention(nn.Module):
    """Self- or cross-attention of today's Transformers, in linear memory.

    The parameters have the names and shapes of Flax's `MultiHeadDotProductAttention` (`query`,
    `key`, `value`, `out`); `qk_norm` adds `query_norm` and `key_norm`, `sinks` adds `sinks` [Hq].
    Partitioning metadata comes with the initializers, ``nn.with_partitioning(init, names)``: names
    of [features, heads, head_dim] for kernels and [heads, head_dim] for biases; those of `out` are
    [heads, head_dim, features] and [features].

    Attributes:
        num_heads: heads of queries, Hq.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`: grouped-query attention,
            multi-query with 1. None means `num_heads`.
        head_dim: features of a head; None means the input's features / `num_heads`.
        mask: e.g. ``Causal() & SlidingWindow(1023, 0)``, for every call.
        score_mod: e.g. ``Softcap(50.0)``, for every call.
        rope: rotary embeddings, e.g. ``Rope()``, or None.
        scale: factor of the scores; None means ``head_dim ** -0.5``.
        qk_norm: RMSNorm over the features of each head of queries and keys, before `rope`.
        sinks: initializer of a logit for each head that takes part in the softmax; None for none.
        dropout_rate: of the attention weights, each head and batch row on its own.
        deterministic: no dropout; may be said in the call instead. Needed where `dropout_rate` > 0.
        use_bias: whether the projections add a bias.
        dtype: of the computation (`jnp.bfloat16`, say); None follows inputs and parameters.
        param_dtype: of the parameters.
        precision: of the matrix products, as in Flax.
        kernel_init, bias_init: of the projections.
        out_kernel_init, out_bias_init: of the last projection; None means those above.
        backend: name of a `pallas_flash` backend; None chooses.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mask: Mask | None = None
    score_mod: ScoreMod | None = None
    rope: Rope | None = None
    scale: float | None = None
    qk_norm: bool = False
    sinks: Callable[..., Any] | None = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Any] = default_kernel_init
    out_kernel_init: Callable[..., Any] | None = None
    bias_init: Callable[..., Any] = nn.initializers.zeros
    out_bias_init: Callable[..., Any] | None = None
    backend: str | None = None

    @nn.compact
    def __call__(
        self,
        inputs,
        inputs_kv=None,
        *,
        mask=None,
        score_mod=None,
        is_causal=False,
        segment_ids=None,
        positions=None,
        cache=None,
        lengths=None,
        deterministic=None,
    ):
        """Returns attention of the inputs, and the new cache if one is given.

        Args:
            inputs: [batch..., T, features].
            inputs_kv: [batch..., Tkv, features] that keys and values are made of; None: `inputs`.
            mask: joins the layer's: a `pallas_flash.Mask`, or an array as Flax takes it, broadcast
                to [batch..., Hq, Tq, Tkv], non-zero keeps. An array stays T x S numbers.
            score_mod: applied after the layer's. Arrays that it holds get their gradients.
            is_causal: joins ``Causal()``.
            segment_ids: [batch..., T] integers: documents packed in a row, each of which attends
                to itself; negative is padding. Positions count from 0 in each run of equal ids.
            positions: [batch..., T] integers, of `rope` alone, in place of the default 0, 1, ...
            cache: of `make_cache`, or a `PagedKVCache` with pages reserved: the inputs are the next
                tokens of its rows. Arrays of masks and score mods span its `max_len`.
            lengths: [batch] integers, with a cache: how many of the T tokens are real, the first
                ones; the others say nothing.
            deterministic: as the attribute.

        Returns:
            [batch..., T, features], with a cache the pair of this and the new cache.

        Raises:
            ValueError: arguments that exclude each other, or sizes that do not fit.
        """
        call = layer.Call(mask, score_mod, is_causal, segment_ids, positions, cache, lengths)
        source = layer.key_value_inputs(self, inputs, inputs_kv, call)
        heads = layer.heads_of(self, inputs.shape[-1])
        options = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        inits = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}

        def project(name, num_heads, inputs):
            return nn.DenseGeneral((num_heads, heads.dim), name=name, **inits, **options)(inputs)

        query = project("query", heads.num_q, inputs)
        key = project("key", heads.num_kv, source)
        value = project("value", heads.num_kv, source)
        if self.qk_norm:
            norm = functools.partial(nn.RMSNorm, dtype=self.dtype, param_dtype=self.param_dtype)
            query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
        sinks, dropout_key = None, None
        if self.sinks is not None:
            sinks = self.param("sinks", self.sinks, (heads.num_q,), self.param_dtype)
        if self.dropout_rate > 0 and not nn.merge_param(
            "deterministic", self.deterministic, deterministic
        ):
            dropout_key = self.make_rng("dropout")
        out, cache = layer.attend(
            self, query, key, value, call, sinks=sinks, dropout_key=dropout_key
        )
        out = nn.DenseGeneral(
            inputs.shape[-1],
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
            **options,
        )(out)
        return out if cache is None else (out, cache)

    def make_cache(self, batch: int, max_len: int, dtype: Any = None, **options: Any) -> KVCache:
        """Returns an empty cache for `batch` rows of at most `max_len` tokens.

        It works on a layer without parameters too. A ring if the layer's mask has a window.

        Args:
            dtype: of keys and values; None means the layer's `dtype`, or else its `param_dtype`.
            options: of `KVCache.create`: ``max_queries`` tokens of a prompt go in at once.

        Raises:
            ValueError: `head_dim` is None; what `KVCache.create` raises.
        """
        return layer.make_cache(self, batch, max_len, dtype, None, **options)
