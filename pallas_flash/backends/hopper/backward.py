"""Backward of dense attention on Hopper: one pass over the keys (FlashAttention-2, section 3.1.2).

dQ is added to an array that XLA zeroes: of float32, or of int32 (`dq_fixed_point`) where gradients
are to be deterministic. Where there are few keys a kernel of its own computes it
(`backward_by_queries`).
"""

import dataclasses
import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.backends.backend import delta_of
from pallas_flash.backends.hopper import (
    array_gradients,
    backward_by_keys,
    backward_by_queries,
    backward_by_roles,
    dq_fixed_point,
    dq_fragments,
    masking,
    row_starts,
)
from pallas_flash.backends.hopper.backward_kernel import (
    Block,
    GlobalRefs,
    Kernel,
    Runs,
    may_hold_padding,
)
from pallas_flash.backends.hopper.backward_load import load_tiles
from pallas_flash.backends.hopper.backward_scores import with_rows
from pallas_flash.backends.hopper.backward_storage import (
    NUM_MATH_WGS,
    Copied,
    dp_starts_from_rows,
    dq_dtype,
    query_columns,
    registers,
    s_starts_from_rows,
    seen,
    storage,
    tiling,
    value_columns,
)
from pallas_flash.backends.hopper.config import BackwardConfig, default_dq_config
from pallas_flash.backends.hopper.copies import in_gmem, out_of_gmem, split
from pallas_flash.backends.hopper.leaves import (
    Terms,
    near_of,
    rows_share_matrices,
    spelled_out,
    with_numbers,
)
from pallas_flash.backends.hopper.padding import without_unused
from pallas_flash.backends.hopper.storage import LOG2_E, divmod_of, locate, round_up
from pallas_flash.masks.schedule import FIRST, FULL_FIRST, FULL_LAST, LAST, Blocks, q_schedule
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import floating


def _compiler_params(config: BackwardConfig) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        # What a warpgroup stores into SMEM it stores where TMA or wgmma have read, behind a wait of
        # all its threads, and commits. Without more barriers: +1% at head_dim 128, but -6% at 64
        # with its 128 queries, H100, JAX 0.11.2.
        unsafe_no_auto_barriers=config.block_q != 128,
    )


def backward(
    spec: AttentionSpec,
    config: Any,
    operands: Operands,
    out: Any,
    lse: Any,
    dout: Any,
    dlse: Any,
) -> tuple[Any, Any, Any, list[Any]]:
    """dq, dk, dv and the gradients of the score mod's arrays, in the operands' shapes and dtypes.

    out, dout: [B, Tq, Hq, Dv]; lse, dlse: [B, Hq, Tq] float32, natural log.
    """
    tiles, whole = config.backward, operands
    dq = None
    if tiles.has_dq_kernel:
        rows = out, lse, dout, dlse
        dq, delta = backward_by_queries.dq_and_delta(spec, default_dq_config(spec), operands, *rows)
    else:
        delta = delta_of(out, dout, dlse)
    spec, operands = seen(spelled_out(spec), tiles), seen(with_numbers(operands), tiles)
    qk, vo = query_columns(spec), value_columns(spec)
    runs, schedule = _schedule(spec, tiles, operands.mask)
    # P and dS are 0 there, but 0 * NaN would reach dK and dV.
    unused = lse == -jnp.inf if may_hold_padding(spec) else None
    if unused is not None:
        delta = jnp.where(unused, 0.0, delta)
    factors = None
    if spec.deterministic and dq is None:
        factors = dq_fixed_point.factors(spec, operands, lse, delta, dout)
        factors = dq_fixed_point.over_whole_tiles(factors, tiles.block_q)
    lse_log2, delta = _per_query_terms(lse, delta, tiles.block_q)
    starts = selectors = s_start = dp_start = None
    if s_starts_from_rows(spec, tiles):
        s_start, lse_log2 = lse_log2 / -(spec.scale * LOG2_E), None
    if dp_starts_from_rows(spec, tiles):
        dp_start, delta = -delta, None
    if s_start is not None or dp_start is not None:
        starts, selectors = row_starts.columns_of(s_start, dp_start), row_starts.selectors()
    inputs = GlobalRefs(
        q=without_unused(in_gmem(operands.q, qk), unused, qk, tiles.block_q),
        k=in_gmem(operands.k, qk),
        v=in_gmem(operands.v, vo),
        dout=without_unused(in_gmem(dout.astype(spec.dtype), vo), unused, vo, tiles.block_q),
        lse_log2=lse_log2,
        starts=starts,
        selectors=selectors,
        delta=delta,
        schedule=schedule,
        terms=Terms(*map(tiling(spec, tiles).in_gmem, Terms.of(operands))),
        ids=masking.id_bounds(operands.mask),
        dq_factors=factors,
        dq_sum=None,
        gradients=array_gradients.Refs(None, ()),
    )
    dq_sum, dk, dv, of_arrays = _launch(spec, tiles, runs, inputs)
    dk, dv = out_of_gmem(dk, spec.head_dim), out_of_gmem(dv, spec.value_dim)
    if dq is None:
        dq = dq_fragments.dq_of_sum(spec, tiles, dq_sum, factors)
    if factors is not None:
        dq = dq_fixed_point.with_overflows(spec, dq, dk)
    of_seen = array_gradients.folded(tiling(spec, tiles), operands.score_mod, of_arrays)
    d_score_mod = _of_all(whole, tiles, of_seen)
    return dq, dk, dv, d_score_mod


