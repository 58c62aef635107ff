"""Masks, score mods and dropout in the Hopper kernels: real bodies in interpret mode, lowering."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import pallas_flash as pf
from conftest import MASKS
from interpreted import interpreted, with_races
from pallas_flash.backends import hopper
from pallas_flash.backends.hopper import assignment
from pallas_flash.backends.hopper import config as hopper_config
from pallas_flash.spec import AttentionSpec, make_request
from pallas_flash.terms import floating
from term_cases import CASES, KEY, SCORES, Case, inputs, judge

pytestmark = pytest.mark.usefixtures("shim")


@pytest.fixture(autouse=True)
def one_block_for_all_tiles(monkeypatch):
    """Small problems would give every tile a block of its own."""
    monkeypatch.setattr(assignment, "NUM_BLOCKS", 1)


def by_kernels(case: Case, arrays: Any, cotangents: Any) -> Any:
    """out, lse and the gradients of q, k, v and the score's array, and whether there was a race."""
    *qkv, array = arrays
    score = SCORES[case.score](case.sizes)
    dropout = pf.Dropout(case.rate, KEY) if case.rate else None

    @jax.jit
    def run(array, dout, dlse):
        def bound(array):
            mask = MASKS[case.mask](case.sizes)[0]
            request = make_request(
                *qkv, mask=mask, score_mod=score.make(array), scale=None, dropout=dropout
            )
            return request.operands

        operands = bound(array)
        spec = AttentionSpec.of(operands, case.sizes.head_dim**-0.5)
        assert hopper.unsupported(spec) is None
        config = hopper.default_config(spec)
        out, lse = hopper.BACKEND.forward(spec, config, operands)
        dq, dk, dv, of_mod = hopper.BACKEND.backward(spec, config, operands, out, lse, dout, dlse)
        # From the arrays of the bound score mod to the one that it was made of.
        _, vjp = jax.vjp(lambda x: floating(bound(x).score_mod)[0], array)
        return out, jnp.where(lse == -jnp.inf, 0.0, lse), dq, dk, dv, *vjp(of_mod)

    return with_races(run, array, *cotangents)


# Of each kind of array one, and what the forward does not compute: gradients of functions.
WITH_DQ_KERNEL = (
    "causal-segments-of-wide-ids",
    "not-causal-or-dense",
    "shared-bias-and-keys",
    "far-relative-bias-causal-chain",
    "dropout-segments-bias",
    "wide-softcap-dropout-segments",
    "wide-arrays-of-every-kind",
    "function",
    "function-of-queries",
)


@interpreted
@pytest.mark.parametrize(
    ("name", "has_dq_kernel"),
    [*((name, False) for name in CASES), *((name, True) for name in WITH_DQ_KERNEL)],
)
def test_values_and_gradients_match_the_oracle_without_races(monkeypatch, name, has_dq_kernel):
    monkeypatch.setattr(hopper_config, "MOST_KEYS_OF_DQ_KERNEL", 1024 if has_dq_kernel else 0)
    case = CASES[name]
    arrays, cotangents = inputs(case.sizes, SCORES[case.score](case.sizes))
    ours, has_raced = by_kernels(case, arrays, cotangents)
    assert not has_raced
    judge(case, ours)
