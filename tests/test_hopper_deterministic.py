"""The Hopper backward with `deterministic`: dQ is as exact, and the same in any order of blocks."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import MASKS, Sizes, normal
from interpreted import interpreted, with_races
from pallas_flash import dispatch
from pallas_flash.backends import hopper
from pallas_flash.backends.hopper import (
    backward,
    dq_fixed_point,
    dq_fragments,
)
from pallas_flash.spec import AttentionSpec, Operands, make_request
from pallas_flash.tuning import table
from term_cases import KEY, SCORES, Case, attention, inputs

pytestmark = pytest.mark.usefixtures("shim")

CASES = {
    "d64-gqa-causal-lengths": Case(
        "causal-and-lengths", sizes=Sizes(2, 150, 140, 2, 1, 64, 64)
    ),
    "d64-softcap-dropout": Case("causal", "softcap", 0.3, Sizes(1, 130, 200, 2, 2, 64, 32)),
    "d128": Case(sizes=Sizes(1, 100, 300, 1, 1, 128, 128)),
    "d128-gqa-alibi-segments-dropout": Case(
        "causal-segments", "alibi", 0.2, Sizes(1, 140, 140, 2, 1, 128, 128)
    ),
    "d256-gqa-causal-lengths": Case(
        "causal-and-lengths", sizes=Sizes(2, 70, 140, 2, 1, 256, 256)
    ),
    "d256-softcap-then-bias-dropout": Case(
        "none", "softcap-then-bias", 0.3, Sizes(1, 70, 100, 1, 1, 256, 200)
    ),
}  # fmt: skip
# Of each way to add dQ to memory: by columns, by rows, from registers.
ORDERS = {
    "d64": Case("causal-bottom-right", sizes=Sizes(1, 140, 390, 2, 1, 64, 64)),
    "d128": Case(sizes=Sizes(1, 64, 390, 1, 1, 128, 128)),
    "d256": Case("causal-bottom-right", sizes=Sizes(1, 70, 200, 2, 1, 256, 256)),
}


class Problem(NamedTuple):
    """A case with what the backward gets, and the oracle's gradient of q."""

    spec: AttentionSpec
    operands: Operands
    residuals: tuple[Any, Any, Any]
    dq: Any


def problem(case: Case, dtype: Any = jnp.bfloat16) -> Problem:
    """The rows of dO and dlse are of any size between 1e-6 and 1e3."""
    score, (mask, allowed) = SCORES[case.score](case.sizes), MASKS[case.mask](case.sizes)
    arrays, (dout, dlse) = inputs(case.sizes, score)
    sizes = 10.0 ** jax.random.uniform(jax.random.key(1), dlse.shape, minval=-6, maxval=3)
    dlse = dlse * sizes
    dout = (dout * sizes.swapaxes(1, 2)[..., None]).astype(dtype)
    qkv, array = [x.astype(dtype) for x in arrays[:3]], arrays[3]
    allowed = np.broadcast_to(
        True if allowed is None else allowed, (*dlse.shape, case.sizes.kv_len)
    )
    exact = attention(oracle.attention, case, allowed, score)
    (out, lse), found = oracle.with_gradients([*qkv, array], (dout, dlse), exact)
    lse = jnp.where(allowed.any(-1), jnp.asarray(lse, jnp.float32), -jnp.inf)
    dropout = pf.Dropout(case.rate, KEY) if case.rate else None
    request = make_request(
        *qkv, mask=mask, score_mod=score.make(array), scale=None, dropout=dropout
    )
    spec = AttentionSpec.of(request.operands, request.scale, deterministic=True)
    residuals = jnp.asarray(out, dtype), lse, dout, dlse
    return Problem(spec, request.operands, residuals, np.asarray(found[0]))


