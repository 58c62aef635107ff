"""Flax's nnx attention layer and ours side by side: state, outputs, gradients, decoding."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_layers.linen
from flax_layers import nnx as ours
from pallas_flash import Causal, DenseMask, KvLengths, SlidingWindow


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_same(result, expected, tolerance=1e-5):
    def check(a, b):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)

    jax.tree.map(check, result, expected)


def assert_identical(result, expected):
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def make_pair(*args, **options):
    """Our layer and Flax's, from the same seed."""
    return [
        module.MultiHeadAttention(*args, rngs=nnx.Rngs(0, dropout=1), **options)
        for module in (ours, nnx)
    ]


def output_and_gradients(layer, *inputs, **call):
    """Output, and the gradients of parameters (as pure arrays) and inputs."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def weighted_sum(params, *inputs):
        out = nnx.merge(graph, params, rest)(*inputs, **call)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    argnums = tuple(range(len(inputs) + 1))
    step = jax.jit(jax.value_and_grad(weighted_sum, argnums, has_aux=True))
    (_, out), gradients = step(params, *inputs)
    return out, jax.tree.leaves(gradients)


def causal_mask(*shape):
    return nnx.make_causal_mask(jnp.ones(shape))


# Each: constructor arguments beside num_heads and in_features, shapes of inputs, call arguments.
CASES = {
    "self": ({}, [(2, 6, 16)], {}),
    "no-batch-causal": ({}, [(6, 16)], {"is_causal": True}),
    "two-batch-axes-causal": ({}, [(2, 3, 6, 16)], {"is_causal": True}),
    "cross-sizes": (
        {"qkv_features": 8, "out_features": 5, "in_kv_features": 10},
        [(2, 6, 16), (2, 7, 10), (2, 7, 10)],
        {"mask": jnp.ones((2, 1, 6, 7)).at[1, :, :, 4:].set(0)},
    ),
    "grouped": ({"num_kv_heads": 2}, [(2, 6, 16)], {"mask": causal_mask(2, 6)}),
    "multi-query": ({"num_kv_heads": 1}, [(2, 6, 16)], {}),
    "normalize-no-bias": ({"normalize_qk": True, "use_bias": False}, [(2, 6, 16)], {}),
    "precision": ({"precision": "highest"}, [(2, 6, 16)], {}),
    "inactive-dropout": ({"dropout_rate": 0.5}, [(2, 6, 16)], {"deterministic": True}),
}
cases = pytest.mark.parametrize(("options", "shapes", "call"), CASES.values(), ids=CASES.keys())


@cases
def test_state_outputs_and_gradients_match_flax(options, shapes, call):
    inputs = [normal(i, *shape) for i, shape in enumerate(shapes)]
    own, theirs = make_pair(4, 16, decode=False, **options)
    states = [nnx.state(layer, nnx.Param) for layer in (own, theirs)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert_identical(*states)
    # Biases that are not all 0, scales that are not all 1.
    shaken = jax.tree.map(lambda x: x + 0.3 * normal(9, *x.shape), states[0])
    for layer in (own, theirs):
        nnx.update(layer, shaken)
    assert_same(
        output_and_gradients(own, *inputs, **call), output_and_gradients(theirs, *inputs, **call)
    )


def test_bfloat16_layer_matches_flax_loosely():
    results = [
        output_and_gradients(layer, normal(0, 2, 6, 16), is_causal=True)
        for layer in make_pair(4, 16, decode=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ]
    assert results[0][0].dtype == jnp.bfloat16
    assert_same(*results, tolerance=3e-2)


@pytest.mark.quick
def test_checkpoint_of_flax_loads():
    theirs = nnx.MultiHeadAttention(4, 16, decode=False, normalize_qk=True, rngs=nnx.Rngs(0))
    own = ours.MultiHeadAttention(4, 16, decode=False, normalize_qk=True, rngs=nnx.Rngs(5))
    x = normal(0, 2, 6, 16)
    assert not np.allclose(own(x), theirs(x))
    nnx.update(own, nnx.to_pure_dict(nnx.state(theirs)))
    assert_same(own(x), theirs(x))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linen_and_nnx_agree_bitwise(dtype):
    x = normal(0, 2, 6, 16)
    options = {"qkv_features": 8, "num_kv_heads": 2, "dtype": dtype}
    linen_layer = flax_layers.linen.MultiHeadAttention(4, **options)
    variables = linen_layer.init(jax.random.key(0), x)
    layer = ours.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0), **options)
    nnx.update(layer, variables["params"])
    assert_identical(layer(x, is_causal=True), linen_layer.apply(variables, x, mask=Causal()))


def test_hook_in_the_layer_of_flax_matches_it():
    _, theirs = make_pair(4, 16, decode=False)
    _, hooked = make_pair(4, 16, decode=False, attention_fn=ours.attention_fn)
    assert type(hooked) is nnx.MultiHeadAttention
    x = normal(0, 2, 6, 16)
    assert_same(
        output_and_gradients(hooked, x, is_causal=True),
        output_and_gradients(theirs, x, is_causal=True),
    )
    assert_same(hooked(x, mask=Causal()), theirs(x, mask=causal_mask(2, 6)))


@pytest.mark.quick
def test_constructor_and_call_have_the_signature_of_flax():
    for method in ("__init__", "__call__"):
        own, theirs = (
            inspect.signature(getattr(m.MultiHeadAttention, method)).parameters for m in (ours, nnx)
        )
        assert list(own) == list(theirs)
        changed = {name for name in own if own[name].default is not theirs[name].default}
        assert changed == ({"attention_fn"} if method == "__init__" else set())
    assert make_pair(2, 4)[0].attention_fn is ours.attention_fn


def test_custom_attention_fn_is_honoured():
    def hook(query, key, value, **kwargs):
        assert "is_causal" in kwargs
        return query * 2

    own, theirs = make_pair(2, 4, decode=False, attention_fn=hook)
    assert_identical(own(normal(0, 3, 4)), theirs(normal(0, 3, 4)))


def test_arguments_that_flax_refuses_are_refused():
    with pytest.raises(ValueError, match="divisible"):
        make_pair(4, 16, num_kv_heads=3)
    layer = ours.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`inputs_k` cannot be None"):
        layer(normal(0, 3, 4), inputs_v=normal(0, 3, 4))
    with pytest.raises(TypeError, match="nonsense"):
        layer(normal(0, 3, 4), nonsense=1)
    with pytest.raises(TypeError, match="nonsense"):
        ours.MultiHeadAttention(2, 4, nonsense=1, rngs=nnx.Rngs(0))


# Dropout, sown weights


@pytest.mark.parametrize("broadcast_dropout", [True, False])
def test_dropout_takes_its_key_and_pattern_as_in_the_layer_of_flax(broadcast_dropout):
    x = normal(0, 2, 6, 16)
    options = {"dropout_rate": 0.4, "broadcast_dropout": broadcast_dropout, "decode": False}
    options["attention_fn"] = ours.attention_fn
    pair = make_pair(4, 16, num_kv_heads=2, deterministic=False, **options)
    # The stream that the layer keeps, then one given to the call.
    first, second, third = (
        [call(layer) for layer in pair]
        for call in (
            lambda layer: layer(x),
            lambda layer: layer(x, mask=causal_mask(2, 6)),
            lambda layer: layer(x, rngs=nnx.Rngs(dropout=7)),
        )
    )
    for result in (first, second, third):
        assert_identical(*result)
    assert not np.allclose(first[0], third[0])


def test_dropout_without_rngs_is_refused_as_by_flax():
    layer, _ = make_pair(4, 16, dropout_rate=0.4, keep_rngs=False, decode=False)
    assert layer.rngs is None
    with pytest.raises(ValueError, match="'rngs' must be provided"):
        layer(normal(0, 6, 16), deterministic=False)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_sown_weights_are_those_of_flax(num_kv_heads):
    x = normal(0, 2, 6, 16)
    results = []
    for layer in make_pair(4, 16, decode=False, num_kv_heads=num_kv_heads):
        out, sown = nnx.capture(layer, nnx.Intermediate)(
            x, mask=causal_mask(2, 6), sow_weights=True
        )
        results.append((out, sown["attention_weights"][0]))
    assert results[0][1].shape == (2, 4, 6, 6)
    assert_same(*results, tolerance=1e-6)


# Decoding


def decode(layer, x, **call):
    """The outputs of feeding x [batch..., length, features] one position at a time."""
    layer.init_cache(x.shape, x.dtype)

    @nnx.jit
    def step(layer, token):
        return layer(token, decode=True, **call)

    outputs = [step(layer, x[..., i : i + 1, :]) for i in range(x.shape[-2])]
    assert layer.cache_index[...] == x.shape[-2]
    return jnp.concatenate(outputs, axis=-2)


@pytest.mark.parametrize(("num_kv_heads", "batch"), [(None, (2,)), (2, ()), (1, (2, 3))])
@pytest.mark.parametrize("is_causal", [True, False])
def test_decoding_equals_the_causal_forward(num_kv_heads, batch, is_causal):
    x = normal(0, *batch, 5, 16)
    layer, _ = make_pair(4, 16, num_kv_heads=num_kv_heads, normalize_qk=True)
    expected = layer(x, decode=False, is_causal=True)
    assert_same(decode(layer, x, is_causal=is_causal), expected)
    assert layer.cached_key.shape == (*batch, 5, num_kv_heads or 4, 4)


def test_cache_is_that_of_flax():
    x = normal(0, 2, 5, 16)
    own, theirs = make_pair(4, 16, num_kv_heads=2)
    assert_same(decode(own, x), decode(theirs, x))
    caches = [nnx.state(layer, nnx.Cache) for layer in (own, theirs)]
    assert jax.tree.structure(caches[0]) == jax.tree.structure(caches[1])
    assert_identical(*caches)


STRUCTURED = {
    "window": SlidingWindow(1, 0),
    "lengths": KvLengths(jnp.array([2, 4], jnp.int32)),
    "bottom-right": Causal("bottom_right"),
    "dense-rows": DenseMask(jax.random.bernoulli(jax.random.key(0), 0.6, (4, 5, 5))),
}


@pytest.mark.parametrize("mask", STRUCTURED.values(), ids=STRUCTURED.keys())
def test_structured_mask_sees_the_decoded_position(mask):
    x = normal(0, 2, 5, 16)
    layer, _ = make_pair(4, 16, num_kv_heads=2)
    expected = layer(x, decode=False, mask=mask, is_causal=True)
    assert_same(decode(layer, x, mask=mask), expected)


def test_decoding_is_refused_as_by_flax():
    layer, _ = make_pair(4, 16, decode=True)
    with pytest.raises(ValueError, match="cache not initialized"):
        layer(normal(0, 2, 1, 16))
    with pytest.raises(ValueError, match="cache not initialized"):
        layer(normal(0, 2, 1, 16), mask=Causal())
    layer.init_cache((2, 5, 16))
    with pytest.raises(ValueError, match=r"expected key shape \(2, 1, 4, 4\)"):
        layer(normal(0, 2, 2, 16))


def test_layer_trains_under_nnx_transformations():
    x = normal(0, 2, 6, 16)

    @nnx.jit
    def gradients(layer):
        return nnx.grad(lambda layer: (layer(x, is_causal=True) ** 2).mean())(layer)

    assert_same(*(jax.tree.leaves(gradients(layer)) for layer in make_pair(4, 16, decode=False)))
