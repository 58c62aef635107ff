"""The Hopper kernel for dQ alone: real bodies in interpret mode, waits and fences, lowering."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_flash as pf
from conftest import with_quick
from interpreted import Case, interpreted, is_caught, with_races
from mutations import WithoutCall
from pallas_flash.backends.hopper import (
    assignment,
    backward,
    backward_by_queries,
    dq_fragments,
    forward_load,
    query_kernel,
)
from pallas_flash.backends.hopper.config import (
    BackwardConfig,
    DqConfig,
    default_backward_config,
    default_dq_config,
    misfit,
)
from pallas_flash.spec import AttentionSpec, Operands
from test_hopper_backward import (
    CASES,
    Problem,
    assert_gradients_match,
    described,
    interpret,
    lowers,
    problem,
    with_backward,
)

pytestmark = pytest.mark.usefixtures("shim")


def with_dq_kernel(p: Problem) -> Problem:
    own = dataclasses.replace(p.config.backward, has_dq_kernel=True)
    return p._replace(config=dataclasses.replace(p.config, backward=own))


# Odd lengths are copied in pieces.
NAMES = (
    "odd-lengths-d64-causal",
    "few-rows-d72",
    "mqa-odd-lengths-d128-causal",
    "more-queries-d96-causal-bottom-right",
    "window-value-dim-32",
    "whole-tile-of-keys-unused",
    "causal-and-lengths-gqa",
    "dp-after-s-d104-value-dim-40-lengths",
    "128-queries-d64",
)


@interpreted
@pytest.mark.parametrize("name", with_quick(NAMES, ("causal-and-lengths-gqa",)))
def test_gradients_match_the_oracle_without_races(name):
    assert_gradients_match(with_dq_kernel(problem(CASES[name])))


@interpreted
@pytest.mark.parametrize("name", ["causal-and-lengths-gqa", "whole-tile-of-keys-unused"])
def test_padding_may_hold_anything_and_has_no_gradients(name):
    p = with_dq_kernel(problem(CASES[name]))
    clean, _ = interpret(p)
    allowed = p.allowed[0][:, 0]
    rows, keys = allowed.any(2), allowed.any(1)

    def poison(x, used):
        return jnp.where(used[..., None, None], x, jnp.nan)

    of, (out, lse, dout, dlse) = p.operands, p.residuals
    operands = Operands(poison(of.q, rows), poison(of.k, keys), poison(of.v, keys), of.mask)
    dirty, races = interpret(
        p._replace(operands=operands, residuals=(out, lse, poison(dout, rows), dlse))
    )
    assert not races and not (rows.all() and keys.all())
    for a, b in zip(dirty[:3], clean[:3], strict=True):
        assert (a == b).all()
    assert (dirty[0][~rows] == 0).all() and (dirty[0][rows] != 0).any()


@interpreted
def test_gradients_are_the_same_in_any_order_of_blocks(monkeypatch):
    """Bit by bit, where sums in memory are not."""
    monkeypatch.setattr(dq_fragments, "dq_of_sum", lambda spec, config, dq_sum, factors: dq_sum)
    p, in_order = problem(Case(140, 390, 2, 1, 64, 64)), backward.locate

    def reversed_order(index, num_tiles, num_heads, heads_per_group):
        last = num_tiles * num_heads - 1
        return in_order(last - index, num_tiles, num_heads, heads_per_group)

    found = []
    for order in (in_order, reversed_order):
        monkeypatch.setattr(backward, "locate", order)
        found.append((interpret(with_dq_kernel(p))[0], interpret(p)[0]))
    (alone, sums), (alone_reversed, sums_reversed) = found
    assert all((a == b).all() for a, b in zip(alone[:3], alone_reversed[:3], strict=True))
    assert (sums[0] != sums_reversed[0]).any()


# ---------------------------------------------------------------------------------------------
# Mutations: the kernel without one of its waits or fences must be caught.

MODULES = backward_by_queries, forward_load, query_kernel


@functools.cache
def mutation_problem(copies: str) -> Problem:
    """Several tiles that reuse their stages, with near and far keys."""
    q_len, kv_len, dim = {"whole": (200, 200, 16), "in-pieces": (203, 203, 48)}[copies]
    mod = pf.RelativeBias(jnp.ones((1, 8)), max_distance=40).bind(q_len, kv_len)
    q, k = jnp.ones((1, q_len, 3, dim), jnp.bfloat16), jnp.ones((1, kv_len, 1, dim), jnp.bfloat16)
    operands = Operands(q, k, k, None, mod)
    row = jnp.ones((1, 3, q_len), jnp.float32)
    spec = AttentionSpec.of(operands, 0.1)
    p = Problem(spec, with_backward(spec, None), operands, (q, row, q, row), None, None)
    return with_dq_kernel(p)


def small_tiles(num_q_stages: int) -> DqConfig:
    return DqConfig(2, 32, 2, num_q_stages, takes_turns=False, heads_per_group=1)


@pytest.fixture
def one_block(monkeypatch):
    """It has all tiles."""
    monkeypatch.setattr(assignment, "NUM_BLOCKS", 1)


def put_in_kernel(patch: pytest.MonkeyPatch, calls: WithoutCall) -> None:
    """Puts `calls` in place of ``plgpu`` where the kernel's body is."""
    for module in MODULES:
        patch.setattr(module, "plgpu", calls)


