"""What Flax's attention arguments mean to `flash_attention`, for the linen and the nnx layers.

Flax's arrays are [batch..., length, heads, head_dim] with any number of leading batch axes, its
masks and biases are broadcastable to [batch..., num_q_heads, q_len, kv_len]. In shapes below,
`batch...` stands for those leading axes and B for their product.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash import (
    Bias,
    Causal,
    Chain,
    DenseMask,
    Dropout,
    Mask,
    ScoreMod,
    flash_attention,
)
from pallas_flash.spec import make_request
from pallas_flash.terms import Tile, map_operands


def flash(
    query, key, value, *, mask, score_mod=None, scale=None, dropout=None, precision=None, backend
) -> jax.Array:
    """Returns `flash_attention` of Flax-shaped arrays, in linear memory.

    Args:
        query: [batch..., Tq, Hq, D].
        key: [batch..., Tkv, Hkv, D], Hq a multiple of Hkv.
        value: [batch..., Tkv, Hkv, Dv].
        mask, score_mod, scale, dropout, backend: as for `flash_attention`; their batch index counts
            the flattened batch axes.
        precision: None, a `jax.lax.Precision`, its name, or a pair of them; for the gradient's
            products too. It changes nothing for 16-bit inputs, whose products are exact.

    Returns:
        [batch..., Tq, Hq, Dv]. A query that may attend to nothing gives 0.

    Raises:
        ValueError: a precision that names an algorithm; and what `flash_attention` raises.
    """
    batch = query.shape[:-3]
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    precision = _check_precision(precision, q.dtype)
    attend = functools.partial(_attend, scale, backend)
    out = _at_precision(attend, precision, (q, k, v, mask, score_mod, dropout))
    return out.reshape(*batch, *out.shape[-3:])


def as_mask(mask, query, key, *, is_causal=False) -> Mask | None:
    """Returns Flax's mask as a `pallas_flash.Mask` over flattened batch axes.

    An array keeps its broadcast axes; only one that is broadcast along some batch axes and not
    along others is expanded over the batch (never over heads or lengths).

    Args:
        mask: broadcastable to [batch..., Hq, Tq, Tkv], any real dtype, non-zero keeps; or a `Mask`,
            which is left as it is; or None.
        query, key: of which only the shapes count.
        is_causal: query i sees keys 0..i only (aligned top-left), besides `mask`.

    Raises:
        ValueError: an array that does not broadcast.
    """
    if mask is not None and not isinstance(mask, Mask):
        mask = DenseMask(_one_batch_axis("mask", _keep(mask), _scores_shape(query, key)))
    if is_causal:
        mask = Causal() if mask is None else mask & Causal()
    return mask


def with_bias(score_mod, bias, query, key) -> ScoreMod | None:
    """Returns the score mod after a bias, broadcastable to [batch..., Hq, Tq, Tkv], is added."""
    if bias is None:
        return score_mod
    bias = Bias(_one_batch_axis("bias", bias, _scores_shape(query, key)))
    return bias if score_mod is None else Chain((bias, score_mod))


def active_dropout(
    *, dropout_rate, dropout_rng, deterministic, broadcast_dropout
) -> Dropout | None:
    """Returns the dropout that Flax's arguments ask for, or None.

    Raises:
        ValueError: `dropout_rate` outside [0, 1), or dropout without a key.
    """
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"{dropout_rate=} must be in [0, 1)")
    if dropout_rate == 0.0 or deterministic:
        return None
    if dropout_rng is None:
        raise ValueError(f"{dropout_rate=} with {deterministic=} needs a dropout_rng, got None")
    return Dropout(dropout_rate, dropout_rng, shared=broadcast_dropout)


def dense_reason(dtype, module) -> str | None:
    """Returns why Flax's own dense attention must serve this call, or None if ours does."""
    if module is not None:
        return f"sown attention weights (module={type(module).__name__})"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return f"dtype {dtype}"
    return None


def refuse_dense(reason, **options) -> None:
    """Raises ValueError if an option that only `flash_attention` has meets the dense path."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is not supported with {reason}: this needs dense "
                f"attention, which has no {name}"
            )


def refuse(**arguments) -> None:
    """Raises ValueError for any argument that is not None: a fused kernel cannot obey it."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is not supported: scores and weights are never "
                f"formed as arrays, so {name} must be None"
            )


def check_shapes(query, key, value) -> None:
    """Raises ValueError unless ranks, batch axes, lengths, depths and head counts go together."""
    shapes = f"got query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim >= 3:
        raise ValueError(
            f"q, k, v must have the same rank, [batch..., length, heads, head_dim], {shapes}"
        )
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(f"q, k, v batch dims must match, {shapes}")
    if key.shape[-3] != value.shape[-3]:
        raise ValueError(f"k, v lengths must match, {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"q, k depths must match, {shapes}")
    num_q_heads, num_kv_heads = query.shape[-2], key.shape[-2]
    if num_kv_heads != value.shape[-2]:
        raise ValueError(f"k, v num_heads must match, {shapes}")
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads=} must be a multiple of {num_kv_heads=}, {shapes}")


def dense_mask(mask, query, key, *, is_causal=False) -> jax.Array | None:
    """Returns the mask as a bool array broadcastable to [batch..., Hq, Tq, Tkv], or None."""
    scores_shape = _scores_shape(query, key)
    if isinstance(mask, Mask):
        mask = _dense_rows(mask, scores_shape)
    elif mask is not None:
        mask = _keep(mask)
        _check_broadcast("mask", mask, scores_shape)
    if is_causal:
        causal = jnp.tril(jnp.ones(scores_shape[-2:], bool))
        mask = causal if mask is None else causal & mask
    return mask


