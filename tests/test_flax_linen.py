"""Flax's linen attention layers and ours side by side: parameters, outputs, gradients, decoding."""

import functools
import inspect
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_layers
from flax_layers import linen as ours
from pallas_flash import Causal, DenseMask, KvLengths, SlidingWindow

KEY = jax.random.key(0)


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


def output_and_gradients(layer, params, *inputs, **kwargs):
    """Output, and the gradients of parameters and inputs, of a layer without other state."""

    def weighted_sum(params, *inputs):
        out = layer.apply({"params": params}, *inputs, **kwargs)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    argnums = tuple(range(len(inputs) + 1))
    step = jax.jit(jax.value_and_grad(weighted_sum, argnums, has_aux=True))
    (_, out), gradients = step(params, *inputs)
    return out, gradients


def shaken(params):
    """The parameters plus noise: biases are not all 0, nor scales all 1."""
    return jax.tree.map(lambda x: x + 0.3 * normal(9, *x.shape, dtype=x.dtype), params)


def causal_mask(*shape):
    return nn.make_causal_mask(jnp.ones(shape))


# Each: constructor arguments beside num_heads, shapes of the inputs, arguments of the call.
CASES = {
    "self": ({}, [(2, 6, 16)], {}),
    "no-batch": ({}, [(6, 16)], {}),
    "two-batch-axes-causal": ({}, [(2, 3, 6, 16)], {"mask": causal_mask(2, 3, 6)}),
    "cross-sizes": (
        {"qkv_features": 8, "out_features": 5},
        [(2, 6, 12), (2, 7, 10), (2, 7, 9)],
        {"mask": jnp.ones((2, 1, 6, 7), bool).at[1, :, :, 4:].set(False)},
    ),
    "normalize-no-bias": ({"normalize_qk": True, "use_bias": False}, [(2, 6, 16)], {}),
    "precision": ({"precision": "highest", "force_fp32_for_softmax": True}, [(2, 6, 16)], {}),
    "inactive-dropout": ({"dropout_rate": 0.5}, [(2, 6, 16)], {"deterministic": True}),
}
cases = pytest.mark.parametrize(("options", "shapes", "call"), CASES.values(), ids=CASES.keys())
# With num_kv_heads, the layer does not share Flax's code, and must do the same with all heads.
kv_heads = pytest.mark.parametrize("num_kv_heads", [None, 4], ids=["inherited", "own"])


@cases
@pytest.mark.parametrize("num_kv_heads", [None, 4], ids=["inherited", "own"])
def test_parameters_outputs_and_gradients_match_flax(options, shapes, call, num_kv_heads):
    inputs = [normal(i, *shape) for i, shape in enumerate(shapes)]
    theirs = nn.MultiHeadDotProductAttention(4, **options)
    own = ours.MultiHeadDotProductAttention(4, **options, num_kv_heads=num_kv_heads)
    variables = theirs.init(KEY, *inputs, **call)
    assert_identical(own.init(KEY, *inputs, **call), variables)
    args = shaken(variables["params"]), *inputs
    assert_same(
        output_and_gradients(own, *args, **call), output_and_gradients(theirs, *args, **call)
    )


@kv_heads
def test_bfloat16_layer_matches_flax_loosely(num_kv_heads):
    theirs = nn.MultiHeadDotProductAttention(4, dtype=jnp.bfloat16)
    own = ours.MultiHeadDotProductAttention(4, dtype=jnp.bfloat16, num_kv_heads=num_kv_heads)
    x = normal(0, 2, 6, 16)
    params = theirs.init(KEY, x)["params"]
    call = {"mask": causal_mask(2, 6)}
    result, expected = (output_and_gradients(f, params, x, **call) for f in (own, theirs))
    assert result[0].dtype == jnp.bfloat16
    assert_same(result, expected, tolerance=3e-2)


@pytest.mark.quick
def test_checkpoint_of_flax_loads():
    theirs, own = (m.MultiHeadAttention(4, normalize_qk=True, decode=True) for m in (nn, ours))
    x = normal(0, 2, 6, 16)
    saved = theirs.init(KEY, x)
    loaded = flax.serialization.from_bytes(
        own.init(jax.random.key(1), x), flax.serialization.to_bytes(saved)
    )
    assert_same(
        own.clone(decode=False).apply({"params": loaded["params"]}, x),
        theirs.clone(decode=False).apply({"params": saved["params"]}, x),
    )


