"""The hooks `attention_fn` of linen and nnx: each argument of Flax's is honoured or refused."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import flax_layers.linen
import flax_layers.nnx
import oracle as exact
from flax_layers import adapter
from pallas_flash import Causal, Dropout, KvLengths, SlidingWindow, Softcap

HOOKS = {
    "linen": (flax_layers.linen.attention_fn, linen.dot_product_attention),
    "nnx": (flax_layers.nnx.attention_fn, nnx.dot_product_attention),
}
EXTRAS = {"score_mod", "backend"}

both_hooks = pytest.mark.parametrize(("ours", "flax"), HOOKS.values(), ids=HOOKS.keys())
# Flax's linen function takes masks and biases of any broadcast shape; its nnx function does not.
oracle = linen.dot_product_attention


def make_qkv(batch=(2,), q_len=6, kv_len=7, heads=4, kv_heads=None, dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(q_len, heads), (kv_len, kv_heads or heads), (kv_len, kv_heads or heads)]
    arrays = zip(keys, shapes, strict=True)
    return [jax.random.normal(k, (*batch, *shape, dim), dtype) for k, shape in arrays]


def make_mask(*shape):
    """A random bool mask in which every query sees some key: key 0."""
    return jax.random.bernoulli(jax.random.key(7), 0.6, shape).at[..., 0].set(True)


def value_and_gradients(attention, *arrays):
    def weighted_sum(*arrays):
        out = attention(*arrays)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    argnums = tuple(range(len(arrays)))
    step = jax.jit(jax.value_and_grad(weighted_sum, argnums, has_aux=True))
    (_, out), gradients = step(*arrays)
    return out, gradients


def assert_same(ours, expected, tolerance=2e-6):
    def check(a, b):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)

    jax.tree.map(check, ours, expected)


class Sown:
    """A module that wants the weights: with it, a call is dense."""

    def sow(self, *args):
        del args


def path_options(is_dense):
    """Arguments of the flash path, or of the dense one with Flax's dropout."""
    dense = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(1), "module": Sown()}
    return dense if is_dense else {}


both_paths = pytest.mark.parametrize("is_dense", [False, True], ids=["flash", "dense"])


def refuse_to_run(*args, **kwargs):
    raise AssertionError("this call must not be dense")


# Signatures


@both_hooks
def test_signature_names_every_argument_of_flax(ours, flax):
    own = inspect.signature(ours).parameters
    theirs = inspect.signature(flax).parameters
    assert list(own)[: len(theirs)] == list(theirs)
    assert set(own) - set(theirs) == EXTRAS
    assert not any(p.kind == p.VAR_KEYWORD for p in own.values())
    assert {n: own[n].default for n in theirs} == {n: p.default for n, p in theirs.items()}


class NamesEverything(inspect.Signature):
    """The signature of a hook that claims to name any keyword, so that Flax drops none."""

    class _Any(dict):
        def __contains__(self, name):
            return True

    parameters = property(lambda self: self._Any())


def spy(passed):
    def hook(query, key, value, **kwargs):
        passed.update(kwargs)
        return query

    hook.__signature__ = NamesEverything()
    return hook


def test_signature_names_every_keyword_that_the_linen_layer_passes():
    passed = {}
    layer = linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=spy(passed))
    layer.init_with_output(jax.random.key(0), jnp.ones((3, 4)), sow_weights=True)
    assert {"mask", "dropout_rng", "precision", "module"} <= set(passed)
    assert set(passed) <= set(inspect.signature(flax_layers.linen.attention_fn).parameters)


def test_signature_names_every_keyword_that_the_nnx_layer_passes():
    passed = {}
    layer = nnx.MultiHeadAttention(2, 4, decode=False, attention_fn=spy(passed), rngs=nnx.Rngs(0))
    layer(jnp.ones((3, 4)))
    assert {"mask", "dropout_rng", "precision", "module", "is_causal"} <= set(passed)
    assert set(passed) <= set(inspect.signature(flax_layers.nnx.attention_fn).parameters)


# Masks, biases and batch axes

