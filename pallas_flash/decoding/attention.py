"""decode_attention: the newest tokens of every row attend to what a cache holds."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash import dispatch
from pallas_flash.api import flash_attention_with_lse
from pallas_flash.decoding.backends import BACKENDS, BLOCKWISE, DecodeBackend
from pallas_flash.decoding.cache import KVCache
from pallas_flash.decoding.paged_cache import PagedKVCache
from pallas_flash.decoding.prefill import AtPositions, NewTokens, is_shiftable
from pallas_flash.decoding.request import (
    Cache,
    DecodeOperands,
    DecodeSpec,
    make_decode_request,
)
from pallas_flash.masks import Mask
from pallas_flash.parallel import distributed, partitioned, vary_together
from pallas_flash.scores import ScoreMod, Sink
from pallas_flash.terms import leaf_axes

# Queries of a group of heads that one pass over the cache serves; more are a prompt.
MOST_ROWS = 64


class Plan(NamedTuple):
    """What is static in a call beside the operands' shapes and structure."""

    scale: float
    backend: str | None


def decode_attention(
    q: jax.Array,
    cache: Cache,
    *,
    lengths: Any = None,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of the newest tokens of every row, which the cache already holds.

    Row b has ``n = lengths[b]`` new tokens; query i stands at ``cache.lengths[b] - n + i`` and
    attends to the keys at or before it, of a cache with a window to the last `window` of them. The
    result is that of `flash_attention` over whole sequences with ``Causal() & mask``, for these
    rows. One or a few queries stream the cache once; many (a prompt) are dense attention. Not
    differentiable: to train, take `flash_attention`.

    Args:
      q: [B, Tq, Hq, D] of the cache's dtype, rows as given to `append`; Hq a multiple of Hkv.
      cache: `KVCache` or `PagedKVCache`.
      lengths: [B] integer, how many of the Tq queries of each row are real, the first ones: what
        `append` was given. None for all of them.
      mask, score_mod: as for `flash_attention`, besides what the cache implies. They see positions
        in the sequence; arrays over queries or keys span ``cache.max_len`` of them.
      scale: factor of the scores; None means ``D ** -0.5``.
      backend: None for the fastest that serves the request on the device at hand, or a name from
        `explain_decode`, which then never falls back.

    Returns:
      out: [B, Tq, Hq, Dv], q's dtype. 0 for queries that are not real; NaN for the rows of a cache
      that have lost a token, or have fewer tokens than queries, where that is not known when the
      function is called.

    Raises:
      TypeError, ValueError: as `flash_attention`; also if the cache holds fewer tokens than there
        are queries, has lost one, or its ring is too small for so many queries.

    Source: Flash-Decoding (Dao et al. 2023); paged attention (Kwon et al. 2023, arXiv:2309.06180).
    """
    request = make_decode_request(
        q, cache, lengths=lengths, mask=mask, score_mod=score_mod, scale=scale
    )
    operands, scale, sinks = request
    spec = DecodeSpec.of(operands, scale)
    if is_prompt(spec):
        return _prompt(operands, scale, sinks, backend)
    _select(spec, backend)
    if backend is None:
        _warn_of_fallback(spec)
    return _decode(Plan(scale, backend), _without_gradient(operands), sinks)


def explain_decode(
    q: Any,
    cache: Cache,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
) -> dict[str, str | None]:
    """For every backend the reason why it does not serve such a `decode_attention` here, or None.

    The first name without a reason is the one that ``backend=None`` uses.
    """
    # Of no queries: a cache that holds nothing yet may be asked about.
    operands, scale, _ = make_decode_request(
        q, cache, lengths=0, mask=mask, score_mod=score_mod, scale=None
    )
    spec = DecodeSpec.of(operands, scale)
    return {b.name: b.unsupported(spec) or dispatch.no_device(b) for b in BACKENDS}


@jax.custom_jvp
def _without_gradient(operands: DecodeOperands) -> DecodeOperands:
    """The same, with an error of our own for who differentiates it."""
    return operands


@_without_gradient.defjvp
def _(primals, tangents):
    raise NotImplementedError(
        "decode_attention is not differentiable: to train, take flash_attention"
    )


def is_prompt(spec: DecodeSpec) -> bool:
    """Whether so many queries are asked about that dense attention serves them, and it can."""
    return spec.q_len * spec.group > MOST_ROWS and is_shiftable(spec.mask, spec.score_mod)


def _prompt(
    operands: DecodeOperands, scale: float, sinks: tuple[Sink, ...], backend: str | None
) -> jax.Array:
    """The same by `flash_attention` over the cache in the order of positions."""
    cache, score_mod = operands.cache, operands.score_mod
    k, v, kv_starts = cache.in_order()
    starts = operands.starts, kv_starts
    out, lse = flash_attention_with_lse(
        operands.q,
        k,
        v,
        mask=NewTokens(*starts, operands.counts, operands.mask, cache.window),
        score_mod=None if score_mod is None else AtPositions(*starts, score_mod),
        scale=scale,
        backend=backend,
    )
    return _finish(operands, out, lse, sinks)


@functools.partial(jax.jit, static_argnums=0)
def _decode(plan: Plan, operands: DecodeOperands, sinks: tuple[Sink, ...]) -> jax.Array:
    leaves, tree = jax.tree.flatten(operands)

    def local(*leaves):
        operands = jax.tree.unflatten(tree, leaves)
        return _run(DecodeSpec.of(operands, plan.scale), plan.backend, operands)

    axes_in, axes_out = _axes_of(operands), [_OUT_AXES, _LSE_AXES]
    if isinstance(operands.cache, KVCache):
        terms = range(len(_axes_of(DecodeOperands(None, None, operands.cache))), len(axes_in))
        out, lse = distributed(local, axes_in, axes_out, shared=terms)(*leaves)
    else:
        out, lse = partitioned(local, axes_in, axes_out)(*leaves)
    return _finish(operands, out, lse, sinks)


_Q_AXES, _OUT_AXES = (("batch", "q", "heads", dim) for dim in ("dim", "value_dim"))
_LSE_AXES = ("batch", "heads", "q")


def _axes_of(operands: DecodeOperands) -> list[tuple[str, ...]]:
    """Named axes of the operands' arrays, in the order of ``jax.tree.leaves``."""
    tokens: tuple[str, ...] = ("batch", "slots")
    tables = []
    if isinstance(operands.cache, PagedKVCache):
        tokens, tables = ("pages", "slots"), [("batch", "row_pages")]
    k, v = ((*tokens, "kv_heads", dim) for dim in ("dim", "value_dim"))
    terms = leaf_axes(operands.mask) + leaf_axes(operands.score_mod)
    return [_Q_AXES, ("batch",), k, v, *tables, ("batch",), *terms]


def _finish(
    operands: DecodeOperands, out: jax.Array, lse: jax.Array, sinks: tuple[Sink, ...]
) -> jax.Array:
    """out with the sinks; 0 for queries that are not real, NaN for rows that have lost a token."""
    for sink in sinks:
        out, lse = sink.join(out, lse)
    is_real = jnp.arange(out.shape[1]) < operands.counts[:, None]
    is_valid = operands.cache.is_valid & (operands.starts >= 0)
    out = jnp.where(is_real[..., None, None], out, 0)
    return jnp.where(is_valid[:, None, None, None], out, jnp.nan).astype(out.dtype)


def _select(spec: DecodeSpec, name: str | None) -> DecodeBackend:
    """The backend that serves `spec`: the one named, or the first that can.

    Raises:
      ValueError: if the named backend does not exist or cannot serve the request.
    """
    if name is None:
        able = (b for b in BACKENDS if b.unsupported(spec) is None and not dispatch.wrong_gpu(b))
        return next(able)
    named = next((b for b in BACKENDS if b.name == name), None)
    if named is None:
        raise ValueError(f"backend={name!r} must be one of {[b.name for b in BACKENDS]} or None")
    if reason := named.unsupported(spec) or dispatch.wrong_gpu(named):
        raise ValueError(f"backend={name!r} cannot serve this request: {reason}")
    return named


def _warn_of_fallback(spec: DecodeSpec) -> None:
    """Says, once per reason, that a GPU is present and its fastest kernel is not used."""
    if jax.default_backend() != "gpu":
        return
    chosen = _select(spec, None)
    for b in BACKENDS[: BACKENDS.index(chosen)]:
        dispatch.warn_once(
            f"decode_attention uses the backend {chosen.name!r}, which is slower than {b.name!r}: "
            f"{b.unsupported(spec) or dispatch.no_device(b)}. Name a backend to silence this."
        )


def _run(
    spec: DecodeSpec, name: str | None, operands: DecodeOperands
) -> tuple[jax.Array, jax.Array]:
    """out and lse by the backend that fits the platform lowered for."""
    chosen = _select(spec, name)

    def call(b, operands):
        return vary_together(b.forward(spec, operands), like=jax.tree.leaves(operands))

    if chosen.platform is None:
        return call(chosen, operands)
    on_gpu = functools.partial(call, chosen)
    if name is None:
        elsewhere = functools.partial(call, BLOCKWISE)
    else:
        elsewhere = functools.partial(dispatch.refuse, on_gpu, chosen)
    return lax.platform_dependent(operands, cuda=on_gpu, default=elsewhere)
