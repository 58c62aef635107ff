"""Sharding: batch and heads split over devices give the same values without communication."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_flash import (
    Alibi,
    Bias,
    Causal,
    Chain,
    DenseMask,
    Dropout,
    PrefixLM,
    RelativeBias,
    ScoreFunction,
    SegmentIds,
    Sink,
    flash_attention,
    flash_attention_with_lse,
)
from pallas_flash.backends.blockwise import BlockwiseConfig
from pallas_flash.parallel import distributed, sharding, vary_together

GATHERS = re.compile(r"\b(all-gather|all-to-all|collective-permute)[-\w]*\(")
BATCH, Q_LEN, KV_LEN, DIM, VALUE_DIM = 8, 4, 8, 8, 4
ARGNUMS = (0, 1, 2, 3)


def make_mesh(types=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(types,) * 2)


def make_arrays(q_heads=8, kv_heads=4, bias=(1, 1), mask=(1, 1), mapped=()):
    """q, k, v, bias, mask; bias and mask given by their sizes of batch and heads."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((*mapped, *shape), np.float32)

    return (
        normal(BATCH, Q_LEN, q_heads, DIM),
        normal(BATCH, KV_LEN, kv_heads, DIM),
        normal(BATCH, KV_LEN, kv_heads, VALUE_DIM),
        normal(*bias, Q_LEN, KV_LEN),
        normal(*mask, Q_LEN, KV_LEN) > -1,
    )


def attention(q, k, v, bias, mask):
    return flash_attention_with_lse(q, k, v, mask=DenseMask(mask), score_mod=Bias(bias))


def in_tiles(q, k, v, bias, mask):
    """The same with loops over tiles."""
    return flash_attention_with_lse(
        q,
        k,
        v,
        mask=DenseMask(mask),
        score_mod=Bias(bias),
        backend="blockwise",
        config=BlockwiseConfig(2, 4),
    )


def loss(function, *arrays):
    out, lse = function(*arrays)
    return jnp.sin(out).sum() + jnp.cos(lse).sum()


def with_gradients(function):
    """(out, lse), (dq, dk, dv, dbias) of the arrays."""
    gradients = jax.grad(functools.partial(loss, function), argnums=ARGNUMS)
    return lambda *arrays: (function(*arrays), gradients(*arrays))


def put(arrays, mesh, specs):
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


def assert_same(got, want):
    got, want = jax.device_get((jax.tree.leaves(got), jax.tree.leaves(want)))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-5, atol=3e-5)


def compiled(function, *arrays):
    return jax.jit(function).lower(*arrays).compile()


@pytest.fixture(autouse=True)
def _say_everything_again():
    sharding.warn_once.cache_clear()


# q; k; v; bias; mask
BATCH_SPLIT = [P("data"), P("data"), P("data"), P(), P()]
HEADS_SPLIT = [P(None, None, "model")] * 3 + [P(), P()]
BOTH_SPLIT = [P("data", None, "model")] * 3 + [P(), P()]
MQA_SPLIT = [P("data", None, "model"), P("data"), P("data"), P(), P()]

LOCAL = {
    "batch": (BATCH_SPLIT, {}),
    "batch-over-both-mesh-axes": ([P(("data", "model"))] * 3 + [P(), P()], {}),
    "batch-with-full-bias-and-mask": (
        [P("model")] * 5,
        {"bias": (BATCH, 8), "mask": (BATCH, 1)},
    ),
    "heads": (HEADS_SPLIT, {"kv_heads": 8}),
    "heads-gqa": (HEADS_SPLIT, {}),
    "heads-with-bias-and-mask-per-head": (
        [*HEADS_SPLIT[:3], *[P(None, "model")] * 2],
        {"bias": (1, 8), "mask": (BATCH, 8)},
    ),
    "batch-and-heads": (BOTH_SPLIT, {}),
    "batch-and-heads-with-bias-of-each": (
        [*BOTH_SPLIT[:3], P("data", "model"), P("data")],
        {"bias": (BATCH, 8), "mask": (BATCH, 1)},
    ),
    "only-q-split": ([P("data"), P(), P(), P(), P()], {}),
    "mqa": (MQA_SPLIT, {"kv_heads": 1}),
    "mqa-with-bias-per-head": (
        [*MQA_SPLIT[:3], P(None, "model"), P()],
        {"kv_heads": 1, "bias": (1, 8)},
    ),
    "gqa-2-kv-heads-on-4-shards": (MQA_SPLIT, {"kv_heads": 2}),
    "gqa-2-kv-heads-on-2-of-8-shards": (
        [P(None, None, ("data", "model"))] + [P(None, None, "data")] * 2 + [P(), P()],
        {"kv_heads": 2},
    ),
}


