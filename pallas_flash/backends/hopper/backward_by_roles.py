"""Backward for head dimensions up to 256: two warpgroups share 64 keys, each owns one gradient.

The first computes P and owns dV, the second dS and dK: so an accumulator of 64 x 256 fits into
registers, and P^T and dS^T feed it from registers. P goes through SMEM to the second warpgroup, dS
to the one that loads, which adds to dQ (`backward_dq`). If arrays of the score mod have gradients,
the second one computes P by itself (`hands_p_over`).
"""

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_flash.backends.hopper import array_gradients, backward_dq, copies
from pallas_flash.backends.hopper.backward_kernel import Kernel, may_hold_padding, stage
from pallas_flash.backends.hopper.backward_scores import (
    Weights,
    accumulator,
    array_gradients_of,
    per_query,
    probabilities,
    scores_part,
    scores_terms,
    scrub,
    weight_factors,
    zero_accumulator,
)
from pallas_flash.backends.hopper.backward_storage import hands_p_over, num_score_stages
from pallas_flash.backends.hopper.backward_walk import for_each_q_tile, for_each_q_tile_alike
from pallas_flash.backends.hopper.scores import Zone, dropout_factor, is_kept, keep
from pallas_flash.backends.hopper.storage import MATRIX, load_accumulator


def compute(kernel: Kernel, wg: Any, dk_gmem: Any, dv_gmem: Any) -> None:
    """The part of math warpgroup `wg`."""
    smem = kernel.smem
    plgpu.barrier_wait(smem.kv_ready)

    # Each warpgroup cleans what it reads first; the second reads K after `p_ready`.
    @pl.when(wg == 0)
    def _():
        if may_hold_padding(kernel.spec):
            scrub(smem.k)
        _own_dv(kernel, dv_gmem)

    @pl.when(wg == 1)
    def _():
        if may_hold_padding(kernel.spec):
            scrub(smem.v)
        _own_dk(kernel, dk_gmem)


def _own_dv(kernel: Kernel, dv_gmem: Any) -> None:
    """The first warpgroup: P and dV."""
    smem = kernel.smem

    def all_tiles(dv_acc):
        steps, _ = for_each_q_tile(kernel, partial(_dv_step, kernel, dv_acc))
        _wait_for_ds(kernel, steps - 1)

    dv = pl.run_state(all_tiles)(zero_accumulator(kernel.config.block_kv, smem.v.shape[-1]))
    # V was last read for dP, before the last dS.
    _store(kernel, dv * dropout_factor(kernel.spec), kernel.copied.v, dv_gmem)


def _own_dk(kernel: Kernel, dk_gmem: Any) -> None:
    """The second warpgroup: dS and dK."""
    smem = kernel.smem

    def all_tiles(dk_acc):
        step = partial(_dk_step, kernel, dk_acc)
        no_sums = array_gradients.no_sums(kernel.spec, kernel.config.block_kv)
        end_of_head = partial(_end_of_head, kernel)
        if hands_p_over(kernel.spec, kernel.config) and kernel.near is None:
            # Whoever gets P need not know which scores are masked.
            alike = partial(step, zone=Zone(is_masked=False))
            for_each_q_tile_alike(kernel, alike, no_sums, end_of_head)
        else:
            for_each_q_tile(kernel, step, no_sums, end_of_head)

    dk = pl.run_state(all_tiles)(zero_accumulator(kernel.config.block_kv, smem.k.shape[-1]))
    backward_dq.wait_for_last(kernel)
    _store(kernel, dk * kernel.spec.scale, kernel.copied.k, dk_gmem)


def _store(kernel: Kernel, value: Any, staging: copies.Tile, array_gmem: Any) -> None:
    """Stores dK or dV by way of the tile of K or V."""
    staging.whole[...] = value.astype(kernel.spec.dtype)
    plgpu.commit_smem()
    block = kernel.block
    copies.store(staging, array_gmem, block.batch, kernel.kv_start, block.kv_head)
    plgpu.wait_smem_to_gmem(0)


def _dv_step(
    kernel: Kernel, dv_acc: Any, t: Any, q_head: Any, q_tile: Any, _: None, zone: Zone
) -> None:
    """Adds one query tile's part to dV."""
    smem, config = kernel.smem, kernel.config
    q_slot, dout_slot = stage(t, config.num_q_stages), stage(t, config.num_dout_stages)
    slot = stage(t, num_score_stages(kernel.spec, kernel.config))
    shape = config.block_kv, config.block_q
    part = scores_part(kernel, kernel.place(q_head, q_tile), shape, zone)

    def scores(s_acc):
        plgpu.barrier_wait(smem.q_ready.at[q_slot])
        plgpu.wgmma(s_acc, smem.k, smem.q.at[q_slot].transpose((1, 0)))
        lse_log2 = per_query(smem.lse_log2.at[q_slot])
        s = load_accumulator(s_acc, wait_n=0)
        terms = scores_terms(kernel, t, part, pl.ds(0, config.block_kv))
        weights = probabilities(kernel, part, terms, s, lse_log2)
        p = keep(terms, weights.p).astype(kernel.spec.dtype)
        return p, weights.scores.astype(kernel.spec.dtype)

    p, weight = pl.run_scoped(scores, accumulator(config.block_kv, config.block_q))
    if hands_p_over(kernel.spec, config):
        # Read by ordinary loads: no need to commit it.
        smem.p.at[slot][...] = weight
    plgpu.barrier_arrive(smem.p_ready.at[slot])
    plgpu.barrier_arrive(smem.q_free.at[q_slot])
    plgpu.barrier_wait(smem.dout_ready.at[dout_slot])
    plgpu.wgmma(dv_acc, p, smem.dout.at[dout_slot])
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(smem.dout_free.at[dout_slot])
    # P of the step before has been read, in whose place that of the next one comes.
    pl.when(t > 0)(lambda: _wait_for_ds(kernel, t - 1))


