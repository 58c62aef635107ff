"""dQ and delta by a kernel of their own: K and V stream past the queries of a block.

Source: FlashAttention (Dao et al. 2022), algorithm 4, with its loops exchanged, so that dQ stays in
registers. It takes two products more than to add to dQ in memory while the keys pass
(`backward_by_keys`), but that sum need not be zeroed, added to nor cast; so it is faster where
there are few keys. delta, of which both kernels make dS, is a sum over rows of tiles that are here
anyway.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper import copies, masking
from pallas_flash.backends.hopper.backward_kernel import may_hold_padding
from pallas_flash.backends.hopper.backward_scores import (
    accumulator,
    marked,
    weight_factors,
    weights_of,
)
from pallas_flash.backends.hopper.config import DqConfig
from pallas_flash.backends.hopper.copies import Tile as Copy
from pallas_flash.backends.hopper.copies import in_gmem, out_of_gmem, shape_in_gmem, split
from pallas_flash.backends.hopper.dq_storage import Copied, storage
from pallas_flash.backends.hopper.forward_load import load
from pallas_flash.backends.hopper.forward_storage import (
    WG_ROWS,
    query_columns,
    tiling,
    value_columns,
)
from pallas_flash.backends.hopper.forward_walk import (
    Assigned,
    Tile,
    first_tile,
    for_each_tile,
    plan,
)
from pallas_flash.backends.hopper.leaves import Terms, spelled_out, with_numbers
from pallas_flash.backends.hopper.padding import unused_keys, without_unused
from pallas_flash.backends.hopper.products import Pair, add_product, set_product
from pallas_flash.backends.hopper.query_kernel import COMPILER_PARAMS, QueryKernel
from pallas_flash.backends.hopper.scores import Zone
from pallas_flash.backends.hopper.storage import (
    LOG2_E,
    MATRIX,
    PER_ROW,
    load_accumulator,
    round_up,
    widen_rows,
)
from pallas_flash.masks import Bounds
from pallas_flash.spec import AttentionSpec, Operands


class Inputs(NamedTuple):
    """What the kernel reads from GMEM.

    q, out, dout: [B, T, H, D], padded where TMA needs it; k, v: sources of the same. lse_log2,
    dlse: [B, Hq, Tq over whole tiles] float32, the first inf where a query attends to nothing.
    assigned: the tiles of each block. terms: the arrays of mask, score mod and dropout. ids: of
    `masking.id_bounds`.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    dout: Any
    lse_log2: Any
    dlse: Any
    assigned: Assigned
    terms: Terms
    ids: list[Bounds]


@dataclasses.dataclass(frozen=True)
class Kernel(QueryKernel):
    """One launch; gmem: `Inputs`, smem: `dq_storage.Storage`, copied: its `Copied`."""

    dq_gmem: Any
    delta_gmem: Any


class Rows(NamedTuple):
    """What belongs to a warpgroup's queries of a tile.

    q, dout: in SMEM; lse_log2, delta: [64] float32; of_terms: what the terms' arrays hold.
    """

    q: Any
    dout: Any
    lse_log2: Any
    delta: Any
    of_terms: Terms


