"""Masks, score mods and dropout that Hopper kernels are tested with, alone and together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import oracle
import pallas_flash as pf
from conftest import MASKS, SCORE_MODS, Score, Sizes, normal, qkv
from tolerance import assert_as_good_as_plain

KEY = jax.random.key(5)
SMALL = Sizes(2, 70, 140, 2, 1, 32, 32)
WIDE = SMALL._replace(batch=1, head_dim=144, value_dim=24)
# Whose steps of the backward overlap.
OVERLAPPED = SMALL._replace(q_len=136, head_dim=128, value_dim=104)
# Tiles far from the diagonal, on both sides.
FAR = Sizes(1, 270, 384, 1, 1, 16, 16)


class Case(NamedTuple):
    """Names in MASKS and SCORE_MODS, a rate of dropout."""

    mask: str = "none"
    score: str = "none"
    rate: float = 0.0
    sizes: Sizes = SMALL


# The kernels' own tests have masks without arrays, and lengths.
CASES = {
    "causal-segments": Case("causal-segments"),
    "segments-in-any-order": Case("segments-in-any-order"),
    "causal-segments-of-wide-ids": Case("causal-segments-of-wide-ids"),
    "dense": Case("dense"),
    "dense-keys-and-causal": Case("dense-keys-and-causal"),
    "not-causal-or-dense": Case("not-causal-or-dense"),
    "mask-mod": Case("mask-mod"),
    "bias": Case("none", "bias"),
    "bias-of-heads": Case("window", "bias-of-heads"),
    "bias-of-keys": Case("none", "bias-of-keys"),
    "softcap-then-bias": Case("causal-segments", "softcap-then-bias"),
    "shared-bias-and-keys": Case("dense-keys-and-causal", "bias-of-pairs"),
    "alibi": Case("causal", "alibi"),
    "relative-bias-causal": Case("causal-and-lengths", "relative-bias-causal"),
    "far-relative-bias": Case("none", "relative-bias", 0.0, FAR),
    "far-relative-bias-causal-chain": Case("causal", "softcap-then-relative-bias", 0.1, FAR),
    "dropout": Case(rate=0.3),
    "dropout-segments-bias": Case("causal-segments", "bias", 0.2),
    "overlapped-softcap-segments": Case("causal-segments", "softcap", 0.0, OVERLAPPED),
    "wide-softcap-dropout-segments": Case("causal-segments", "softcap", 0.2, WIDE),
    "wide-relative-bias": Case("causal", "softcap-then-relative-bias", 0.0, WIDE),
    "wide-arrays-of-every-kind": Case("mask-mod", "every-kind", 0.2, WIDE),
    "function": Case("causal", "gains", 0.1),
    "function-of-queries": Case("causal-and-lengths", "function"),
}
# What is served by kernels and what is behind them together: only by a device.
ON_A_DEVICE = CASES | {
    "sinks": Case("causal", "bias-then-sinks", 0.1),
    "function": Case("causal", "gentle-gains", 0.1),
    "function-of-queries": Case("causal-and-lengths", "gentle-function"),
}
# Sizes that make a device's kernels cut their work in different ways.
TERM_SIZES = {
    "d32": Sizes(2, 300, 420, 4, 2, 32, 32),
    "d64": Sizes(3, 640, 512, 4, 4, 64, 64),
    "d128": Sizes(2, 336, 500, 4, 1, 128, 128),
    "d256": Sizes(2, 300, 420, 4, 2, 256, 256),
}


def _gated(s, q_pos, kv_pos):
    """Uses the score three times."""
    return jnp.where(s > 0, jax.nn.silu(s), 0.1 * s * s)


def _gained(s, q_pos, kv_pos, gain, shift, is_gated):
    gated = _gated(s, q_pos, kv_pos)
    return jnp.where(is_gated > 0, gated, s) * gain + shift * (q_pos - kv_pos).astype(s.dtype)


def _gains(z):
    q, k = np.arange(z.q_len)[:, None], np.arange(z.kv_len)[None, :]
    is_gated = np.arange(z.batch).reshape(-1, 1, 1, 1) % 2
    gain = jnp.linspace(0.5, 1.5, z.num_q_heads).reshape(-1, 1, 1)
    return Score(
        normal(4, z.batch, 1, 1, z.kv_len),
        lambda a: pf.ScoreFunction(_gained, gain, a * 0.1, jnp.asarray(is_gated)),
        lambda s, a: _gained(s, q, k, gain, a * 0.1, is_gated),
    )


def _every_kind(z):
    """Numbers, vectors along queries and keys, a matrix and a band, all made of one array."""
    index = np.arange(z.kv_len)[None, :] - np.arange(z.q_len)[:, None] + z.q_len - 1

    def made_of(a):
        return a[:, :, :1, :1], a[:, :, :, :1], a[:, :, :1]

    def band(a):
        return jnp.tile(a[:, :, 0], (1, 1, 3))[..., : z.q_len + z.kv_len - 1]

    def mod(a):
        function = pf.ScoreFunction(_shifted, *made_of(a))
        return pf.Chain((function, pf.Bias(a), pf.DistanceBias(band(a))))

    return Score(
        normal(4, 1, z.num_q_heads, z.q_len, z.kv_len),
        mod,
        lambda s, a: _shifted(s, None, None, *made_of(a)) + a + band(a)[..., index],
    )


def _shifted(s, q_pos, kv_pos, number, of_query, of_key):
    return _gated(s, q_pos, kv_pos) * (1 + 0.1 * number + 0.2 * of_query) + of_key * of_query


def _softcap_relative_bias(z):
    score = SCORE_MODS["relative-bias-causal"](z)
    return score._replace(
        make=lambda a: pf.Chain((pf.Softcap(2.0), score.make(a))),
        change=lambda s, a: score.change(2.0 * jnp.tanh(s / 2.0), a),
    )


def _gentle(make):
    """The same of a tenth of the array: what grows with distance else becomes logits of hundreds,
    at a device's lengths, and the rounding of `out` in delta a gradient's largest error."""

    def gentle(z):
        score = make(z)
        return score._replace(array=0.1 * score.array)

    return gentle


SCORES = SCORE_MODS | {
    "bias-of-pairs": lambda z: Score(
        normal(4, 1, z.num_q_heads, z.q_len, z.kv_len), pf.Bias, lambda s, a: s + a
    ),
    "gains": _gains,
    "gentle-gains": _gentle(_gains),
    "gentle-function": _gentle(SCORE_MODS["function"]),
    "every-kind": _every_kind,
    "softcap-then-relative-bias": _softcap_relative_bias,
}


def inputs(z: Sizes, score: Score) -> tuple[list[Any], tuple[Any, Any]]:
    """q, k, v and the score's array; cotangents of out and lse."""
    dout = normal(5, z.batch, z.q_len, z.num_q_heads, z.value_dim, dtype=jnp.bfloat16)
    dlse = normal(6, z.batch, z.num_q_heads, z.q_len)
    return [*qkv(z, jnp.bfloat16), score.array], (dout, dlse)


