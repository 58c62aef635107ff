"""Dropout: bits that look random, the same everywhere, and exact values and gradients for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import BACKENDS, MASKS, SCORE_MODS, SIZES, Sizes, normal, qkv
from tolerance import assert_close_to_oracle

KEY = jax.random.key(5)
NAMES = ("out", "lse", "dq", "dk", "dv", "d_score_mod")


def kept(rate=0.5, key=KEY, sizes=(2, 3, 512, 512)):
    return np.asarray(pf.Dropout(rate, key).keep_mask(*sizes)).astype(np.float64)


def assert_uncorrelated(a, b):
    """Correlation of two samples of n independent numbers: within 5 of its standard deviations."""
    a, b = (x.ravel() - x.mean() for x in (a, b))
    correlation = (a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean())
    assert abs(correlation) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_mean_of_all_rows_and_columns(rate):
    mask = kept(rate)
    deviation = np.sqrt(rate * (1 - rate))
    for axes, limit in (((0, 1, 2, 3), 4), ((2, 3), 5), ((3,), 6), ((2,), 6)):
        count = np.prod([mask.shape[a] for a in axes])
        assert np.abs(mask.mean(axes) - (1 - rate)).max() < limit * deviation / np.sqrt(count)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_are_independent(rate):
    mask = kept(rate)
    for shift in (1, 2, 3, 8, 64, 128, 255):
        assert_uncorrelated(mask[..., shift:, :], mask[..., :-shift, :])
        assert_uncorrelated(mask[..., shift:], mask[..., :-shift])
        assert_uncorrelated(mask[..., shift:, shift:], mask[..., :-shift, :-shift])
    assert_uncorrelated(mask, mask.swapaxes(-1, -2))
    assert_uncorrelated(mask[0], mask[1])
    assert_uncorrelated(mask[:, 0], mask[:, 1])
    assert_uncorrelated(mask, kept(rate, jax.random.key(6)))
    assert_uncorrelated(mask, kept(rate, jax.random.fold_in(KEY, 1)))


def test_counts_of_rows_are_binomial():
    """Variance of the rows' and the columns' sums: correlated bits would spread or narrow it."""
    mask = kept(0.5, sizes=(4, 8, 512, 512))
    for axis in (2, 3):
        sums = mask.sum(axis)
        ratio = sums.var() / (512 * 0.25)
        assert abs(ratio - 1) < 5 * np.sqrt(2 / sums.size)


@pytest.mark.quick
def test_bits_are_known():
    """A saved run must go on with the bits it began with."""
    bits = pf.Dropout(0.5, KEY).bind(1, 2)
    seeds = np.array(bits.seeds)

    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    mask = pf.Dropout(0.5, KEY).keep_mask(1, 2, 3, 4)
    for h, i, j in np.ndindex(2, 3, 4):
        seed = int(seeds[0, h])
        value = (mix(seed ^ i) | 1) * (mix(j ^ ~seed % 2**32) | 1) % 2**32
        assert mask[0, h, i, j] == (value >= 2**31)


def attention(mask, score, dropout, **keywords):
    def function(q, k, v, array):
        out, lse = pf.flash_attention_with_lse(
            q, k, v, mask=mask, score_mod=score.make(array), dropout=dropout, **keywords
        )
        return out, jnp.where(lse == -jnp.inf, 0.0, lse)

    return function


def gradients(function, arrays, cotangents):
    results, vjp = jax.vjp(function, *arrays)
    return *results, *vjp(cotangents)


CASES = {
    "plain": ("gqa", "none", "none", 0.5),
    "causal-lengths-mods": ("gqa", "causal-and-lengths", "softcap-then-bias", 0.2),
    "segments-relative": ("gqa", "causal-segments", "relative-bias", 0.2),
    "sink": ("mha-more-keys", "causal", "sink", 0.1),
}


@functools.cache
def truth_of(case):
    size_name, mask_name, score_name, rate = CASES[case]
    z = SIZES[size_name]
    _, allowed = MASKS[mask_name](z)
    score = SCORE_MODS[score_name](z)
    keep = pf.Dropout(rate, KEY).keep_mask(z.batch, z.num_q_heads, z.q_len, z.kv_len)
    factor = np.asarray(keep) / (1 - rate)

    def dense(q, k, v, array):
        out, lse = oracle.attention(
            q,
            k,
            v,
            allowed=allowed,
            change=lambda s: score.change(s, array),
            sink=None if score.sink is None else score.sink(array),
            keep=factor,
        )
        return out, jnp.where(lse == -jnp.inf, 0.0, lse)

    results, found = oracle.with_gradients(*problem(z, score), dense)
    return *results, *found


def problem(z, score):
    cotangents = (
        normal(5, z.batch, z.q_len, z.num_q_heads, z.value_dim),
        normal(6, z.batch, z.num_q_heads, z.q_len),
    )
    return [*qkv(z), score.array], cotangents


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(backend, case):
    size_name, mask_name, score_name, rate = CASES[case]
    z = SIZES[size_name]
    score = SCORE_MODS[score_name](z)
    function = attention(MASKS[mask_name](z)[0], score, pf.Dropout(rate, KEY), **BACKENDS[backend])
    got = jax.jit(functools.partial(gradients, function))(*problem(z, score))
    for name, a, b in zip(NAMES, got, truth_of(case)):
        assert_close_to_oracle(a, b, name)


@pytest.mark.quick
def test_rate_0_and_jax_nn():
    q, k, v = qkv(SIZES["gqa"])
    plain = pf.flash_attention(q, k, v)
    assert (pf.flash_attention(q, k, v, dropout=pf.Dropout(0.0, KEY)) == plain).all()
    dropout = pf.Dropout(0.3, KEY)
    out = pf.flash_attention(q, k, v, mask=pf.Causal(), dropout=dropout)
    assert (pf.dot_product_attention(q, k, v, is_causal=True, dropout=dropout) == out).all()
    raw = pf.Dropout(0.3, jax.random.key_data(KEY))
    assert (pf.flash_attention(q, k, v, mask=pf.Causal(), dropout=raw) == out).all()


def test_under_jit_vmap_and_remat():
    q, k, v = (jnp.stack([x, 2 * x, x]) for x in qkv(Sizes(q_len=20, kv_len=30)))
    keys = jax.random.split(KEY, 3)

    def loss(q, key):
        dropout = pf.Dropout(0.4, key)
        return jnp.sin(pf.flash_attention(q, k[0], v[0], mask=pf.Causal(), dropout=dropout)).sum()

    for function in (loss, jax.grad(loss), jax.grad(jax.checkpoint(loss))):
        for axis, key in ((0, keys), (None, KEY)):
            got = jax.jit(jax.vmap(function, in_axes=(0, axis)))(q, key)
            want = [function(q[i], keys[i] if axis == 0 else KEY) for i in range(3)]
            np.testing.assert_allclose(got, jnp.stack(want), rtol=2e-5, atol=2e-5)


@pytest.mark.quick
def test_what_is_refused():
    q, k, v = qkv(SIZES["gqa"])
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"rate=.* must be at least 0 and below 1"):
            pf.Dropout(rate, KEY)
    with pytest.raises(TypeError, match="must be a number known when it is traced"):
        jax.jit(lambda r: pf.flash_attention(q, k, v, dropout=pf.Dropout(r, KEY)))(0.5)
    for key in (None, 0, jax.random.split(KEY), jnp.ones(2)):
        with pytest.raises(TypeError, match=r"Dropout.key must be one key of jax.random, got"):
            pf.flash_attention(q, k, v, dropout=pf.Dropout(0.5, key))
    with pytest.raises(TypeError, match=r"dropout must be Dropout\(rate, key\) or None, got float"):
        pf.flash_attention(q, k, v, dropout=0.5)
    with pytest.raises(ValueError, match="jax.nn, which does not take dropout"):
        pf.dot_product_attention(q, k, v, implementation="cudnn", dropout=pf.Dropout(0.5, KEY))