def test_hook_in_the_layer_of_flax_matches_it():
    x = normal(0, 2, 6, 16)
    theirs = nn.MultiHeadDotProductAttention(4)
    hooked = theirs.clone(attention_fn=ours.attention_fn)
    params = theirs.init(KEY, x)["params"]
    for mask in (causal_mask(2, 6), None):
        result, expected = (output_and_gradients(f, params, x, mask=mask) for f in (hooked, theirs))
        assert_same(result, expected)
    assert_same(
        hooked.apply({"params": params}, x, mask=Causal()),
        theirs.apply({"params": params}, x, mask=causal_mask(2, 6)),
    )


@pytest.mark.quick
def test_constructor_and_call_have_the_arguments_of_flax():
    for name in ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"):
        own, theirs = getattr(ours, name), getattr(nn, name)
        fields, flax_fields = own.__dataclass_fields__, theirs.__dataclass_fields__
        assert [f for f in fields if f != "num_kv_heads"] == list(flax_fields)
        assert fields["attention_fn"].default is ours.attention_fn
        assert list(inspect.signature(own.__call__).parameters) == list(
            inspect.signature(theirs.__call__).parameters
        )


@pytest.mark.quick
@pytest.mark.parametrize("name", ["MultiHeadDotProductAttention", "MultiHeadAttention"])
def test_automatic_names_are_those_of_flax(name):
    class Model(nn.Module):
        make: type

        @nn.compact
        def __call__(self, x):
            return self.make(2)(self.make(2)(x))

    x = normal(0, 3, 4)
    result, expected = (Model(getattr(m, name)).init(KEY, x) for m in (ours, nn))
    assert set(result["params"]) == {f"{name}_0", f"{name}_1"}
    assert_identical(result, expected)


def test_package_loads_layers_when_used():
    assert flax_layers.linen is ours
    with pytest.raises(AttributeError, match="no attribute 'haiku'"):
        _ = flax_layers.haiku


# Dropout, sown weights


@pytest.mark.parametrize(("num_kv_heads", "broadcast_dropout"), [(None, True), (4, False)])
def test_dropout_takes_its_key_and_pattern_as_in_the_layer_of_flax(num_kv_heads, broadcast_dropout):
    options = {"dropout_rate": 0.4, "broadcast_dropout": broadcast_dropout, "deterministic": False}
    theirs = nn.MultiHeadDotProductAttention(4, **options, attention_fn=ours.attention_fn)
    own = ours.MultiHeadDotProductAttention(4, **options, num_kv_heads=num_kv_heads)
    x = normal(0, 2, 6, 16)
    params = theirs.init({"params": KEY, "dropout": KEY}, x)["params"]
    first, second = jax.random.key(1), jax.random.key(2)

    def run(layer, **call):
        return layer.apply({"params": params}, x, **call)

    explicit = run(own, dropout_rng=first)
    assert_identical(explicit, run(theirs, dropout_rng=first))
    # An explicit key wins over the stream of the module.
    assert_identical(explicit, run(own, dropout_rng=first, rngs={"dropout": second}))
    streams = {"rngs": {"dropout": second}, "mask": causal_mask(2, 6)}
    assert_identical(*(output_and_gradients(f, params, x, **streams) for f in (own, theirs)))
    assert not np.allclose(explicit, run(own, rngs={"dropout": first}))


@kv_heads
def test_dropout_without_rng_is_refused_as_by_flax(num_kv_heads):
    own = ours.MultiHeadDotProductAttention(4, dropout_rate=0.4, num_kv_heads=num_kv_heads)
    x = normal(0, 3, 16)
    variables = own.init(KEY, x, deterministic=True)
    with pytest.raises(flax.errors.InvalidRngError):
        own.apply(variables, x, deterministic=False)


@pytest.mark.parametrize(
    ("num_kv_heads", "dtype"), [(None, jnp.float32), (2, jnp.float32), (4, jnp.bfloat16)]
)
def test_sown_weights_are_those_of_flax(dtype, num_kv_heads):
    theirs = nn.MultiHeadDotProductAttention(4, dtype=dtype, force_fp32_for_softmax=True)
    own = ours.MultiHeadDotProductAttention(
        4, dtype=dtype, force_fp32_for_softmax=True, num_kv_heads=num_kv_heads
    )
    x, mask = normal(0, 2, 6, 16), causal_mask(2, 6)
    variables = own.init(KEY, x)
    call = {"mask": mask, "sow_weights": True, "mutable": ["intermediates"]}
    result = own.apply(variables, x, **call)
    expected = theirs.apply(with_repeated_kv_heads(variables, 4), x, **call)
    assert result[1]["intermediates"]["attention_weights"][0].shape == (2, 4, 6, 6)
    assert_same(result, expected, tolerance=1e-6)


# Grouped heads


