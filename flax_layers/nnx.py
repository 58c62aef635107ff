"""Flax nnx: `attention_fn` for Flax's own layer, and Flax's attention layer on flash attention."""

import inspect

import jax
from flax import nnx
from flax.nnx import dot_product_attention as flax_attention
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype

from flax_layers import adapter
from flax_layers.nnx_attention import Attention
from pallas_flash import Mask

__all__ = ["Attention", "MultiHeadAttention", "attention_fn"]


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
    promote_dtype=flax_promote_dtype,
    is_causal=False,
    *,
    score_mod=None,
    backend=None,
) -> jax.Array:
    """Returns attention as `flax.nnx.dot_product_attention` defines it, in linear memory.

    For `attention_fn=` of Flax's layer. `functools.partial` sets the extras `score_mod` and
    `backend`.

    Dropout is computed in the kernel, from other random bits than Flax draws from the same key.

    Two requests form the weights as an array, quadratic in length, through Flax's own function:
    `module` (Flax's `sow_weights`; dropout then has Flax's bits) and complex inputs.

    A query that may attend to nothing gives 0 on both paths, where Flax gives the mean of all
    values. The weights that are sown for such a query are Flax's (uniform).

    Args:
        query: [batch..., Tq, Hq, D], any number of batch axes.
        key: [batch..., Tkv, Hkv, D], Hq a multiple of Hkv.
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
        module: the nnx module that sows the weights as "attention_weights".
        promote_dtype: casts (query, key, value), called with `dtype=`.
        is_causal: query i sees keys 0..i only (aligned top-left), besides `mask`.
        score_mod: a `pallas_flash` score modification, applied after the bias.
        backend: name of the `pallas_flash` backend; None chooses.

    Returns:
        [batch..., Tq, Hq, Dv] in the promoted dtype.

    Raises:
        ValueError: `score_mod` or `backend` where dense attention is needed; an array that does
            not fit; a dropout rate outside [0, 1) or without key; a precision that names an
            algorithm.
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
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
            mask=adapter.as_mask(mask, query, key, is_causal=is_causal),
            score_mod=adapter.with_bias(score_mod, bias, query, key),
            dropout=active_dropout,
            precision=precision,
            backend=backend,
        )
    adapter.refuse_dense(reason, score_mod=score_mod, backend=backend)
    mask = adapter.dense_mask(mask, query, key, is_causal=is_causal)
    query, key, value = adapter.zero_unused(query, key, value, mask)
    out = flax_attention(
        query,
        key,
        value,
        bias,
        mask,
        precision=precision,
        module=module,
        **dropout,
    )
    return adapter.zero_empty_rows(out, mask)


class MultiHeadAttention(nnx.MultiHeadAttention):
    """Flax's nnx `MultiHeadAttention` on flash attention.

    Constructor, call and state are Flax's, `num_kv_heads` (grouped key and value heads) included:
    the state of Flax's layer loads. It differs in this:

    - `attention_fn` defaults to this module's, which says what is dense.
    - `mask` may be a `pallas_flash.Mask`. When decoding, it sees the query at position
      `cache_index`.
    - `is_causal` is ignored when decoding, with every version of Flax: all that the cache holds is
      in the past. (Before 0.12.11, Flax's layer sees the first position only.)
    """

    def __init__(self, *args, attention_fn=attention_fn, **kwargs):
        super().__init__(*args, attention_fn=attention_fn, **kwargs)

    def __call__(self, *inputs, mask=None, decode=None, is_causal=False, **kwargs):
        if self.decode if decode is None else decode:
            is_causal = False
            if (
                isinstance(mask, Mask)
                and self.cached_key is not None
                and self.cache_index is not None
            ):
                mask = adapter.decode_mask(
                    mask, self.cache_index[...], self.cached_key.shape, self.num_heads
                )
        return super().__call__(*inputs, mask=mask, decode=decode, is_causal=is_causal, **kwargs)


def _show_signature(method, like, **defaults):
    """Gives `method` the signature of Flax's `like`, with other defaults, for `help`."""
    signature = inspect.signature(like)
    parameters = [
        p.replace(default=defaults.get(name, p.default)) for name, p in signature.parameters.items()
    ]
    method.__signature__ = signature.replace(parameters=parameters)


_show_signature(
    MultiHeadAttention.__init__, nnx.MultiHeadAttention.__init__, attention_fn=attention_fn
)
_show_signature(MultiHeadAttention.__call__, nnx.MultiHeadAttention.__call__)
