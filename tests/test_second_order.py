"""Gradients of gradients, against the float64 oracle differentiated twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import BACKENDS, MASKS, SCORE_MODS, SIZES, normal, qkv
from tolerance import assert_close_to_oracle

KEY = jax.random.key(1)
ARGNUMS = (0, 1, 2, 3)
NAMES = ("q", "k", "v", "score mod")

CASES = {
    "plain": ("gqa", "none", "none", 0.0),
    "causal-lengths-mods": ("gqa", "causal-and-lengths", "softcap-then-bias", 0.3),
    "segments-function": ("gqa", "segments", "function", 0.0),
    "relative-bias": ("mha-more-keys", "prefix-lm", "relative-bias", 0.2),
}


def twice(attention, arrays):
    """Gradient of a function of the gradients of all arrays: every mixed second derivative."""

    def loss(*arrays):
        out, lse = attention(*arrays)
        lse = jnp.where(lse == -jnp.inf, 0.0, lse)
        return (jnp.sin(out) * jnp.cos(1.0 + out)).sum() + jnp.sin(lse).sum()

    def penalty(*arrays):
        gradients = jax.grad(loss, argnums=ARGNUMS)(*arrays)
        weights = [normal(10 + i, *x.shape).astype(x.dtype) for i, x in enumerate(arrays)]
        return sum((w * g + g**2).sum() for w, g in zip(weights, gradients))

    return jax.jit(jax.grad(penalty, argnums=ARGNUMS))(*arrays)


TILES = "blockwise-tiles-of-16-by-24"


# The second derivative is one program for all backends.
@pytest.mark.parametrize(
    "case, backend", [(case, "reference" if case == "plain" else TILES) for case in CASES]
)
def test_gradient_of_a_gradient(case, backend):
    size_name, mask_name, score_name, rate = CASES[case]
    z = SIZES[size_name]
    mask, allowed = MASKS[mask_name](z)
    score = SCORE_MODS[score_name](z)
    dropout = pf.Dropout(rate, KEY)
    keep = np.asarray(dropout.keep_mask(z.batch, z.num_q_heads, z.q_len, z.kv_len)) / (1 - rate)
    arrays = [*qkv(z), score.array]

    def ours(q, k, v, array):
        return pf.flash_attention_with_lse(
            q, k, v, mask=mask, score_mod=score.make(array), dropout=dropout, **BACKENDS[backend]
        )

    def dense(q, k, v, array):
        return oracle.attention(
            q,
            k,
            v,
            allowed=allowed,
            change=lambda s: score.change(s, array),
            keep=keep,
        )

    with jax.enable_x64(True):
        want = twice(dense, [x.astype(jnp.float64) for x in arrays])
    for name, a, b in zip(NAMES, twice(ours, arrays), want):
        assert_close_to_oracle(a, b, name, rtol=5e-5)


def test_rows_that_attend_to_nothing_and_poisoned_padding():
    z = SIZES["gqa"]
    q, k, v = qkv(z)
    used = jnp.arange(z.kv_len)[:, None, None] < jnp.array([0, 20])[:, None, None, None]
    mask = pf.KvLengths(jnp.array([0, 20])) & pf.QLengths(jnp.array([5, 9]))

    def penalty(q, k, v):
        loss = lambda *x: jnp.sin(pf.flash_attention(*x, mask=mask)).sum()  # noqa: E731
        dq, dk, dv = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
        return sum((x**2).sum() for x in (dq, jnp.where(used, dk, 0), jnp.where(used, dv, 0)))

    second = jax.jit(jax.grad(penalty, argnums=(0, 1, 2)))
    clean = second(q, k, v)
    dirty = second(q, jnp.where(used, k, jnp.nan), jnp.where(used, v, jnp.nan))
    for a, b in zip(dirty, clean):
        assert jnp.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


def test_hessian_vector_product_under_vmap():
    q, k, v = qkv(SIZES["gqa"])
    vectors = normal(9, 2, *q.shape)

    def loss(q):
        return jnp.sin(pf.flash_attention(q, k, v, mask=pf.Causal())).sum()

    product = lambda w: jax.grad(lambda q: (jax.grad(loss)(q) * w).sum())(q)  # noqa: E731
    got = jax.jit(jax.vmap(product))(vectors)
    want = jnp.stack([jax.jit(product)(w) for w in vectors])
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_memory_is_linear_in_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.bfloat16)

        def penalty(q, k, v):
            loss = lambda *x: pf.flash_attention(*x, mask=pf.Causal()).astype(jnp.float32).sum()  # noqa: E731
            return sum(
                (g.astype(jnp.float32) ** 2).sum() for g in jax.grad(loss, (0, 1, 2))(q, k, v)
            )

        compiled = jax.jit(jax.grad(penalty, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(8192), temporaries(32768)
    assert long < 4.5 * short