def with_repeated_kv_heads(variables, num_heads):
    """The parameters of the equivalent layer with as many key heads as query heads."""

    def repeat(path, x):
        if path[1].key not in ("key", "value"):
            return x
        return jnp.repeat(x, num_heads // x.shape[-2], axis=-2)

    return jax.tree_util.tree_map_with_path(repeat, variables)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("normalize_qk", [True, False])
def test_grouped_layer_matches_flax_with_repeated_heads(num_kv_heads, normalize_qk):
    own = ours.MultiHeadAttention(4, num_kv_heads=num_kv_heads, normalize_qk=normalize_qk)
    theirs = nn.MultiHeadAttention(4, normalize_qk=normalize_qk)
    x, context = normal(0, 2, 6, 16), normal(1, 2, 7, 12)
    params = shaken(own.init(KEY, x, context)["params"])
    assert params["key"]["kernel"].shape == (12, num_kv_heads, 4)
    assert params["value"]["bias"].shape == (num_kv_heads, 4)
    assert params["query"]["kernel"].shape == (16, 4, 4)

    class Oracle:
        @staticmethod
        def apply(variables, *inputs):
            return theirs.apply(with_repeated_kv_heads(variables, 4), *inputs)

    args = params, x, context
    assert_same(output_and_gradients(own, *args), output_and_gradients(Oracle, *args))


@pytest.mark.parametrize("num_kv_heads", [3, 0, -1, 8])
def test_kv_heads_that_do_not_divide_are_refused(num_kv_heads):
    layer = ours.MultiHeadAttention(4, num_kv_heads=num_kv_heads)
    message = f"num_heads=4 must be a multiple of num_kv_heads={num_kv_heads}"
    with pytest.raises(ValueError, match=message):
        layer.init(KEY, normal(0, 6, 16))


def test_features_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="qkv_features=16 must be a multiple of num_heads=3"):
        ours.MultiHeadAttention(3, num_kv_heads=1).init(KEY, normal(0, 6, 16))


# Decoding


def decode(layer, variables, x, **call):
    """The outputs of feeding x [batch..., length, features] one position at a time."""
    step = jax.jit(functools.partial(layer.apply, mutable=["cache"], **call))
    params, cache = {"params": variables["params"]}, {"cache": variables["cache"]}
    outputs = []
    for position in range(x.shape[-2]):
        out, cache = step({**params, **cache}, x[..., position : position + 1, :])
        outputs.append(out)
    assert cache["cache"]["cache_index"] == x.shape[-2]
    return jnp.concatenate(outputs, axis=-2)


@pytest.mark.parametrize(
    ("num_kv_heads", "batch"), [(None, (2, 3)), (1, ()), (2, (2, 3)), (4, (2,))]
)
def test_decoding_equals_the_causal_forward(num_kv_heads, batch):
    x = normal(0, *batch, 5, 16)
    layer = ours.MultiHeadAttention(4, num_kv_heads=num_kv_heads, decode=True, normalize_qk=True)
    variables = layer.init(KEY, x)
    assert variables["cache"]["cached_key"].shape == (*batch, 5, num_kv_heads or 4, 4)
    expected = layer.clone(decode=False).apply({"params": variables["params"]}, x, mask=Causal())
    assert_same(decode(layer, variables, x), expected)


@kv_heads
def test_cache_is_that_of_flax(num_kv_heads):
    x = normal(0, 2, 5, 16)
    theirs = nn.MultiHeadDotProductAttention(4, decode=True)
    own = ours.MultiHeadDotProductAttention(4, decode=True, num_kv_heads=num_kv_heads)
    variables = theirs.init(KEY, x)
    assert_identical(own.init(KEY, x), variables)
    result, expected = (f.apply(variables, x[:, :1], mutable=["cache"]) for f in (own, theirs))
    assert_same(result[0], expected[0])
    assert_identical(result[1], expected[1])


STRUCTURED = {
    "window": SlidingWindow(1, 0),
    "lengths": KvLengths(jnp.array([2, 4], jnp.int32)),
    "bottom-right": Causal("bottom_right"),
    "dense-rows": DenseMask(jax.random.bernoulli(KEY, 0.6, (4, 5, 5))),
    "nothing": ~SlidingWindow(),
}


@pytest.mark.parametrize("num_kv_heads", [None, 2], ids=["inherited", "grouped"])
@pytest.mark.parametrize("mask", STRUCTURED.values(), ids=STRUCTURED.keys())
def test_structured_mask_sees_the_decoded_position(mask, num_kv_heads):
    x = normal(0, 2, 5, 16)
    layer = ours.MultiHeadAttention(4, num_kv_heads=num_kv_heads, decode=True)
    variables = layer.init(KEY, x, mask=mask)
    expected = layer.clone(decode=False).apply(
        {"params": variables["params"]}, x, mask=mask & Causal()
    )
    assert_same(decode(layer, variables, x, mask=mask), expected)


