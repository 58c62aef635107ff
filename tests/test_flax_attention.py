"""`Attention` of linen and nnx: Flax's results where Flax has the feature, else its formula."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flax_layers.linen
import flax_layers.nnx
import oracle
from flax_layers import Rope, adapter
from flax_layers.rope import document_positions
from pallas_flash import (
    Alibi,
    Bias,
    Causal,
    SlidingWindow,
    Softcap,
    alibi_slopes,
)

KEY = jax.random.key(0)
FEATURES = 16


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_same(result, expected, tolerance=1e-5):
    def check(a, b):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)

    jax.tree.map(check, result, expected)


def assert_identical(result, expected):
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def output_and_gradients(function, params, *inputs):
    """Of a function of parameters and inputs."""

    def weighted_sum(params, *inputs):
        out = function(params, *inputs)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    argnums = tuple(range(len(inputs) + 1))
    step = jax.jit(jax.value_and_grad(weighted_sum, argnums, has_aux=True))
    (_, out), gradients = step(params, *inputs)
    return out, gradients


def linen_layer(options, x, *inputs, **call):
    """The layer as a function of parameters and inputs, and random parameters."""
    layer = flax_layers.linen.Attention(4, **options)
    shapes = jax.eval_shape(functools.partial(layer.init, **call), KEY, x, *inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype), shapes)
    return lambda params, *inputs, **call: layer.apply({"params": params}, *inputs, **call), params


def nnx_layer(options, params):
    """The same layer in nnx, with the parameters of linen's."""
    features, kv_features = (params[name]["kernel"].shape[0] for name in ("query", "key"))
    layer = nnx.eval_shape(
        lambda: flax_layers.nnx.Attention(
            4, features, in_kv_features=kv_features, **options, rngs=nnx.Rngs(1)
        )
    )
    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert jax.tree.structure(state) == jax.tree.structure(params)
    nnx.update(layer, params)
    # The arrays of a constructor's mods have become shapes.
    if mod := options.get("score_mod"):
        layer.score_mod = nnx.data(mod)
    return layer


# The formula, in other words than the layer's


def turn(x, positions, rope):
    """Rotates [B, T, H, D] by complex numbers; positions [B, T]."""
    dim = rope.dim or x.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    pairs = (
        turned.reshape(*x.shape[:-1], -1, 2)
        if rope.interleaved
        else jnp.stack(jnp.split(turned, 2, -1), -1)
    )
    angles = positions[:, :, None, None] * rope.base ** (-2.0 * jnp.arange(dim // 2) / dim)
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * jnp.exp(1j * angles)
    pairs = jnp.stack((z.real, z.imag), -1)
    back = pairs if rope.interleaved else jnp.swapaxes(pairs, -1, -2)
    return jnp.concatenate((back.reshape(turned.shape), rest), -1)


def formula(params, x, kv=None, *, allowed=None, positions=None, rope=None, **attention):
    """The layer's output for [B, T, features], from its parameters, by the oracle."""

    def project(name, inputs):
        heads = jnp.einsum("btf,fhd->bthd", inputs, params[name]["kernel"])
        if "bias" in params[name]:
            heads = heads + params[name]["bias"]
        if f"{name}_norm" in params:
            mean = (heads**2).mean(-1, keepdims=True)
            heads = heads / jnp.sqrt(mean + 1e-6) * params[f"{name}_norm"]["scale"]
        if rope is not None and name != "value":
            heads = turn(heads, positions, rope)
        return heads

    q, k, v = (project(n, i) for n, i in (("query", x), ("key", kv), ("value", kv)))
    out, _ = oracle.attention(q, k, v, allowed=allowed, sink=params.get("sinks"), **attention)
    out = jnp.einsum("bthd,hdf->btf", out, params["out"]["kernel"])
    return out + params["out"].get("bias", 0)


LENGTH = 9
ROW, COL = np.arange(LENGTH)[:, None], np.arange(LENGTH)
IDS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [3, 3, 5, 5, 5, 5, -1, -1, -1]])
IN_DOCUMENT = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3, 0, 1, 2]])
ONE_DOCUMENT = ((IDS[:, :, None] == IDS[:, None]) & (IDS[:, None] >= 0))[:, None]
ARRAY = np.random.default_rng(0).random((2, 4, LENGTH, LENGTH)) < 0.7
BIAS = np.random.default_rng(1).normal(size=(1, 4, LENGTH, LENGTH))
EARLIER = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))

