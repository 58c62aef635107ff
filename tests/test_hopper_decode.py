"""The Hopper decode kernel: its real body in interpret mode, mutations of it, and its lowering."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from interpreted import interpreted, is_caught, with_races
from mutations import WithoutCall
from pallas_flash.backends.hopper import (
    decode,
    decode_compute,
    decode_load,
    decode_share,
    decode_storage,
)
from pallas_flash.backends.hopper.decode_storage import default_decode_config
from pallas_flash.backends.hopper.storage import SHARED_MEMORY_LIMIT
from pallas_flash.decoding.request import DecodeOperands, DecodeSpec
from tolerance import assert_as_good_as_plain

pytestmark = pytest.mark.usefixtures("shim")


# Teams end inside of rows, rows inside of teams, and stages are used again.
TWO = {"num_stages": 2, "num_teams": 2}


class Case(NamedTuple):
    """lengths: tokens of each row, the new ones included; counts: new ones, None for all."""

    lengths: tuple[int, ...]
    q_len: int = 1
    num_q_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 16
    value_dim: int = 16
    max_len: int = 300
    counts: tuple[int, ...] | None = None
    window: int | None = None
    page_size: int | None = None
    dtype: Any = jnp.bfloat16
    softcap: float | None = None
    config: Any = TWO


CASES = {
    "rows-of-any-length-two-kv-heads": Case((200, 1, 0, 70), num_kv_heads=2),
    "more-teams-than-work": Case((70, 3), config={"num_stages": 2, "num_teams": 9}),
    "mqa-d128-several-queries": Case((150,), 3, 5, 1, 128, 64),
    "mha-f16-ragged-queries": Case((140, 5), 4, 1, 1, 40, 40, counts=(4, 1),
                                   dtype=jnp.float16),
    "window": Case((300, 7), 2, window=70),
    "ring": Case((500, 7), 2, window=70, max_len=600),
    "pages-of-16-softcap": Case((130, 1), page_size=16, softcap=0.7),
    "pages-of-128": Case((200,), 2, page_size=128),
}  # fmt: skip


class Problem(NamedTuple):
    spec: DecodeSpec
    config: Any
    operands: DecodeOperands
    # Of the whole sequences: k and v [B, longest, Hkv, D], and where the queries attend.
    k: jax.Array
    v: jax.Array
    allowed: np.ndarray


def problem(case: Case) -> Problem:
    rng = np.random.default_rng(0)
    batch, longest = len(case.lengths), max(case.lengths)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), case.dtype)

    q = normal(batch, case.q_len, case.num_q_heads, case.head_dim)
    k = normal(batch, longest, case.num_kv_heads, case.head_dim)
    v = normal(batch, longest, case.num_kv_heads, case.value_dim)
    sizes = (batch, case.max_len, case.num_kv_heads, case.head_dim, case.dtype)
    if case.page_size is None:
        cache = pf.KVCache.create(
            *sizes, value_dim=case.value_dim, window=case.window, max_queries=8
        )
    else:
        cache = pf.PagedKVCache.create(
            *sizes,
            value_dim=case.value_dim,
            page_size=case.page_size,
            num_pages=sum(-(-n // case.page_size) for n in case.lengths) + 1,
        )
        # Rows that grow in turns have no pages in a row.
        for part in (3, 2, 1):
            cache = cache.reserve(np.array(case.lengths) // part)
    poison = lambda x: jnp.full_like(x, jnp.nan)  # noqa: E731
    if case.page_size is None:
        cache = dataclasses.replace(cache, k=poison(cache.k), v=poison(cache.v))
    else:
        cache = dataclasses.replace(
            cache, k_pages=poison(cache.k_pages), v_pages=poison(cache.v_pages)
        )
    lengths = np.array(case.lengths)
    cache = jax.jit(lambda cache, k, v: cache.append(k, v, jnp.asarray(lengths)))(cache, k, v)
    counts = np.minimum(lengths, case.q_len if case.counts is None else np.array(case.counts))
    score_mod = None if case.softcap is None else pf.Softcap(case.softcap)
    operands = DecodeOperands(q, jnp.asarray(counts, jnp.int32), cache, None, score_mod)
    spec = DecodeSpec.of(operands, case.head_dim**-0.5)
    config = dataclasses.replace(default_decode_config(spec), **case.config)
    i = np.arange(case.q_len)
    q_pos = ((lengths - counts)[:, None] + i)[:, None, :, None]
    kv_pos = np.arange(longest)
    allowed = (kv_pos <= q_pos) & (kv_pos > q_pos - (case.window or longest + 1))
    allowed &= (i < counts[:, None])[:, None, :, None]
    return Problem(spec, config, operands, k, v, allowed)


def interpret(p: Problem) -> Any:
    """(out, lse) of the kernel in interpret mode, and whether it raced."""
    return with_races(jax.jit(lambda o: decode.forward(p.spec, p.config, o)), p.operands)


def changed(p: Problem, s: Any) -> Any:
    """Scores after the score mod."""
    cap = p.spec.score_mod and p.spec.score_mod.cap
    return s if cap is None else cap * jnp.tanh(s / cap)


def truth(p: Problem) -> Any:
    """out and lse in float64, by NumPy: nothing to compile."""
    q, k, v = (np.asarray(x, np.float64) for x in (p.operands.q, p.k, p.v))
    k, v = (np.repeat(x, p.spec.group, axis=2) for x in (k, v))
    s = changed(p, np.einsum("bthd,bshd->bhts", q, k) * p.spec.scale)
    weights = np.where(p.allowed, np.exp(s), 0.0)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total)[..., 0]
    return np.einsum("bhts,bshd->bthd", weights / np.where(total, total, 1.0), v), lse


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_out_and_lse_match_the_oracle_without_races(name):
    p = problem(CASES[name])
    (out, lse), has_raced = interpret(p)
    assert not has_raced
    true_out, true_lse = truth(p)
    plain = jax.jit(
        functools.partial(oracle.plain_attention_with_lse, change=functools.partial(changed, p))
    )(p.operands.q, p.k, p.v, p.allowed)[0]
    real = np.arange(out.shape[1]) < np.asarray(p.operands.counts)[:, None]
    out = jnp.where(real[..., None, None], out, 0)
    assert_as_good_as_plain(out, plain, true_out, "out", factor=2.0)
    real = np.broadcast_to(real[:, None], lse.shape)
    np.testing.assert_allclose(np.asarray(lse)[real], true_lse[real], rtol=0, atol=5e-6)


@interpreted
def test_nan_stays_in_its_row():
    p = problem(Case((70, 3)))
    (clean, _), _ = interpret(p)
    cache = p.operands.cache
    spoilt = dataclasses.replace(cache, v=cache.v.at[0, 69].set(jnp.nan))
    (out, _), _ = interpret(p._replace(operands=dataclasses.replace(p.operands, cache=spoilt)))
    assert np.isnan(out[0]).all()
    assert (out[1] == clean[1]).all()


# ---------------------------------------------------------------------------------------------
# How the work is shared out


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_teams", [1, 5, 40])
def test_teams_have_equal_shares_of_all_key_blocks(num_teams, window):
    lengths = np.array([1000, 0, 1, 64, 65, 700, 0], np.int32)
    spec = problem(Case((1,) * 7, max_len=1000, window=window)).spec
    # A window in a cache with room for all.
    cache = dataclasses.replace(spec.cache, k=jax.ShapeDtypeStruct((7, 1000, 1, 16), jnp.bfloat16))
    spec = dataclasses.replace(spec, cache=cache)
    share = jax.device_get(decode_share.share_out(spec, num_teams, lengths, 1))
    first, last = jax.device_get(decode_share.key_blocks(spec, lengths, lengths - 1))
    assert (last - first).sum() == (31 if window is None else 8)
    work = jax.device_get(decode_share.row_work(first, last))
    total = work.sum()
    assert share.ends[-1] == total == (last - first).sum() + 5 * decode_share.ROW_WORK
    row_of, pieces = np.repeat(np.arange(7), work), np.arange(total)
    teams = np.asarray(decode_share.team_of(pieces, total, num_teams))
    sizes = np.bincount(teams, minlength=num_teams)
    assert (np.diff(teams) >= 0).all() and sizes.max() <= -(-total // num_teams)
    assert sizes.min() >= total // num_teams
    begins = np.asarray(decode_share.share_begin(np.arange(num_teams + 1), total, num_teams))
    np.testing.assert_array_equal(begins, [0, *np.cumsum(sizes)])
    for team in np.unique(teams):
        assert share.first_rows[team] == row_of[teams == team][0]
    # A part for each team and row that meet.
    parts = set(zip(teams, row_of))
    assert len({team + row for team, row in parts}) == len(parts)


# ---------------------------------------------------------------------------------------------
# Mutations: the kernel without one of its waits or fences must be caught.


@functools.cache
def mutation_problem() -> Problem:
    """Two rows in one team, with stages that are used again."""
    return problem(Case((260, 3), config={"num_stages": 2, "num_teams": 1}))


def launch(p: Problem, operands: DecodeOperands) -> Any:
    """The kernel without the one that joins parts."""
    lengths, counts = operands.cache.lengths, operands.counts
    share = decode_share.share_out(p.spec, p.config.num_teams, lengths, counts)
    return decode._launch(p.spec, p.config, decode._inputs(p.spec, operands, share))


def put_in_kernel(patch: pytest.MonkeyPatch, calls: WithoutCall) -> None:
    """Puts `calls` in place of ``plgpu`` where the kernel's body is."""
    for module in (decode_load, decode_compute):
        patch.setattr(module, "plgpu", calls)


