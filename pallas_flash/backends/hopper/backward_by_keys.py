"""Backward for head dimensions up to 128: each of two warpgroups owns 64 keys, their dK and dV.

P^T and dS^T feed dV and dK from registers; the warpgroups share nothing. dS of both goes through
SMEM to the one that loads, which adds to dQ (`backward_dq`), unless another kernel computes that
(`backward_by_queries`).
"""

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper import array_gradients, backward_dq, copies, row_starts
from pallas_flash.backends.hopper.backward_kernel import Kernel, may_hold_padding, stage
from pallas_flash.backends.hopper.backward_scores import (
    accumulator,
    array_gradients_of,
    free_stages,
    kept,
    marked,
    per_query,
    probabilities,
    scores_part,
    scores_terms,
    scrub,
    weight_factors,
    zero_accumulator,
)
from pallas_flash.backends.hopper.backward_storage import (
    WG_KEYS,
    dp_follows_s,
    dp_starts_from_rows,
    query_columns,
    s_starts_from_rows,
    value_columns,
)
from pallas_flash.backends.hopper.backward_walk import for_each_q_tile
from pallas_flash.backends.hopper.products import Pair, set_product
from pallas_flash.backends.hopper.scores import Zone, dropout_factor
from pallas_flash.backends.hopper.storage import load_accumulator


def compute(kernel: Kernel, wg: Any, dk_gmem: Any, dv_gmem: Any) -> None:
    """The part of math warpgroup `wg`."""
    smem = kernel.smem
    k, v = (tile.rows(wg, WG_KEYS) for tile in (kernel.copied.k, kernel.copied.v))
    plgpu.barrier_wait(smem.kv_ready)
    if may_hold_padding(kernel.spec):
        # For dQ these rows of K are first read after `ds_ready`.
        scrub(k.whole)
        scrub(v.whole)

    def all_tiles(accs):
        step = partial(_step, kernel, wg, accs)
        no_sums = array_gradients.no_sums(kernel.spec, WG_KEYS)
        for_each_q_tile(kernel, step, no_sums, partial(_end_of_head, kernel, wg))

    dk, dv = pl.run_state(all_tiles)(
        (
            zero_accumulator(WG_KEYS, smem.k.shape[-1]),
            zero_accumulator(WG_KEYS, smem.v.shape[-1]),
        )
    )
    _store(kernel, wg, dv * dropout_factor(kernel.spec), v, dv_gmem)
    backward_dq.wait_for_last(kernel)
    _store(kernel, wg, dk * kernel.spec.scale, k, dk_gmem)
    plgpu.wait_smem_to_gmem(0)


def _store(kernel: Kernel, wg: Any, value: Any, staging: copies.Tile, array_gmem: Any) -> None:
    """Stores this warpgroup's rows of dK or dV by way of those of K or V."""
    staging.whole[...] = value.astype(kernel.spec.dtype)
    plgpu.commit_smem()
    block, start = kernel.block, kernel.kv_start + wg * WG_KEYS
    copies.store(staging, array_gmem, block.batch, start, block.kv_head)


def _end_of_head(kernel: Kernel, wg: Any, q_head: Any, sums: Any) -> Any:
    """Stores what was summed over a query head's tiles."""
    if not sums:
        return sums
    place = kernel.place(q_head, 0)
    refs = kernel.gmem.gradients, kernel.smem.gradients
    array_gradients.store_sums(*refs, wg, place, sums)
    return array_gradients.no_sums(kernel.spec, WG_KEYS)