def gradients(p: Problem, deterministic: bool = True) -> Any:
    """dq, dk, dv and those of arrays, from the kernel in interpret mode without a race."""
    spec = dataclasses.replace(p.spec, deterministic=deterministic)
    assert hopper.unsupported(spec) is None
    config = hopper.default_config(spec)
    # A kernel for dQ is deterministic as it is.
    of_sums = dataclasses.replace(config.backward, has_dq_kernel=False)
    config = dataclasses.replace(config, backward=of_sums)
    run = jax.jit(lambda operands, *x: hopper.BACKEND.backward(spec, config, operands, *x))
    results, has_raced = with_races(run, p.operands, *p.residuals)
    assert not has_raced
    return jax.tree.map(np.asarray, results)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_every_row_of_dq_is_as_exact_as_by_floats(name):
    p = problem(CASES[name])
    fixed, floats = gradients(p), gradients(p, deterministic=False)
    for a, b in zip(jax.tree.leaves(fixed[1:]), jax.tree.leaves(floats[1:]), strict=True):
        assert (a == b).all()
    errors = [np.abs(x[0].astype(np.float64) - p.dq).max(-1) for x in (fixed, floats)]
    largest = np.abs(p.dq).max(-1)
    assert largest[largest > 0].min() < 1e-4 * largest.max()
    # Where a number lies between two of bfloat16, either may be chosen.
    assert (errors[0] <= errors[1] + 2.0**-14 * largest).all()
    assert (fixed[0][largest == 0] == 0).all()


@interpreted
@pytest.mark.parametrize("name", ORDERS)
def test_sums_of_integers_are_the_same_in_any_order_of_blocks(monkeypatch, name):
    p = problem(ORDERS[name])
    in_order = backward.locate

    def reversed_order(index, num_tiles, num_heads, heads_per_group):
        last = num_tiles * num_heads - 1
        return in_order(last - index, num_tiles, num_heads, heads_per_group)

    monkeypatch.setattr(dq_fragments, "dq_of_sum", lambda spec, config, dq_sum, factors: dq_sum)
    sums: dict[bool, list[Any]] = {True: [], False: []}
    for order in (in_order, reversed_order):
        monkeypatch.setattr(backward, "locate", order)
        for deterministic, found in sums.items():
            found.append(gradients(p, deterministic)[0])
    assert sums[True][0].dtype == np.int32
    assert (sums[True][0] == sums[True][1]).all()
    assert (sums[False][0] != sums[False][1]).any()


def test_factors_leave_room_for_every_sum_and_no_more():
    """Also where a row's gradient is as large as the bound, and at both ends of float32."""
    operands = Operands(*(normal(i, 1, 20, 2, 16, dtype=jnp.bfloat16) for i in range(3)))
    spec = AttentionSpec.of(operands, 0.25, deterministic=True)
    row = jnp.zeros((1, 2, 20))
    limit = jnp.abs(operands.k.astype(jnp.float32)).max((1, 3))[..., None]
    no_dout = jnp.zeros((1, 20, 2, 16), jnp.bfloat16)
    for size in (1e-24, 3e-6, 1.0, 2.0**20, 1e30):
        delta = size * normal(7, 1, 2, 20)
        factors = dq_fixed_point.factors(spec, operands, row, delta, no_dout)
        largest = np.asarray(jnp.abs(delta) * limit * factors)
        assert (largest >= 2.0**29).all() and (largest < 2.0**30).all()
        assert (np.asarray(factors * dq_fixed_point.units(factors)) == 1).all()
    for delta, expected in (
        (0.0, 2.0**126),
        (1e-38, 2.0**126),
        (2e38, jnp.nan),
        (jnp.nan, jnp.nan),
    ):
        factors = dq_fixed_point.factors(spec, operands, row, row + delta, no_dout)
        np.testing.assert_array_equal(factors, np.full_like(factors, expected))
    dout = normal(5, 1, 20, 2, 16, dtype=jnp.bfloat16)
    v_times_dout = jnp.einsum(
        "btnd,bsnd->bnts", dout, operands.v, preferred_element_type=jnp.float32
    )
    factors = dq_fixed_point.factors(spec, operands, row, row, dout)
    assert (jnp.abs(v_times_dout).max(-1) * limit * factors < 2.0**30).all()