def callers(name: str) -> list[str]:
    """The functions that call ``plgpu.name`` while the kernel is traced."""
    recorder = WithoutCall(name)
    with pytest.MonkeyPatch.context() as patch:
        put_in_kernel(patch, recorder)
        p = mutation_problem()
        jax.eval_shape(functools.partial(launch, p), p.operands)
    return recorder.callers


GUARDS = [
    (name, i)
    for name in ("barrier_wait", "commit_smem", "wait_smem_to_gmem")
    for i, caller in enumerate(callers(name))
    # The producer's last waits are there for interpret mode only, and what a thread has stored
    # itself never counts as a race there.
    if caller != "load.<locals>._" and (name, caller) != ("commit_smem", "_zero_unused")
]


@interpreted
@pytest.mark.parametrize(("name", "index"), GUARDS)
def test_a_missing_wait_or_fence_is_caught(monkeypatch, name, index):
    put_in_kernel(monkeypatch, WithoutCall(name, index))
    p = mutation_problem()
    assert is_caught(jax.jit(functools.partial(launch, p)), p.operands)


# ---------------------------------------------------------------------------------------------
# Lowering


def described(head_dim: int, value_dim: int, q_len: int = 1, **options: Any) -> DecodeOperands:
    """Shapes of a problem, for lowering."""
    make = pf.PagedKVCache.create if "num_pages" in options else pf.KVCache.create
    cache = jax.eval_shape(
        lambda: make(3, 500, 2, head_dim, jnp.bfloat16, value_dim=value_dim, **options)
    )
    q = jax.ShapeDtypeStruct((3, q_len, 8, head_dim), jnp.bfloat16)
    return DecodeOperands(q, jax.ShapeDtypeStruct((3,), jnp.int32), cache)


