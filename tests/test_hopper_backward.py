"""The Hopper backward: its real kernel bodies in interpret mode, and their lowering for CUDA."""

import ast
import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import with_quick
from interpreted import Case, below, causal, interpreted, is_caught, lengths, with_races
from pallas_flash.backends.hopper import (
    array_gradients,
    backward_by_keys,
    backward_by_roles,
    backward_dq,
    backward_load,
    backward_scores,
    default_config,
    dq_fragments,
)
from pallas_flash.backends.hopper.backward import backward
from pallas_flash.backends.hopper.config import (
    BackwardConfig,
    Config,
    default_backward_config,
)
from pallas_flash.backends.hopper.storage import SHARED_MEMORY_LIMIT
from pallas_flash.masks.mask import kind_of
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import operand, term
from tolerance import assert_as_good_as_plain

pytestmark = pytest.mark.usefixtures("shim")

CASES = {
    "odd-lengths-d64": Case(65, 129, 1, 1, 64, 64),
    "odd-lengths-d64-causal": Case(131, 131, 1, 1, 64, 64, mask=pf.Causal(), allowed=causal),
    "odd-lengths-d128-gqa": Case(67, 141, 2, 1, 128, 128, batch=2),
    "odd-lengths-d256": Case(71, 133, 1, 1, 256, 256),
    "odd-lengths-d256-causal": Case(133, 133, 1, 1, 256, 256, mask=pf.Causal(), allowed=causal),
    "one-query-one-key-d16": Case(1, 1, 2, 1, 16, 24),
    "few-rows-d72": Case(5, 3, 1, 1, 72, 16),
    "gqa-d40": Case(70, 140, 4, 2, 40, 40),
    "mqa-odd-lengths-d128-causal": Case(131, 131, 4, 1, 128, 128, mask=pf.Causal(), allowed=causal),
    "stages-reused-d64-causal": Case(600, 200, 1, 1, 64, 64, mask=pf.Causal(), allowed=causal),
    "stages-reused-d128": Case(330, 100, 1, 1, 128, 128),
    "more-queries-d96-causal-bottom-right": Case(
        150, 70, 2, 2, 96, 96, mask=pf.Causal("bottom_right"),
        allowed=lambda q, k: k <= q + 70 - 150,
    ),
    "chunked-causal": Case(
        150, 150, 1, 1, 32, 32, mask=pf.ChunkedCausal(37),
        allowed=lambda q, k: (k <= q) & (k // 37 == q // 37),
    ),
    "prefix-of-rows": Case(
        90, 120, 1, 1, 32, 32, batch=2, mask=pf.PrefixLM(lengths(50, 0)),
        allowed=lambda q, k: (k <= q) | (k < below(50, 0)),
    ),
    "more-keys-d80-causal": Case(70, 200, 1, 1, 80, 80, mask=pf.Causal(), allowed=causal),
    "window-value-dim-32": Case(
        150, 330, 1, 1, 64, 32, mask=pf.SlidingWindow(40, 10),
        allowed=lambda q, k: (k >= q - 40) & (k <= q + 10),
    ),
    "not-causal": Case(
        90, 140, 1, 1, 32, 48, mask=~pf.Causal(), allowed=lambda q, k: k > q
    ),
    "not-causal-square": Case(
        70, 70, 1, 1, 32, 32, mask=~pf.Causal(), allowed=lambda q, k: k > q
    ),
    # The second block has no query in any head, the first one's second head has none.
    "keys-of-no-query-d160-gqa": Case(
        64, 130, 2, 1, 160, 160, mask=pf.MaskMod(lambda q, k: (k < 50) & (q >= 0)),
        allowed=lambda q, k: (k < 50) & (q >= 0),
    ),
    # Every block that is visited is full, and the second tile of keys visits none.
    "whole-tile-of-keys-unused": Case(
        64, 256, 1, 1, 64, 64, mask=pf.MaskMod(lambda q, k: k < 128),
        allowed=lambda q, k: (k < 128) & (q >= 0),
    ),
    "causal-and-lengths-gqa": Case(
        130, 130, 2, 1, 64, 64, batch=2,
        mask=pf.Causal() & pf.QLengths(lengths(100, 7)) & pf.KvLengths(lengths(90, 0)),
        allowed=lambda q, k: (k <= q) & (q < below(100, 7)) & (k < below(90, 0)),
    ),
    "lengths-of-groups-of-rows": Case(
        40, 140, 1, 1, 64, 64, batch=4, mask=pf.KvLengths(lengths(30, 135)),
        allowed=lambda q, k: k < below(30, 30, 135, 135),
    ),
    "f16-value-dim-192": Case(
        70, 90, 1, 1, 128, 192, dtype=jnp.float16, mask=pf.Causal(), allowed=causal
    ),
    "d192-value-dim-128-gqa": Case(80, 60, 2, 1, 192, 128),
    "d256-causal": Case(200, 70, 1, 1, 256, 256, mask=pf.Causal(), allowed=causal),
    "d200-lengths": Case(
        70, 130, 1, 1, 200, 24, mask=pf.KvLengths(lengths(70)),
        allowed=lambda q, k: k < below(70),
    ),
    "d64-with-the-tiles-of-d256": Case(
        150, 60, 1, 1, 64, 64, config=BackwardConfig(64, 64, 2, 1, 1, False)
    ),
    "d64-one-stage-dq-by-columns": Case(
        150, 100, 1, 1, 64, 64, config=BackwardConfig(64, 128, 1, 1, 3, False)
    ),
    "many-steps-d128": Case(328, 100, 1, 1, 128, 128),
    "many-steps-d128-gqa-causal": Case(
        200, 200, 2, 1, 128, 128, batch=2, mask=pf.Causal(), allowed=causal
    ),
    "dp-after-s-d104-value-dim-40-lengths": Case(
        72, 130, 1, 1, 104, 40, mask=pf.KvLengths(lengths(70)),
        allowed=lambda q, k: k < below(70),
    ),
    "128-queries-d64": Case(
        328, 104, 1, 1, 64, 64, config=BackwardConfig(128, 128, 2, 2, 1, True)
    ),
    "128-queries-d64-value-dim-48-gqa-causal": Case(
        250, 130, 2, 1, 64, 48, mask=pf.Causal(), allowed=causal,
        config=BackwardConfig(128, 128, 2, 2, 1, True),
    ),
    "128-queries-d40-lengths": Case(
        210, 130, 1, 1, 40, 64, mask=pf.KvLengths(lengths(70)), allowed=lambda q, k: k < below(70),
        config=BackwardConfig(128, 128, 1, 1, 1, False),
    ),
}  # fmt: skip


# Each of the kernels, with each of what its schedule and its copies may have to do.
QUICK = [
    "gqa-d40",
    "stages-reused-d128",
    "window-value-dim-32",
    "causal-and-lengths-gqa",
    "f16-value-dim-192",
    "d200-lengths",
    "many-steps-d128-gqa-causal",
    "d64-one-stage-dq-by-columns",
]

# Queries or keys without partner, some of them in a block that is visited.
WITH_PADDING = ["causal-and-lengths-gqa", "d200-lengths", "more-keys-d80-causal"]
WITH_PADDING += ["not-causal-square", "128-queries-d40-lengths"]
WITH_PADDING += ["dp-after-s-d104-value-dim-40-lengths"]


class Problem(NamedTuple):
    """Arrays of a case with the oracle's answer."""

    spec: AttentionSpec
    config: Config
    operands: Operands
    residuals: tuple[Any, Any, Any]
    gradients: Any
    allowed: Any


def with_backward(spec: AttentionSpec, backward_config: BackwardConfig | None) -> Config:
    config = default_config(spec)
    backward_config = backward_config or dataclasses.replace(config.backward, has_dq_kernel=False)
    return dataclasses.replace(config, backward=backward_config)


def problem(case: Case) -> Problem:
    """The case with the oracle's gradients, for random dout and random dlse of finite lse."""
    rng = np.random.default_rng(0)
    shapes = case.shapes().items()
    arrays = {name: jnp.asarray(rng.normal(size=n), case.dtype) for name, n in shapes}
    dout = arrays.pop("dout")
    allowed = case.allows()
    rows = (case.batch, case.num_q_heads, case.q_len)
    dlse = jnp.asarray(rng.normal(size=rows) * allowed.any(-1), jnp.float32)

    @jax.jit
    def attention(q, k, v):
        out, lse = oracle.attention(q, k, v, allowed=allowed)
        return out, jnp.where(lse == -jnp.inf, 0.0, lse)

    (out, lse), gradients = oracle.with_gradients(list(arrays.values()), (dout, dlse), attention)
    lse = jnp.where(allowed.any(-1), jnp.asarray(lse, jnp.float32), -jnp.inf)
    operands = Operands(**arrays, mask=case.bound_mask())
    spec = AttentionSpec.of(operands, case.head_dim**-0.5)
    config = with_backward(spec, case.config)
    residuals = (jnp.asarray(out, case.dtype), lse, dout, dlse)
    return Problem(spec, config, operands, residuals, gradients, (allowed, dlse))


def interpretable(problem: Problem) -> Any:
    """operands, residuals -> dq, dk, dv; traced anew for every problem."""

    @jax.jit
    def run(operands, *residuals):
        return backward(problem.spec, problem.config, operands, *residuals)

    return run


def interpret(problem: Problem) -> Any:
    """dq, dk, dv from the kernel in interpret mode, and whether it raced."""
    return with_races(interpretable(problem), problem.operands, *problem.residuals)


def plain(problem: Problem) -> Any:
    """dq, dk, dv of plain attention in the low precision."""
    allowed, dlse = problem.allowed
    attention = jax.jit(functools.partial(oracle.plain_attention_with_lse, allowed=allowed))
    operands = problem.operands
    _, vjp = jax.vjp(attention, operands.q, operands.k, operands.v)
    return vjp((problem.residuals[2], dlse))


def assert_gradients_match(p: Problem) -> None:
    """The kernels' are as good as those of plain attention, and nothing races."""
    results, races = interpret(p)
    assert not races
    for label, ours, low, truth in zip(
        ("dq", "dk", "dv"), results[:3], plain(p), p.gradients, strict=True
    ):
        assert_as_good_as_plain(ours, low, truth, label, factor=3.0)


@interpreted
@pytest.mark.parametrize("name", with_quick(CASES, QUICK))
def test_gradients_match_the_oracle_without_races(name):
    assert_gradients_match(problem(CASES[name]))


@interpreted
def test_score_mods_with_128_queries_give_what_64_give():
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        jnp.asarray(rng.normal(size=(1, n, 1, 64)), jnp.bfloat16) for n in (170, 100, 100, 170)
    )
    operands = Operands(q, k, v, None, pf.Softcap(2.0))
    spec = AttentionSpec.of(operands, 0.1)
    row = jnp.full((1, 1, 170), 5.0, jnp.float32)
    residuals = jnp.zeros_like(dout), row, dout, -row
    found = []
    for block_q in (64, 128):
        config = with_backward(spec, BackwardConfig(block_q, 128, 2, 2, 1, True))
        results, races = interpret(Problem(spec, config, operands, residuals, None, None))
        assert not races
        found.append(results[:3])
    for of_64, of_128 in zip(*found, strict=True):
        of_64, of_128 = (np.asarray(x, np.float32) for x in (of_64, of_128))
        assert np.abs(of_64).max() > 0.1
        np.testing.assert_allclose(of_128, of_64, rtol=2**-7, atol=2**-7 * np.abs(of_64).max())