@pytest.mark.parametrize(("specs", "kwargs"), LOCAL.values(), ids=LOCAL.keys())
def test_values_and_gradients_stay_local(specs, kwargs):
    arrays = make_arrays(**kwargs)
    split = put(arrays, make_mesh(), specs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = compiled(with_gradients(attention), *split)
    assert not GATHERS.findall(run.as_text())
    got = run(*split)
    assert_same(got, jax.jit(with_gradients(attention))(*arrays))
    (out, _), gradients = got
    assert out.sharding.is_equivalent_to(split[0].sharding, out.ndim)
    assert gradients[0].sharding.is_equivalent_to(split[0].sharding, out.ndim)


def test_gradients_of_the_default_backend_stay_local():
    """That of bfloat16 has the kernels in it, also where they do not run."""
    sharding = NamedSharding(make_mesh(), BOTH_SPLIT[0])
    x = jax.ShapeDtypeStruct((BATCH, 64, 8, 16), jnp.bfloat16, sharding=sharding)
    gradients = jax.grad(
        lambda *x: flash_attention(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2)
    )
    assert not GATHERS.findall(compiled(gradients, x, x, x).as_text())


def along(function):
    """Tangents, and the gradients' tangents, of the arrays along themselves."""

    def run(*arrays):
        *x, mask = arrays
        attention = lambda *x: function(*x, mask)  # noqa: E731
        gradients = jax.grad(functools.partial(loss, attention), argnums=ARGNUMS)
        return jax.jvp(attention, x, x)[1], jax.jvp(gradients, x, x)[1]

    return run


def test_tangents_and_second_derivatives_stay_local():
    arrays, mesh = make_arrays(), make_mesh()
    specs, results = BOTH_SPLIT, (P("data", None, "model"), P("data", "model"))
    mapped = jax.shard_map(in_tiles, mesh=mesh, in_specs=tuple(specs), out_specs=results)
    want = jax.jit(along(in_tiles))(*arrays)
    split = put(arrays, mesh, specs)
    for function in (in_tiles, mapped):
        run = compiled(along(function), *split)
        assert not GATHERS.findall(run.as_text())
        assert_same(run(*split), want)


def all_terms(q, k, v, ids, lengths, table, slopes, gain, logits, key):
    """Every kind of operand: along the queries, the keys, the distances, and of functions."""
    mask = Causal() | SegmentIds(ids, jnp.tile(ids, 2)) & PrefixLM(lengths)
    mods = (RelativeBias(table), Alibi(slopes), ScoreFunction(_times, gain), Sink(logits))
    return flash_attention_with_lse(
        q, k, v, mask=mask, score_mod=Chain(mods), dropout=Dropout(0.3, key)
    )


def _times(s, q_pos, kv_pos, gain):
    return s * gain


@pytest.mark.parametrize("specs", [BATCH_SPLIT, HEADS_SPLIT, BOTH_SPLIT], ids=["b", "h", "b-h"])
def test_all_terms_and_dropout_stay_local_and_are_the_same(specs):
    rng = np.random.default_rng(1)
    batch, _, heads = (*specs[0], None, None)[:3]
    arrays = [
        *make_arrays()[:3],
        rng.integers(0, 2, (BATCH, Q_LEN)),
        rng.integers(0, KV_LEN, BATCH),
        *(rng.standard_normal(shape, np.float32) for shape in ((8, 8), 8, (BATCH, 1, 4, 1), 8)),
        np.asarray(jax.random.key_data(jax.random.key(3))),
    ]
    others = [P(batch), P(batch), P(heads), P(heads), P(batch), P(heads), P()]
    argnums = (0, 1, 2, 5, 6, 7, 8)
    function = jax.value_and_grad(functools.partial(loss, all_terms), argnums=argnums)
    split = put(arrays, make_mesh(), [*specs[:3], *others])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = compiled(function, *split)
    assert not GATHERS.findall(run.as_text())
    assert_same(run(*split), jax.jit(function)(*arrays))


def test_sharded_intermediates_of_few_kv_heads():
    """Shardy must not split a mesh axis of 4 over 2 kv heads and 2 of their groups."""
    q, k, v, bias, mask = make_arrays(kv_heads=2)
    q = jax.device_put(q, NamedSharding(make_mesh(), P(None, None, "model")))
    run = compiled(lambda q, *rest: attention(q * 1.5, *map(jnp.sin, rest), bias, mask), q, k, v)
    assert not GATHERS.findall(run.as_text())
    assert_same(run(q, k, v), attention(q * 1.5, jnp.sin(k), jnp.sin(v), bias, mask))


def test_eager_call_stays_split():
    arrays = make_arrays()
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        out, lse = attention(*put(arrays, mesh, BOTH_SPLIT))
    assert tuple(out.sharding.spec)[:3] == ("data", None, "model")
    assert_same((out, lse), attention(*arrays))


GATHERED = {
    "q": ([P("data", "model"), P("data"), P("data"), P(), P()], {}, "axis 'q' of size 4"),
    "kv": ([P("data"), P("data", "model"), P("data"), P(), P()], {}, "axis 'kv' of size 8"),
    "dim": ([P(None, None, None, "data"), P(), P(), P(), P()], {}, "axis 'dim' of size 8"),
    "3-kv-heads-on-4-shards": (
        [P(None, None, "model"), P(), P(), P(), P()],
        {"q_heads": 12, "kv_heads": 3},
        r"axis 'heads' of size 12 .* with num_kv_heads=3",
    ),
    "kv-heads-split-as-q-is-not": (
        [P("model"), P(None, None, "model"), P("model"), P(), P()],
        {},
        r"axis 'kv_heads' of size 4 .* mesh axes \('model',\)",
    ),
}


@pytest.mark.parametrize(("specs", "kwargs", "message"), GATHERED.values(), ids=GATHERED.keys())
def test_what_cannot_stay_local_is_gathered_with_a_warning(specs, kwargs, message):
    arrays = make_arrays(**kwargs)
    split = put(arrays, make_mesh(), specs)
    with pytest.warns(UserWarning, match=message):
        run = compiled(attention, *split)
    assert_same(run(*split), jax.jit(attention)(*arrays))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(lambda *arrays: attention(*arrays), *split)


@pytest.mark.quick
def test_shard_map_over_batch_and_heads():
    """With the types of shard_map checked, from outside and inside; the loops' types too."""
    attention = in_tiles
    arrays = make_arrays(kv_heads=1, bias=(1, 8))
    specs = (*MQA_SPLIT[:3], P(None, "model"), P())
    mesh = make_mesh()
    results = (P("data", None, "model"), P("data", "model"))
    outside = with_gradients(jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=results))
    inside = jax.shard_map(
        with_gradients(attention), mesh=mesh, in_specs=specs, out_specs=(results, specs[:4])
    )
    unchecked = with_gradients(
        jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False)
    )
    want = jax.jit(with_gradients(attention))(*arrays)
    for function in (outside, inside, unchecked):
        run = compiled(function, *put(arrays, mesh, specs))
        assert not GATHERS.findall(run.as_text())
        assert_same(run(*put(arrays, mesh, specs)), want)


