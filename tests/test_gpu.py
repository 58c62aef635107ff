"""The Hopper kernels on a Hopper GPU: values and gradients through the public API.

    make test-gpu

Every case is judged against a float64 oracle and against plain attention in the same precision.
"""

import dataclasses
import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import MASKS as MASKS_OF_ALL
from conftest import Sizes, normal, qkv
from pallas_flash.backends import hopper
from pallas_flash.backends.hopper import config as hopper_config
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.tuning import table
from term_cases import KEY, ON_A_DEVICE, SCORES, TERM_SIZES, inputs, judge
from tolerance import assert_as_good_as_plain, assert_close_to_oracle

pytestmark = pytest.mark.gpu

LENGTHS = [(1, 1), (7, 7), (63, 63), (129, 129), (1000, 1000), (4097, 4097)]
UNEQUAL = [(1, 1000), (1000, 1), (65, 1000), (1000, 129), (257, 4097)]
# Without a mask every tile is the same but the last one.
WITHOUT_MASK = [(1, 1), (63, 63), (257, 4097)]
HEAD_DIMS = [16, 40, 64, 80, 96, 128, 192, 256]
H100 = table.DATA / "nvidia_h100_80gb_hbm3.json"
HEADS = {"mha": (4, 4), "gqa-8-to-1": (8, 1), "gqa-2-to-1": (4, 2), "mqa": (3, 1)}


@pytest.fixture(autouse=True)
def kernel_for_dq_in_half_of_the_cases(request, monkeypatch):
    """Of whatever length: few tests are long, and by default it is there for few keys."""
    is_there = zlib.crc32(request.node.name.encode()) % 2
    if "deterministic" not in request.node.name:
        monkeypatch.setattr(hopper_config, "MOST_KEYS_OF_DQ_KERNEL", 2**31 * is_there)


def length_mask(z: Sizes):
    kv = np.linspace(0, z.kv_len, z.batch).astype(np.int32)
    q = np.linspace(z.q_len, z.q_len // 2, z.batch).astype(np.int32)
    mask = pf.KvLengths(jnp.asarray(kv)) & pf.QLengths(jnp.asarray(q)) & pf.Causal("bottom_right")
    rows, keys = np.arange(z.q_len)[:, None], np.arange(z.kv_len)[None]
    allowed = (keys < kv[:, None, None, None]) & (rows < q[:, None, None, None])
    return mask, allowed & (keys <= rows + z.kv_len - z.q_len)


def window_mask(z: Sizes):
    distance = np.arange(z.kv_len)[None] - np.arange(z.q_len)[:, None]
    return pf.SlidingWindow(100, 30), (distance >= -100) & (distance <= 30)


def causal_mask(z: Sizes):
    return pf.Causal(), np.arange(z.kv_len)[None] <= np.arange(z.q_len)[:, None]


def not_or_mask(z: Sizes):
    distance = np.arange(z.kv_len)[None] - np.arange(z.q_len)[:, None]
    mask = ~(pf.SlidingWindow(64, 64) | ~pf.Causal(offset=200))
    return mask, ~((np.abs(distance) <= 64) | ~(distance <= 200))


MASKS = {
    "full": lambda z: (None, np.ones((1, 1), bool)),
    "causal": causal_mask,
    "lengths-and-bottom-right": length_mask,
    "window": window_mask,
    "not-or": not_or_mask,
}


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, arrays, cotangents):
    results, vjp = jax.vjp(function, *arrays)
    return *results, *vjp(cotangents)


