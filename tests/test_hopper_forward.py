"""The Hopper forward: its real kernel body in interpret mode, and what mutations of it do."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import with_quick
from interpreted import Case, below, causal, interpreted, is_caught, lengths, with_races
from mutations import WithoutCall
from pallas_flash.backends import hopper
from pallas_flash.backends.hopper import (
    assignment,
    forward_compute,
    forward_load,
    forward_storage,
)
from pallas_flash.backends.hopper.forward import forward
from pallas_flash.backends.hopper.storage import load_accumulator, tiled
from pallas_flash.spec import AttentionSpec, Operands
from tolerance import assert_as_good_as_plain

pytestmark = pytest.mark.usefixtures("shim")

# Two warpgroups that take turns, in blocks so small that stages are used again.
TURNS = {"num_warpgroups": 2, "block_kv": 32, "num_q_stages": 1, "takes_turns": True}
THREE = {"num_warpgroups": 3, "block_kv": 48, "takes_turns": False}

CASES = {
    "odd-lengths-d64": Case(65, 129, 1, 1, 64, 64),
    "odd-lengths-d64-causal": Case(
        131, 77, 1, 1, 64, 64, mask=pf.Causal(), config=TURNS, allowed=causal
    ),
    "odd-lengths-d128-gqa": Case(67, 141, 2, 1, 128, 128, batch=2, config=TURNS),
    "odd-lengths-d16": Case(65, 129, 2, 1, 16, 24, config=TURNS),
    "odd-lengths-d40-causal": Case(
        71, 141, 1, 1, 40, 40, mask=pf.Causal("bottom_right"), config={"block_kv": 48},
        allowed=lambda q, k: k <= q + 141 - 71,
    ),
    "one-query-one-key-d16": Case(1, 1, 2, 1, 16, 24),
    "few-rows-d72": Case(5, 3, 1, 1, 72, 16),
    "gqa-d40-stages-reused": Case(70, 140, 4, 2, 40, 40, config=TURNS),
    "mqa-odd-lengths-d128-causal": Case(131, 131, 4, 1, 128, 128, mask=pf.Causal(), allowed=causal),
    "three-warpgroups-causal": Case(
        200, 200, 1, 1, 32, 32, mask=pf.Causal(), allowed=causal, config=THREE
    ),
    "more-queries-causal-bottom-right": Case(
        150, 70, 2, 2, 96, 96, mask=pf.Causal("bottom_right"), config=TURNS,
        allowed=lambda q, k: k <= q + 70 - 150,
    ),
    "more-keys-causal-bottom-right": Case(
        70, 201, 1, 1, 80, 80, mask=pf.Causal("bottom_right"), config=TURNS,
        allowed=lambda q, k: k <= q + 201 - 70,
    ),
    "more-keys-causal": Case(70, 200, 1, 1, 80, 48, mask=pf.Causal(), allowed=causal),
    "window-value-dim-32": Case(
        150, 330, 1, 1, 64, 32, mask=pf.SlidingWindow(70, 40), config=TURNS,
        allowed=lambda q, k: (k >= q - 70) & (k <= q + 40),
    ),
    "not-causal-or-window": Case(
        90, 140, 1, 1, 32, 48, mask=~(pf.Causal() | pf.SlidingWindow(None, 9)), config=TURNS,
        allowed=lambda q, k: k > q + 9,
    ),
    "causal-and-lengths-gqa": Case(
        130, 130, 2, 1, 64, 64, batch=2, config=TURNS,
        mask=pf.Causal() & pf.QLengths(lengths(100, 7)) & pf.KvLengths(lengths(90, 0)),
        allowed=lambda q, k: (k <= q) & (q < below(100, 7)) & (k < below(90, 0)),
    ),
    "lengths-of-groups-of-rows": Case(
        40, 140, 1, 1, 64, 64, batch=4, mask=pf.KvLengths(lengths(30, 135)),
        allowed=lambda q, k: k < below(30, 30, 135, 135),
    ),
    "one-length-for-all-rows": Case(
        40, 70, 1, 1, 16, 16, batch=2, mask=~pf.KvLengths(lengths(33)),
        allowed=lambda q, k: k >= below(33),
    ),
    "chunked-causal": Case(
        150, 150, 1, 1, 32, 32, mask=pf.ChunkedCausal(37), config=TURNS,
        allowed=lambda q, k: (k <= q) & (k // 37 == q // 37),
    ),
    "prefix-of-rows": Case(
        90, 120, 1, 1, 32, 32, batch=2, mask=pf.PrefixLM(lengths(50, 0)), config=TURNS,
        allowed=lambda q, k: (k <= q) | (k < below(50, 0)),
    ),
    "f16-value-dim-192": Case(
        70, 90, 1, 1, 128, 192, dtype=jnp.float16, mask=pf.Causal(), allowed=causal
    ),
    "d192-value-dim-128-gqa": Case(80, 60, 2, 1, 192, 128),
    "d256-causal": Case(200, 70, 1, 1, 256, 256, mask=pf.Causal(), allowed=causal),
    "d256-blocks-of-80": Case(70, 170, 1, 1, 256, 256, config={"block_kv": 80}),
    "d200-blocks-of-80-causal": Case(
        130, 170, 1, 1, 200, 256, mask=pf.Causal(), allowed=causal,
        config={"block_kv": 80, "takes_turns": True},
    ),
    "value-dim-192-growing-maxima": Case(
        130, 201, 1, 1, 192, 192, scale=0.3, mask=pf.Causal("bottom_right"),
        config={"block_kv": 32}, allowed=lambda q, k: k <= q + 201 - 130,
    ),
    "d192-blocks-of-96": Case(70, 201, 2, 1, 192, 192, config={"block_kv": 96}),
    "d96-blocks-of-48": Case(70, 130, 1, 1, 96, 96, config={"block_kv": 48}),
    "value-dim-32-blocks-of-80-causal": Case(
        90, 171, 1, 1, 64, 32, mask=pf.Causal("bottom_right"), config={"block_kv": 80},
        allowed=lambda q, k: k <= q + 171 - 90,
    ),
    "one-stage": Case(70, 170, 1, 1, 64, 64, config={"num_stages": 1, "block_kv": 64}),
    "four-stages-without-turns": Case(
        70, 333, 1, 1, 64, 64, config={"num_stages": 4, "block_kv": 32, "takes_turns": False}
    ),
    "negative-scale": Case(
        40, 70, 1, 1, 32, 32, scale=-0.4, mask=pf.Causal(), allowed=causal, config={"block_kv": 16}
    ),
    "scale-zero": Case(9, 70, 1, 1, 32, 32, scale=0.0, mask=pf.Causal(), allowed=causal),
    "groups-of-heads": Case(70, 20, 5, 1, 16, 16, batch=2, config={"heads_per_group": 4}),
}  # fmt: skip
# Each kind of configuration, with each of what its schedule and its copies may have to do.
QUICK = [
    "odd-lengths-d64-causal",
    "odd-lengths-d128-gqa",
    "few-rows-d72",
    "gqa-d40-stages-reused",
    "three-warpgroups-causal",
    "window-value-dim-32",
    "causal-and-lengths-gqa",
    "f16-value-dim-192",
    "d256-causal",
    "value-dim-192-growing-maxima",
    "one-stage",
    "groups-of-heads",
]


# Keys that no query attends to, some of them in a block that is visited.
WITH_PADDING = ["causal-and-lengths-gqa", "lengths-of-groups-of-rows", "more-keys-causal"]
WITH_PADDING += ["not-causal-or-window"]


class Problem(NamedTuple):
    """Arrays of a case, and where it allows attention [B, 1, Tq, Tkv]."""

    spec: AttentionSpec
    config: hopper.Config
    operands: Operands
    allowed: np.ndarray


@pytest.fixture(autouse=True)
def one_block_for_all_tiles(monkeypatch):
    """Small problems would give every tile a block of its own."""
    monkeypatch.setattr(assignment, "NUM_BLOCKS", 1)


def arrays(p: Problem) -> Any:
    return p.operands.q, p.operands.k, p.operands.v


def problem(case: Case) -> Problem:
    rng = np.random.default_rng(0)
    shapes = case.shapes()
    q, k, v = (jnp.asarray(rng.normal(size=shapes[name]), case.dtype) for name in "qkv")
    operands = Operands(q, k, v, case.bound_mask())
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    spec = AttentionSpec.of(operands, scale)
    config = hopper.default_config(spec)
    tiles = dataclasses.replace(config.forward, **(case.config or {}))
    return Problem(spec, dataclasses.replace(config, forward=tiles), operands, case.allows())


def interpret(p: Problem) -> Any:
    """(out, lse) of the kernel in interpret mode, and whether it raced."""
    run = jax.jit(lambda operands: hopper.BACKEND.forward(p.spec, p.config, operands))
    return with_races(run, p.operands)


def truth(p: Problem) -> Any:
    """out and lse in float64."""
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(x, np.float64)) for x in arrays(p))
        attention = jax.jit(functools.partial(oracle.attention, scale=p.spec.scale))
        return jax.device_get(attention(q, k, v, allowed=p.allowed))


def plain(p: Problem) -> Any:
    """out of plain attention in the low precision."""
    return oracle.plain_attention_with_lse(*arrays(p), p.allowed, p.spec.scale)[0]


@interpreted
@pytest.mark.parametrize("name", with_quick(CASES, QUICK))
def test_out_and_lse_match_the_oracle_without_races(name):
    p = problem(CASES[name])
    (out, lse), has_raced = interpret(p)
    true_out, true_lse = truth(p)
    assert not has_raced
    assert out.dtype == p.spec.dtype and lse.dtype == jnp.float32
    assert lse.shape == true_lse.shape
    assert_as_good_as_plain(out, plain(p), true_out, "out", factor=2.0)
    empty = np.isinf(true_lse)
    np.testing.assert_array_equal(np.asarray(lse)[empty], -np.inf)
    np.testing.assert_allclose(np.asarray(lse)[~empty], true_lse[~empty], rtol=0, atol=5e-6)
    assert (np.asarray(out).swapaxes(1, 2)[empty] == 0).all()


@interpreted
@pytest.mark.parametrize("name", WITH_PADDING)
def test_nan_in_padding_does_not_leak(name):
    p = problem(CASES[name])
    clean, _ = interpret(p)
    rows, keys = p.allowed[:, 0].any(2), p.allowed[:, 0].any(1)

    def poison(x, used):
        return jnp.where(used[..., None, None], x, jnp.nan)

    q, k, v = arrays(p)
    dirty, has_raced = interpret(
        p._replace(
            operands=Operands(poison(q, rows), poison(k, keys), poison(v, keys), p.operands.mask)
        )
    )
    assert not has_raced
    assert not keys.all()
    for a, b in zip(dirty, clean, strict=True):
        assert (a == b).all()


@interpreted
def test_nan_stays_in_its_batch_row_and_head():
    p = problem(Case(70, 70, 2, 2, 16, 16, batch=2))
    (clean, clean_lse), _ = interpret(p)
    q, k, v = arrays(p)
    spoilt = p._replace(operands=Operands(q, k, v.at[0, 69, 1].set(jnp.nan)))
    (out, lse), _ = interpret(spoilt)
    expected = clean.at[0, :, 1].set(jnp.nan)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(expected, np.float32))
    assert (lse == clean_lse).all()


# ---------------------------------------------------------------------------------------------
# Mutations: the kernel without one of its waits or fences must be caught.


@functools.cache
def mutation_problem(copies: str) -> Problem:
    """Several tiles that reuse their stages, with masked and unmasked blocks.

    copies: how arrays of its lengths are copied. Turns are for speed: it takes none.
    """
    config = {"num_warpgroups": 2, "block_kv": 16, "takes_turns": False}
    q_len, kv_len, dim = {"whole": (104, 80, 16), "in-pieces": (101, 83, 48)}[copies]
    mask = pf.Causal("bottom_right")
    return problem(Case(q_len, kv_len, 3, 1, dim, dim, mask=mask, config=config))


def put_in_kernel(patch: pytest.MonkeyPatch, calls: WithoutCall) -> None:
    """Puts `calls` in place of ``plgpu`` where the kernel's body is."""
    for module in (forward_load, forward_compute):
        patch.setattr(module, "plgpu", calls)