# Each: the layer's options, its call's arguments, the formula's arguments.
CASES = {
    "window-gqa": (
        {"mask": Causal() & SlidingWindow(2, 0), "num_kv_heads": 2, "head_dim": 5},
        {},
        {"allowed": (COL <= ROW) & (COL >= ROW - 2)},
    ),
    "rope-mqa-norm": (
        {"rope": Rope(), "num_kv_heads": 1, "head_dim": 6, "qk_norm": True, "use_bias": False},
        {"is_causal": True},
        {"rope": Rope(), "positions": EARLIER, "allowed": COL <= ROW},
    ),
    "positions": (
        {"rope": Rope(100.0, dim=4, interleaved=True), "head_dim": 6, "scale": 0.7},
        {"positions": jnp.arange(LENGTH) * 3 + 5},
        {"rope": Rope(100.0, dim=4, interleaved=True), "positions": EARLIER * 3 + 5, "scale": 0.7},
    ),
    "documents": (
        {"mask": Causal(), "rope": Rope(), "head_dim": 4, "sinks": nn.initializers.ones},
        {"segment_ids": jnp.asarray(IDS)},
        {"rope": Rope(), "positions": IN_DOCUMENT, "allowed": ONE_DOCUMENT & (COL <= ROW)},
    ),
    "softcap-array-mask": (
        {"score_mod": Softcap(0.5), "num_kv_heads": 2, "mask": SlidingWindow(None, 3)},
        {"mask": jnp.asarray(ARRAY, jnp.float32)},
        {"allowed": ARRAY & (COL <= ROW + 3), "change": lambda s: 0.5 * jnp.tanh(s / 0.5)},
    ),
    "mods-of-layer-and-call": (
        {"score_mod": Alibi(alibi_slopes(4)), "mask": Causal()},
        {"score_mod": Bias(jnp.asarray(BIAS, jnp.float32))},
        {
            "allowed": COL <= ROW,
            "change": lambda s: (
                s
                + BIAS.astype(np.float32)
                - np.asarray(alibi_slopes(4), np.float64)[:, None, None] * np.abs(ROW - COL)
            ),
        },
    ),
}
cases = pytest.mark.parametrize(("options", "call", "truth"), CASES.values(), ids=CASES.keys())


@cases
def test_both_layers_are_the_formula(options, call, truth):
    with jax.enable_x64(True):
        x = normal(0, 2, LENGTH, FEATURES, dtype=jnp.float64)
        options = options | {"param_dtype": jnp.float64}
        layer, params = linen_layer(options, x, **call)
        result = output_and_gradients(functools.partial(layer, **call), params, x)
        expected = output_and_gradients(lambda p, x: formula(p, x, x, **truth), params, x)
        assert result[0].dtype == jnp.float64
        # The mods' arrays and the frequencies are float32 numbers.
        assert_same(result, expected, 1e-6 if "rope" in options else 1e-12)
        other = nnx.jit(lambda layer, x: layer(x, **call))(nnx_layer(options, params), x)
        assert_same(other, result[0], 1e-14)


# Flax's own layers


FLAX = {
    "self": ({}, {}, ()),
    "array-mask": ({"use_bias": False}, {"mask": jnp.asarray(ARRAY)}, ()),
    "cross": ({}, {"mask": jnp.asarray(ARRAY[:, :1, :, :7])}, ((2, 7, 10),)),
}


@pytest.mark.parametrize(("options", "call", "shapes"), FLAX.values(), ids=FLAX.keys())
def test_parameters_outputs_and_gradients_are_those_of_flax(options, call, shapes):
    inputs = [normal(0, 2, LENGTH, FEATURES), *(normal(1, *shape) for shape in shapes)]
    own, params = linen_layer(options, *inputs, **call)
    theirs = nn.MultiHeadDotProductAttention(4, **options)
    variables = theirs.init(KEY, *inputs)
    assert_identical(flax_layers.linen.Attention(4, **options).init(KEY, *inputs), variables)

    def flax(params, *inputs):
        return theirs.apply({"params": params}, *inputs, **call)

    result = output_and_gradients(functools.partial(own, **call), params, *inputs)
    assert_same(result, output_and_gradients(flax, params, *inputs))
    other = nnx.jit(lambda layer, *x: layer(*x, **call))(nnx_layer(options, params), *inputs)
    assert_same(other, result[0])


