"""The steps of `backward_by_keys`, each begun while the one before it ends.

dS, dK and dQ of a tile of queries are made in the step of the next one. So the exponentials of a
step run beside dK of the step before, and dQ is staged and added beside dP: the matrix units wait
for neither. P, or what dS is a multiple of, goes from step to step in 16 bits.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper import backward_dq, dq_fixed_point
from pallas_flash.backends.hopper.backward_kernel import Kernel, stage
from pallas_flash.backends.hopper.backward_scores import (
    accumulator,
    per_query,
    probabilities,
    scores_part,
    scores_terms,
    start_from,
)
from pallas_flash.backends.hopper.backward_storage import (
    NUM_SCORE_STAGES,
    WG_KEYS,
    dq_part,
    query_columns,
)
from pallas_flash.backends.hopper.backward_walk import for_each_q_tile
from pallas_flash.backends.hopper.products import set_product
from pallas_flash.backends.hopper.scores import Zone
from pallas_flash.backends.hopper.storage import load_accumulator


class Begun(NamedTuple):
    """A step whose dS is still to be made: of what it is a multiple of, and dP, [keys, queries]."""

    t: Any
    q_head: Any
    q_tile: Any
    weights: Any
    dp: Any


def all_tiles(kernel: Kernel, wg: Any, accs: tuple[Any, Any]) -> None:
    """Adds the parts of all query tiles to dK, dV (accumulators) and dQ (memory)."""
    _, last = for_each_q_tile(kernel, partial(_step, kernel, wg, accs))
    dk_acc, _ = accs

    def end(dq_acc):
        ds = _store_ds(kernel, wg, last)
        plgpu.wgmma(dk_acc, ds, _q(kernel, last.t))
        _start_dq(kernel, wg, last, dq_acc)
        _dq_adder(kernel, wg, last, dq_acc, wait_n=0)()

    pl.run_scoped(end, accumulator(*dq_part(kernel.spec, kernel.config)))


def _step(
    kernel: Kernel,
    wg: Any,
    accs: Any,
    t: Any,
    q_head: Any,
    q_tile: Any,
    before: Begun | None,
    zone: Zone,
) -> Begun:
    """P, dV and dP of a query tile, and all else of the one before, if there is one."""
    dk_acc, dv_acc = accs
    scores = accumulator(WG_KEYS, kernel.config.block_q)
    if before is not None:
        # Seemingly another one in every step: else ptxas keeps the places of all operands in
        # registers, which are few.
        wg = wg + jnp.minimum(lax.optimization_barrier(t), 0)
        ds = _store_ds(kernel, wg, before)

    def weights_of(s_acc):
        _start_s(kernel, wg, t, s_acc)
        if before is not None:
            plgpu.wgmma(dk_acc, ds, _q(kernel, before.t))
        s = load_accumulator(s_acc, wait_n=0 if before is None else 1)
        return _weights(kernel, wg, t, q_head, q_tile, zone, s)

    p, weights = pl.run_scoped(weights_of, scores)

    def dp_beside(meanwhile, dp_acc):
        _start_dp(kernel, wg, t, dp_acc)
        meanwhile()
        return load_accumulator(dp_acc, wait_n=0)

    def start_dv():
        plgpu.barrier_wait(kernel.smem.dout_ready.at[_dout_slot(kernel, t)])
        plgpu.wgmma(dv_acc, p, _dout(kernel, t))

    def with_dq(before, dq_acc):
        _start_dq(kernel, wg, before, dq_acc)
        start_dv()
        add_dq = _dq_adder(kernel, wg, before, dq_acc, wait_n=1)
        return pl.run_scoped(partial(dp_beside, add_dq), scores)

    if before is None:
        start_dv()
        dp = pl.run_scoped(partial(dp_beside, lambda: None), scores)
    else:
        dq_acc = accumulator(*dq_part(kernel.spec, kernel.config))
        dp = pl.run_scoped(partial(with_dq, before), dq_acc)
    return Begun(t, q_head, q_tile, weights, dp)


def _own(wg: Any) -> Any:
    return pl.ds(wg * WG_KEYS, WG_KEYS)


def _q_slot(kernel: Kernel, t: Any) -> Any:
    return stage(t, kernel.config.num_q_stages)


def _dout_slot(kernel: Kernel, t: Any) -> Any:
    return stage(t, kernel.config.num_dout_stages)


def _q(kernel: Kernel, t: Any) -> Any:
    return kernel.smem.q.at[_q_slot(kernel, t)]


def _dout(kernel: Kernel, t: Any) -> Any:
    return kernel.smem.dout.at[_dout_slot(kernel, t)]


def _start_s(kernel: Kernel, wg: Any, t: Any, s_acc: Any) -> None:
    plgpu.barrier_wait(kernel.smem.q_ready.at[_q_slot(kernel, t)])
    tile = query_columns(kernel.spec, kernel.config).tile
    set_product(s_acc, kernel.smem.k.at[_own(wg)], _q(kernel, t), tile)


def _weights(
    kernel: Kernel, wg: Any, t: Any, q_head: Any, q_tile: Any, zone: Zone, s: Any
) -> tuple[Any, Any]:
    """P, and what dS is a multiple of, from raw scores s."""
    config, dtype = kernel.config, kernel.spec.dtype
    place = kernel.place(q_head, q_tile)
    place = place._replace(row_start=place.row_start + wg * WG_KEYS)
    part = scores_part(kernel, place, (WG_KEYS, config.block_q), zone)
    terms = scores_terms(kernel, t, part, _own(wg))
    lse_log2 = per_query(kernel.smem.lse_log2.at[_q_slot(kernel, t), pl.ds(0, config.block_q)])
    weights = probabilities(kernel, part, terms, s, lse_log2)
    return weights.p.astype(dtype), weights.scores.astype(dtype)


def _start_dp(kernel: Kernel, wg: Any, t: Any, dp_acc: Any) -> None:
    queries = pl.ds(0, kernel.config.block_q)
    start_from(dp_acc, kernel.smem.delta.at[_dout_slot(kernel, t), queries])
    plgpu.wgmma(dp_acc, kernel.smem.v.at[_own(wg)], _dout(kernel, t).transpose((1, 0)))


def _store_ds(kernel: Kernel, wg: Any, begun: Begun) -> Any:
    """dS, which is handed to the other warpgroup as well, without the scale."""
    smem = kernel.smem
    dout_slot, ds_slot = _dout_slot(kernel, begun.t), stage(begun.t, NUM_SCORE_STAGES)
    # 0 where P is, since dP is finite there (`scrub`).
    ds = (begun.weights.astype(jnp.float32) * begun.dp).astype(kernel.spec.dtype)
    smem.ds.at[ds_slot, _own(wg)][...] = ds
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.ds_ready.at[ds_slot])
    plgpu.barrier_arrive(smem.dout_free.at[dout_slot])
    return ds


def _start_dq(kernel: Kernel, wg: Any, begun: Begun, dq_acc: Any) -> None:
    ds_slot = stage(begun.t, NUM_SCORE_STAGES)
    plgpu.barrier_wait(kernel.smem.ds_ready.at[ds_slot])
    backward_dq.product(kernel, wg, kernel.smem.ds.at[ds_slot], dq_acc)


def _dq_adder(kernel: Kernel, wg: Any, begun: Begun, dq_acc: Any, wait_n: int) -> Any:
    """Awaits dQ, hands Q back, and returns what adds dQ to memory."""
    where = kernel, wg, begun.q_head, begun.q_tile
    factors = backward_dq.factors(*where, dq_acc.shape)
    dq = load_accumulator(dq_acc, wait_n=wait_n)
    plgpu.barrier_arrive(kernel.smem.q_free.at[_q_slot(kernel, begun.t)])
    return partial(backward_dq.add, *where, dq_fixed_point.as_added(dq, factors))
