"""Backward for head dimensions up to 256: two warpgroups share 64 keys and split columns.

Each warpgroup computes the scores of half the queries of a tile. P and dS go through SMEM, and each
product for dV, dK and dQ is over the whole tile and half the columns, so that dK and dV fit the
registers.
"""

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_flash.backends.hopper.backward_common import (
    Kernel,
    accumulator,
    add_dq,
    allowed_tile,
    for_each_q_tile,
    free_stages,
    load_accumulator,
    may_hold_padding,
    probabilities,
    score_gradients,
    scrub,
    stage,
    zero_accumulator,
)
from pallas_flash.backends.hopper.backward_storage import NUM_SCORE_STAGES, dq_part
from pallas_flash.backends.hopper.storage import window


def compute(kernel: Kernel, wg: Any, dk_gmem: Any, dv_gmem: Any) -> None:
    """The part of math warpgroup `wg`."""
    smem, config = kernel.smem, kernel.config
    plgpu.barrier_wait(smem.kv_ready)
    if may_hold_padding(kernel.spec):
        scrub(_own_columns(smem.k, wg))
        scrub(_own_columns(smem.v, wg))
        plgpu.barrier_arrive(smem.scrubbed)
        plgpu.barrier_wait(smem.scrubbed)

    def all_tiles(accs):
        step = partial(_step, kernel, wg, accs)
        for_each_q_tile(kernel, partial(step, masked=False), partial(step, masked=True))

    dk, dv = pl.run_state(all_tiles)(
        (
            zero_accumulator(config.block_kv, smem.k.shape[-1] // 2),
            zero_accumulator(config.block_kv, smem.v.shape[-1] // 2),
        )
    )
    # The tiles of K and V now stage the outputs. The other warpgroup last read these columns for
    # its scores, before the last `ds_ready`.
    _own_columns(smem.v, wg)[...] = dv.astype(smem.v.dtype)
    _own_columns(smem.k, wg)[...] = (dk * kernel.spec.scale).astype(smem.k.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.outputs_ready)
    plgpu.barrier_wait(smem.outputs_ready)

    # TMA takes whole tiles only, so each warpgroup stores one and not its columns of both.
    @pl.when(wg == 0)
    def _():
        _store(kernel, smem.v, dv_gmem)

    @pl.when(wg == 1)
    def _():
        _store(kernel, smem.k, dk_gmem)

    plgpu.wait_smem_to_gmem(0)


def _store(kernel: Kernel, tile_smem: Any, array_gmem: Any) -> None:
    block = kernel.block
    target = window(array_gmem, block.batch, kernel.kv_start, block.kv_head, tile_smem)
    plgpu.copy_smem_to_gmem(tile_smem, target)


def _own_columns(tile_smem: Any, wg: Any) -> Any:
    width = tile_smem.shape[-1] // 2
    return tile_smem.at[:, pl.ds(wg * width, width)]


def _step(kernel: Kernel, wg: Any, accs: Any, t: Any, q_head: Any, q_tile: Any, masked: bool):
    """Adds one query tile's part to dK, dV (registers) and dQ (memory)."""
    smem, config, dtype = kernel.smem, kernel.config, kernel.spec.dtype
    dk_acc, dv_acc = accs
    wg_queries = config.block_q // 2
    own = pl.ds(wg * wg_queries, wg_queries)
    q_slot, dout_slot = stage(t, config.num_q_stages), stage(t, config.num_dout_stages)
    q_smem, dout_smem = smem.q.at[q_slot], smem.dout.at[dout_slot]
    slot = stage(t, NUM_SCORE_STAGES)
    p_smem, ds_smem = smem.p.at[slot], smem.ds.at[slot]

    def scores(s_acc, dp_acc):
        plgpu.barrier_wait(smem.q_ready.at[q_slot])
        plgpu.wgmma(s_acc, smem.k, q_smem.at[own].transpose((1, 0)))
        plgpu.barrier_wait(smem.dout_ready.at[dout_slot])
        plgpu.wgmma(dp_acc, smem.v, dout_smem.at[own].transpose((1, 0)))
        s = load_accumulator(s_acc, wait_n=1)
        allowed = None
        if masked:
            q_start = q_tile * config.block_q + wg * wg_queries
            allowed = allowed_tile(kernel, q_head, q_start, kernel.kv_start, s.shape)
        p = probabilities(kernel, s, smem.lse_log2.at[q_slot, own], allowed)
        p_smem.at[:, own][...] = p.astype(dtype)
        dp = load_accumulator(dp_acc, wait_n=0)
        ds = score_gradients(p, dp, smem.delta.at[dout_slot, own])
        ds_smem.at[:, own][...] = ds.astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem.ds_ready.at[slot])

    def gradients(dq_acc):
        plgpu.wgmma(dv_acc, p_smem, _own_columns(dout_smem, wg))
        plgpu.wgmma(dk_acc, ds_smem, _own_columns(q_smem, wg))
        plgpu.wgmma(dq_acc, ds_smem.transpose((1, 0)), _own_columns(smem.k, wg))
        dq = load_accumulator(dq_acc, wait_n=0)
        free_stages(kernel, t)
        add_dq(kernel, wg, q_head, q_tile, dq)

    scores_acc = accumulator(config.block_kv, wg_queries)
    pl.run_scoped(scores, scores_acc, scores_acc)
    plgpu.barrier_wait(smem.ds_ready.at[slot])
    pl.run_scoped(gradients, accumulator(*dq_part(kernel.spec, config)))
