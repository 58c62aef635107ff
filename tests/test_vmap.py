"""vmap: mapped over any axis of any operand, attention equals a loop of calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import (
    Alibi,
    Bias,
    Causal,
    Chain,
    DenseMask,
    KvLengths,
    RelativeBias,
    ScoreFunction,
    SegmentIds,
    Sink,
    flash_attention,
    flash_attention_with_lse,
)
from pallas_flash.parallel import foldable

N, M = 3, 4
NAMES = ("q", "k", "v", "bias", "mask")
SHAPES = {
    "q": (2, 5, 4, 8),
    "k": (2, 7, 2, 8),
    "v": (2, 7, 2, 6),
    "bias": (1, 4, 5, 7),
    "mask": (2, 1, 5, 7),
}


def make(name, *mapped, shape=None):
    """A random operand with mapped axes in front."""
    rng = np.random.default_rng(len(mapped) * 10 + NAMES.index(name))
    x = rng.standard_normal((*mapped, *(SHAPES[name] if shape is None else shape)), np.float32)
    return jnp.asarray(x > -1 if name == "mask" else x)


def attention(q, k, v, bias, mask):
    return flash_attention_with_lse(q, k, v, mask=DenseMask(mask), score_mod=Bias(bias))


def loss(q, k, v, bias, mask):
    out, lse = attention(q, k, v, bias, mask)
    return jnp.sin(out).sum() + jnp.cos(lse).sum()


gradients = jax.grad(loss, argnums=(0, 1, 2, 3))


def looped(function, arrays, axes):
    """What vmap means: a call per instance, stacked."""
    n = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)

    def instance(i):
        return [
            x if a is None else jnp.take(x, i, axis=a) for x, a in zip(arrays, axes, strict=True)
        ]

    results = [function(*instance(i)) for i in range(n)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *results)


def assert_same(got, want):
    """Equal up to the order of sums in float32."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert [x.shape for x in got] == [x.shape for x in want]
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


jitted = functools.cache(jax.jit)


@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_one_operand_mapped_over_any_axis(name, axis):
    arrays = [make(n, N) if n == name else make(n) for n in NAMES]
    arrays = [
        jnp.moveaxis(x, 0, axis) if n == name else x for n, x in zip(NAMES, arrays, strict=True)
    ]
    axes = tuple(axis if n == name else None for n in NAMES)
    got = jax.jit(jax.vmap(attention, in_axes=axes))(*arrays)
    assert_same(got, looped(jitted(attention), arrays, axes))


@pytest.mark.parametrize(
    "axes",
    [
        (0, 0, 0, 0, 0),
        (1, 2, 3, 4, 0),
        (4, 3, 0, None, 1),
        (None, 0, None, 1, None),
    ],
    ids=str,
)
def test_gradients_of_each_instance(axes):
    arrays = [
        make(n) if a is None else jnp.moveaxis(make(n, N), 0, a)
        for n, a in zip(NAMES, axes, strict=True)
    ]
    got = jax.jit(jax.vmap(gradients, in_axes=axes))(*arrays)
    assert_same(got, looped(jitted(gradients), arrays, axes))


@pytest.mark.parametrize("mapped", [("q",), ("k", "bias"), ("q", "k", "v", "mask")], ids="-".join)
def test_gradient_through_vmap_is_summed_over_instances(mapped):
    arrays = [make(n, N) if n in mapped else make(n) for n in NAMES]
    axes = tuple(0 if n in mapped else None for n in NAMES)

    def total(function):
        return lambda *arrays: function(arrays).sum()

    mapped_loss = total(lambda arrays: jax.vmap(loss, in_axes=axes)(*arrays))
    looped_loss = total(lambda arrays: looped(loss, arrays, axes))
    got = jax.jit(jax.grad(mapped_loss, argnums=(0, 1, 2, 3)))(*arrays)
    assert_same(got, jax.jit(jax.grad(looped_loss, argnums=(0, 1, 2, 3)))(*arrays))


@pytest.mark.quick
def test_nested_vmaps_over_different_operands():
    """Outer over q, v, mask; inner over q, k, bias: no operand sees both but q."""
    q, k, v = make("q", N, M), make("k", M), make("v", N)
    bias, mask = make("bias", M), make("mask", N)
    inner, outer = (0, 0, None, 0, None), (0, None, 0, None, 0)
    for function in (attention, gradients):
        got = jax.jit(jax.vmap(jax.vmap(function, in_axes=inner), in_axes=outer))(
            q, k, v, bias, mask
        )

        def inside(*arrays, function=function):
            return looped(jitted(function), arrays, inner)

        assert_same(got, looped(inside, (q, k, v, bias, mask), outer))


def test_three_nested_vmaps():
    q, k, v = make("q", 2, N, M), make("k", 2), make("v", N)
    bias, mask = make("bias", M), make("mask")
    mapped = attention
    for axes in ((0, None, None, 0, None), (0, None, 0, None, None), (0, 0, None, None, None)):
        mapped = jax.vmap(mapped, in_axes=axes)
    out, lse = jax.jit(mapped)(q, k, v, bias, mask)
    for i, j, m in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        want = jitted(attention)(q[i, j, m], k[i], v[j], bias[m], mask)
        assert_same((out[i, j, m], lse[i, j, m]), want)