@interpreted
def test_rows_and_keys_without_partner_get_zero_gradients():
    p = problem(CASES["causal-and-lengths-gqa"])
    (dq, dk, dv, _), _ = interpret(p)
    allowed = p.allowed[0][:, 0]
    assert (dq[~allowed.any(2)] == 0).all()
    assert (dk[~allowed.any(1)] == 0).all()
    assert (dv[~allowed.any(1)] == 0).all()
    assert (dq[allowed.any(2)] != 0).any()


@interpreted
@pytest.mark.parametrize("name", WITH_PADDING)
def test_nan_in_padding_does_not_leak(name):
    p = problem(CASES[name])
    clean, _ = interpret(p)
    allowed = p.allowed[0][:, 0]

    def poison(x, used):
        return jnp.where(used[..., None, None], x, jnp.nan)

    q, k, v, (out, lse, dout, dlse) = p.operands.q, p.operands.k, p.operands.v, p.residuals
    rows, keys = allowed.any(2), allowed.any(1)
    dirty, races = interpret(
        p._replace(
            operands=Operands(poison(q, rows), poison(k, keys), poison(v, keys), p.operands.mask),
            residuals=(out, lse, poison(dout, rows), dlse),
        )
    )
    assert not races
    assert not (rows.all() and keys.all())
    for a, b in zip(dirty[:3], clean[:3], strict=True):
        assert (a == b).all()


