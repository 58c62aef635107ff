"""How dense attention is differentiated: residuals, delta, names for rematerialisation.

Source: FlashAttention-2 (Dao 2023), sections 2.2 and 3.1. With ``P = exp(S - lse)`` and
``delta = rowsum(out * dout) - dlse`` the gradient of the logits is ``dS = P * (dP - delta)``; the
term ``- dlse`` is all that a differentiable lse takes.

Forward and backward are tied by a ``custom_vjp``, which `both_modes` lets JAX differentiate
forward as well. Tangents, and the derivatives of the backward, are those of the tiles' sums
``drop(P) V`` and ``rowsum(P)`` at a known lse: in plain JAX, of any order (`tile_sums`).
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_flash import dispatch, tile_sums
from pallas_flash.linear_map import both_modes
from pallas_flash.parallel import distributed
from pallas_flash.spec import LSE_AXES, OUT_AXES, AttentionSpec, Operands
from pallas_flash.tile_sums import TileSum, View, sum_tiles

# Of out, lse, dout and dlse.
_ROW_AXES = OUT_AXES, LSE_AXES, OUT_AXES, LSE_AXES


class Plan(NamedTuple):
    """What is static in a call beside the operands' shapes and structure."""

    scale: float
    backend: str | None
    config: Any
    deterministic: bool


def attend(plan: Plan, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out [B, Tq, Hq, Dv] and lse [B, Hq, Tq] of checked operands; both differentiable."""
    return _attend_in_both_modes(plan, _without_other_gradients(operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, operands: Operands) -> tuple[jax.Array, jax.Array]:
    leaves, tree = jax.tree.flatten(operands)

    def local(*leaves):
        operands = jax.tree.unflatten(tree, leaves)
        spec = AttentionSpec.of(operands, plan.scale, plan.deterministic)
        return dispatch.run("forward", spec, plan.backend, plan.config, operands)

    shared = range(3, len(leaves))
    out, lse = distributed(local, operands.axes, [OUT_AXES, LSE_AXES], shared=shared)(*leaves)
    return out, lse


def _forward(plan: Plan, operands: Operands):
    out, lse = attend(plan, operands)
    # Named here, so that a policy such as save_only_these_names can keep them.
    out = checkpoint_name(out, "flash_attention_out")
    lse = checkpoint_name(lse, "flash_attention_lse")
    return (out, lse), (operands, out, lse)


def _backward(plan: Plan, residuals, cotangents):
    gradients = _attend_backward_in_both_modes(plan, *residuals, *cotangents)
    operands, _, _ = residuals
    return (_in_place_of(operands, gradients),)


def _tangent(plan: Plan, residuals, tangents) -> tuple[jax.Array, ...]:
    """The tangents of out and lse; None in `tangents` is zero."""
    operands, out, lse = residuals
    indices, x = operands.differentiated, _differentiated(operands)
    moved = tuple(i for i, leaf in enumerate(indices) if tangents[leaf] is not None)
    axes = tuple(operands.axes[leaf] for leaf in indices)

    def function(view: View, *parts):
        x, (lse, out), dx = parts[: len(axes)], parts[len(axes) :][:2], parts[len(axes) + 2 :]
        weighed = TileSum(lambda view, *x: view.weighed(lse, *x), axes, ())
        d_sum, d_total = weighed.tangent(moved).function(view, *x, *dx)
        # The softmax's denominator, which is 1 at this lse, moves too.
        return d_sum - out * d_total.swapaxes(1, 2), d_total

    all_axes = (*axes, LSE_AXES, OUT_AXES, *(axes[i] for i in moved))
    of = TileSum(function, all_axes, (len(axes) + 1, len(axes)))
    dx = (tangents[indices[i]] for i in moved)
    return sum_tiles(_request(plan, of), operands, (*x, lse, out, *dx))


_attend.defvjp(_forward, _backward)
_attend_in_both_modes = both_modes(_attend, _tangent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_backward(plan: Plan, operands: Operands, *rows: jax.Array) -> tuple[jax.Array, ...]:
    """dq, dk, dv and the gradients of the score mod's arrays; differentiable again.

    rows: out, lse, dout and dlse.
    """
    leaves, tree = jax.tree.flatten(operands)

    def local(*arrays):
        leaves, rows = arrays[:-4], arrays[-4:]
        operands = jax.tree.unflatten(tree, leaves)
        spec = AttentionSpec.of(operands, plan.scale, plan.deterministic)
        dq, dk, dv, d_score_mod = dispatch.run(
            "backward", spec, plan.backend, plan.config, operands, *rows
        )
        return dq, dk, dv, *d_score_mod

    axes_in = [*operands.axes, *_ROW_AXES]
    axes_out = [operands.axes[i] for i in operands.differentiated]
    run = distributed(local, axes_in, axes_out, shared=operands.shared)
    return tuple(run(*leaves, *rows))


def _sum_of_gradients(operands: Operands) -> TileSum:
    """What `_attend_backward` is, as a sum over tiles: of q, k, v, arrays and its rows."""

    def function(view: View, *parts):
        *x, out, lse, dout, dlse = parts
        delta = (out * dout).sum(-1, keepdims=True).swapaxes(1, 2) - dlse
        return jax.vjp(functools.partial(view.weighed, lse), *x)[1]((dout, -delta))

    axes = [operands.axes[i] for i in operands.differentiated]
    return TileSum(function, (*axes, *_ROW_AXES), tuple(range(len(axes))))


def _backward_forward(plan: Plan, *inputs):
    return _attend_backward_in_both_modes(plan, *inputs), inputs


def _backward_backward(plan: Plan, inputs, cotangents):
    operands, *rows = inputs
    of = _sum_of_gradients(operands).transposed()
    arrays = (*_differentiated(operands), *rows, *cotangents)
    found = sum_tiles(_request(plan, of), operands, arrays)
    return _in_place_of(operands, found[:-4]), *found[-4:]


def _backward_tangent(plan: Plan, inputs, tangents) -> tuple[jax.Array, ...]:
    operands, *rows = inputs
    dx = [tangents[i] for i in operands.differentiated] + tangents[-4:]
    moved = tuple(i for i, x in enumerate(dx) if x is not None)
    of = _sum_of_gradients(operands).tangent(moved)
    arrays = (*_differentiated(operands), *rows, *(dx[i] for i in moved))
    return sum_tiles(_request(plan, of), operands, arrays)


_attend_backward.defvjp(_backward_forward, _backward_backward)
_attend_backward_in_both_modes = both_modes(_attend_backward, _backward_tangent)


def _request(plan: Plan, of: TileSum) -> tile_sums.Request:
    return tile_sums.Request(of, plan.scale, plan.config)


def _differentiated(operands: Operands) -> list[jax.Array]:
    """q, k, v and the score mod's floating point arrays."""
    leaves = jax.tree.leaves(operands)
    return [leaves[i] for i in operands.differentiated]


def _in_place_of(operands: Operands, gradients) -> Operands:
    """Operands with gradients in place of the arrays that have one, None elsewhere."""
    leaves, tree = jax.tree.flatten(operands)
    by_index = dict(zip(operands.differentiated, gradients, strict=True))
    return jax.tree.unflatten(tree, [by_index.get(i) for i in range(len(leaves))])


def _without_other_gradients(operands: Operands) -> Operands:
    """The operands, of which only those with gradients are differentiated."""
    leaves, tree = jax.tree.flatten(operands)
    own = operands.differentiated
    new = [x if i in own else lax.stop_gradient(x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, new)