def decode_mask(mask, cache_index, cache_shape, num_q_heads) -> jax.Array:
    """Returns a structured mask as the bool array that Flax's decode step takes.

    The one query sits at position `cache_index` of a sequence as long as the cache, whose shape
    is [batch..., max_length, Hkv, D]. The result broadcasts to [batch..., Hq, 1, max_length].
    """
    *batch, max_length, _, _ = cache_shape
    return _dense_rows(mask, (*batch, num_q_heads, max_length, max_length), cache_index, 1)


def _dense_rows(mask, scores_shape, q_start=0, q_size=None) -> jax.Array:
    """Returns rows q_start.. of a structured mask over scores of shape [batch..., Hq, Tq, Tkv].

    A bool array [batch or 1..., Hq or 1, q_size, Tkv], or all rows if `q_size` is None.
    """
    *batch, num_q_heads, q_len, kv_len = scores_shape
    rows = math.prod(batch)
    # Arrays of the right sizes and of no content: the core checks and binds the mask with them.
    q, kv = jnp.zeros((rows, q_len, num_q_heads, 1)), jnp.zeros((rows, kv_len, 1, 1))
    operands, *_ = make_request(q, kv, kv, mask=mask, score_mod=None, scale=None)
    tile = Tile(rows, q_start, q_len if q_size is None else q_size, 0, kv_len, q_len)
    assert operands.mask is not None
    allowed = map_operands(tile.align, operands.mask).allowed(*tile.positions())
    allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
    batch = batch if allowed.shape[0] == rows else [1] * len(batch)
    return allowed.reshape(*batch, *allowed.shape[1:])


def zero_unused(query, key, value, mask):
    """Returns the arrays with 0 in the queries that see no key, and the keys that no query sees.

    `mask` is that of `dense_mask`. In dense attention what is masked still meets a factor of 0,
    and NaN times 0 is NaN.
    """
    if mask is None:
        return query, key, value
    mask = mask.reshape((1,) * (query.ndim - mask.ndim) + mask.shape)
    is_seen = mask.any((-3, -2))[..., None, None]
    key, value = (jnp.where(is_seen, x, jnp.zeros((), x.dtype)) for x in (key, value))
    return zero_empty_rows(query, mask), key, value


def zero_empty_rows(out, mask) -> jax.Array:
    """Returns out [batch..., Tq, Hq, Dv] with 0 where `mask` (see `dense_mask`) allows no key.

    Flax's dense attention averages all values there; this keeps the dense path's meaning ours.
    """
    if mask is None:
        return out
    mask = mask.reshape((1,) * (out.ndim - mask.ndim) + mask.shape)
    has_key = jnp.swapaxes(mask.any(-1), -1, -2)[..., None]
    return jnp.where(has_key, out, jnp.zeros((), out.dtype))


def _attend(scale, backend, operands) -> jax.Array:
    q, k, v, mask, score_mod, dropout = operands
    return flash_attention(
        q,
        k,
        v,
        mask=mask,
        score_mod=score_mod,
        scale=scale,
        dropout=dropout,
        backend=backend,
    )


def matmul_precision(precision, dtype) -> contextlib.AbstractContextManager:
    """A context whose products of `dtype` have Flax's `precision`, where nothing is differentiated.

    Raises:
        ValueError: a precision that names an algorithm.
    """
    precision = _check_precision(precision, dtype)
    return jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()


def _check_precision(precision, dtype) -> str | None:
    """Returns the name of the better one of a pair of precisions, None if it changes nothing."""
    pair = precision if type(precision) is tuple else (precision, precision)
    try:
        best = max((lax.Precision(p) for p in pair), key=lambda p: p.value)
    except ValueError:
        raise ValueError(
            f"{precision=} is not supported: it must be None, a jax.lax.Precision, "
            "the name of one, or a pair of them"
        ) from None
    is_exact = dtype.itemsize == 2
    return None if is_exact or best is lax.Precision.DEFAULT else best.name.lower()


def _at_precision(function, precision, operands):
    """Returns function(operands), its matrix products in this precision, the gradient's too."""
    if precision is None:
        return function(operands)

    # A context around the call alone would not reach the backward pass, which is traced later.
    @jax.custom_vjp
    def call(operands):
        with jax.default_matmul_precision(precision):
            return function(operands)

    def forward(operands):
        with jax.default_matmul_precision(precision):
            return jax.vjp(function, operands)

    def backward(vjp, dout):
        with jax.default_matmul_precision(precision):
            return vjp(dout)

    call.defvjp(forward, backward)
    return call(operands)


def _scores_shape(query, key) -> tuple[int, ...]:
    """Returns [batch..., Hq, Tq, Tkv]."""
    return (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])


def _keep(mask) -> jax.Array:
    """Returns a bool mask: Flax's masks have any real dtype and non-zero keeps."""
    return jnp.asarray(mask).astype(bool)


def _check_broadcast(name, array, shape) -> None:
    fits = zip(reversed(array.shape), reversed(shape), strict=False)
    if array.ndim > len(shape) or any(a not in (1, s) for a, s in fits):
        raise ValueError(
            f"{name} of shape {array.shape} must be broadcastable to "
            f"[batch..., num_q_heads, q_len, kv_len] = {shape}"
        )


def _one_batch_axis(name, array, shape) -> jax.Array:
    """Returns an array that broadcasts to shape [batch..., Hq, Tq, Tkv] as [B or 1, h, q, kv]."""
    array = jnp.asarray(array)
    _check_broadcast(name, array, shape)
    array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if any(n != 1 for n in array.shape[:-3]):
        array = jnp.broadcast_to(array, (*shape[:-3], *array.shape[-3:]))
    return array.reshape(math.prod(array.shape[:-3]), *array.shape[-3:])