def check(sizes: Sizes, make_mask, dtype, record, k_factor=1.0):
    mask, allowed = make_mask(sizes)
    with oracle.on_host():
        q, k, v = qkv(sizes, dtype)
        arrays = q, (k * k_factor).astype(dtype), v
        shape = sizes.batch, sizes.q_len, sizes.num_q_heads
        cotangents = (
            normal(5, *shape, sizes.value_dim, dtype=dtype),
            normal(6, *shape[::2], sizes.q_len),
        )
    problem = jax.tree.map(np.asarray, (arrays, cotangents))

    def finite(results):
        return results[0], jnp.where(results[1] == -jnp.inf, 0.0, results[1])

    def ours(q, k, v):
        return finite(pf.flash_attention_with_lse(q, k, v, mask=mask, backend="hopper"))

    def plain(q, k, v):
        return finite(oracle.plain_attention_with_lse(q, k, v, allowed))

    def exact(q, k, v):
        return finite(oracle.attention(q, k, v, allowed=allowed))

    got = with_gradients(ours, *problem)
    usual, truth = oracle.in_own_precision(*problem, plain), oracle.with_gradients(*problem, exact)
    names = ("out", "lse", "dq", "dk", "dv")
    references = ((*values, *gradients) for values, gradients in (usual, truth))
    for name, a, b, c in zip(names, got, *references, strict=True):
        record(f"error_{name}", float(np.abs(np.asarray(a, np.float64) - np.asarray(c)).max()))
        if name == "lse":
            assert_close_to_oracle(a, c, name, rtol=1e-5)
        else:
            assert_as_good_as_plain(a, b, c, name, 2.0 if name == "out" else 3.0)


# Masks without more are the same to all kernels, and so is a score mod that comes with dropout too.
FEWER = {
    "d256": {"causal-segments", "segments-in-any-order", "dense", "not-causal-or-dense"},
    "d128": {"segments-in-any-order", "not-causal-or-dense"},
}
FEWER = {sizes: {*names, "wide-relative-bias"} for sizes, names in FEWER.items()}
# The largest kernels first: the last ones to be compiled keep others waiting. Small head dimensions
# have the same kernels: one of them for each case.
HEAVY_FIRST = [
    (name, sizes) for sizes in FEWER for name in reversed(ON_A_DEVICE) if name not in FEWER[sizes]
]
HEAVY_FIRST += [(name, ("d32", "d64")[i % 2]) for i, name in enumerate(ON_A_DEVICE)]


@pytest.mark.parametrize(("name", "sizes"), HEAVY_FIRST, ids=map("-".join, HEAVY_FIRST))
def test_masks_scores_and_dropout(name, sizes, record_property):
    case = ON_A_DEVICE[name]._replace(sizes=TERM_SIZES[sizes])
    with oracle.on_host():
        score = SCORES[case.score](case.sizes)
        problem = jax.tree.map(np.asarray, inputs(case.sizes, score))
        mask = MASKS_OF_ALL[case.mask](case.sizes)[0]
    if (name, sizes) == ("wide-arrays-of-every-kind", "d256"):
        arrays = problem[0][:3]
        reason = pf.explain_backends(*arrays, mask=mask, score_mod=score.make(score.array))
        assert "bytes of shared memory" in reason["hopper"]
        return

    def ours(q, k, v, array):
        dropout = pf.Dropout(case.rate, KEY) if case.rate else None
        out, lse = pf.flash_attention_with_lse(
            q, k, v, mask=mask, score_mod=score.make(array), dropout=dropout, backend="hopper"
        )
        return out, jnp.where(lse == -jnp.inf, 0.0, lse)

    judge(case, with_gradients(ours, *problem), record_property)


@pytest.mark.parametrize(
    ("length", "mask"),
    [*((n, "causal") for n in LENGTHS + UNEQUAL), *((n, "full") for n in WITHOUT_MASK)],
    ids=lambda x: x if isinstance(x, str) else f"{x[0]}x{x[1]}",
)
def test_any_length(length, mask, record_property):
    sizes = (
        Sizes(2, *length, 4, 2, 64, 64) if max(length) < 4000 else Sizes(1, *length, 2, 1, 64, 64)
    )
    check(sizes, MASKS[mask], jnp.bfloat16, record_property)


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [("full", jnp.float16), ("causal", jnp.bfloat16)],
    ids=["full-float16", "causal-bfloat16"],
)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_any_head_dim(head_dim, mask, dtype, record_property):
    sizes = Sizes(2, 1000, 1000, 4, 2, head_dim, head_dim)
    check(sizes, MASKS[mask], dtype, record_property)


