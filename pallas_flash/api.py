"""The public functions: signature, meaning, and a short body."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_flash import dispatch
from pallas_flash.autodiff import Plan, attend
from pallas_flash.dropout import Dropout
from pallas_flash.masks import Causal, DenseMask, KvLengths, Mask, QLengths, SlidingWindow
from pallas_flash.parallel import align
from pallas_flash.scores import Bias, Chain, ScoreMod, Sink
from pallas_flash.spec import AttentionSpec, Operands, make_request


@functools.partial(jax.jit, static_argnums=0)
def _attend(plan: Plan, operands: Operands, sinks: tuple[Sink, ...]) -> tuple[jax.Array, jax.Array]:
    """out and lse. One compilation for every plan and shape, also where the caller does not jit."""
    out, lse = attend(plan, operands)
    for sink in sinks:
        out, lse = sink.join(out, lse)
    return out, lse


def flash_attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Exact softmax attention and the log-sum-exp of its scores, both differentiable.

    See `flash_attention` for the arguments.

    Returns:
      out: [B, Tq, Hq, Dv], q's dtype.
      lse: [B, Hq, Tq] float32 (float64 for float64 inputs), natural log of the softmax
        denominator ``sum_j exp(s_ij)``, a `Sink` included; -inf for a row that may attend to
        nothing (and has no sink).
    """
    request = make_request(q, k, v, mask=mask, score_mod=score_mod, scale=scale, dropout=dropout)
    operands, scale, sinks, has_batch = request
    spec = AttentionSpec.of(operands, scale, deterministic)
    if config is not None and backend is None:
        raise ValueError(f"config={config} needs the name of the backend it is for, got {backend=}")
    chosen = dispatch.select_backend(spec, backend)
    if config is not None and not isinstance(config, chosen.config_type):
        raise TypeError(
            f"config must be a {chosen.config_type.__name__} for backend={chosen.name!r}, "
            f"got {type(config).__name__}"
        )
    if backend is None:
        dispatch.warn_of_fallback(spec)
    leaves, tree = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(tree, align(leaves, operands.axes))
    out, lse = _attend(Plan(scale, backend, config, deterministic), operands, sinks)
    return (out, lse) if has_batch else (out[0], lse[0])


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    config: Any = None,
) -> jax.Array:
    """Exact softmax attention, computed tile by tile in linear memory.

    ``out = softmax(mask(score_mod(scale * q @ k.T))) @ v`` for each batch row and head. The order
    is always: scale, score mods from left to right, mask, softmax (with sinks), dropout. A row
    that may attend to nothing gives zeros, and zero gradients.

    Args:
      q: [B, Tq, Hq, D] or [Tq, Hq, D]; bfloat16, float16, float32 or float64.
      k: [B, Tkv, Hkv, D] or [Tkv, Hkv, D], q's dtype. Query head h reads key head
        ``h // (Hq // Hkv)``: grouped-query attention, and multi-query with Hkv = 1; keys and values
        are never repeated in memory.
      v: [B, Tkv, Hkv, Dv] or [Tkv, Hkv, Dv], q's dtype.
      mask: who may attend to whom, e.g. ``Causal() & KvLengths(lengths)``, or None.
      score_mod: elementwise change of the scaled scores, e.g. ``Softcap(50.0)``, or None. Arrays
        that it holds get their gradients.
      scale: factor of the scores; None means ``D ** -0.5``.
      dropout: of the probabilities, ``Dropout(rate, key)``, or None.
      deterministic: whether the gradients are bitwise the same in every run, on the same device and
        version; `out` always is.
      backend: None for the fastest that serves the request on the device at hand, or a name from
        `explain_backends`, which then never falls back.
      config: the named backend's tile sizes, or None for its default. It changes speed, never
        results.

    Returns:
      out: [B, Tq, Hq, Dv] or [Tq, Hq, Dv], q's dtype.

    Raises:
      TypeError: if mask, score_mod, scale, dropout, deterministic or config is not of its
        documented kind.
      ValueError: if shapes, dtypes or head counts break their rules, the backend is unknown,
        cannot serve the request, or its device is missing. The message has the value and the rule.

    Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithms 1 and 2; grouped-query
    attention (Ainslie et al. 2023, arXiv:2305.13245).
    """
    return flash_attention_with_lse(
        q,
        k,
        v,
        mask=mask,
        score_mod=score_mod,
        scale=scale,
        dropout=dropout,
        deterministic=deterministic,
        backend=backend,
        config=config,
    )[0]