BROADCASTS = {
    "no-batch": ((), (1, 6, 7)),
    "one-batch-axis": ((2,), (2, 4, 6, 7)),
    "broadcast-heads": ((2,), (2, 1, 6, 7)),
    "broadcast-queries": ((2,), (2, 1, 1, 7)),
    "broadcast-keys": ((2,), (2, 1, 6, 1)),
    "low-rank": ((2,), (6, 7)),
    "two-batch-axes": ((2, 3), (2, 3, 4, 6, 7)),
    "first-of-two-batch-axes": ((2, 3), (2, 1, 1, 6, 7)),
    "last-of-two-batch-axes": ((2, 3), (3, 1, 6, 7)),
    "broadcast-batch": ((2, 3), (1, 1, 4, 6, 7)),
}
broadcasts = pytest.mark.parametrize(("batch", "shape"), BROADCASTS.values(), ids=BROADCASTS.keys())


@broadcasts
def test_mask_and_bias_of_any_broadcast_shape_match_flax(batch, shape):
    mask = make_mask(*shape) | (shape[-1] == 1)
    arrays = [*make_qkv(batch), jax.random.normal(jax.random.key(5), shape)]
    result, expected = (
        value_and_gradients(functools.partial(f, mask=mask), *arrays)
        for f in (flax_layers.linen.attention_fn, oracle)
    )
    assert_same(result, expected)


@both_hooks
@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_mask_of_any_dtype_keeps_where_non_zero(ours, flax, dtype):
    keep = make_mask(2, 1, 6, 7)
    # 0.5 and -3 keep: a cast to an integer, or a test for one, would lose them.
    values = jnp.array([0.5, -3.0] if dtype not in (bool, np.int32) else [1, -3])
    mask = jnp.where(keep, values[jnp.arange(7) % 2], 0).astype(dtype)
    arrays = make_qkv()
    assert_same(ours(*arrays, mask=mask), oracle(*arrays, mask=keep))


@both_hooks
def test_mask_of_numpy_matches_flax(ours, flax):
    mask = np.asarray(make_mask(2, 1, 6, 7))
    assert_same(ours(*make_qkv(), mask=mask), oracle(*make_qkv(), mask=mask))


@broadcasts
def test_mask_is_not_expanded_over_heads_and_lengths(monkeypatch, batch, shape):
    seen = []

    def record(q, k, v, *, mask, **kwargs):
        seen.append(mask.array.shape)
        return q

    monkeypatch.setattr(adapter, "flash_attention", record)
    flax_layers.linen.attention_fn(*make_qkv(batch), mask=jnp.ones(shape))
    assert seen[0][1:] == ((1, *shape) if len(shape) == 2 else shape[-3:])
    assert seen[0][0] == (1 if all(n == 1 for n in shape[:-3]) else np.prod(batch))


@both_hooks
@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("shape", [(3, 1, 6, 7), (2, 1, 7, 7), (1, 2, 1, 6, 7), (2, 2, 6, 7)])
def test_array_that_does_not_broadcast_is_refused(ours, flax, name, shape):
    with pytest.raises(ValueError, match="must be broadcastable") as error:
        ours(*make_qkv(), **{name: jnp.ones(shape)})
    assert f"{name} of shape {shape}" in str(error.value)
    assert "(2, 4, 6, 7)" in str(error.value)


SHAPES = {
    "same rank": [(2, 6, 4, 8), (7, 4, 8), (7, 4, 8)],
    "batch dims must match": [(2, 6, 4, 8), (3, 7, 4, 8), (3, 7, 4, 8)],
    "lengths must match": [(2, 6, 4, 8), (2, 7, 4, 8), (2, 6, 4, 8)],
    "depths must match": [(2, 6, 4, 8), (2, 7, 4, 5), (2, 7, 4, 8)],
    "num_heads must match": [(2, 6, 4, 8), (2, 7, 2, 8), (2, 7, 4, 8)],
    "num_q_heads=4 must be a multiple of num_kv_heads=3": [(6, 4, 8), (7, 3, 8), (7, 3, 8)],
}


@both_hooks
@both_paths
@pytest.mark.parametrize("rule", SHAPES)
def test_arrays_that_do_not_fit_are_refused(ours, flax, rule, is_dense):
    arrays = [jnp.ones(shape) for shape in SHAPES[rule]]
    with pytest.raises(ValueError, match=rule) as error:
        ours(*arrays, **path_options(is_dense))
    assert all(str(shape) in str(error.value) for shape in SHAPES[rule])


