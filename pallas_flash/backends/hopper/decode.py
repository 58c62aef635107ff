"""Attention of a few queries over a cache on Hopper: the keys split over the whole GPU.

The thread blocks of a team, one for each kv head, walk side by side over an equal share of all key
blocks of the batch, row after row: how long a row is changes nothing for who works how much. A
block packs the queries of a group of heads into the rows of one product, and streams K and V once,
by TMA. Each part of a row gives its own out and lse, which `decode_merge` joins.

Source: Flash-Decoding (Dao et al. 2023).
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.decode_compute import compute
from pallas_flash.backends.hopper.decode_kernel import Inputs, Kernel
from pallas_flash.backends.hopper.decode_load import load
from pallas_flash.backends.hopper.decode_merge import merge, width_of
from pallas_flash.backends.hopper.decode_share import Share, share_out
from pallas_flash.backends.hopper.decode_storage import (
    REDUCTION_SCRATCH_BYTES,
    WG_ROWS,
    DecodeConfig,
    storage,
)
from pallas_flash.backends.hopper.storage import tma_rows

# Threads of a block: the one that loads, the one that computes.
PRODUCER, CONSUMER = range(2)
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
)


def forward(spec: Any, config: DecodeConfig, operands: Any) -> tuple[Any, Any]:
    """out [B, Tq, Hq, Dv] in q's dtype and lse [B, Hq, Tq] float32, natural log."""
    num_teams = config.num_teams
    share = share_out(spec, num_teams, operands.cache.lengths, operands.counts)
    parts, lse_log2 = _launch(spec, config, _inputs(spec, operands, share))
    out, lse = merge(spec, config, share, parts, lse_log2)
    return out.astype(spec.dtype), lse


def _inputs(spec: Any, operands: Any, share: Share) -> Inputs:
    cache = operands.cache
    q = operands.q.reshape(spec.batch, spec.q_len, spec.num_kv_heads, spec.group, spec.head_dim)
    q = q.swapaxes(1, 2).reshape(spec.batch, spec.num_kv_heads, -1, spec.head_dim)
    num_rows = q.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, tma_rows(num_rows) - num_rows), (0, 0)))
    if not hasattr(cache, "block_tables"):
        return Inputs(q, cache.k, cache.v, None, share)
    pages = jnp.clip(cache.block_tables, 0, len(cache.k_pages) - 1)
    return Inputs(q, cache.k_pages, cache.v_pages, pages, share)


def _launch(spec: Any, config: DecodeConfig, inputs: Inputs) -> tuple[Any, Any]:
    """out [parts, Hkv, rows, width] float32 and lse [parts, Hkv, 64] of each part, in base 2."""
    num_kv_heads = spec.num_kv_heads

    def flash_decode(gmem, out_gmem, lse_gmem, smem):
        index, heads = lax.axis_index("block"), jnp.int32(num_kv_heads)
        team, head = lax.div(index, heads), lax.rem(index, heads)
        kernel = Kernel(spec, config, gmem, out_gmem, lse_gmem, smem, team, head)
        wg = lax.axis_index("wg")
        pl.when(wg == PRODUCER)(lambda: load(kernel))
        pl.when(wg == CONSUMER)(lambda: compute(kernel))

    num_parts = config.num_teams + spec.batch
    rows, width = inputs.q.shape[2], width_of(spec.value_dim)
    return plgpu.kernel(
        flash_decode,
        out_type=(
            jax.ShapeDtypeStruct((num_parts, num_kv_heads, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((num_parts, num_kv_heads, WG_ROWS), jnp.float32),
        ),
        grid=(config.num_teams * num_kv_heads,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=(storage(spec, config),),
        compiler_params=COMPILER_PARAMS,
    )(inputs)