def test_partly_manual_mesh_warns():
    arrays = make_arrays()
    mesh = make_mesh()
    specs = (P("data"), P("data"), P("data"), P(), P())
    function = jax.shard_map(
        attention, mesh=mesh, in_specs=specs, out_specs=(P("data"), P("data")), axis_names={"data"}
    )
    with pytest.warns(UserWarning, match=r"can't stay local over the Auto axes \('model',\)"):
        run = compiled(function, *put(arrays, mesh, BOTH_SPLIT))
    assert_same(run(*put(arrays, mesh, BOTH_SPLIT)), jax.jit(attention)(*arrays))


EXPLICIT = {
    "batch": (BATCH_SPLIT, {}, False),
    "batch-and-heads": (BOTH_SPLIT, {}, True),
    "mqa": (MQA_SPLIT, {"kv_heads": 1}, False),
    "gqa-2-kv-heads-on-4-shards": (MQA_SPLIT, {"kv_heads": 2}, True),
}


@pytest.mark.parametrize(("specs", "kwargs", "in_context"), EXPLICIT.values(), ids=EXPLICIT.keys())
def test_explicit_mesh_axes(specs, kwargs, in_context):
    arrays = make_arrays(**kwargs)
    mesh = make_mesh(AxisType.Explicit)
    want = jax.jit(with_gradients(attention))(*arrays)
    split = put(arrays, mesh, specs)
    if in_context:
        with jax.set_mesh(mesh):
            run = compiled(with_gradients(attention), *split)
    else:
        run = compiled(with_gradients(attention), *split)
    assert not GATHERS.findall(run.as_text())
    (out, lse), gradients = got = run(*split)
    assert_same(got, want)
    assert out.sharding.is_equivalent_to(split[0].sharding, out.ndim)
    assert jax.typeof(lse).sharding.spec == P(specs[0][0], *specs[0][2:] or (None,), None)
    for x, dx in zip(split, gradients, strict=False):
        assert jax.typeof(dx).sharding == jax.typeof(x).sharding