@interpreted
def test_what_is_not_finite_stays_so_in_its_rows_and_heads():
    p = problem(Case(sizes=Sizes(1, 40, 30, 4, 2, 32, 32)))
    clean = gradients(p)[0]
    q, k, v, (out, lse, dout, dlse) = p.operands.q, p.operands.k, p.operands.v, p.residuals
    dirty = p._replace(
        operands=Operands(q.at[0, 3, 0, 5].set(jnp.nan), k.at[0, 7, 1, 2].set(jnp.inf), v),
        residuals=(
            out,
            lse.at[0, 0, 3].set(jnp.nan).at[0, 1, 9].set(jnp.inf),
            dout.at[0, 5, 1, 0].set(jnp.inf),
            dlse.at[0, 0, 3].set(jnp.nan).at[0, 1, 5].set(jnp.inf),
        ),
    )
    expected = clean.copy()
    for row, head in ((3, 0), (5, 1), (9, 1)):
        expected[0, row, head] = np.nan
    # Whoever attends to the infinite key, which is everyone.
    expected[:, :, 2:] = np.nan
    np.testing.assert_array_equal(np.float32(gradients(dirty)[0]), np.float32(expected))


@interpreted
@pytest.mark.parametrize(
    ("mask", "fill"),
    [
        ("causal-and-lengths", 1e30),
        ("causal-and-lengths", jnp.nan),
        # It does not tell which keys nobody attends to.
        ("dense-keys-and-causal", jnp.nan),
    ],
)
def test_padding_does_not_count(mask, fill):
    """Large numbers would make the units of all others too large."""
    case = Case(mask, sizes=Sizes(3, 40, 30, 2, 1, 32, 32))
    p, allowed = problem(case), np.broadcast_to(MASKS[mask](case.sizes)[1], (3, 1, 40, 30))
    clean, rows, keys = gradients(p), allowed[:, 0].any(2), allowed[:, 0].any(1)
    padded = lambda x, used: jnp.where(used[..., None, None], x, fill).astype(x.dtype)  # noqa: E731
    (out, lse, dout, dlse), of = p.residuals, p.operands
    dirty = gradients(
        p._replace(
            operands=dataclasses.replace(
                of, q=padded(of.q, rows), k=padded(of.k, keys), v=padded(of.v, keys)
            ),
            residuals=(out, lse, padded(dout, rows), dlse),
        )
    )
    assert not keys.all()
    for a, b in zip(dirty[:3], clean[:3], strict=True):
        assert (a == b).all()
    assert (dirty[0][~rows] == 0).all() and (dirty[0][rows] != 0).any()


@interpreted
def test_what_float16_cannot_hold_is_no_number():
    p = problem(Case(sizes=Sizes(1, 40, 30, 2, 2, 32, 32)), jnp.float16)
    out, lse, dout, dlse = p.residuals
    p = p._replace(residuals=(out, lse * 0, dout, dlse.at[0, 0, 3].set(1e9)))
    fixed, floats = gradients(p)[0], gradients(p, deterministic=False)[0]
    assert not np.isfinite(floats[0, 3, 0]).any()
    assert np.isnan(fixed[0, :, 0]).all() and np.isfinite(fixed[0, :, 1]).all()


# ---------------------------------------------------------------------------------------------
# What is asked for and refused.

