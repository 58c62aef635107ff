"""The Hopper decode kernel: its real body in interpret mode, mutations of it, and its lowering."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from interpreted import interpreted, with_races
from pallas_flash.backends.hopper import decode as module
from pallas_flash.backends.hopper.decode_storage import default_decode_config
from pallas_flash.decoding.request import DecodeOperands, DecodeSpec
from tolerance import assert_as_good_as_plain

pytestmark = pytest.mark.usefixtures("shim")


class Case(NamedTuple):
    """lengths: tokens of each row, the new ones included; counts: new ones, None for all."""

    lengths: tuple[int, ...]
    q_len: int = 1
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    max_len: int = 400
    counts: tuple[int, ...] | None = None
    window: int | None = None
    page_size: int | None = None
    dtype: Any = jnp.bfloat16
    config: Any = None


ONE = {"num_warpgroups": 1, "num_stages": 2, "num_teams": 3}
TWO = {"num_warpgroups": 2, "num_stages": 2, "num_teams": 2}
CASES = {
    "rows-of-any-length": Case((400, 1, 0, 130), config=TWO),
    "one-team": Case((70, 65), config=ONE | {"num_teams": 1}),
    "blocks-of-128": Case((300, 100), config=ONE | {"block_kv": 128}),
    "more-teams-than-blocks": Case((70, 3), config=ONE | {"num_teams": 5}),
    "mqa-d128-several-queries": Case((200, 66), 3, 5, 1, 128, 64, config=TWO),
    "mha-f16-ragged-queries": Case((200, 66, 5), 4, 2, 2, 40, 40, counts=(4, 1, 3),
                                   dtype=jnp.float16, config=ONE),
    "window": Case((400, 130, 7), 2, window=100, max_len=400, config=ONE),
    "ring": Case((2000, 300, 7), 2, window=100, max_len=4000, config=TWO),
    "pages-of-16": Case((400, 1, 130), page_size=16, config=TWO),
    "pages-of-128": Case((400, 70), 2, page_size=128, config=ONE),
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
            *sizes, value_dim=case.value_dim, page_size=case.page_size, num_pages=80
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
    operands = DecodeOperands(q, jnp.asarray(counts, jnp.int32), cache)
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
    return with_races(jax.jit(lambda o: module.forward(p.spec, p.config, o)), p.operands)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_out_and_lse_match_the_oracle_without_races(name):
    p = problem(CASES[name])
    (out, lse), has_raced = interpret(p)
    assert not has_raced
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x, np.float64)) for x in (p.operands.q, p.k, p.v))
        true_out, true_lse = jax.device_get(oracle.attention(*wide, allowed=p.allowed))
    plain = oracle.plain_attention_with_lse(p.operands.q, p.k, p.v, p.allowed)[0]
    real = np.arange(out.shape[1]) < np.asarray(p.operands.counts)[:, None]
    out = jnp.where(real[..., None, None], out, 0)
    assert_as_good_as_plain(out, plain, true_out, "out", factor=2.0)
    real = np.broadcast_to(real[:, None], lse.shape)
    np.testing.assert_allclose(np.asarray(lse)[real], true_lse[real], rtol=0, atol=5e-6)