def test_grouped_rotary_layer_is_that_of_flax_nnx():
    rotate = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE())
    options = {"num_kv_heads": 2, "rngs": nnx.Rngs(0)}
    theirs = nnx.MultiHeadAttention(4, 16, **options, decode=False, attention_fn=rotate)
    own = flax_layers.nnx.Attention(4, 16, **options, rope=Rope())
    nnx.update(own, nnx.to_pure_dict(nnx.state(theirs, nnx.Param)))
    x = normal(0, 2, LENGTH, 16)
    call = nnx.jit(lambda layer, x: layer(x, is_causal=True))
    assert_same(call(own, x), call(theirs, x))


@pytest.mark.parametrize("base", [100.0, 10_000.0])
def test_rope_is_that_of_flax(base):
    x, positions = normal(0, LENGTH, 6), jnp.arange(LENGTH) * 7
    result = Rope(base)(x[:, None], positions)[:, 0]
    assert_same(result, nnx.RoPE(base)(x, positions), 1e-6)


def test_a_subclass_of_rope_has_its_own_frequencies():
    class Stretched(Rope):
        def frequencies(self, dim):
            return super().frequencies(dim) / 4

    x, positions = normal(0, 1, LENGTH, 2, 6), jnp.arange(LENGTH)
    assert_same(Stretched()(x, positions * 4), Rope()(x, positions), 1e-6)


# Documents, dtypes, dropout, partitioning


class Absolute(Rope):
    """Says where a token is, where rotary embeddings only say how far from another."""

    def __call__(self, x, positions):
        return x * (1 + positions[..., None, None])


def test_a_packed_document_gives_what_it_gives_alone():
    options = {"mask": Causal() & SlidingWindow(3, 0), "rope": Absolute(), "num_kv_heads": 2}
    x = normal(0, 1, 8, FEATURES)
    layer, params = linen_layer(options, x)
    layer = jax.jit(layer)
    packed = layer(params, x, segment_ids=jnp.array([[7, 7, 7, 4, 4, 4, 4, 4]]))
    assert_same(packed[:, :3], layer(params, x[:, :3]))
    assert_same(packed[:, 3:], layer(params, x[:, 3:]))
    np.testing.assert_array_equal(document_positions(jnp.asarray(IDS)), IN_DOCUMENT)


def test_several_batch_axes_are_one_batch():
    options = {"mask": Causal(), "rope": Rope()}
    x = normal(0, 2, 3, 5, FEATURES)
    ids = jnp.array([[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]])[:, None]
    layer, params = linen_layer(options, x)
    layer = jax.jit(layer)
    out = layer(params, x, segment_ids=jnp.broadcast_to(ids, (2, 3, 5)))
    flat = layer(params, x.reshape(6, 5, -1), segment_ids=jnp.repeat(ids[:, 0], 3, 0))
    assert_identical(out, flat.reshape(x.shape))