Q, K, V = (normal(i, 1, 32, 2, 32, dtype=jnp.bfloat16) for i in range(3))
ANY_ORDER = "along queries or distances .* are added up in any order"
# A score mod, and the reason why its gradients are not deterministic.
SCORE_MODS = {
    "bias": (pf.Bias(jnp.ones((32, 32))), r"\(Bias.array\)"),
    "bias-of-queries": (pf.Bias(jnp.ones((32, 1))), ANY_ORDER),
    "relative-bias": (pf.RelativeBias(jnp.ones((2, 8)), max_distance=20), ANY_ORDER),
    "distance-bias": (pf.DistanceBias(jnp.ones(63)), r"\(DistanceBias.values\)"),
    "function": (pf.ScoreFunction(lambda s, *_: s * s), "no bound of the score mod's derivative"),
    "softcap-and-function": (
        pf.Chain((pf.Softcap(2.0), pf.ScoreFunction(lambda s, *_: s * s))), "no bound",
    ),
    "softcap": (pf.Softcap(2.0), None),
    "alibi-and-bias-of-keys": (
        pf.Chain((pf.Alibi(jnp.ones(2)), pf.Bias(jnp.ones(32)), pf.Sink(jnp.ones(2)))), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORE_MODS)
def test_gradients_that_are_not_deterministic_are_refused(name):
    score_mod, reason = SCORE_MODS[name]

    def answer(deterministic):
        return pf.explain_backends(Q, K, V, score_mod=score_mod, deterministic=deterministic)

    usual, found = answer(False), answer(True)
    assert {**found, "hopper": None} == {**usual, "hopper": None}
    if reason is None:
        assert found == usual
        return
    with pytest.raises(ValueError, match=f"'hopper' cannot serve .* deterministic=True.*{reason}"):
        pf.flash_attention(Q, K, V, score_mod=score_mod, deterministic=True, backend="hopper")
    out = pf.flash_attention(Q, K, V, score_mod=score_mod, deterministic=True)
    assert jnp.isfinite(out).all()


def test_the_fallback_is_told_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "wrong_gpu", lambda b: None)
    monkeypatch.setattr(table, "_device_kind", lambda: None)
    mod = pf.Bias(jnp.ones((32, 32)))
    with pytest.warns(UserWarning, match=f"'blockwise', which is slower.*{ANY_ORDER}"):
        pf.flash_attention(Q, K, V, score_mod=mod, deterministic=True)


def test_deterministic_must_be_a_bool():
    for function in (pf.flash_attention, pf.explain_backends, pf.dot_product_attention):
        with pytest.raises(TypeError, match="deterministic must be True or False, got 1"):
            function(Q, K, V, deterministic=1)
    with pytest.raises(ValueError, match="jax.nn, which does not take deterministic"):
        pf.dot_product_attention(Q, K, V, deterministic=True, implementation="cudnn")


def test_every_way_to_a_gradient_is_told(monkeypatch):
    """Differentiated, mapped, rematerialised, split over devices, and within ``jax.nn``'s name."""
    told = []

    def run(direction, spec, *rest):
        told.append((direction, spec.deterministic))
        return original(direction, spec, *rest)

    original = dispatch.run
    monkeypatch.setattr(dispatch, "run", run)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))

    def gradient(attention, *arrays):
        loss = lambda *x: attention(*x, deterministic=True).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss)(*arrays)

    dense = functools.partial(gradient, pf.flash_attention)
    with jax.set_mesh(mesh):
        split = [jax.device_put(jnp.tile(x, (2, 1, 1, 1)), jax.P("batch")) for x in (Q, K, V)]
        jax.jit(dense)(*split)
    jax.jit(jax.vmap(dense))(*(x[None] for x in (Q, K, V)))
    jax.jit(dense)(Q[:, :20], K, V)
    jax.jit(jax.checkpoint(dense))(Q[:, :21], K, V)
    jax.jit(functools.partial(gradient, pf.dot_product_attention))(Q[:, :22], K, V)
    assert {direction for direction, _ in told} == {"forward", "backward"}
    assert sum(direction == "backward" for direction, _ in told) >= 5
    assert all(deterministic for _, deterministic in told)


@pytest.mark.quick
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic_gradients_lower_for_cuda(head_dim):
    q, k = (jax.ShapeDtypeStruct((1, 4104, n, head_dim), jnp.bfloat16) for n in (4, 2))
    attention = functools.partial(
        pf.flash_attention, mask=pf.Causal(), deterministic=True, backend="hopper"
    )
    both = jax.jit(lambda q, k, v: jax.vjp(attention, q, k, v)[1](q))
    text = both.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 3