def dq_and_delta(
    spec: AttentionSpec,
    config: DqConfig,
    operands: Operands,
    out: Any,
    lse: Any,
    dout: Any,
    dlse: Any,
) -> tuple[Any, Any]:
    """dQ [B, Tq, Hq, D] in the spec's dtype, and delta [B, Hq, Tq] float32.

    delta is not to be used where a query attends to nothing.
    """
    spec, operands = spelled_out(spec), with_numbers(operands)
    columns, v_columns = query_columns(spec), value_columns(spec)
    walk, assigned = plan(spec, config, operands.mask)
    # P and dS are 0 there, but their products would spread 0 * NaN.
    unused = unused_keys(operands.mask, spec.batch, spec.q_len, spec.kv_len)
    rows = round_up(spec.q_len, config.block_q)
    missing = (0, 0), (0, 0), (0, rows - spec.q_len)
    lse_log2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)
    inputs = Inputs(
        q=in_gmem(operands.q, columns),
        k=without_unused(in_gmem(operands.k, columns), unused, columns, config.block_kv),
        v=without_unused(in_gmem(operands.v, v_columns), unused, v_columns, config.block_kv),
        out=in_gmem(out, v_columns),
        dout=in_gmem(dout.astype(spec.dtype), v_columns),
        lse_log2=jnp.pad(lse_log2, missing, constant_values=jnp.inf),
        dlse=jnp.pad(dlse, missing),
        assigned=assigned,
        terms=Terms(*map(tiling(spec, config).in_gmem, Terms.of(operands))),
        ids=masking.id_bounds(operands.mask),
    )

    def flash_attention_backward_dq(gmem, dq_gmem, delta_gmem, smem):
        kernel = Kernel(spec, config, walk, gmem, *split(smem, Copied, spec), dq_gmem, delta_gmem)
        kernel.run(partial(load, kernel, v_is_late=False), partial(_compute, kernel))

    of_dq = spec.batch, spec.q_len, spec.num_q_heads, spec.head_dim
    dq, delta = plgpu.kernel(
        flash_attention_backward_dq,
        out_type=(
            jax.ShapeDtypeStruct(shape_in_gmem(of_dq, columns), spec.dtype),
            jax.ShapeDtypeStruct((spec.batch, spec.num_q_heads, rows), jnp.float32),
        ),
        grid=(assigned.tiles.shape[0],),
        grid_names=("block",),
        num_threads=config.num_warpgroups + 1,
        thread_name="wg",
        scratch_types=(storage(spec, config),),
        compiler_params=COMPILER_PARAMS,
    )(inputs)
    return out_of_gmem(dq, spec.head_dim), delta[..., : spec.q_len]