def callers(name: str) -> list[str]:
    """The functions that call ``plgpu.name`` while the kernel is traced."""
    recorder = WithoutCall(name)
    with pytest.MonkeyPatch.context() as patch:
        put_in_kernel(patch, recorder)
        p = mutation_problem("whole")
        jax.eval_shape(lambda o: forward(p.spec, p.config, o), p.operands)
    return recorder.callers


both_copies = pytest.mark.parametrize("copies", ["whole", "in-pieces"])
GUARDS = [
    (name, i)
    for name in ("barrier_wait", "commit_smem", "wait_smem_to_gmem")
    for i, caller in enumerate(callers(name))
    # The producer's last waits are there for interpret mode only, and it takes TMA for one thread:
    # who has waited for the next tile's queries would know that the stores before have been read.
    if caller != "load.<locals>._" and (name, caller) != ("wait_smem_to_gmem", "_finish")
]


@both_copies
def test_the_kernel_that_is_mutated_below_has_no_races(copies):
    assert not interpret(mutation_problem(copies))[1]


@interpreted
@both_copies
@pytest.mark.parametrize(("name", "index"), GUARDS)
def test_a_missing_wait_or_fence_is_caught(monkeypatch, name, index, copies):
    put_in_kernel(monkeypatch, WithoutCall(name, index))
    p = mutation_problem(copies)
    assert is_caught(jax.jit(lambda o: forward(p.spec, p.config, o)), p.operands)