def lowers(operands: DecodeOperands, **changes: Any) -> bool:
    spec = DecodeSpec.of(operands, 0.1)
    assert decode_storage.unsupported(spec) is None
    config = dataclasses.replace(default_decode_config(spec), **changes)
    assert config.shared_memory_bytes(spec) <= SHARED_MEMORY_LIMIT
    traced = jax.jit(lambda o: decode.forward(spec, config, o)).trace(operands)
    return "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.quick
@pytest.mark.parametrize("head_dim", [16, 40, 80, 128, 256])
def test_head_dims_lower_for_cuda(head_dim):
    assert lowers(described(head_dim, head_dim))


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "options"),
    [
        (192, 128, {"q_len": 16}),
        (64, 256, {"window": 30}),
        (128, 128, {"window": 600, "q_len": 3}),
        (128, 128, {"num_pages": 9, "page_size": 16}),
        (128, 64, {"num_pages": 9, "page_size": 192}),
    ],
)
def test_variants_lower_for_cuda(head_dim, value_dim, options):
    assert lowers(described(head_dim, value_dim, **options))


UNSERVED = {
    "head_dim=72 must be a multiple of 8": described(72, 64),
    "value_dim=264": described(64, 264),
    "17 queries of 4 heads": described(64, 64, 17),
    "page_size=48": described(64, 64, num_pages=9, page_size=48),
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_what_the_kernel_does_not_serve_has_a_reason(reason):
    assert reason in decode_storage.unsupported(DecodeSpec.of(UNSERVED[reason], 0.1))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("num_stages", 0, "must be at least 1"),
        ("num_teams", 0, "must be at least 1"),
    ],
)
def test_wrong_configurations_are_refused(field, value, rule):
    good = default_decode_config(DecodeSpec.of(described(64, 64), 0.1))
    with pytest.raises(ValueError, match=f"{field}={value} {rule}"):
        dataclasses.replace(good, **{field: value})