# Structured masks, causality, grouped heads


def structured(batch, q_len, kv_len):
    lengths = jnp.arange(2, 2 + np.prod(batch, dtype=int), dtype=jnp.int32)
    mask = Causal() & KvLengths(lengths) | SlidingWindow(1, 0)
    q_pos, kv_pos = jnp.arange(q_len)[:, None], jnp.arange(kv_len)
    keep = (kv_pos <= q_pos) & (kv_pos < lengths[:, None, None])
    keep |= (kv_pos <= q_pos) & (kv_pos >= q_pos - 1)
    return mask, keep.reshape(*batch, 1, q_len, kv_len)


@both_hooks
@pytest.mark.parametrize("batch", [(), (2, 2)], ids=str)
@both_paths
def test_structured_mask_equals_its_dense_array(ours, flax, batch, is_dense):
    mask, keep = structured(batch, 6, 6)
    arrays = make_qkv(batch, kv_len=6)
    path = path_options(is_dense)
    result = value_and_gradients(functools.partial(ours, mask=mask, **path), *arrays)
    assert_same(result, value_and_gradients(functools.partial(oracle, mask=keep, **path), *arrays))


@pytest.mark.parametrize("shape", [None, (2, 1, 1, 7), (6, 1)], ids=str)
@both_paths
def test_is_causal_joins_a_mask_of_any_shape(shape, is_dense):
    mask = None if shape is None else make_mask(*shape) | (shape[-1] == 1)
    keep = jnp.tril(jnp.ones((6, 7), bool)) & (True if mask is None else mask)
    keep = keep.reshape((1,) * (4 - keep.ndim) + keep.shape)
    path = path_options(is_dense)
    result = flax_layers.nnx.attention_fn(*make_qkv(), mask=mask, is_causal=True, **path)
    assert_same(result, oracle(*make_qkv(), mask=keep, **path))