@pytest.mark.parametrize(
    ("mask", "head_dim"),
    [("causal", 128), ("packed", 64), ("packed", 128), ("packed", 256)],
)
def test_more_tiles_than_multiprocessors(mask, head_dim, record_property):
    """Blocks have several tiles each, in the order that suits the cache."""
    sizes = Sizes(6, 600, 600, 16, 8, head_dim, head_dim)
    packed = MASKS_OF_ALL["causal-segments"]
    check(sizes, MASKS.get(mask, packed), jnp.bfloat16, record_property)


def _tuned():
    """Head dimension, mask and parts of the configuration, each once."""
    entries = table.read(H100, {"hopper": hopper.BACKEND})
    found = {(e.key.head_dim, e.key.mask, *e.config.items()) for e in entries}
    return sorted(found, key=str)


def check_forward(sizes: Sizes, mask_name: str, change, record):
    """With the configuration that `change` makes of the default one."""
    mask, allowed = MASKS[mask_name](sizes)
    with oracle.on_host():
        arrays = qkv(sizes, jnp.bfloat16)
        exact, plain = jax.jit(oracle.attention), jax.jit(oracle.plain_attention_with_lse)
        low = plain(*arrays, allowed)
        with jax.enable_x64(True):
            truth = exact(*arrays, allowed=allowed)
    arrays = jax.tree.map(np.asarray, arrays)
    config = change(hopper.default_config(AttentionSpec.of(Operands(*arrays, mask), scale=1.0)))
    how = {"mask": mask, "backend": "hopper", "config": config}
    out, lse = jax.jit(functools.partial(pf.flash_attention_with_lse, **how))(*arrays)
    error = np.abs(np.asarray(out, np.float64) - np.asarray(truth[0]))
    record("error_out", float(error.max()))
    assert_as_good_as_plain(out, low[0], truth[0], "out", 2.0)
    assert_close_to_oracle(lse, truth[1], "lse", rtol=1e-5)


@pytest.mark.parametrize("number", range(len(_tuned())))
def test_tuned_configurations(number, record_property):
    """Of the forward: the backward's are the defaults."""
    head_dim, kind, *parts = _tuned()[number]
    sizes = Sizes(2, 1000, 1000, 4, 2, head_dim, head_dim)
    mask = "full" if kind == "none" else "causal"
    check_forward(sizes, mask, lambda c: dataclasses.replace(c, **dict(parts)), record_property)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(
    ("block_kv", "dims"),
    [(80, (256, 256)), (80, (64, 32)), (112, (192, 96)), (48, (40, 40))],
    ids=["80-d256", "80-value-dim-32", "112-value-dim-96", "48-d40"],
)
def test_blocks_that_are_no_whole_tiles(block_kv, dims, mask, record_property):
    def change(config):
        forward = dataclasses.replace(config.forward, block_kv=block_kv)
        return dataclasses.replace(config, forward=forward)

    check_forward(Sizes(2, 500, 1001, 4, 2, *dims), mask, change, record_property)


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [("full", jnp.float16), ("causal", jnp.bfloat16)],
    ids=["full-float16", "causal-bfloat16"],
)
@pytest.mark.parametrize("value_dim", [64, 128, 192, 256])
def test_maxima_that_grow(value_dim, mask, dtype, record_property):
    """The first keys, which come last, have the largest scores: old sums shrink to nothing."""
    sizes = Sizes(2, 700, 700, 4, 2, 128, value_dim)
    growing = np.linspace(12.0, 0.5, sizes.kv_len)[:, None, None]
    check(sizes, MASKS[mask], dtype, record_property, growing)


@pytest.mark.parametrize("dims", [(192, 128), (64, 256), (256, 16), (40, 72), (128, 64)])
def test_value_dim_of_its_own(dims, record_property):
    check(Sizes(2, 333, 500, 4, 2, *dims), MASKS["causal"], jnp.bfloat16, record_property)


@pytest.mark.parametrize(
    ("heads", "head_dim"), [*((heads, 64) for heads in HEADS), ("gqa-8-to-1", 256), ("mqa", 256)]
)
def test_head_groups(heads, head_dim, record_property):
    sizes = Sizes(2, 700, 500, *HEADS[heads], head_dim, head_dim)
    check(sizes, MASKS["causal"], jnp.bfloat16, record_property)


