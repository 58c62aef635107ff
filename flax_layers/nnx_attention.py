"""`flax_layers.nnx.Attention`: the parameters; `layer` has what is computed from them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init

from flax_layers import layer
from flax_layers.rope import Rope
from pallas_flash import KVCache, Mask, ScoreMod


class Attention(nnx.Module):
    """Self- or cross-attention of today's Transformers, in linear memory.

    `flax_layers.linen.Attention` in nnx: arguments, call, parameters and results are the same, and
    are described there. Beyond them:

    Args:
        in_features: features of the inputs, and of the outputs.
        in_kv_features: of `inputs_kv`; None means `in_features`.
        rngs: stream "params" for the parameters; with `dropout_rate` > 0, stream "dropout" too.

    Partitioning metadata: ``nnx.with_partitioning(init, names)`` as initializers.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        in_kv_features: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mask: Mask | None = None,
        score_mod: ScoreMod | None = None,
        rope: Rope | None = None,
        scale: float | None = None,
        qk_norm: bool = False,
        sinks: Callable[..., Any] | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        out_kernel_init: Callable[..., Any] | None = None,
        bias_init: Callable[..., Any] = nnx.initializers.zeros,
        out_bias_init: Callable[..., Any] | None = None,
        backend: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.mask, self.score_mod = _held(mask), _held(score_mod)
        self.rope, self.scale, self.backend = rope, scale, backend
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.in_features = in_features
        heads = layer.heads_of(self, in_features)
        options = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "rngs": rngs,
        }
        inits = {"kernel_init": kernel_init, "bias_init": bias_init}

        def project(features, num_heads):
            return nnx.LinearGeneral(features, (num_heads, heads.dim), **inits, **options)

        kv_features = in_features if in_kv_features is None else in_kv_features
        self.query = project(in_features, heads.num_q)
        self.key = project(kv_features, heads.num_kv)
        self.value = project(kv_features, heads.num_kv)
        norm = functools.partial(
            nnx.RMSNorm, heads.dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.query_norm = norm() if qk_norm else nnx.data(None)
        self.key_norm = norm() if qk_norm else nnx.data(None)
        self.sinks = nnx.data(None)
        if sinks is not None:
            self.sinks = nnx.Param(sinks(rngs.params(), (heads.num_q,), param_dtype))
        self.out = nnx.LinearGeneral(
            (heads.num_q, heads.dim),
            in_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            **options,
        )
        self.rngs = rngs.dropout.fork() if dropout_rate > 0 else nnx.data(None)

    def __call__(
        self,
        inputs: jax.Array,
        inputs_kv: jax.Array | None = None,
        *,
        mask=None,
        score_mod=None,
        is_causal=False,
        segment_ids=None,
        positions=None,
        cache=None,
        lengths=None,
        deterministic=None,
        rngs=None,
    ):
        """As `flax_layers.linen.Attention.__call__`.

        Args:
            rngs: `nnx.Rngs` or a stream, for dropout in place of the layer's own.
        """
        call = layer.Call(mask, score_mod, is_causal, segment_ids, positions, cache, lengths)
        source = layer.key_value_inputs(self, inputs, inputs_kv, call)
        query, key, value = self.query(inputs), self.key(source), self.value(source)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        out, cache = layer.attend(
            self,
            query,
            key,
            value,
            call,
            sinks=None if self.sinks is None else self.sinks[...],
            dropout_key=self._dropout_key(deterministic, rngs),
        )
        out = self.out(out)
        return out if cache is None else (out, cache)

    def make_cache(self, batch: int, max_len: int, dtype: Any = None, **options: Any) -> KVCache:
        """As `flax_layers.linen.Attention.make_cache`."""
        return layer.make_cache(self, batch, max_len, dtype, self.in_features, **options)

    def _dropout_key(self, deterministic, rngs) -> jax.Array | None:
        """Returns a key of `jax.random`, or None where nothing is dropped."""
        if self.dropout_rate == 0:
            return None
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic is None:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} needs deterministic=True or False, in the call "
                "or in the constructor"
            )
        if deterministic:
            return None
        stream: Any = self.rngs if rngs is None else rngs
        return stream.dropout() if isinstance(stream, nnx.Rngs) else stream()


def _held(term):
    """Returns a mask or score mod as an nnx attribute: data if it holds arrays."""
    return nnx.data(term) if jax.tree.leaves(term) else term