# ---------------------------------------------------------------------------------------------
# Mutations: the kernel without one of its waits or fences must be caught.

MODULES = {
    "array_gradients": array_gradients,
    "backward_load": backward_load,
    "backward_scores": backward_scores,
    "backward_by_keys": backward_by_keys,
    "backward_by_roles": backward_by_roles,
    "backward_dq": backward_dq,
    "dq_fragments": dq_fragments,
}
GUARDS = ("barrier_wait", "commit_smem", "wait_smem_to_gmem")


def guards():
    """Every call of a guard in the kernels' modules: (module name, function, guard, line).

    `_drain` is left out: only the book-keeping of 0.11.2's interpret mode needs it; and the loading
    warpgroup's wait for K: to interpret mode the arrival of the first dS tells that K is there.
    """
    for name, module in MODULES.items():
        for function in ast.parse(inspect.getsource(module)).body:
            for node in ast.walk(function):
                called = getattr(node.func, "attr", None) if isinstance(node, ast.Call) else None
                if called in GUARDS and function.name not in ("_drain", "_load_and_add"):
                    yield name, function.name, called, node.lineno


class Without:
    """plgpu, but what is called `guard` does nothing on one line."""

    def __init__(self, guard: str, line: int):
        self.guard, self.line = guard, line

    def __getattr__(self, name):
        original = getattr(plgpu, name)

        def call(*args, **keywords):
            if inspect.currentframe().f_back.f_lineno == self.line:
                return None
            return original(*args, **keywords)

        return call if name == self.guard else original