def _of_all(operands: Operands, config: BackwardConfig, gradients: list[Any]) -> list[Any]:
    """The gradients of all the score mod's arrays, from those of the arrays that are `seen`."""
    arrays, rebuild = floating(operands.score_mod)

    def those_seen(arrays):
        changed = dataclasses.replace(operands, score_mod=rebuild(arrays))
        return floating(seen(changed, config).score_mod)[0]

    return jax.vjp(those_seen, arrays)[1](gradients)[0]


def _schedule(spec: AttentionSpec, config: BackwardConfig, mask: Any) -> tuple[Runs, Any]:
    """Which loops a block runs, and their bounds where they differ between blocks."""
    near = near_of(spec.score_mod)
    if mask is None and spec.kv_len % config.block_kv == 0 and near is None:
        return Runs(False, True, False), None
    blocks = Blocks(spec.q_len, spec.kv_len, config.block_q, config.block_kv, spec.batch)
    bounds = q_schedule(mask, blocks, near)
    if not isinstance(bounds, np.ndarray):
        return Runs(True, True, True), bounds
    edges = [bounds[..., column] for column in (FIRST, FULL_FIRST, FULL_LAST, LAST)]
    has_any = [bool((low < high).any()) for low, high in itertools.pairwise(edges)]
    # A tile of keys without any query still has one step, which the mask must empty.
    has_empty = bool((bounds[..., FIRST] == bounds[..., LAST]).any())
    if near is not None:
        return Runs(has_any[1] or has_empty, has_any[0], has_any[2]), jnp.asarray(bounds)
    return Runs(has_any[0] or has_empty, *has_any[1:]), jnp.asarray(bounds)


def _per_query_terms(lse: Any, delta: Any, block_q: int) -> Any:
    """lse in base 2 and delta, over whole tiles. Rows without weight get lse = inf, so P = 0."""
    rows = round_up(lse.shape[-1], block_q) - lse.shape[-1]
    pad = ((0, 0), (0, 0), (0, rows))
    lse_log2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)
    return jnp.pad(lse_log2, pad, constant_values=jnp.inf), jnp.pad(delta, pad)


class _Results(NamedTuple):
    """dq_sum, if any, and matrices are added to, zeros before; stored: dk, dv, the sums or None."""

    dq_sum: Any
    matrices: tuple[Any, ...]
    stored: tuple[Any, Any, Any]


def _launch(
    spec: AttentionSpec, config: BackwardConfig, runs: Runs, inputs: GlobalRefs
) -> tuple[Any, Any, Any, array_gradients.Refs]:
    """The sum of dQ, without the scale; dk and dv, as they are copied.

    And what the gradients of the score mod's arrays are folded from.
    """
    compute = backward_by_roles.compute if config.shares_keys else backward_by_keys.compute
    of_loader, of_math = registers(config)
    num_kv_tiles = pl.cdiv(spec.kv_len, config.block_kv)
    num_heads = spec.batch * spec.num_kv_heads

    def flash_attention_backward(gmem, dk_gmem, dv_gmem, sums_gmem, smem):
        gmem = gmem._replace(gradients=gmem.gradients._replace(sums=sums_gmem))
        head, kv_tile = locate(
            lax.axis_index("block"), num_kv_tiles, num_heads, config.heads_per_group
        )
        if rows_share_matrices(spec):
            # What they read, and add their gradients to, stays in the L2 cache.
            kv_head, row = divmod_of(head, spec.batch)
        else:
            row, kv_head = divmod_of(head, spec.num_kv_heads)
        block = Block(row, kv_head, kv_tile)
        kernel = Kernel(spec, config, runs, gmem, *split(smem, Copied, spec), block)
        wg = lax.axis_index("wg")

        @pl.when(wg == NUM_MATH_WGS)
        def _():
            plgpu.set_max_registers(of_loader, action="decrease")
            load_tiles(kernel)

        @pl.when(wg < NUM_MATH_WGS)
        def _():
            plgpu.set_max_registers(of_math, action="increase")
            if smem.near_free is not None:
                plgpu.barrier_arrive(smem.near_free.at[wg])
            with_keys = with_rows(kernel, wg)
            is_wide = masking.read_wide(gmem.ids, row * 0)
            if isinstance(is_wide, bool):
                compute(with_keys, wg, dk_gmem, dv_gmem)
                return
            for which in (False, True):
                variant = dataclasses.replace(with_keys, is_wide=which)
                pl.when(is_wide == which)(partial(compute, variant, wg, dk_gmem, dv_gmem))

    def launch(results):
        dk, dv, sums = plgpu.kernel(
            flash_attention_backward,
            out_type=stored,
            # One axis: the others of a CUDA grid end at 65535.
            grid=(num_heads * num_kv_tiles,),
            grid_names=("block",),
            num_threads=NUM_MATH_WGS + 1,
            thread_name="wg",
            scratch_types=(storage(spec, config),),
            compiler_params=_compiler_params(config),
        )(
            inputs._replace(
                dq_sum=results.dq_sum, gradients=array_gradients.Refs(None, results.matrices)
            )
        )
        for ref, x in zip(results.stored, (dk, dv, sums), strict=True):
            if x is not None:
                ref[...] = x

    stored = (
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs.k, inputs.v)),
        array_gradients.sums_in_gmem(tiling(spec, config)),
    )
    # A state of its own, and no `jax.new_ref`: its effect would be seen outside, where
    # custom_partitioning and custom_jvp refuse effects. What `stored` begins with is never read.
    found = pl.run_state(launch)(
        _Results(
            None
            if config.has_dq_kernel
            else jnp.zeros(dq_fragments.dq_sum_shape(spec, config), dq_dtype(spec)),
            array_gradients.zero_matrices(tiling(spec, config)),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stored),
        )
    )
    dk, dv, sums = found.stored
    return found.dq_sum, dk, dv, array_gradients.Refs(sums, found.matrices)