def _compute(kernel: Kernel, wg: Any) -> None:
    """A consumer: dQ and delta of its queries in every tile."""
    _load_rows(kernel, wg, first_tile(kernel.walk, kernel.gmem.assigned))
    kernel.free_near(wg)

    def compute_tile(tile, following, step):
        load_next_rows = partial(following, partial(_load_rows, kernel, wg))
        loads_early = kernel.config.num_q_stages > 1
        rows = _rows(kernel, wg, tile)
        if loads_early:
            # In the place of the tile before, whose dQ has been stored from there.
            load_next_rows()

        def with_accumulator(dq_acc):
            _add_keys(kernel, wg, tile, step, rows, dq_acc)
            _finish(kernel, wg, tile, rows, dq_acc)

        pl.run_scoped(with_accumulator, accumulator(WG_ROWS, kernel.smem.k.shape[-1]))
        if not loads_early:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            load_next_rows()
        return step + tile.num_steps

    for_each_tile(kernel.walk, kernel.gmem.assigned, compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _own(kernel: Kernel, wg: Any, tile: Tile) -> tuple[Copy, Copy, Copy]:
    """A warpgroup's Q, out and dO in SMEM."""
    copied: Copied = kernel.copied
    q, out, dout = (x.part(kernel.q_stage(tile), wg) for x in (copied.q, copied.out, copied.dout))
    return q, out, dout


def _load_rows(kernel: Kernel, wg: Any, tile: Tile) -> None:
    """Starts the loads of a warpgroup's Q, out and dO."""
    gmem, ready, start = kernel.gmem, kernel.q_ready(wg, tile), kernel.q_start(wg, tile)
    for array, target in zip((gmem.q, gmem.out, gmem.dout), _own(kernel, wg, tile), strict=True):
        copies.load(array, tile.batch, start, tile.q_head, target, ready)


def _rows(kernel: Kernel, wg: Any, tile: Tile) -> Rows:
    """What belongs to a tile's queries; starts to store delta."""
    q, out, dout = _own(kernel, wg, tile)
    of_terms = kernel.read_rows(wg, tile)
    where = tile.batch, tile.q_head, pl.ds(kernel.q_start(wg, tile), WG_ROWS)
    lse_log2, dlse = (
        plgpu.load(x.at[where], layout=PER_ROW, optimized=False)
        for x in (kernel.gmem.lse_log2, kernel.gmem.dlse)
    )
    plgpu.barrier_wait(kernel.q_ready(wg, tile))
    out_rows, dout_rows = (
        plgpu.load(x.whole, layout=MATRIX, optimized=False).astype(jnp.float32) for x in (out, dout)
    )
    delta = (out_rows * dout_rows).sum(axis=1) - dlse
    delta_smem = kernel.smem.delta.at[wg]
    # The stores of the tile before have read this, and the place of its queries.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    delta_smem[...] = delta
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(delta_smem, kernel.delta_gmem.at[where])
    return Rows(q.whole, dout.whole, lse_log2, delta, of_terms)


def _add_keys(
    kernel: Kernel, wg: Any, tile: Tile, first_step: Any, rows: Rows, dq_acc: Any
) -> None:
    """Adds the parts of all key blocks to dQ."""

    def step(i, _, zone):
        _step(kernel, wg, tile, i, first_step + i, rows, dq_acc, zone)

    for i, zone in enumerate(kernel.walk.zones):
        if kernel.walk.meets[i]:
            lax.fori_loop(tile.runs[i], tile.runs[i + 1], partial(step, zone=zone), None)


def _step(
    kernel: Kernel, wg: Any, tile: Tile, i: Any, t: Any, rows: Rows, dq_acc: Any, zone: Zone
) -> None:
    """Adds the part of a tile's step `i`, the block's step `t`."""
    spec, smem, stage = kernel.spec, kernel.smem, kernel.stage(t)
    part = kernel.part(wg, tile, i, rows.of_terms, zone)

    def products(s_acc, dp_acc):
        plgpu.barrier_wait(smem.k_ready.at[stage])
        set_product(s_acc, Pair(rows.q, smem.k.at[stage], query_columns(spec).tile))
        plgpu.barrier_wait(smem.v_ready.at[stage])
        set_product(dp_acc, Pair(rows.dout, smem.v.at[stage], value_columns(spec).tile))
        s = load_accumulator(s_acc, wait_n=1)
        terms = kernel.terms(wg, stage, part)
        # Keys behind the end have K = V = 0, but P would be large where lse is small.
        ends = None, spec.kv_len if spec.kv_len % kernel.config.block_kv else None
        weights = marked(terms, weights_of(part, terms, s, rows.lse_log2, ends))
        # Not behind the wait for dP, where the exponentials would not run beside it.
        weights = lax.optimization_barrier(weights)
        dp = load_accumulator(dp_acc, wait_n=0)
        plgpu.barrier_arrive(smem.v_free.at[stage])
        are_kept = weights.p >= 0.0 if spec.dropout is not None else None
        x = weight_factors(part, are_kept, dp, rows.delta)
        ds = (weights.scores * x).astype(spec.dtype)
        add_product(dq_acc, ds, smem.k.at[stage], query_columns(spec).tile)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem.k_free.at[stage])

    scores = accumulator(WG_ROWS, kernel.config.block_kv)
    pl.run_scoped(products, scores, scores)


def _finish(kernel: Kernel, wg: Any, tile: Tile, rows: Rows, dq_acc: Any) -> None:
    """Starts to store dQ, from the place of its queries."""
    dq = load_accumulator(dq_acc, wait_n=0) * kernel.spec.scale
    if may_hold_padding(kernel.spec):
        # Of a query that attends to nothing dO, and so dP, may hold anything.
        is_unused = widen_rows(rows.lse_log2, dq.shape) == jnp.inf
        dq = jnp.where(is_unused, 0.0, dq)
    staging, _, _ = _own(kernel, wg, tile)
    staging.whole[...] = dq.astype(kernel.spec.dtype)
    plgpu.commit_smem()
    copies.store(staging, kernel.dq_gmem, tile.batch, kernel.q_start(wg, tile), tile.q_head)