def test_explicit_split_of_a_sequence_raises():
    split = put(make_arrays(), make_mesh(AxisType.Explicit), [P(None, "model")] + [P()] * 4)
    with pytest.raises(ValueError, match=r"axis 'q' of size 4 .* mesh axes \('model',\)"):
        jax.jit(attention)(*split)


@pytest.mark.parametrize(
    "specs",
    [
        [P(None, "model")] * 3 + [P(), P()],
        [P("data")] * 3 + [P(), P()],
        [P("data", None, None, "model"), P("data"), P("data"), P("data"), P()],
    ],
    ids=["batch", "mapped-axis", "mapped-axis-and-heads"],
)
def test_vmap_of_split_arrays_stays_local(specs):
    arrays = make_arrays(kv_heads=1, mapped=(2,))
    split = put(arrays, make_mesh(), specs)
    function = jax.vmap(with_gradients(attention))
    run = compiled(function, *split)
    assert not GATHERS.findall(run.as_text())
    assert_same(run(*split), jax.jit(function)(*arrays))


def test_training_step_of_scanned_and_rematerialised_layers_stays_local():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, Q_LEN, 32), np.float32)
    weights = rng.standard_normal((3, 4, 32, 8, 4), np.float32) / 6
    policy = jax.checkpoint_policies.save_only_these_names(
        "flash_attention_out", "flash_attention_lse"
    )

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x, w):
        q, k, v = jnp.einsum("btc,pcnh->pbtnh", x, w[:3])
        out = flash_attention(q, k, v, mask=Causal())
        return x + jnp.einsum("btnh,cnh->btc", out, w[3]), None

    def step(x, weights):
        return jnp.sin(jax.lax.scan(layer, x, weights)[0]).sum()

    step = jax.value_and_grad(step, argnums=(0, 1))
    split = put([x, weights], make_mesh(), [P("data"), P(None, None, None, "model")])
    run = compiled(step, *split)
    assert not GATHERS.findall(run.as_text())
    assert_same(run(*split), jax.jit(step)(x, weights))


def test_shapes_under_eval_shape():
    out, lse = jax.eval_shape(attention, *make_arrays())
    assert out.shape == (BATCH, Q_LEN, 8, VALUE_DIM)
    assert lse.shape == (BATCH, 8, Q_LEN)


@pytest.mark.quick
def test_one_device_runs_the_plain_program():
    lowered = jax.jit(with_gradients(attention)).lower(*make_arrays())
    assert "CustomSPMDPartitioning" not in lowered.as_text()
    assert "all-reduce" not in lowered.compile().as_text()


# What follows wraps a function of its own: a kernel for CUDA, plain JAX elsewhere.

AXES = [("batch", "dim")]


def _double_kernel(x):
    def body(x_gmem, out_gmem):
        out_gmem[...] = x_gmem[...] * 2

    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.kernel(body, out_type=out_type, grid=(1,), grid_names=("i",))(x)


def _double(x):
    return jax.lax.platform_dependent(
        x,
        cuda=lambda x: vary_together((_double_kernel(x),), like=(x,)),
        default=lambda x: vary_together((x * 2,), like=(x,)),
    )


def double(x):
    return distributed(_double, AXES, AXES)(x)[0]


@pytest.mark.parametrize("check_vma", [True, False])
def test_kernel_in_shard_map_lowers_for_cuda(check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    function = jax.shard_map(
        double, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )
    x = jnp.ones((1024, 128))
    lowered = jax.jit(function).trace(x).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    np.testing.assert_array_equal(jax.jit(function)(x), 2 * x)


def test_kernel_lowers_for_cuda():
    x = jnp.ones((128, 128))
    plain = jax.jit(double).trace(x).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in plain.as_text()
    mapped = jax.jit(jax.vmap(double)).trace(x[None]).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in mapped.as_text()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    # The kernel itself comes in when the partitioner asks for it.
    text = jax.jit(double).trace(split).lower(lowering_platforms=("cuda",)).as_text()
    assert "CustomSPMDPartitioning" in text


def test_function_with_effects_runs():
    """A kernel in interpret mode has callbacks, which custom_partitioning would refuse."""
    seen = []

    def fn(x):
        jax.debug.callback(lambda x: seen.append(x.shape), x, ordered=True)
        return (x * 2,)

    out = jax.jit(lambda x: distributed(fn, AXES, AXES)(x)[0])(jnp.ones((8, 4)))
    jax.effects_barrier()
    assert (out == 2).all()
    assert seen == [(8, 4)]