@pytest.mark.parametrize(
    ("mask", "head_dim"),
    [
        *itertools.product(("lengths-and-bottom-right", "window", "not-or"), (128, 192)),
        ("lengths-and-bottom-right", 40),
    ],
)
def test_masks(mask, head_dim, record_property):
    sizes = Sizes(3, 777, 900, 4, 2, head_dim, head_dim)
    check(sizes, MASKS[mask], jnp.bfloat16, record_property)


def test_masks_and_dropout_of_one_number_for_a_tile(record_property):
    """Beside it, one head that may attend to nothing."""
    is_open = np.array([1, 0, 1, 1], bool).reshape(1, 4, 1, 1)
    for mask in (pf.DenseMask(is_open), pf.MaskMod(lambda q, k, x: x > 0, is_open.astype(int))):
        sizes = Sizes(2, 256, 128, 4, 2, 64, 64)
        check(sizes, lambda z, mask=mask: (mask, is_open), jnp.bfloat16, record_property)
    q, k, v = qkv(Sizes(8, 1, 1, 64, 64, 64, 64), jnp.bfloat16)
    dropout = pf.Dropout(0.5, KEY)
    out = pf.flash_attention(q, k, v, dropout=dropout, backend="hopper")
    assert (out == jnp.where(dropout.keep_mask(8, 64, 1, 1)[:, None, :, 0], 2 * v, 0)).all()


def test_nan_in_padding_does_not_leak():
    sizes = Sizes(2, 300, 500, 4, 2, 64, 64)
    q, k, v = qkv(sizes, jnp.bfloat16)
    lengths = jnp.array([70, 400], jnp.int32)
    beyond = (jnp.arange(500) >= lengths[:, None])[..., None, None]
    attention = lambda q, k, v: pf.flash_attention(  # noqa: E731
        q, k, v, mask=pf.KvLengths(lengths), backend="hopper"
    )
    results = []
    for fill in (0.0, jnp.nan):
        poisoned = [jnp.where(beyond, fill, x).astype(x.dtype) for x in (k, v)]
        out, vjp = jax.vjp(attention, q, *poisoned)
        results.append((out, *vjp(jnp.ones_like(out))[1:]))
    for clean, dirty in zip(*results):
        assert (clean == dirty).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic_gradients_are_the_same_in_250_runs(head_dim, record_property):
    sizes = Sizes(2, 4096, 4096, 4, 2, head_dim, head_dim)
    arrays = *qkv(sizes, jnp.bfloat16), normal(5, 2, 4096, 4, head_dim, dtype=jnp.bfloat16)

    def gradients(deterministic, *arrays):
        attention = functools.partial(
            pf.flash_attention, mask=pf.Causal(), deterministic=deterministic, backend="hopper"
        )
        return jax.vjp(attention, *arrays[:3])[1](arrays[3])

    run = jax.jit(gradients, static_argnums=0)
    first = run(True, *arrays)
    is_same = jax.jit(lambda a, b: jnp.array([(x == y).all() for x, y in zip(a, b)]).all())
    assert all(is_same(run(True, *arrays), first) for _ in range(249))
    for name, a, b in zip(("dq", "dk", "dv"), first, run(False, *arrays), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        difference = jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
        record_property(f"difference_{name}", float(difference))
        # A number half-way between two of bfloat16 may become either.
        assert difference < 1e-3, name


def test_memory_of_a_training_step_is_linear_in_length():
    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16)

        def loss(q, k, v):
            return (
                pf.flash_attention(q, k, v, mask=pf.Causal(), backend="hopper")
                .astype(jnp.float32)
                .sum()
            )

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(8192), temporaries(32768)
    assert long < 4.5 * short
    assert long < 0.5 * 2**30