def test_bfloat16_computes_with_float32_parameters():
    options = {"num_kv_heads": 2, "rope": Rope(), "qk_norm": True, "mask": Causal()}
    options["sinks"] = nn.initializers.ones
    x = normal(0, 2, LENGTH, FEATURES)
    layer, params = linen_layer(options | {"dtype": jnp.bfloat16}, x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out, gradients = output_and_gradients(layer, params, x)
    assert out.dtype == jnp.bfloat16
    wide, _ = linen_layer(options, x)
    assert_same((out, gradients), output_and_gradients(wide, params, x), 5e-2)
    # Far positions turn by angles that bfloat16 does not hold.
    positions = jnp.arange(LENGTH) + 1_000_001
    far = jax.jit(layer)(params, x, positions=positions)
    assert_same(far, jax.jit(wide)(params, x, positions=positions), 3e-2)


@pytest.fixture
def dropouts(monkeypatch):
    """What `flash_attention` is given as dropout, call by call."""
    seen, function = [], adapter.flash_attention

    def spy(*args, dropout, **options):
        seen.append(dropout)
        return function(*args, dropout=dropout, **options)

    monkeypatch.setattr(adapter, "flash_attention", spy)
    return seen


def test_dropout_reaches_the_kernel(dropouts):
    x = normal(0, 2, LENGTH, FEATURES)
    options = {"dropout_rate": 0.4, "mask": Causal()}
    layer = flax_layers.linen.Attention(4, **options)
    params = layer.init(KEY, x, deterministic=True)["params"]
    other = flax_layers.nnx.Attention(4, FEATURES, **options, rngs=nnx.Rngs(0))
    nnx.update(other, params)
    dropouts.clear()
    quiet = layer.apply({"params": params}, x, deterministic=True)
    assert_same(other(x, deterministic=True), quiet)
    other.eval()
    assert_same(other(x), quiet)
    assert dropouts == [None] * 3
    loud = layer.clone(deterministic=False).apply({"params": params}, x, rngs={"dropout": KEY})
    other(x, deterministic=False)
    other(x, deterministic=False, rngs=nnx.Rngs(dropout=3))
    first, second, third = dropouts[3:]
    assert {d.rate for d in dropouts[3:]} == {0.4} and not any(d.shared for d in dropouts[3:])
    # Each call draws its own key, or has it from its own stream.
    assert first.key != second.key != third.key
    assert third.key == nnx.Rngs(dropout=3).dropout()
    keep = first.keep_mask(2, 4, LENGTH, LENGTH) / 0.6
    with jax.enable_x64(True):
        expected = formula(params, x, x, allowed=COL <= ROW, keep=keep)
    assert_same(loud, expected)
    with pytest.raises(ValueError, match="deterministic"):
        flax_layers.nnx.Attention(4, FEATURES, **options, rngs=nnx.Rngs(0))(x)


def test_parameters_carry_their_partitioning():
    names = {
        "kernel_init": ("embed", "heads", None),
        "out_kernel_init": ("heads", None, "embed"),
        "bias_init": ("heads", None),
        "out_bias_init": ("embed",),
        "sinks": ("heads",),
    }
    x = normal(0, 2, LENGTH, FEATURES)
    make = nn.initializers.normal()
    linen_inits = {name: nn.with_partitioning(make, axes) for name, axes in names.items()}
    nnx_inits = {name: nnx.with_partitioning(make, axes) for name, axes in names.items()}
    layer = flax_layers.linen.Attention(4, **linen_inits)
    specs = nn.get_partition_spec(jax.eval_shape(layer.init, KEY, x))["params"]
    mesh = jax.make_mesh((1, 1), ("embed", "heads"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        other = nnx.eval_shape(
            lambda: flax_layers.nnx.Attention(4, FEATURES, **nnx_inits, rngs=nnx.Rngs(0))
        )
    assert specs["query"]["kernel"] == specs["value"]["kernel"] == P("embed", "heads", None)
    assert specs["out"]["kernel"] == P("heads", None, "embed")
    assert specs["key"]["bias"] == P("heads", None)
    assert specs["out"]["bias"] == P("embed")
    assert specs["sinks"] == P("heads")
    assert nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(other, nnx.Param))) == specs


# What is refused


REFUSED = {
    "num_heads=4 must be a multiple of num_kv_heads=3": ({"num_kv_heads": 3}, {}),
    "features=10 must be a multiple of num_heads=4": ({}, {}),
    "lengths needs a cache": ({"head_dim": 4}, {"lengths": jnp.array([1, 2])}),
    "positions needs rope": ({"head_dim": 4}, {"positions": jnp.arange(5)}),
    "dropout_rate=-0.5 must be in [0, 1)": ({"head_dim": 4, "dropout_rate": -0.5}, {}),
    "dim=6 must be even and at most head_dim=4": ({"head_dim": 4, "rope": Rope(dim=6)}, {}),
    "rope does not go with inputs_kv": (
        {"head_dim": 4, "rope": Rope()},
        {"inputs_kv": jnp.ones((2, 3, 10))},
    ),
    r"say mask=SegmentIds(q_ids, kv_ids)": (
        {"head_dim": 4},
        {"inputs_kv": jnp.ones((2, 3, 10)), "segment_ids": jnp.zeros((2, 5), jnp.int32)},
    ),
    "segment_ids of shape (3, 5) must be broadcastable to [batch..., T] = (2, 5)": (
        {"head_dim": 4},
        {"segment_ids": jnp.zeros((3, 5), jnp.int32)},
    ),
    "positions: dtype=float32 must be an integer dtype": (
        {"head_dim": 4, "rope": Rope()},
        {"positions": jnp.zeros(5)},
    ),
    "mask of shape (3, 1, 5, 5) must be broadcastable": (
        {"head_dim": 4},
        {"mask": jnp.ones((3, 1, 5, 5))},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message):
    options, call = REFUSED[message]
    layer = flax_layers.linen.Attention(4, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(functools.partial(layer.init, **call), KEY, jnp.ones((2, 5, 10)))


def test_wrong_rope_and_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="base=0 must be positive"):
        Rope(0)
    with pytest.raises(TypeError, match="nonsense"):
        flax_layers.linen.Attention(4).init(KEY, jnp.ones((2, 5, 12)), nonsense=1)
