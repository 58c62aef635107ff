"""Flax linen: `attention_fn` for Flax's layers, and Flax's attention layers on flash attention."""

import functools
import inspect
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dot_product_attention as flax_attention
from flax.linen.dtypes import promote_dtype
from jax import lax

from flax_layers import adapter
from flax_layers.linen_attention import Attention
from pallas_flash import Mask

__all__ = [
    "Attention",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "SelfAttention",
    "attention_fn",
]


def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    force_fp32_for_softmax=False,
    einsum_dot_general=None,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
    *,
    score_mod=None,
    backend=None,
) -> jax.Array:
    """Returns attention as `flax.linen.dot_product_attention` defines it, in linear memory.

    For `attention_fn=` of Flax's layers. Flax drops the keywords that a hook does not name; this
    one names all of them and honours or refuses each. `functools.partial` sets the extras
    `score_mod` and `backend`.

    Dropout is computed in the kernel, from other random bits than Flax draws from the same key.

    Two requests form the weights as an array, quadratic in length, through Flax's own function:
    `module` (Flax's `sow_weights`; dropout then has Flax's bits) and complex inputs.

    A query that may attend to nothing gives 0 on both paths, where Flax gives the mean of all
    values. The weights that are sown for such a query are Flax's (uniform).

    Args:
        query: [batch..., Tq, Hq, D], any number of batch axes.
        key: [batch..., Tkv, Hkv, D], Hq a multiple of Hkv (Flax's own function needs Hkv = Hq).
        value: [batch..., Tkv, Hkv, Dv].
        bias: broadcastable to [batch..., Hq, Tq, Tkv], added to the scaled scores.
        mask: broadcastable to [batch..., Hq, Tq, Tkv], any real dtype, non-zero keeps; or a
            `pallas_flash.Mask`, whose batch index counts the flattened batch axes.
        broadcast_dropout: one dropout mask [Tq, Tkv] for all batch rows and heads.
        dropout_rng: the key of the dropout mask.
        dropout_rate: probability of dropping a weight, in [0, 1).
        deterministic: no dropout.
        dtype: what the inputs are cast to; None promotes them to their common dtype.
        precision: least precision of the matrix products: a `jax.lax.Precision`, its name, or a
            pair of them. Products of 16-bit inputs are exact in the float32 they are summed in.
        module: the linen module that sows the weights as "attention_weights".
        force_fp32_for_softmax: either value is satisfied, the softmax is float32 at least.
        einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: must be None.
        score_mod: a `pallas_flash` score modification, applied after the bias.
        backend: name of the `pallas_flash` backend; None chooses.

    Returns:
        [batch..., Tq, Hq, Dv] in the promoted dtype.

    Raises:
        ValueError: a replaced einsum or dot_general; `score_mod` or `backend` where dense
            attention is needed; an array that does not fit; a dropout rate outside [0, 1) or
            without key; a precision that names an algorithm.
    """
    adapter.refuse(
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    adapter.check_shapes(query, key, value)
    dropout = {
        "dropout_rng": dropout_rng,
        "dropout_rate": dropout_rate,
        "deterministic": deterministic,
        "broadcast_dropout": broadcast_dropout,
    }
    active_dropout = adapter.active_dropout(**dropout)
    reason = adapter.dense_reason(query.dtype, module)
    if reason is None:
        return adapter.flash(
            query,
            key,
            value,
            mask=adapter.as_mask(mask, query, key),
            score_mod=adapter.with_bias(score_mod, bias, query, key),
            dropout=active_dropout,
            precision=precision,
            backend=backend,
        )
    adapter.refuse_dense(reason, score_mod=score_mod, backend=backend)
    mask = adapter.dense_mask(mask, query, key)
    query, key, value = adapter.zero_unused(query, key, value, mask)
    # Flax's linen function has no grouped heads.
    key, value = (jnp.repeat(x, query.shape[-2] // x.shape[-2], axis=-2) for x in (key, value))
    out = flax_attention(
        query,
        key,
        value,
        bias,
        mask,
        precision=precision,
        module=module,
        force_fp32_for_softmax=force_fp32_for_softmax,
        **dropout,
    )
    return adapter.zero_empty_rows(out, mask)


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """Flax's `MultiHeadDotProductAttention` on flash attention, with grouped key and value heads.

    Constructor, call, parameters and cache are Flax's: a checkpoint of Flax's layer loads. Beyond
    Flax's attributes and arguments:

    Attributes:
        attention_fn: defaults to this module's `attention_fn`, which says what is dense.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`; None means `num_heads`.
            The key and value kernels are [features, num_kv_heads, head_dim], and so is the cache:
            [batch..., max_length, num_kv_heads, head_dim].

    Call:
        mask: an array as Flax takes it, or a `pallas_flash.Mask`. When decoding, a structured mask
            sees the query at position `cache_index`.

    Raises:
        ValueError: `num_heads` not a multiple of `num_kv_heads`; when decoding, an input that is
            not one position of the batch the cache was made for.
    """

    attention_fn: Callable[..., jax.Array] = attention_fn
    num_kv_heads: int | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q,
        inputs_k=None,
        inputs_v=None,
        *,
        inputs_kv=None,
        mask=None,
        deterministic=None,
        dropout_rng=None,
        sow_weights=False,
    ):
        if isinstance(mask, Mask) and self.decode and self.has_variable("cache", "cached_key"):
            # Flax combines the mask with its own, which sees the filled part of the cache.
            cache_shape: tuple[int, ...] = self.get_variable("cache", "cached_key").shape
            index: jax.Array = self.get_variable("cache", "cache_index")
            mask = adapter.decode_mask(mask, index, cache_shape, self.num_heads)
        call = super().__call__ if self.num_kv_heads is None else self._grouped
        return call(
            inputs_q,
            inputs_k,
            inputs_v,
            inputs_kv=inputs_kv,
            mask=mask,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            sow_weights=sow_weights,
        )

    def _grouped(
        self,
        inputs_q,
        inputs_k,
        inputs_v,
        *,
        inputs_kv,
        mask,
        deterministic,
        dropout_rng,
        sow_weights,
    ):
        """Flax's `__call__` with `num_kv_heads` heads for keys and values."""
        inputs_k, inputs_v = _key_value_inputs(inputs_q, inputs_k, inputs_v, inputs_kv)
        assert self.num_kv_heads is not None
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        qkv_features = self.qkv_features or inputs_q.shape[-1]
        if qkv_features % self.num_heads:
            raise ValueError(f"{qkv_features=} must be a multiple of num_heads={self.num_heads}")
        shared = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }

        def project(name, num_heads, inputs):
            return nn.DenseGeneral(
                (num_heads, qkv_features // self.num_heads),
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                dot_general=self.qkv_dot_general,
                dot_general_cls=self.qkv_dot_general_cls,
                name=name,
                **shared,
            )(inputs)

        query = project("query", self.num_heads, inputs_q)
        key = project("key", self.num_kv_heads, inputs_k)
        value = project("value", self.num_kv_heads, inputs_v)
        if self.normalize_qk:
            norm = functools.partial(
                nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        if self.decode:
            key, value, mask = self._decode_step(query, key, value, mask)
        if self.dropout_rate > 0.0:
            deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
            if not deterministic and dropout_rng is None:
                dropout_rng = self.make_rng("dropout")
        else:
            deterministic = True
        arguments = {
            "mask": mask,
            "dropout_rng": dropout_rng,
            "dropout_rate": self.dropout_rate,
            "broadcast_dropout": self.broadcast_dropout,
            "deterministic": deterministic,
            "dtype": self.dtype,
            "precision": self.precision,
            "force_fp32_for_softmax": self.force_fp32_for_softmax,
            "qk_attn_weights_einsum": _make(self.qk_attn_weights_einsum_cls),
            "attn_weights_value_einsum": _make(self.attn_weights_value_einsum_cls),
        }
        # As Flax: a hook need not name every argument.
        named = inspect.signature(self.attention_fn).parameters
        arguments = {name: value for name, value in arguments.items() if name in named}
        if sow_weights:
            arguments["module"] = self
        out = self.attention_fn(query, key, value, **arguments)
        return nn.DenseGeneral(
            self.out_features or inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            name="out",
            **shared,
        )(out)

    def _decode_step(self, query, key, value, mask):
        """Writes one position to the cache; returns all keys and values, and who is visible."""
        is_initialized = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
        cache_index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))
        if not is_initialized:
            return key, value, mask
        *batch, max_length, num_kv_heads, head_dim = cached_key.value.shape
        if key.shape != (*batch, 1, num_kv_heads, head_dim) or query.shape[:-2] != (*batch, 1):
            raise ValueError(
                f"decoding takes one position of each row of the cache, of shape "
                f"{cached_key.value.shape}, got query {query.shape} and key {key.shape}"
            )
        index = cache_index.value
        write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=index, axis=-3)
        cached_key.value = write(cached_key.value, key)
        cached_value.value = write(cached_value.value, value)
        cache_index.value = index + 1
        filled = jnp.arange(max_length) <= index
        filled = jnp.broadcast_to(filled, (*batch, 1, 1, max_length))
        return cached_key.value, cached_value.value, nn.combine_masks(mask, filled)


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` whose automatic name in a parent is `MultiHeadAttention_N`."""


class SelfAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` of one input. Deprecated by Flax, and here with it."""

    @nn.compact
    def __call__(
        self, inputs_q, mask=None, deterministic=None, dropout_rng=None, sow_weights=False
    ):
        warnings.warn(
            "SelfAttention is deprecated: use MultiHeadDotProductAttention with one input",
            DeprecationWarning,
            stacklevel=2,
        )
        return super().__call__(
            inputs_q,
            mask=mask,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            sow_weights=sow_weights,
        )


def _key_value_inputs(inputs_q, inputs_k, inputs_v, inputs_kv):
    """Returns the inputs of keys and of values; what is absent is copied from its left."""
    if inputs_kv is not None:
        if inputs_k is not None or inputs_v is not None:
            raise ValueError("inputs_kv must be None if inputs_k or inputs_v is given")
        warnings.warn(
            "inputs_kv is deprecated: use inputs_k and inputs_v", DeprecationWarning, stacklevel=2
        )
        return inputs_kv, inputs_kv
    if inputs_k is None:
        if inputs_v is not None:
            raise ValueError("inputs_k cannot be None if inputs_v is given: pass it as inputs_k")
        inputs_k = inputs_q
    return inputs_k, inputs_k if inputs_v is None else inputs_v


def _make(factory):
    return None if factory is None else factory()
