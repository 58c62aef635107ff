"""Values and all gradients of every backend against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import BACKENDS, MASKS, SCORE_MODS, SIZES, Score, Sizes, normal, qkv, with_quick
from tolerance import assert_as_good_as_plain, assert_close_to_oracle

# The score mods that are run at every size.
EVERY_SIZE = ("none", "bias", "softcap-then-bias", "relative-bias")
TILES = "blockwise-tiles-of-16-by-24"
NAMES = ("out", "lse", "dq", "dk", "dv", "d_score_mod")


def finite(results):
    """lse = -inf of an empty row would make any gradient through it NaN: cut it off."""
    out, lse = results
    return out, jnp.where(lse == -jnp.inf, 0.0, lse)


def run(function, arrays, cotangents):
    @jax.jit
    def both(arrays, cotangents):
        results, vjp = jax.vjp(function, *arrays)
        return *results, *vjp(cotangents)

    return both(arrays, cotangents)


def problem(sizes, mask, score, dtype=jnp.float32):
    arrays = [*qkv(sizes, dtype), score.array]
    cotangents = (
        normal(5, sizes.batch, sizes.q_len, sizes.num_q_heads, sizes.value_dim, dtype=dtype),
        normal(6, sizes.batch, sizes.num_q_heads, sizes.q_len),
    )
    return arrays, cotangents


def expected(arrays, cotangents, allowed, score):
    def attention(q, k, v, array):
        change = lambda s: score.change(s, array)  # noqa: E731
        sink = None if score.sink is None else score.sink(array)
        return finite(oracle.attention(q, k, v, allowed=allowed, change=change, sink=sink))

    results, gradients = oracle.with_gradients(arrays, cotangents, attention)
    return *results, *gradients


def ours(mask, score, **keywords):
    def attention(q, k, v, array):
        return finite(
            pf.flash_attention_with_lse(q, k, v, mask=mask, score_mod=score.make(array), **keywords)
        )

    return attention


@functools.cache
def truth_of(size_name, mask_name, score_name):
    """What the oracle says of a problem, the same for all backends."""
    sizes = SIZES[size_name]
    mask, allowed = MASKS[mask_name](sizes)
    score = SCORE_MODS[score_name](sizes)
    return expected(*problem(sizes, mask, score), allowed, score)


def assert_agrees(backend, size_name, mask_name, score_name):
    sizes = SIZES[size_name]
    mask, _ = MASKS[mask_name](sizes)
    score = SCORE_MODS[score_name](sizes)
    got = run(ours(mask, score, **BACKENDS[backend]), *problem(sizes, mask, score))
    for name, a, b in zip(NAMES, got, truth_of(size_name, mask_name, score_name)):
        assert_close_to_oracle(a, b, name)


# Alone, as it is known when a program is traced; test_pairs has every mask with every score mod.
@pytest.mark.parametrize("mask_name", MASKS)
def test_values_and_gradients_under_every_mask(mask_name):
    assert_agrees(TILES, "gqa", mask_name, "none")


@pytest.mark.parametrize("score_name", SCORE_MODS)
def test_values_and_gradients_of_every_score_mod(score_name):
    assert_agrees(TILES, "gqa", "causal", score_name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score_name", EVERY_SIZE)
@pytest.mark.parametrize(
    "size_name", with_quick([size for size in SIZES if size != "gqa"], ["mha-more-keys"])
)
def test_values_and_gradients_at_every_size(size_name, score_name, backend):
    assert_agrees(backend, size_name, "causal", score_name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_errs_no_more_than_plain_attention(backend, dtype):
    sizes = Sizes(q_len=200, kv_len=200, head_dim=32, value_dim=32)
    mask, allowed = MASKS["causal"](sizes)
    score = SCORE_MODS["none"](sizes)
    arrays, (dout, dlse) = problem(sizes, mask, score, dtype)
    cotangents = (dout, jnp.zeros_like(dlse))
    got = run(ours(mask, score, **BACKENDS[backend]), arrays, cotangents)

    def plain(q, k, v, array):
        return oracle.plain_attention_with_lse(q, k, v, allowed)[0], cotangents[1]

    plain_results = run(plain, arrays, cotangents)
    truth = expected(arrays, cotangents, allowed, score)
    for i, name in enumerate(NAMES[:5]):
        if name == "lse":
            assert_close_to_oracle(got[i], truth[i], name, rtol=1e-5)
            continue
        assert got[i].dtype == dtype
        factor = 2.0 if name == "out" else 3.0
        assert_as_good_as_plain(got[i], plain_results[i], truth[i], name, factor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_inputs_are_computed_in_float64(backend):
    sizes = SIZES["gqa"]
    mask, allowed = MASKS["window"](sizes)
    score = SCORE_MODS["softcap-then-bias"](sizes)
    arrays, cotangents = problem(sizes, mask, score)
    truth = expected(arrays, cotangents, allowed, score)
    with jax.enable_x64(True):
        arrays, cotangents = jax.tree.map(lambda x: x.astype(jnp.float64), (arrays, cotangents))
        got = run(ours(mask, score, **BACKENDS[backend]), arrays, cotangents)
    for name, a, b in zip(NAMES, got, truth):
        assert_close_to_oracle(a, b, name, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_masked_row_returns_zero_with_zero_gradients(backend):
    sizes = Sizes(q_len=9, kv_len=9)
    q, k, v = qkv(sizes)
    mask = pf.Causal() & pf.SlidingWindow(right=0) & ~pf.SlidingWindow(left=2)  # empty: rows 0..2
    attention = lambda q, k, v: pf.flash_attention_with_lse(  # noqa: E731
        q, k, v, mask=mask, **BACKENDS[backend]
    )
    (out, lse), vjp = jax.vjp(attention, q, k, v)
    assert (out[:, :3] == 0).all() and (lse[:, :, :3] == -jnp.inf).all()
    assert (out[:, 3:] != 0).any() and jnp.isfinite(lse[:, :, 3:]).all()
    dq, dk, dv = vjp((jnp.ones_like(out), jnp.zeros_like(lse)))
    assert (dq[:, :3] == 0).all()
    assert all(jnp.isfinite(g).all() for g in (dq, dk, dv))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_name", ["kv-lengths", "causal-and-lengths", "dense-keys-and-causal"])
def test_nan_in_padding_does_not_leak(backend, mask_name):
    sizes = SIZES["gqa"]
    mask, allowed = MASKS[mask_name](sizes)
    q, k, v = qkv(sizes)
    full = jnp.broadcast_to(allowed, (sizes.batch, 1, sizes.q_len, sizes.kv_len))[:, 0]
    unused_keys, unused_rows = ~full.any(1), ~full.any(2)
    assert unused_keys.any()

    def poison(x, unused):
        return jnp.where(unused[..., None, None], jnp.nan, x)

    dout = normal(5, sizes.batch, sizes.q_len, sizes.num_q_heads, sizes.value_dim)

    def results(q, k, v, dout):
        attention = lambda q, k, v: pf.flash_attention(  # noqa: E731
            q, k, v, mask=mask, **BACKENDS[backend]
        )
        out, vjp = jax.vjp(attention, q, k, v)
        return out, *vjp(dout)

    clean = results(q, k, v, dout)
    dirty = results(poison(q, unused_rows), poison(k, unused_keys), poison(v, unused_keys), dout)
    for a, b in zip(dirty, clean):
        assert (a == b).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_batch_row_and_head(backend):
    sizes = SIZES["gqa"]
    q, k, v = qkv(sizes)
    attention = lambda q, k, v: pf.flash_attention(q, k, v, **BACKENDS[backend])  # noqa: E731
    clean, dirty = attention(q, k, v), attention(q, k.at[0, 5, 1].set(jnp.nan), v)
    heads = sizes.num_q_heads // sizes.num_kv_heads
    assert jnp.isnan(dirty[0, :, heads:]).all()
    assert (dirty[1] == clean[1]).all() and (dirty[0, :, :heads] == clean[0, :, :heads]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_batch_dimension(backend):
    q, k, v = (x[0] for x in qkv(SIZES["gqa"]))
    got = pf.flash_attention_with_lse(q, k, v, mask=pf.Causal(), **BACKENDS[backend])
    want = pf.flash_attention_with_lse(
        q[None], k[None], v[None], mask=pf.Causal(), **BACKENDS[backend]
    )
    for a, b in zip(got, want):
        assert a.shape == b.shape[1:] and (a == b[0]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_low_precision_bias_is_summed_in_float32(backend):
    """Over hundreds of rows and many tiles: sums in bfloat16 would lose most of their digits."""
    sizes = Sizes(q_len=300, kv_len=40)
    arrays, cotangents = problem(sizes, None, SCORE_MODS["none"](sizes))
    *arrays, _ = arrays
    bias = normal(4, 1, 1, 1, sizes.kv_len, dtype=jnp.bfloat16)
    score = Score(bias, pf.Bias, lambda s, a: s + a)
    got = run(ours(None, score, **BACKENDS[backend]), [*arrays, bias], cotangents)[-1]
    want = expected([*arrays, bias], cotangents, True, score)[-1]
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got).astype(np.float64) - np.asarray(want))
    assert (error <= 2**-8 * np.abs(want) + 1e-3).all()