def explain_backends(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    dropout: Dropout | None = None,
    deterministic: bool = False,
) -> dict[str, str | None]:
    """For every backend the reason why it does not serve such a call on this machine, or None.

    The first name without a reason is the one that ``backend=None`` uses. Takes the arguments of
    `flash_attention`; nothing is computed.
    """
    operands, scale, *_ = make_request(
        q, k, v, mask=mask, score_mod=score_mod, scale=None, dropout=dropout
    )
    return dispatch.explain_backends(AttentionSpec.of(operands, scale, deterministic))


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
    score_mod: ScoreMod | None = None,
    dropout: Dropout | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    config: Any = None,
) -> Any:
    """``jax.nn.dot_product_attention`` with this project's kernels: same arguments, same meaning.

    ``softmax(scale * query @ key.T + bias) @ value`` where the masks allow.

    Args:
      query: [B, T, N, H] or [T, N, H].
      key, value: [B, S, K, H] or [S, K, H], N a multiple of K; the value's H may differ here.
      bias: floating point, broadcastable to [B, N, T, S]; gets its gradient in its own shape.
      mask: bool, broadcastable to [B, N, T, S], True where a query attends; or a `Mask`.
      scale: factor of the scores; None means ``H ** -0.5``.
      is_causal: query i attends to keys 0..i (top-left, also when T != S).
      query_seq_lengths, key_value_seq_lengths: [B] int32, the rows beyond them are padding.
      local_window_size: (left, right), or one number for both.
      implementation: None for the fastest backend that serves the call; "xla" for plain JAX
        (``backend="blockwise"``); "cudnn" hands the call to ``jax.nn`` as it is.
      return_residual: also return the log-sum-exp of the scores, [B, T, N] in key's dtype.
      score_mod: applied after scale and before bias.
      dropout: of the probabilities, `Dropout(rate, key)`.
      deterministic, backend, config: as for `flash_attention`.

    Returns:
      out shaped like query but for value's last dimension; with `return_residual` a pair.
      Two differences from ``jax.nn``, both on purpose: a row that may attend to nothing gives
      zeros (and a residual of -inf) instead of the mean of all values, and the residual has its
      true gradient instead of none.

    Raises:
      TypeError, ValueError: as `flash_attention`; also if `implementation` is unknown or is
        combined with what ``jax.nn`` does not take.
    """
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"implementation={implementation!r} must be 'xla', 'cudnn' or None")
    if implementation == "xla":
        if backend is not None:
            raise ValueError(f"implementation='xla' is backend='blockwise', got {backend=}")
        backend = "blockwise"
    if implementation == "cudnn":
        ours = {
            "score_mod": score_mod,
            "dropout": dropout,
            "backend": backend,
            "config": config,
            "deterministic": deterministic or None,
        }
        given = [name for name, x in ours.items() if x is not None]
        if given or isinstance(mask, Mask):
            raise ValueError(
                f"implementation='cudnn' hands the call to jax.nn, which does not take "
                f"{', '.join(given) or type(mask).__name__}; leave implementation=None"
            )
        return jax.nn.dot_product_attention(  # type: ignore[call-overload]
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation=implementation,
            return_residual=return_residual,
        )

    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    masks: list[Mask] = []
    if mask is not None:
        masks.append(mask if isinstance(mask, Mask) else DenseMask(jnp.asarray(mask)))
    if is_causal:
        masks.append(Causal())
    if local_window_size is not None:
        masks.append(SlidingWindow(*local_window_size))
    if query_seq_lengths is not None:
        masks.append(QLengths(jnp.asarray(query_seq_lengths)))
    if key_value_seq_lengths is not None:
        masks.append(KvLengths(jnp.asarray(key_value_seq_lengths)))
    mods = ([] if score_mod is None else [score_mod]) + (
        [] if bias is None else [Bias(jnp.asarray(bias))]
    )
    out, lse = flash_attention_with_lse(
        query,
        key,
        value,
        mask=functools.reduce(lambda a, b: a & b, masks) if masks else None,
        score_mod=Chain(tuple(mods)) if mods else None,
        scale=scale,
        dropout=dropout,
        deterministic=deterministic,
        backend=backend,
        config=config,
    )
    if not return_residual:
        return out
    return out, jnp.swapaxes(lse, -1, -2).astype(jnp.asarray(key).dtype)