@both_hooks
@pytest.mark.parametrize(("kv_heads", "is_dense"), [(1, False), (2, False), (2, True)])
def test_grouped_heads_match_repeated_heads(ours, flax, kv_heads, is_dense):
    mask = make_mask(2, 1, 6, 7)
    arrays = make_qkv(kv_heads=kv_heads)
    path = path_options(is_dense)

    def repeated(q, k, v):
        k, v = (jnp.repeat(x, 4 // kv_heads, axis=-2) for x in (k, v))
        return oracle(q, k, v, mask=mask, **path)

    result = value_and_gradients(functools.partial(ours, mask=mask, **path), *arrays)
    assert_same(result, value_and_gradients(repeated, *arrays))


# Queries that see nothing, padding that holds NaN


@both_hooks
@both_paths
def test_query_that_sees_nothing_gives_zero(ours, flax, is_dense):
    mask = make_mask(2, 1, 6, 7).at[0, :, 2].set(False)
    path = path_options(is_dense)
    arrays = make_qkv()
    out, (dq, _, dv) = value_and_gradients(functools.partial(ours, mask=mask, **path), *arrays)
    expected, gradients = value_and_gradients(
        lambda *a: oracle(*a, mask=mask, **path).at[0, 2].set(0), *arrays
    )
    assert (out[0, 2] == 0).all()
    assert (dq[0, 2] == 0).all()
    assert_same((out, dq, dv), (expected, gradients[0], gradients[2]))


@both_hooks
@both_paths
def test_nan_in_padding_does_not_leak(ours, flax, is_dense):
    used = (jnp.arange(6) < 4)[:, None] & (jnp.arange(7) < 5)
    q, k, v = make_qkv()
    hook = functools.partial(ours, mask=used, **path_options(is_dense))
    padded = q.at[:, 4:].set(jnp.nan), k.at[:, 5:].set(jnp.nan), v.at[:, 5:].set(jnp.nan)
    assert_same(value_and_gradients(hook, *padded), value_and_gradients(hook, q, k, v))


# Dropout and sown weights


@both_hooks
@pytest.mark.parametrize("broadcast_dropout", [True, False])
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("precision", [None, "highest"])
def test_dropout_is_that_of_the_kernel(ours, flax, broadcast_dropout, batch, precision):
    mask = make_mask(*batch, 4, 6, 7)
    bias = jnp.arange(7.0)
    dropout = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(3)}
    arrays = make_qkv(batch)
    rows = int(np.prod(batch))
    kept = Dropout(0.3, jax.random.key(3), shared=broadcast_dropout).keep_mask(rows, 4, 6, 7)
    # Flax's default: one pattern for all rows and heads.
    assert (kept == kept[:1, :1]).all() == broadcast_dropout
    hook = functools.partial(
        ours,
        mask=mask,
        bias=bias,
        precision=precision,
        **dropout,
        broadcast_dropout=broadcast_dropout,
    )

    def truth(*arrays):
        q, k, v = (x.reshape(rows, *x.shape[-3:]) for x in arrays)
        out, _ = exact.attention(
            q, k, v, allowed=mask.reshape(rows, 4, 6, 7), change=lambda s: s + bias, keep=kept / 0.7
        )
        return out.reshape(*batch, *out.shape[1:])

    with jax.enable_x64(True):
        expected = value_and_gradients(truth, *arrays)
        expected = jax.tree.map(lambda x: x.astype(jnp.float32), expected)
    assert_same(value_and_gradients(hook, *arrays), expected, 1e-5)


@both_hooks
def test_sown_weights_are_dropped_as_flax_drops_them(ours, flax):
    class Keep(Sown):
        def sow(self, collection, name, weights):
            self.weights = weights

    results = []
    for function in (ours, flax):
        keep = Keep()
        options = path_options(True) | {"module": keep, "broadcast_dropout": False}
        results.append((function(*make_qkv(), **options), keep.weights))
    assert_same(*results)


@both_hooks
def test_only_sowing_is_dense(ours, flax, monkeypatch):
    monkeypatch.setattr(inspect.getmodule(ours), "flax_attention", refuse_to_run)
    arrays = make_qkv()
    inactive = {"dropout_rate": 0.5, "deterministic": True, "dropout_rng": jax.random.key(0)}
    assert_same(ours(*arrays, **inactive), oracle(*arrays))
    assert_same(ours(*arrays, dropout_rng=jax.random.key(0)), oracle(*arrays))
    ours(*arrays, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    with pytest.raises(AssertionError, match="must not be dense"):
        ours(*arrays, module=Sown())


@both_hooks
@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_rate_outside_its_range_is_refused(ours, flax, rate):
    with pytest.raises(ValueError, match=rf"dropout_rate={rate} must be in \[0, 1\)"):
        ours(*make_qkv(), dropout_rate=rate, dropout_rng=jax.random.key(0))


@both_hooks
def test_dropout_without_a_key_is_refused(ours, flax):
    with pytest.raises(ValueError, match=r"dropout_rate=0.5 .* needs a dropout_rng"):
        ours(*make_qkv(), dropout_rate=0.5)


# Dtypes and precision


@both_hooks
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
def test_low_precision_inputs_match_flax_loosely(ours, flax, dtype, tolerance):
    mask = make_mask(2, 1, 6, 7)
    arrays = make_qkv(dtype=dtype)
    result = value_and_gradients(functools.partial(ours, mask=mask), *arrays)
    expected = value_and_gradients(functools.partial(oracle, mask=mask), *arrays)
    assert_same(result, expected, tolerance)


@both_hooks
def test_dtypes_are_promoted_as_flax_does(ours, flax):
    q, k, v = make_qkv(dtype=jnp.bfloat16)
    assert ours(q, k, v.astype(jnp.float32)).dtype == jnp.float32
    assert ours(q, k, v, dtype=jnp.float16).dtype == jnp.float16
    q, k, v = make_qkv()
    assert_same(
        ours(q, k, v, dtype=jnp.bfloat16), oracle(q, k, v, dtype=jnp.bfloat16), tolerance=2e-2
    )


def test_promote_dtype_is_called_with_the_arrays_and_the_dtype():
    def promote(arrays, dtype):
        assert dtype == jnp.float16
        return [x.astype(jnp.bfloat16) for x in arrays]

    out = flax_layers.nnx.attention_fn(*make_qkv(), promote_dtype=promote, dtype=jnp.float16)
    assert out.dtype == jnp.bfloat16


@both_hooks
def test_float64_matches_flax_tightly(ours, flax):
    with jax.enable_x64(True):
        arrays = make_qkv(dtype=jnp.float64)
        assert_same(value_and_gradients(ours, *arrays), value_and_gradients(oracle, *arrays), 1e-13)


def test_complex_inputs_give_the_result_of_flax():
    arrays = make_qkv(dtype=jnp.complex64)
    np.testing.assert_array_equal(flax_layers.linen.attention_fn(*arrays), oracle(*arrays))


@pytest.mark.parametrize("force", [True, False])
def test_softmax_is_float32_whatever_is_forced(force):
    arrays = make_qkv(dtype=jnp.bfloat16)
    exact = oracle(*(x.astype(jnp.float32) for x in arrays)).astype(jnp.bfloat16)
    result = flax_layers.linen.attention_fn(*arrays, force_fp32_for_softmax=force)
    assert_same(result, exact, tolerance=8e-3)


def precisions_of_products(function, *args):
    """The precision of every dot_general in the program of function(*args), loops included."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append(eqn.params["precision"])
            for sub in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if hasattr(sub, "eqns"):
                    walk(getattr(sub, "jaxpr", sub))

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@both_hooks
@pytest.mark.parametrize("precision", [lax.Precision.HIGHEST, ("default", "float32")], ids=str)
def test_precision_reaches_forward_and_backward(ours, flax, precision):
    def step(*arrays):
        return value_and_gradients(functools.partial(ours, precision=precision), *arrays)

    products = precisions_of_products(step, *make_qkv())
    assert len(products) >= 5
    assert set(products) == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
    assert_same(step(*make_qkv()), value_and_gradients(oracle, *make_qkv()))


@both_hooks
@pytest.mark.parametrize("precision", [None, "default", lax.Precision.DEFAULT])
def test_default_precision_leaves_the_products_alone(ours, flax, precision):
    products = precisions_of_products(functools.partial(ours, precision=precision), *make_qkv())
    assert set(products) == set(precisions_of_products(ours, *make_qkv()))


@both_hooks
@pytest.mark.parametrize(
    "precision", ["sloppy", "BF16_BF16_F32", lax.DotAlgorithmPreset.F32_F32_F32], ids=str
)
def test_precision_that_names_an_algorithm_is_refused(ours, flax, precision):
    with pytest.raises(ValueError, match=r"precision=.* is not supported") as error:
        ours(*make_qkv(), precision=precision)
    assert repr(precision) in str(error.value)


# What is refused, extras, transformations


@pytest.mark.parametrize(
    "name", ["einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"]
)
def test_replaced_einsum_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=<function .* must be None"):
        flax_layers.linen.attention_fn(*make_qkv(), **{name: jnp.einsum})


@both_hooks
@pytest.mark.parametrize("extra", [{"score_mod": Softcap(5.0)}, {"backend": "reference"}], ids=str)
def test_extras_are_refused_with_sown_weights(ours, flax, extra):
    with pytest.raises(ValueError, match=r"not supported with sown attention weights") as error:
        ours(*make_qkv(), module=Sown(), **extra)
    [(name, value)] = extra.items()
    assert f"{name}={value!r}" in str(error.value)


@both_hooks
def test_score_mod_comes_after_the_bias(ours, flax):
    q, k, v = make_qkv()
    bias = jax.random.normal(jax.random.key(2), (1, 4, 6, 7))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(8.0) + bias
    weights = jax.nn.softmax(2.0 * jnp.tanh(scores / 2.0))
    expected = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    assert_same(ours(q, k, v, bias=bias, score_mod=Softcap(2.0)), expected)


@both_hooks
def test_unknown_backend_is_refused(ours, flax):
    with pytest.raises(ValueError, match="nonsense"):
        ours(*make_qkv(), backend="nonsense")


@both_hooks
def test_unknown_keyword_is_refused(ours, flax):
    with pytest.raises(TypeError, match="input_positions"):
        ours(*make_qkv(), input_positions=jnp.arange(6))


@both_hooks
def test_jit_and_vmap_match_the_plain_call(ours, flax):
    mask = make_mask(3, 2, 1, 6, 7)
    arrays = make_qkv((3, 2))
    hook = lambda q, k, v, mask: ours(q, k, v, mask=mask, precision="highest")  # noqa: E731
    expected = hook(*arrays, mask)
    assert_same(jax.jit(hook)(*arrays, mask), expected)
    assert_same(jax.vmap(hook)(*arrays, mask), expected)
