"""Derivatives beyond the first backward, against the float64 oracle differentiated the same way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import MASKS, SCORE_MODS, SIZES, Sizes, normal, qkv, with_quick
from pallas_flash.backends.blockwise import BlockwiseConfig
from tolerance import assert_close_to_oracle

KEY = jax.random.key(1)
SMALL = Sizes(2, 13, 11, 4, 2, 8, 6)
# Neither length is a multiple of its tile.
TILES = {"backend": "blockwise", "config": BlockwiseConfig(5, 4)}


def attentions(mask_name, score_name, rate, keywords=TILES):
    """The arrays q, k, v and the score's; ours and the oracle's function of them: (out, lse)."""
    mask, allowed = MASKS[mask_name](SMALL)
    score = SCORE_MODS[score_name](SMALL)
    dropout = pf.Dropout(rate, KEY)
    sizes = SMALL.batch, SMALL.num_q_heads, SMALL.q_len, SMALL.kv_len
    keep = np.asarray(dropout.keep_mask(*sizes)) / (1 - rate)

    def finite(results):
        return results[0], jnp.where(results[1] == -jnp.inf, 0.0, results[1])

    def ours(q, k, v, array):
        mod = score.make(array)
        return finite(
            pf.flash_attention_with_lse(
                q, k, v, mask=mask, score_mod=mod, dropout=dropout, **keywords
            )
        )

    def dense(q, k, v, array):
        change = lambda s: score.change(s, array)  # noqa: E731
        sink = None if score.sink is None else score.sink(array)
        terms = {"allowed": allowed, "change": change, "sink": sink, "keep": keep}
        return finite(oracle.attention(q, k, v, **terms))

    return [*qkv(SMALL), score.array], ours, dense


def directions(arrays):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in arrays]


def tangents(attention):
    return lambda arrays: jax.jvp(attention, arrays, directions(arrays))


def loss(attention):
    def function(arrays):
        out, lse = attention(*arrays)
        return (jnp.sin(out) * jnp.cos(1.0 + out)).sum() + jnp.sin(lse).sum()

    return function


def along(function):
    """Derivative of a number along the directions, in forward mode."""
    return lambda arrays: jax.jvp(function, [arrays], [directions(arrays)])[1]


def forward_over_reverse(attention):
    return along(jax.grad(loss(attention)))


def reverse_over_forward(attention):
    return jax.grad(along(loss(attention)))


def forward_over_forward(attention):
    return along(along(lambda arrays: attention(*arrays)))


def reverse_over_reverse(attention):
    def penalty(arrays):
        gradients = jax.grad(loss(attention))(arrays)
        return sum((w * g + g**2).sum() for w, g in zip(directions(arrays), gradients))

    return jax.grad(penalty)


def three_times_in_reverse(attention):
    def product(arrays):
        found = reverse_over_reverse(attention)(arrays)
        return sum((w * x).sum() for w, x in zip(directions(arrays), found))

    return jax.grad(product)


def assert_agrees(derivative, arrays, ours, dense):
    with jax.enable_x64(True):
        want = jax.jit(derivative(dense))([x.astype(jnp.float64) for x in arrays])
    got = jax.jit(derivative(ours))(arrays)
    for i, (a, b) in enumerate(zip(*map(jax.tree.leaves, (got, want)), strict=True)):
        assert_close_to_oracle(a, b, f"result {i}", rtol=5e-5)


@pytest.mark.parametrize(
    "mask_name, score_name, rate",
    [
        ("causal-and-lengths", "softcap-then-bias", 0.3),
        ("causal-segments", "function", 0.0),
        ("mask-mod", "relative-bias", 0.0),
        ("not-causal-or-dense", "bias-then-sinks", 0.2),
    ],
)
def test_tangents(mask_name, score_name, rate):
    assert_agrees(tangents, *attentions(mask_name, score_name, rate))


@pytest.mark.quick
def test_tangents_of_the_reference():
    assert_agrees(tangents, *attentions("window", "bias", 0.0, {"backend": "reference"}))


HIGHER = [
    forward_over_reverse,
    reverse_over_forward,
    forward_over_forward,
    reverse_over_reverse,
    three_times_in_reverse,
]


@pytest.mark.parametrize(
    "derivative", with_quick(HIGHER, [forward_over_reverse, reverse_over_reverse])
)
def test_higher_derivatives(derivative):
    assert_agrees(derivative, *attentions("causal-and-lengths", "softcap-then-bias", 0.0))


def test_second_derivatives_with_segments_dropout_and_a_function():
    assert_agrees(reverse_over_reverse, *attentions("segments", "function", 0.2))


def test_jacobian_linearization_and_hessian():
    (q, k, v, _), ours, _ = attentions("causal", "none", 0.0)

    def row(x):
        return jnp.sin(ours(q.at[0, 1, 0, :3].set(x), k, v, None)[0][0, 1, 0])

    @jax.jit
    def derivatives(x):
        return jax.jacfwd(row)(x), jax.linearize(row, x)[1](jnp.ones(3)), jax.hessian(row)(x)

    @jax.jit
    def in_reverse(x):
        return jax.jacrev(row)(x), jax.jacrev(jax.jacrev(row))(x)

    (jacobian, tangent, hessian), want = derivatives(q[0, 1, 0, :3]), in_reverse(q[0, 1, 0, :3])
    assert jnp.abs(want[1]).max() > 1e-3
    for got, other in zip((jacobian, tangent, hessian), (want[0], want[0].sum(1), want[1])):
        np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-6)
    # Compiled apart from where it was made.
    np.testing.assert_allclose(jax.jit(jax.linearize(row, q[0, 1, 0, :3])[1])(jnp.ones(3)), tangent)


def test_tangents_under_vmap_and_remat_and_scan():
    (q, k, v, _), ours, _ = attentions("causal", "none", 0.0)
    layer = jax.checkpoint(lambda x: x + ours(x, k, v, None)[1].swapaxes(1, 2)[..., None])

    def run(x):
        return jax.lax.scan(lambda x, _: (layer(x), None), x, length=2)[0]

    def unrolled(x):
        return layer(layer(x))

    moves = normal(9, 3, *q.shape)
    got = jax.jit(jax.vmap(lambda dx: jax.jvp(run, [q], [dx])[1]))(moves)
    want = [jax.jit(lambda dx: jax.jvp(unrolled, [q], [dx])[1])(dx) for dx in moves]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=2e-5, atol=2e-5)


def test_rows_that_attend_to_nothing_and_poisoned_padding():
    z = SIZES["gqa"]
    q, k, v = qkv(z)
    used = jnp.arange(z.kv_len)[:, None, None] < jnp.array([0, 20])[:, None, None, None]
    mask = pf.KvLengths(jnp.array([0, 20])) & pf.QLengths(jnp.array([5, 9]))

    def penalty(q, k, v):
        attention = lambda *x: pf.flash_attention(*x, mask=mask)  # noqa: E731
        dq, dk, dv = jax.grad(lambda *x: jnp.sin(attention(*x)).sum(), argnums=(0, 1, 2))(q, k, v)
        total = sum((x**2).sum() for x in (dq, jnp.where(used, dk, 0), jnp.where(used, dv, 0)))
        return total + jax.jvp(attention, (q, k, v), (q, k, v))[1].sum()

    second = jax.jit(jax.grad(penalty, argnums=(0, 1, 2)))
    clean = second(q, k, v)
    dirty = second(q, jnp.where(used, k, jnp.nan), jnp.where(used, v, jnp.nan))
    for a, b in zip(dirty, clean):
        assert jnp.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


def test_memory_is_linear_in_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.bfloat16)

        def second(*x):
            attention = lambda *x: pf.flash_attention(*x, mask=pf.Causal())  # noqa: E731
            loss = lambda *x: attention(*x).astype(jnp.float32).sum()  # noqa: E731
            return jax.jvp(jax.grad(loss, argnums=(0, 1, 2)), x, x)

        return jax.jit(second).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(8192), temporaries(32768)
    assert long < 4.5 * short


@pytest.mark.quick
def test_only_the_backward_is_traced_for_a_gradient():
    """The tangents cost nothing where nobody asks for them."""
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    f = lambda *x: pf.flash_attention(*x).astype(jnp.float32).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(f, argnums=(0, 1, 2)))(x, x, x))
    assert "linear_map" not in text
    assert "linear_map" in str(jax.make_jaxpr(lambda *x: jax.jvp(f, x, x))(x, x, x))