@interpreted
def test_a_tile_that_is_taken_before_all_its_pieces_are_there_is_caught(monkeypatch):
    monkeypatch.setattr(forward_storage, "num_copies", lambda *_: 1)
    p = mutation_problem("in-pieces")
    assert is_caught(jax.jit(lambda o: forward(p.spec, p.config, o)), p.operands)


@interpreted
@pytest.mark.parametrize("commits", [True, False])
def test_a_missing_fence_behind_the_matrices_of_a_mask_is_caught(monkeypatch, commits):
    if not commits:
        monkeypatch.setattr(forward_compute.Part, "reads_smem", False)
    mask = pf.DenseMask(jnp.ones((1, 1, 70, 150), bool))
    p = problem(Case(70, 150, 1, 1, 16, 16, mask=mask, config=TURNS))
    run = jax.jit(lambda o: forward(p.spec, p.config, o))
    assert is_caught(run, p.operands) != commits


@interpreted
@pytest.mark.parametrize("released_early", [False, True])
def test_a_stage_released_while_a_product_reads_it_is_caught(released_early):
    def two_products(x_gmem, out_gmem, x_smem, out_smem, ready, free):
        @pl.when(jax.lax.axis_index("wg") == 0)
        def _():
            for _ in range(2):
                plgpu.barrier_wait(ready)

                def product(acc):
                    plgpu.wgmma(acc, x_smem, x_smem.transpose((1, 0)))
                    if released_early:
                        plgpu.barrier_arrive(free)
                    square = load_accumulator(acc, wait_n=0)
                    if not released_early:
                        plgpu.barrier_arrive(free)
                    return square

                square = pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))
            out_smem[...] = square.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(jax.lax.axis_index("wg") == 1)
        def _():
            for i in range(2):
                plgpu.copy_gmem_to_smem(x_gmem.at[i], x_smem, ready)
                plgpu.barrier_wait(free)

    tile = tiled((64, 64), jnp.bfloat16, 64)
    kernel = plgpu.kernel(
        two_products,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),
        num_threads=2,
        thread_name="wg",
        scratch_types=(tile, tile, plgpu.Barrier(), plgpu.Barrier()),
    )
    x = jnp.ones((2, 64, 64), jnp.bfloat16)
    assert is_caught(jax.jit(kernel), x) == released_early
