"""How dense attention is differentiated: residuals, delta, names for rematerialisation.

Source: FlashAttention-2 (Dao 2023), sections 2.2 and 3.1. With ``P = exp(S - lse)`` and
``delta = rowsum(out * dout) - dlse`` the gradient of the logits is ``dS = P * (dP - delta)``; the
term ``- dlse`` is all that a differentiable lse takes. The backward is a ``custom_vjp`` of its own,
so that a gradient can be differentiated: `backends.second_order`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_flash import dispatch
from pallas_flash.backends.second_order import backward_vjp
from pallas_flash.parallel import distributed
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import Axes, floating_axes, leaf_axes

Q_AXES = ("batch", "q", "heads", "dim")
K_AXES = ("batch", "kv", "kv_heads", "dim")
V_AXES = ("batch", "kv", "kv_heads", "value_dim")
OUT_AXES = ("batch", "q", "heads", "value_dim")
LSE_AXES = ("batch", "heads", "q")


class Plan(NamedTuple):
    """What is static in a call beside the operands' shapes and structure."""

    scale: float
    backend: str | None
    config: Any


def axes_of(operands: Operands) -> list[Axes]:
    """Named axes of the operands' arrays, in the order of ``jax.tree.leaves``."""
    terms = (operands.mask, operands.score_mod, operands.dropout)
    return [Q_AXES, K_AXES, V_AXES, *(axes for term in terms for axes in leaf_axes(term))]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out [B, Tq, Hq, Dv] and lse [B, Hq, Tq] of checked operands; both differentiable."""
    leaves, tree = jax.tree.flatten(operands)

    def local(*leaves):
        operands = jax.tree.unflatten(tree, leaves)
        spec = AttentionSpec.of(operands, plan.scale)
        return dispatch.run("forward", spec, plan.backend, plan.config, operands)

    axes_in = axes_of(operands)
    shared = range(3, len(axes_in))
    out, lse = distributed(local, axes_in, [OUT_AXES, LSE_AXES], shared=shared)(*leaves)
    return out, lse


def _forward(plan: Plan, operands: Operands):
    out, lse = attend(plan, operands)
    # Named here, so that a policy such as save_only_these_names can keep them.
    out = checkpoint_name(out, "flash_attention_out")
    lse = checkpoint_name(lse, "flash_attention_lse")
    return (out, lse), (operands, out, lse)


def _backward(plan: Plan, residuals, cotangents):
    operands, out, lse = residuals
    dout, dlse = cotangents
    delta = jnp.einsum("bthd,bthd->bht", out, dout, preferred_element_type=lse.dtype) - dlse
    dq, dk, dv, *d_score_mod = attend_backward(plan, operands, lse, delta, dout)
    return (_cotangents(operands, dq, dk, dv, d_score_mod),)


attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_backward(plan: Plan, operands: Operands, lse, delta, dout) -> tuple[jax.Array, ...]:
    """dq, dk, dv and the gradients of the score mod's arrays; differentiable once more."""
    leaves, tree = jax.tree.flatten(operands)

    def local(*arrays):
        *leaves, lse, delta, dout = arrays
        operands = jax.tree.unflatten(tree, leaves)
        spec = AttentionSpec.of(operands, plan.scale)
        dq, dk, dv, d_score_mod = dispatch.run(
            "backward", spec, plan.backend, plan.config, operands, lse, delta, dout
        )
        return dq, dk, dv, *d_score_mod

    axes_in = [*axes_of(operands), LSE_AXES, LSE_AXES, OUT_AXES]
    run = distributed(local, axes_in, _gradient_axes(operands), shared=_shared(operands))
    return tuple(run(*leaves, lse, delta, dout))


def _backward_forward(plan: Plan, *inputs):
    return attend_backward(plan, *inputs), inputs


def _backward_backward(plan: Plan, inputs, cotangents):
    operands, *rows = inputs
    leaves, tree = jax.tree.flatten(operands)

    def local(*arrays):
        operands = jax.tree.unflatten(tree, arrays[: len(leaves)])
        lse, delta, dout, ddq, ddk, ddv, *dd_arrays = arrays[len(leaves) :]
        spec = AttentionSpec.of(operands, plan.scale)
        cotangents = (ddq, ddk, ddv, dd_arrays)
        q, k, v, of_arrays, *of_rows = backward_vjp(
            spec, plan.config, operands, lse, delta, dout, cotangents
        )
        return q, k, v, *of_arrays, *of_rows

    gradient_axes, row_axes = _gradient_axes(operands), [LSE_AXES, LSE_AXES, OUT_AXES]
    axes_in = [*axes_of(operands), *row_axes, *gradient_axes]
    run = distributed(local, axes_in, gradient_axes + row_axes, shared=_shared(operands))
    q, k, v, *rest = run(*leaves, *rows, *cotangents)
    return _cotangents(operands, q, k, v, rest[:-3]), *rest[-3:]


attend_backward.defvjp(_backward_forward, _backward_backward)


def _gradient_axes(operands: Operands) -> list[Axes]:
    """Axes of what the backward returns."""
    return [Q_AXES, K_AXES, V_AXES, *floating_axes(operands.score_mod)]


def _shared(operands: Operands) -> set[int]:
    """The operands that mapped calls may share: of the terms not the score mod.

    Its arrays need a gradient for every mapped call.
    """
    num_mask, num_mod = len(leaf_axes(operands.mask)), len(leaf_axes(operands.score_mod))
    num_dropout = len(leaf_axes(operands.dropout))
    after = 3 + num_mask + num_mod
    return {*range(3, 3 + num_mask), *range(after, after + num_dropout)}


def _cotangents(operands: Operands, dq, dk, dv, d_score_mod: list[jax.Array]) -> Operands:
    """Operands with gradients in place of the arrays that have one, None elsewhere."""
    leaves, tree = jax.tree.flatten(operands.score_mod)
    left = iter(d_score_mod)
    found = [next(left) if jnp.issubdtype(x.dtype, jnp.floating) else None for x in leaves]
    return Operands(dq, dk, dv, None, jax.tree.unflatten(tree, found), None)