@term
class OfHeads(pf.Mask):
    """Heads that attend, or not at all: these have no tiles to visit."""

    attends: jax.Array = operand("batch", "heads", dtype=jnp.integer)

    def allowed(self, q_pos, kv_pos):
        return (q_pos + kv_pos) * 0 < self.attends

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        some = q_lo * 0 + kv_lo * 0 < self.attends
        return kind_of(some, some)


@functools.cache
def mutation_problem(block_kv: int, module: str = "", function: str = "") -> Problem:
    """One block that reuses its stages and scrubs its keys, without oracle.

    module, function: what is mutated; it may be there for bands of near tiles alone.
    """
    # A step commits what it has read where it stores no dS.
    has_dq_kernel = (module, function) == ("backward_by_keys", "_step")
    config = BackwardConfig(64, block_kv, 2, 1, 2, has_dq_kernel)
    q_len, dim = 300, 32
    q, k = jnp.ones((1, q_len, 3, dim), jnp.bfloat16), jnp.ones((1, 60, 1, dim), jnp.bfloat16)
    of_scores = jnp.ones((1, 1, q_len, 60))
    mask = pf.KvLengths(lengths(50)) & pf.DenseMask(of_scores > 0) & OfHeads(lengths(1, 0, 0)[None])
    mods = (pf.Bias(of_scores), pf.Bias(of_scores[:, :, :1]), pf.Bias(of_scores))
    mod: Any = pf.Chain(mods)
    if function in ("_load_near", "scores_terms"):
        mod = pf.RelativeBias(jnp.ones((1, 8)), max_distance=40).bind(q_len, 60)
        # Or the producer waits for the end of the step before.
        config = dataclasses.replace(config, num_dout_stages=2)
    if has_dq_kernel:
        # Its gradients commit, too.
        mod = None
    operands = Operands(q, k, k, mask, mod)
    row = jnp.ones((1, 3, q_len), jnp.float32)
    spec = AttentionSpec.of(operands, 0.1)
    return Problem(spec, with_backward(spec, config), operands, (q, row, q, row), None, None)


@pytest.mark.parametrize(
    "of", [(64,), (128,), (128, "", "_load_near"), (128, "backward_by_keys", "_step")], ids=str
)
def test_the_kernel_that_is_mutated_below_has_no_races(of):
    assert not interpret(mutation_problem(*of))[1]


@interpreted
@pytest.mark.parametrize(("module", "function", "guard", "line"), list(guards()))
def test_a_missing_wait_or_fence_is_caught(monkeypatch, module, function, guard, line):
    of_roles = module in ("backward_by_roles", "dq_fragments")
    p = mutation_problem(64 if of_roles else 128, module, function)
    monkeypatch.setattr(MODULES[module], "plgpu", Without(guard, line))
    assert is_caught(interpretable(p), p.operands, *p.residuals)