def attention(of: Any, case: Case, allowed: Any, score: Score) -> Any:
    """q, k, v, array -> out and lse by a function of the oracle's."""
    z, keep = case.sizes, None
    if case.rate:
        keep = pf.Dropout(case.rate, KEY).keep_mask(z.batch, z.num_q_heads, z.q_len, z.kv_len)
        keep = np.asarray(keep) / (1 - case.rate)

    def function(q, k, v, array):
        change = lambda s: score.change(s, array)  # noqa: E731
        out, lse = of(q, k, v, allowed=allowed, change=change, keep=keep)
        if score.sink is not None:
            sink = jnp.broadcast_to(score.sink(array), lse.shape[:2])[..., None]
            weight = 1 / (1 + jnp.exp(sink - lse))
            out = (out * weight.swapaxes(1, 2)[..., None]).astype(out.dtype)
            lse = lse + jnp.log1p(jnp.exp(sink - lse))
        return out, jnp.where(lse == -jnp.inf, 0.0, lse)

    return function


def judge(case: Case, ours: Any, record: Any = lambda name, error: None) -> None:
    """Compares out, lse (0 for -inf) and the gradients of q, k, v and the score's array.

    With the float64 oracle, allowing for what plain attention in bfloat16 makes of it.
    """
    with oracle.on_host():
        _, allowed = MASKS[case.mask](case.sizes)
        score = SCORES[case.score](case.sizes)
        problem = inputs(case.sizes, score)
        allowed = True if allowed is None else allowed
        exact = attention(oracle.attention, case, allowed, score)
        plain = attention(oracle.plain_attention_with_lse, case, allowed, score)
    truth, usual = oracle.with_gradients(*problem, exact), oracle.in_own_precision(*problem, plain)
    names = ("out", "lse", "dq", "dk", "dv", "d_array")
    for name, a, b, c in zip(
        names, ours, (*usual[0], *usual[1]), (*truth[0], *truth[1]), strict=True
    ):
        record(f"error_{name}", float(np.abs(np.asarray(a, np.float64) - np.asarray(c)).max()))
        if name == "lse":
            np.testing.assert_allclose(a, c, rtol=0, atol=2e-5)
        else:
            # delta is made of `out` in q's precision. What rounding that leaves in dS is seen where
            # dS itself is a gradient, or a sum of many, and not a product in q's precision.
            factors = {"out": (2.0, 1.1), "d_array": (3.0, 1e9, 2)}.get(name, (3.0,))
            assert_as_good_as_plain(a.astype(jnp.bfloat16), b, c, name, *factors)