def _wait_for_ds(kernel: Kernel, t: Any) -> None:
    """Waits until the second warpgroup has made dS of step `t`."""
    plgpu.barrier_wait(
        kernel.smem.ds_ready.at[stage(t, num_score_stages(kernel.spec, kernel.config))]
    )


def _end_of_head(kernel: Kernel, q_head: Any, sums: Any) -> Any:
    """Stores what was summed over a query head's tiles."""
    if not sums:
        return sums
    refs = kernel.gmem.gradients, kernel.smem.gradients
    array_gradients.store_sums(*refs, q_head * 0, kernel.place(q_head, 0), sums)
    return array_gradients.no_sums(kernel.spec, kernel.config.block_kv)


def _dk_step(
    kernel: Kernel, dk_acc: Any, t: Any, q_head: Any, q_tile: Any, sums: Any, zone: Zone
) -> Any:
    """Adds one query tile's part to dK and the gradients of the score mod's arrays.

    sums: of these gradients over the queries of this head.
    """
    smem, config, dtype = kernel.smem, kernel.config, kernel.spec.dtype
    q_slot, dout_slot = stage(t, config.num_q_stages), stage(t, config.num_dout_stages)
    slot = stage(t, num_score_stages(kernel.spec, kernel.config))
    shape, own = (config.block_kv, config.block_q), pl.ds(0, config.block_kv)
    place, computes_p = kernel.place(q_head, q_tile), not hands_p_over(kernel.spec, config)
    zone = zone._replace(is_masked=zone.is_masked and computes_p)
    part = scores_part(kernel, place, shape, zone)

    def gradients(dp_acc):
        plgpu.barrier_wait(smem.dout_ready.at[dout_slot])
        plgpu.wgmma(dp_acc, smem.v, smem.dout.at[dout_slot].transpose((1, 0)))
        delta = per_query(smem.delta.at[dout_slot])
        plgpu.barrier_wait(smem.p_ready.at[slot])
        terms = scores_terms(kernel, t, part, own)
        if not computes_p:
            weight = plgpu.load(smem.p.at[slot], layout=MATRIX).astype(delta.dtype)
            dp = load_accumulator(dp_acc, wait_n=0)
            x = weight_factors(part, is_kept(terms, shape), dp, delta)
            return (weight * x).astype(dtype), sums
        scores = accumulator(config.block_kv, config.block_q)
        s, weights = pl.run_scoped(partial(_own_weights, kernel, q_slot, part, terms), scores)
        # Awaited with the scores.
        dp = load_accumulator(dp_acc, wait_n=0)
        x = weight_factors(part, is_kept(terms, shape), dp, delta)
        of_arrays = array_gradients_of(part, terms, s, weights.p, x)
        refs = kernel.gmem.gradients, smem.gradients
        added = array_gradients.add(kernel.tiling, *refs, q_head * 0, place, of_arrays, sums)
        return (weights.scores * x).astype(dtype), added

    ds, sums = pl.run_scoped(gradients, accumulator(config.block_kv, config.block_q))
    backward_dq.wait_for_place(kernel, t)
    backward_dq.store(kernel, t, own, ds)
    backward_dq.hand_over(kernel, t)
    plgpu.barrier_arrive(smem.dout_free.at[dout_slot])
    # Q has arrived: P was made of it.
    plgpu.wgmma(dk_acc, ds, smem.q.at[q_slot])
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(smem.q_free.at[q_slot])
    return sums


def _own_weights(
    kernel: Kernel, q_slot: Any, part: Any, terms: Any, s_acc: Any
) -> tuple[Any, Weights]:
    """Raw scores, and P, by the second warpgroup. K and Q are there: the first has read them."""
    smem = kernel.smem
    plgpu.wgmma(s_acc, smem.k, smem.q.at[q_slot].transpose((1, 0)))
    lse_log2 = per_query(smem.lse_log2.at[q_slot])
    s = load_accumulator(s_acc, wait_n=0)
    return s, probabilities(kernel, part, terms, s, lse_log2)