# ---------------------------------------------------------------------------------------------
# Lowering for CUDA, on a machine without a GPU.

DIMS = range(16, 257, 8)
# Some of each kind of configuration.
QUICK_DIMS = (16, 64, 80, 128, 192, 256)


def described(head_dim, value_dim, mask=None, dtype=jnp.bfloat16, batch=2, q_len=200, kv_len=200):
    """Shapes of a small problem, for lowering."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, k = array(batch, q_len, 4, head_dim), array(batch, kv_len, 2, head_dim)
    operands = Operands(q, k, array(batch, kv_len, 2, value_dim), mask)
    row = array(batch, 4, q_len, dtype=jnp.float32)
    out = array(batch, q_len, 4, value_dim)
    return operands, out, row, out, row


def lowers(arrays, config=None):
    spec = AttentionSpec.of(arrays[0], 0.1)
    config = with_backward(spec, config)
    run = jax.jit(lambda *arrays: backward(spec, config, *arrays)[:3])
    return run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("head_dim", with_quick(DIMS, QUICK_DIMS))
def test_default_config_lowers_for_cuda(head_dim):
    assert "mosaic_gpu" in lowers(described(head_dim, head_dim))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(16, 256), (256, 16), (64, 128), (192, 128), (72, 200)]
)
def test_default_config_of_unequal_dimensions_lowers_for_cuda(head_dim, value_dim):
    assert "mosaic_gpu" in lowers(described(head_dim, value_dim, dtype=jnp.float16))


@pytest.mark.quick
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "mask",
    [
        pf.Causal(),
        pf.SlidingWindow(30, 5) & ~pf.KvLengths(jax.ShapeDtypeStruct((2,), jnp.int32)),
        pf.Causal() & pf.QLengths(jax.ShapeDtypeStruct((1,), jnp.int32)),
    ],
    ids=["causal", "window-not-lengths", "causal-lengths"],
)
def test_masks_lower_for_cuda(head_dim, mask):
    assert "mosaic_gpu" in lowers(described(head_dim, head_dim, mask, q_len=7, kv_len=1001))


@pytest.mark.quick
@pytest.mark.parametrize("mask", [None, pf.Causal()], ids=["full", "causal"])
@pytest.mark.parametrize("has_dq_kernel", [False, True])
def test_tiles_of_128_queries_lower_for_cuda(has_dq_kernel, mask):
    arrays = described(64, 48, mask, q_len=250)
    assert "mosaic_gpu" in lowers(arrays, BackwardConfig(128, 128, 1, 1, 1, has_dq_kernel))


def test_more_than_2_to_31_elements_lower_for_cuda():
    arrays = described(128, 128, pf.Causal(), batch=2**14, q_len=512, kv_len=512)
    assert arrays[0].q.size > 2**31
    assert "mosaic_gpu" in lowers(arrays)


def test_default_configs_fit_shared_memory():
    for head_dim in DIMS:
        for value_dim in DIMS:
            operands = described(head_dim, value_dim)[0]
            spec = AttentionSpec.of(operands, 0.1)
            config = default_backward_config(spec)
            assert config.shared_memory_bytes(spec) <= SHARED_MEMORY_LIMIT, (head_dim, value_dim)


def test_as_many_heads_side_by_side_as_run_at_a_time():
    def heads(length):
        operands = described(128, 128, q_len=4 * length, kv_len=length)[0]
        return default_backward_config(AttentionSpec.of(operands, 0.1)).heads_per_group

    # 32 and 128 blocks of keys, of which 132 run at a time. The cache would do for one head.
    assert (heads(4096), heads(16384)) == (4, 1)


def test_shared_memory_is_what_pallas_requests():
    arrays = described(128, 128)
    config = BackwardConfig(128, 128, 4, 3, 1, False)
    expected = config.shared_memory_bytes(AttentionSpec.of(arrays[0], 0.1))
    with pytest.raises(ValueError, match=f"smem_bytes={expected}"):
        lowers(arrays, config)


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="block_q=72 must be 64 or 128"):
        BackwardConfig(72, 128, 2, 2, 1, False)
    with pytest.raises(ValueError, match="block_kv=96 must be 64 or 128"):
        BackwardConfig(64, 96, 2, 2, 1, False)
    with pytest.raises(ValueError, match="num_q_stages=0 must be at least 1"):
        BackwardConfig(64, 128, 0, 2, 1, False)
