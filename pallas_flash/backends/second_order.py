"""The derivative of the backward pass: tile by tile, linear memory, in plain JAX.

The backward maps (q, k, v, arrays of the score mod, lse, delta, dout) to (dq, dk, dv, d_arrays).
For cotangents (ddq, ddk, ddv, dd_arrays) of these its derivative is the gradient of

    sum over tiles of <ddq, dS k> + <ddk, dS^T q> + <ddv, drop(P)^T dout> + <dd_arrays, d_arrays>

with P and dS as in FlashAttention-2 (Dao 2023), algorithm 2. Each tile's summand is differentiated
on its own, so every mask and score mod is served. It needs nothing that a backward has computed,
so it serves the results of any backend. Everything is computed in float32 at least.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends import blockwise, tile
from pallas_flash.backends.blockwise import BlockwiseConfig, Grid
from pallas_flash.masks import schedule
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import floating, floating_axes, map_operands


class _Cotangents(NamedTuple):
    """Of dq [B, Hkv, G, Tq, D], dk and dv [B, Hkv, Tkv, D], and the score mod's gradients."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    arrays: list[jax.Array]


class _Inputs(NamedTuple):
    """Of the backward: q and dout [B, Hkv, G, Tq, D]; k and v [B, Hkv, Tkv, D]; arrays of the
    score mod; lse and delta [B, Hq, Tq].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    arrays: list[jax.Array]
    lse: jax.Array
    delta: jax.Array
    dout: jax.Array


# Where the positions are in each array but those of the score mod: (axis, whether of queries).
_PLACES = {
    **dict.fromkeys(("q", "dout", "dq"), (3, True)),
    **dict.fromkeys(("lse", "delta"), (2, True)),
    **dict.fromkeys(("k", "v", "dk", "dv"), (2, False)),
}


def backward_vjp(
    spec: AttentionSpec, config: Any, operands: Operands, lse, delta, dout, cotangents
):
    """Gradients of q, k, v, the score mod's arrays (a list), lse, delta and dout.

    config: of the backend that the user named; tile sizes are those of `blockwise`, or its default.
    cotangents: of the results of ``Backend.backward``, in their layout.
    """
    if not isinstance(config, BlockwiseConfig):
        config = blockwise.default_config(spec)
    grid = Grid.of(spec, config, operands)
    axes = floating_axes(operands.score_mod)
    own = floating(operands.score_mod)[0]
    ddq, ddk, ddv, dd_arrays = cotangents
    of_q, of_kv = lambda x: blockwise.grouped(x, spec), lambda x: x.transpose(0, 2, 1, 3)
    inputs, cots = jax.tree.map(
        lambda x: x.astype(spec.state_dtype),
        (
            _Inputs(
                of_q(operands.q),
                of_kv(operands.k),
                of_kv(operands.v),
                own,
                lse,
                delta,
                of_q(dout),
            ),
            _Cotangents(of_q(ddq), of_kv(ddk), of_kv(ddv), list(dd_arrays)),
        ),
    )
    first, last = grid.bounds(schedule.kv_schedule)

    def start_and_size(here, name):
        axis, is_q = _PLACES[name]
        return (here.q_start, here.q_size, axis) if is_q else (here.kv_start, here.kv_size, axis)

    def cut(here, x):
        parts = {
            name: lax.dynamic_slice_in_dim(getattr(x, name), *start_and_size(here, name))
            for name in x._fields
            if name != "arrays"
        }
        arrays = [here.align(a, names) for a, names in zip(x.arrays, axes, strict=True)]
        return x._replace(arrays=arrays, **parts)

    def add(here, total, part):
        def sum_of(name):
            start, size, axis = start_and_size(here, name)
            old = lax.dynamic_slice_in_dim(getattr(total, name), start, size, axis)
            new = old + getattr(part, name)
            return lax.dynamic_update_slice_in_dim(getattr(total, name), new, start, axis)

        sums = {name: sum_of(name) for name in total._fields if name != "arrays"}
        pairs = zip(total.arrays, axes, part.arrays, strict=True)
        return total._replace(arrays=[here.add(t, a, p) for t, a, p in pairs], **sums)

    def visit(i, j, total):
        here = grid.tile(i, j)
        cots_here = cut(here, cots)
        gradient = jax.grad(lambda x: _summand(grid, i, j, x, cots_here))
        return add(here, total, gradient(cut(here, inputs)))

    def query_tile(i, total):
        return lax.fori_loop(first[i], last[i], lambda j, total: visit(i, j, total), total)

    zeros = jax.tree.map(jnp.zeros_like, inputs)
    found = lax.fori_loop(0, grid.blocks.num_q, query_tile, zeros)

    back = lambda x: blockwise.ungrouped(x, spec).astype(spec.dtype)  # noqa: E731
    return (
        back(found.q),
        of_kv(found.k).astype(spec.dtype),
        of_kv(found.v).astype(spec.dtype),
        [d.astype(x.dtype) for d, x in zip(found.arrays, own, strict=True)],
        found.lse,
        found.delta,
        back(found.dout),
    )


def _summand(grid: Grid, i, j, x: _Inputs, c: _Cotangents) -> jax.Array:
    """What tile (i, j) adds to the function whose gradient is `backward_vjp`."""
    spec, here = grid.spec, grid.tile(i, j)
    ok = grid.allowed(i, j)
    used_q, used_kv = tile.in_use(ok, spec.num_kv_heads)
    used_q = blockwise.split_heads(used_q, spec)
    q, dout = jnp.where(used_q, x.q, 0), jnp.where(used_q, x.dout, 0)
    k, v = jnp.where(used_kv, x.k, 0), jnp.where(used_kv, x.v, 0)
    q_pos, kv_pos = here.positions()
    _, rebuild = floating(map_operands(here.align, grid.operands.score_mod))

    def product(a, b):
        return jnp.einsum("bkgqd,bksd->bkgqs", a, b).reshape(
            spec.batch, spec.num_q_heads, here.q_size, here.kv_size
        )

    def logits(s, arrays):
        return tile.logits(s, q_pos, kv_pos, spec.scale, rebuild(arrays))

    s, logits_vjp = jax.vjp(logits, product(q, k), x.arrays)
    # Inside as well: the gradient of exp at an empty row's lse of -inf would be NaN.
    p = jnp.where(ok, jnp.exp(jnp.where(ok, s - x.lse[..., None], 0)), 0)
    dp = grid.dropped(i, j, product(dout, v))
    ds, d_arrays = logits_vjp(jnp.where(ok, p * (dp - x.delta[..., None]), 0))
    total = (ds * (product(c.dq, k) + product(q, c.dk))).sum()
    total += (grid.dropped(i, j, p) * product(dout, c.dv)).sum()
    return total + sum((a * b).sum() for a, b in zip(c.arrays, d_arrays, strict=True))