@kv_heads
def test_array_mask_joins_the_cache_when_decoding(num_kv_heads):
    x = normal(0, 2, 5, 16)
    layer = ours.MultiHeadAttention(4, num_kv_heads=num_kv_heads, decode=True)
    variables = layer.init(KEY, x)
    # Every query sees key 0 and not key 1.
    mask = jnp.ones((2, 1, 1, 5)).at[..., 1].set(0)
    expected = layer.clone(decode=False).apply(
        {"params": variables["params"]}, x, mask=mask * causal_mask(2, 5)
    )
    assert_same(decode(layer, variables, x, mask=mask), expected)


@pytest.mark.parametrize("num_kv_heads", [None, 2], ids=["inherited", "grouped"])
@pytest.mark.parametrize("shape", [(2, 2, 16), (3, 1, 16)], ids=["two-positions", "other-batch"])
def test_input_that_does_not_fit_the_cache_is_refused(shape, num_kv_heads):
    layer = ours.MultiHeadAttention(4, num_kv_heads=num_kv_heads, decode=True)
    variables = layer.init(KEY, normal(0, 2, 5, 16))
    with pytest.raises(ValueError, match=rf"cache.* \({shape[0]}, {shape[1]}, 4, 4\)"):
        layer.apply(variables, normal(0, *shape), mutable=["cache"])


# Arguments


@kv_heads
def test_inputs_are_copied_and_checked_as_by_flax(num_kv_heads):
    layer = ours.MultiHeadAttention(2, num_kv_heads=num_kv_heads and 2)
    q, kv = normal(0, 3, 4), normal(1, 5, 4)
    variables = layer.init(KEY, q)
    expected = layer.apply(variables, q, kv, kv)
    assert_identical(layer.apply(variables, q, kv), expected)
    assert_identical(layer.apply(variables, inputs_q=q, inputs_k=kv), expected)
    with pytest.warns(DeprecationWarning, match="inputs_kv"):
        assert_identical(layer.apply(variables, q, inputs_kv=kv), expected)
    assert_identical(layer.apply(variables, q), layer.apply(variables, q, q))
    with pytest.raises(ValueError, match=r"`?inputs_k`? cannot be None"):
        layer.apply(variables, q, inputs_v=kv)
    with pytest.raises(ValueError, match=r"`?inputs_kv`? must be None"):
        layer.apply(variables, q, kv, inputs_kv=kv)


@kv_heads
@pytest.mark.parametrize("name", ["qk_attn_weights_einsum", "attn_weights_value_einsum"])
def test_quantized_einsums_are_refused(name, num_kv_heads):
    options = {f"{name}_cls": lambda: jnp.einsum}
    layer = ours.MultiHeadAttention(2, **options, num_kv_heads=num_kv_heads and 2)
    with pytest.raises(ValueError, match=f"{name}=<function .* is not supported"):
        layer.init(KEY, normal(0, 3, 4))


@kv_heads
def test_custom_attention_fn_receives_what_it_names(num_kv_heads):
    def hook(query, key, value, mask=None, dropout_rate=None):
        assert mask is not None
        assert dropout_rate == 0.25
        return query * 2

    x = normal(0, 3, 4)
    options = {"attention_fn": hook, "dropout_rate": 0.25, "deterministic": True}
    own = ours.MultiHeadAttention(2, **options, num_kv_heads=num_kv_heads and 2)
    result = own.init_with_output(KEY, x, mask=causal_mask(3))
    theirs = nn.MultiHeadAttention(2, **options)
    assert_identical(result, theirs.init_with_output(KEY, x, mask=causal_mask(3)))


def test_self_attention_matches_flax_and_warns():
    x = normal(0, 2, 6, 16)
    results = []
    for module in (ours, nn):
        with pytest.warns(DeprecationWarning, match="SelfAttention"):
            results.append(module.SelfAttention(4).init_with_output(KEY, x, causal_mask(2, 6)))
    assert_same(*results)


def test_layers_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num_kv_heads in (None, 2):
            ours.MultiHeadAttention(4, num_kv_heads=num_kv_heads).init(KEY, normal(0, 2, 6, 16))


def test_decoding_under_x64():
    with jax.enable_x64(True):
        x = normal(0, 2, 5, 16, dtype=jnp.float64)
        for num_kv_heads in (None, 2):
            layer = ours.MultiHeadAttention(
                4, num_kv_heads=num_kv_heads, decode=True, param_dtype=jnp.float64
            )
            variables = layer.init(KEY, x)
            mask = SlidingWindow(2, None)
            expected = layer.clone(decode=False).apply(
                {"params": variables["params"]}, x, mask=mask & Causal()
            )
            assert_same(decode(layer, variables, x, mask=mask), expected, tolerance=1e-13)