def test_more_than_2_to_the_31_elements(record_property):
    """Only rows at both ends are compared: the whole oracle would not fit."""
    batch, length, heads, dim = 33, 8192, 64, 128
    assert batch * length * heads * dim > 2**31
    shape = (batch, length, heads, dim)
    q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
    window = pf.SlidingWindow(200, 0)
    attention = functools.partial(pf.flash_attention, mask=window, backend="hopper")
    out = jax.jit(attention)(q, k, v)
    for rows in (slice(0, 1), slice(batch - 1, batch)):
        part = [x[rows, -1024:, -2:] for x in (q, k, v)]
        want = jax.jit(attention)(*part)
        ours = out[rows, -1024:, -2:]
        difference = jnp.abs((ours - want)[:, 200:].astype(jnp.float32)).max()
        record_property("difference", float(difference))
        assert difference < 0.02
    del out
    small = slice(batch - 1, batch)
    loss = lambda *x: attention(*x).astype(jnp.float32).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    big = grads(q, k, v)
    for a, b in zip(big, grads(*(x[small] for x in (q, k, v)))):
        difference = jnp.abs((a[small] - b).astype(jnp.float32)).max()
        assert difference <= 0.02 * jnp.abs(b.astype(jnp.float32)).max()


def test_default_is_hopper_and_falls_back_with_a_warning():
    q, k, v = qkv(Sizes(), jnp.bfloat16)
    assert pf.explain_backends(q, k, v)["hopper"] is None
    with pytest.warns(UserWarning, match="'blockwise', which is slower than 'hopper'.*erf"):
        pf.flash_attention(q, k, v, score_mod=pf.ScoreFunction(lambda s, *_: jax.lax.erf(s)))


def test_tangents_and_second_derivatives(record_property):
    """The values and the first gradients are the kernels', the rest is plain JAX."""
    sizes = Sizes(2, 200, 264, 4, 2, 64, 64)
    mask, allowed = MASKS_OF_ALL["causal"](sizes)
    score = SCORES["softcap-then-bias"](sizes)
    arrays = [*qkv(sizes, jnp.bfloat16), score.array]
    moves = [normal(20 + i, *x.shape, dtype=x.dtype) for i, x in enumerate(arrays)]
    arrays, moves = jax.tree.map(np.asarray, (arrays, moves))

    def ours(q, k, v, array):
        return pf.flash_attention_with_lse(
            q, k, v, mask=mask, score_mod=score.make(array), backend="hopper"
        )

    def exact(q, k, v, array):
        return oracle.attention(q, k, v, allowed=allowed, change=lambda s: score.change(s, array))

    def derivatives(function):
        def loss(*arrays):
            return sum(jnp.sin(x.astype(lse_dtype)).sum() for x in function(*arrays))

        lse_dtype = jax.eval_shape(function, *arrays)[1].dtype
        tangents = jax.jit(lambda x, dx: jax.jvp(function, x, dx)[1])
        second = jax.jit(lambda x, dx: jax.jvp(jax.grad(loss, (0, 1, 2, 3)), x, dx)[1])
        return lambda x, dx: (*tangents(x, dx), *second(x, dx))

    got = derivatives(ours)(arrays, moves)
    with oracle.on_host(), jax.enable_x64(True):
        truth = derivatives(exact)(*jax.tree.map(np.float64, (arrays, moves)))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "d_array"), got, truth, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        error = np.abs(a - b).max() / np.abs(b).max()
        record_property(f"error_{name}", float(error))
        # bfloat16's rounding of out and of the first gradients.
        assert error < 0.02, name


def test_remat_scan_and_vmap_on_the_device():
    sizes = Sizes(2, 256, 256, 4, 2, 64, 64)
    q, k, v = qkv(sizes, jnp.bfloat16)

    def loss(backend, q, k, v):
        def body(x, _):
            one = functools.partial(pf.flash_attention, mask=pf.Causal(), backend=backend)
            return jax.checkpoint(jax.vmap(one))(x[None], k[None], v[None])[0] + x, None

        return (jax.lax.scan(body, q, length=2)[0].astype(jnp.float32) ** 2).sum()

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, b), argnums=(0, 1, 2)))(q, k, v)
        for b in ("hopper", "reference")
    ]
    for a, b in zip(*gradients):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(b)