@pytest.mark.parametrize("lengths_mapped", [True, False])
def test_lengths(lengths_mapped):
    q, k, v = make("q", N), make("k", N), make("v", N)
    lengths = jnp.array([[3, 7], [1, 0], [5, 2]])
    lengths = lengths if lengths_mapped else lengths[0]

    def masked(q, k, v, lengths):
        return flash_attention(q, k, v, mask=Causal() & KvLengths(lengths))

    axes = (0, 0, 0, 0 if lengths_mapped else None)
    got = jax.jit(jax.vmap(masked, in_axes=axes))(q, k, v, lengths)
    assert_same(got, looped(jax.jit(masked), (q, k, v, lengths), axes))


def all_terms(q, k, v, ids, kv_ids, table, slopes, gain, logits):
    mask = Causal() | SegmentIds(ids, kv_ids)
    mods = (RelativeBias(table), Alibi(slopes), ScoreFunction(_times, gain), Sink(logits))
    return flash_attention_with_lse(q, k, v, mask=mask, score_mod=Chain(mods))


def _times(s, q_pos, kv_pos, gain):
    return s * gain


@pytest.mark.parametrize(
    "mapped", [("q", "ids"), ("k", "kv_ids", "table", "slopes"), ("gain", "logits")], ids="-".join
)
def test_terms_along_positions(mapped):
    names = ("q", "k", "v", "ids", "kv_ids", "table", "slopes", "gain", "logits")
    shapes = {"ids": (2, 5), "kv_ids": (2, 7), "table": (4, 8), "slopes": (4,), "logits": (2, 4)}
    shapes = {**SHAPES, **shapes, "gain": (2, 1, 5, 1)}
    rng = np.random.default_rng(0)

    def array(name):
        shape = (N, *shapes[name]) if name in mapped else shapes[name]
        if "ids" in name:
            return jnp.asarray(rng.integers(-1, 3, shape))
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    arrays = [array(name) for name in names]
    axes = tuple(0 if name in mapped else None for name in names)

    def both(*arrays):
        def total(*arrays):
            out, lse = all_terms(*arrays)
            return jnp.sin(out).sum() + jnp.cos(lse).sum()

        return all_terms(*arrays), jax.grad(total, argnums=(0, 1, 2, 5, 6, 7, 8))(*arrays)

    got = jax.jit(jax.vmap(both, in_axes=axes))(*arrays)
    assert_same(got, looped(jax.jit(both), arrays, axes))


def test_without_batch_axis():
    q, k, v = (make(n, N)[:, 0] for n in ("q", "k", "v"))
    got = jax.vmap(functools.partial(flash_attention, mask=Causal()))(q, k, v)
    assert_same(got, flash_attention(q, k, v, mask=Causal()))


def test_batch_of_one_and_a_mapped_axis_of_one():
    q, k = make("q", N, shape=(1, 5, 4, 8)), make("k", shape=(1, 7, 2, 8))
    v = make("v", shape=(1, 7, 2, 6))
    bias, mask = make("bias"), make("mask", shape=(1, 1, 5, 7))
    axes = (0, None, None, None, None)
    for function in (attention, gradients):
        got = jax.vmap(function, in_axes=axes)(q, k, v, bias, mask)
        assert_same(got, looped(jitted(function), (q, k, v, bias, mask), axes))
        got = jax.vmap(function, in_axes=axes)(q[:1], k, v, bias, mask)
        assert_same(got, looped(jitted(function), (q[:1], k, v, bias, mask), axes))


@pytest.mark.parametrize(
    ("axes", "rows"),
    [
        ((0, None, None), (6, 1, 6)),
        ((0, 0, None), (6, 3, 6)),
        ((0, None, 0), (6, 1, 6)),
        ((None, 0, None), (6, 3, 6)),
    ],
)
def test_shared_operand_is_not_repeated(axes, rows):
    """What `fn` of `foldable` sees: `shared` arguments keep as few rows as they have."""
    seen = []

    def fn(x, mask, bias):
        seen.append((x.shape[0], mask.shape[0], bias.shape[0]))
        return (x + jnp.repeat(mask, x.shape[0] // mask.shape[0], axis=0) + bias,)

    names = [("batch", "q")] * 3
    call = foldable(fn, names, names[:1], shared={1})
    arrays = (jnp.ones((2, 4)), 2 * jnp.ones((1, 4)), 3 * jnp.ones((2, 4)))
    pairs = zip(arrays, axes, strict=True)
    arrays = [x if a is None else jnp.stack([x] * N) for x, a in pairs]
    (out,) = jax.vmap(call, in_axes=axes)(*arrays)
    assert seen[-1] == rows
    assert out.shape == (N, 2, 4)
    assert (out == 6).all()


def test_shared_operand_between_two_mapped_axes():
    """Mapped by the inner vmap only, a shared operand's rows are repeated by the outer one."""

    def fn(x, shared):
        return (x + jnp.repeat(shared, x.shape[0] // shared.shape[0], axis=0),)

    call = foldable(fn, [("batch",)] * 2, [("batch",)], shared={1})
    x, shared = jnp.zeros((N, M, 2)), jnp.arange(float(M))[:, None]
    (out,) = jax.vmap(jax.vmap(call), in_axes=(0, None))(x, shared)
    np.testing.assert_array_equal(out, jnp.broadcast_to(shared, (N, M, 2)))