def dq_of(p: Problem, num_q_stages: int):
    """operands, out, lse, dout, dlse -> dq and delta; traced anew."""
    config = small_tiles(num_q_stages)
    return jax.jit(lambda *arrays: backward_by_queries.dq_and_delta(p.spec, config, *arrays))


def callers(name: str, num_q_stages: int) -> list[str]:
    """The functions that call ``plgpu.name`` while the kernel is traced."""
    recorder = WithoutCall(name)
    with pytest.MonkeyPatch.context() as patch:
        put_in_kernel(patch, recorder)
        p = mutation_problem("whole")
        jax.eval_shape(dq_of(p, num_q_stages), p.operands, *p.residuals)
    return recorder.callers


both_copies = pytest.mark.parametrize("copies", ["whole", "in-pieces"])
GUARDS = [
    (name, i, num_q_stages)
    for name in ("barrier_wait", "commit_smem", "wait_smem_to_gmem")
    for num_q_stages in (2, 1)
    for i, caller in enumerate(callers(name, num_q_stages))
    # The producer's last waits are there for interpret mode only, and it takes TMA for one thread:
    # who has waited for the next tile's queries would know that the stores before have been read.
    if caller not in ("load", "load.<locals>._")
    and (name, caller) != ("wait_smem_to_gmem", "_rows")
    # With one stage, what is not there with two.
    and (num_q_stages == 2 or caller == "_compute.<locals>.compute_tile")
]


@both_copies
@pytest.mark.parametrize("num_q_stages", [1, 2])
def test_the_kernel_that_is_mutated_below_has_no_races(one_block, copies, num_q_stages):
    p = mutation_problem(copies)
    assert not with_races(dq_of(p, num_q_stages), p.operands, *p.residuals)[1]


@interpreted
@both_copies
@pytest.mark.parametrize(("name", "index", "num_q_stages"), GUARDS)
def test_a_missing_wait_or_fence_is_caught(
    monkeypatch, one_block, name, index, num_q_stages, copies
):
    put_in_kernel(monkeypatch, WithoutCall(name, index))
    p = mutation_problem(copies)
    assert is_caught(dq_of(p, num_q_stages), p.operands, *p.residuals)


# ---------------------------------------------------------------------------------------------
# Configurations, and lowering for CUDA on a machine without a GPU.


def default_of(q_len, kv_len, head_dim=64, mask=None, score_mod=None, **options):
    operands, *_ = described(head_dim, head_dim, mask, q_len=q_len, kv_len=kv_len)
    operands = dataclasses.replace(operands, score_mod=score_mod)
    spec = AttentionSpec.of(operands, 0.1, **options)
    return spec, default_backward_config(spec)


@pytest.mark.parametrize(
    ("kv_len", "head_dim", "mask", "has_dq_kernel"),
    [
        (1024, 64, None, True),
        (1025, 64, None, False),
        (1024, 64, pf.Causal(), True),
        (1025, 64, pf.Causal(), False),
        (1024, 128, pf.Causal(), True),
        (1025, 128, pf.Causal(), False),
        (200, 136, None, False),
    ],
)
def test_few_keys_have_a_kernel_for_dq(kv_len, head_dim, mask, has_dq_kernel):
    spec, config = default_of(4096, kv_len, head_dim, mask)
    assert config.has_dq_kernel == has_dq_kernel
    assert misfit(spec, config) is None


def test_arrays_that_do_not_fit_beside_out_and_q_have_none():
    bias = pf.Bias(jax.ShapeDtypeStruct((1, 4, 512, 512), jnp.float32))
    spec, config = default_of(512, 512, 128, score_mod=pf.Chain((bias,) * 4))
    alone = dataclasses.replace(config, block_kv=128, has_dq_kernel=True)
    assert not config.has_dq_kernel and misfit(spec, config) is None
    assert "has beside it a kernel for dQ, which needs" in misfit(spec, alone)


def test_the_kernel_for_dq_takes_no_turns():
    with pytest.raises(ValueError, match="takes_turns=True must be False in the kernel for dQ"):
        DqConfig(2, 64, 2, 1, takes_turns=True, heads_per_group=1)


def test_shared_keys_have_no_kernel_for_dq():
    with pytest.raises(ValueError, match="has_dq_kernel=True needs block_kv=64 to be 128"):
        BackwardConfig(64, 64, 2, 2, 1, True)


def test_default_configs_fit_shared_memory():
    for head_dim in range(16, 129, 8):
        for value_dim in range(16, 129, 8):
            spec = AttentionSpec.of(described(head_dim, value_dim)[0], 0.1)
            config = default_dq_config(spec)
            assert misfit(spec, config) is None, (head_dim, value_dim)
            assert config.block_kv >= 64


@pytest.mark.quick
@pytest.mark.parametrize("mask", [None, pf.Causal()], ids=["full", "causal"])
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (72, 24), (128, 128)])
def test_default_config_lowers_for_cuda(dims, mask):
    arrays = described(*dims, mask)
    spec = AttentionSpec.of(arrays[0], 0.1)
    text = lowers(arrays, default_backward_config(spec))
    assert text.count("@mosaic_gpu_v2") == 2