def _step(
    kernel: Kernel, wg: Any, accs: Any, t: Any, q_head: Any, q_tile: Any, sums: Any, zone: Zone
) -> Any:
    """Adds one query tile's part to dK, dV (registers) and the arrays' gradients; hands dS over.

    sums: of the arrays' gradients over the queries of this head.
    """
    smem, config = kernel.smem, kernel.config
    dk_acc, dv_acc = accs
    s_starts = s_starts_from_rows(kernel.spec, config)
    dp_starts = dp_starts_from_rows(kernel.spec, config)
    dp_follows = dp_follows_s(kernel.spec, config)
    is_tight = dp_starts or kernel.spec.dropout is not None
    if is_tight and config.block_q != 128 and dk_acc.shape[1] > 64:
        # Seemingly another one in every step: else ptxas keeps the places of all operands in
        # registers, which are few, and spills 170 bytes. With 128 queries, or up to head_dim 64, it
        # spills less as well, but is slower: 1.427 ms for 1.402, 4 x 4096 x 32 x 64 causal, 2.111
        # for 2.074 with a dense bias, 8 x 2048 x 16 x 64. H100, JAX 0.11.2.
        wg = wg + jnp.minimum(lax.optimization_barrier(t), 0)
    own = pl.ds(wg * WG_KEYS, WG_KEYS)
    q_slot, dout_slot = stage(t, config.num_q_stages), stage(t, config.num_dout_stages)
    q_smem, dout_smem = smem.q.at[q_slot], smem.dout.at[dout_slot]
    place = kernel.place(q_head, q_tile)
    own_place = place._replace(row_start=place.row_start + wg * WG_KEYS)
    queries = pl.ds(0, config.block_q)
    part = scores_part(kernel, own_place, (WG_KEYS, config.block_q), zone)
    qk, vo = query_columns(kernel.spec), value_columns(kernel.spec)

    def products(s_acc, dp_acc):
        backward_dq.wait_for_place(kernel, t)
        plgpu.barrier_wait(smem.q_ready.at[q_slot])
        starts = [row_starts.pair(smem, row_starts.S, q_slot)] if s_starts else []
        set_product(s_acc, Pair(smem.k.at[own], q_smem, qk.tile), *starts)
        if not dp_follows:
            product_dp(dp_acc)
        return gradients(s_acc, dp_acc)

    def product_dp(dp_acc):
        plgpu.barrier_wait(smem.dout_ready.at[dout_slot])
        starts = [row_starts.pair(smem, row_starts.DP, q_slot)] if dp_starts else []
        set_product(dp_acc, Pair(smem.v.at[own], dout_smem, vo.tile), *starts)

    def lse_log2_of_tile():
        return None if s_starts else per_query(smem.lse_log2.at[q_slot, queries])

    def gradients(s_acc, dp_acc):
        if config.block_q == 64:
            # Early where there are registers: +7% at head_dim 128, H100, JAX 0.11.2.
            lse_log2 = lse_log2_of_tile()
        s = load_accumulator(s_acc, wait_n=0 if dp_follows else 1)
        if config.block_q != 64:
            lse_log2 = lse_log2_of_tile()
        terms = scores_terms(kernel, t, part, own)
        weights = marked(terms, probabilities(kernel, part, terms, s, lse_log2))
        p = kept(terms, weights.p).astype(kernel.spec.dtype)
        if dp_follows:
            product_dp(dp_acc)
        plgpu.wgmma(dv_acc, p, dout_smem)
        dp = load_accumulator(dp_acc, wait_n=1)
        delta = None if dp_starts else per_query(smem.delta.at[dout_slot, queries])
        are_kept = weights.p >= 0.0 if kernel.spec.dropout is not None else None
        x = weight_factors(part, are_kept, dp, delta)
        # 0 where P is, since dP is finite there (`scrub`). Without the scale.
        ds = (weights.scores * x).astype(kernel.spec.dtype)
        if not config.has_dq_kernel:
            backward_dq.store(kernel, t, own, ds)
        if not dp_follows:
            # Ahead of the fence, which takes some hundred cycles: 2.43 ms for 2.54, 4 x 4096 x 32 x
            # 64 full, 1.40 for 1.45 causal, but 2.16 for 2.11 at 16 x 128 full. H100, JAX 0.11.2.
            plgpu.wgmma(dk_acc, ds, q_smem)
        if not config.has_dq_kernel:
            backward_dq.hand_over(kernel, t)
        elif part.reads_smem or not (s_starts and dp_starts):
            # What is read by ordinary loads TMA overwrites.
            plgpu.commit_smem()
        if dp_follows:
            plgpu.wgmma(dk_acc, ds, q_smem)
        of_arrays = array_gradients_of(part, terms, s, jnp.abs(weights.p), x)
        refs = kernel.gmem.gradients, smem.gradients
        new_sums = array_gradients.add(kernel.tiling, *refs, wg, place, of_arrays, sums)
        # Everything is awaited here: with products left in flight across the step ptxas runs out
        # of registers and serialises them all (its warning C7512).
        plgpu.wgmma_wait(0)
        free_stages(kernel, t)
        return new_sums

    scores = accumulator(WG_KEYS, config.block_q)
    return pl.run_scoped(products, scores, scores)
