"""Forward of dense attention on Hopper: K and V stream past the queries of a block.

Source: FlashAttention-2 (Dao 2023), algorithm 1, with the warp specialisation and the ping-pong of
FlashAttention-3 (Shah et al. 2024), section 3.1. One warpgroup loads by TMA, the others each own
64 queries; P feeds the second product from registers. Exponentials are taken in base 2: m and the
scores that it is compared with are multiplied by ``scale * LOG2_E``.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper import masking
from pallas_flash.backends.hopper.config import Config, ForwardConfig
from pallas_flash.backends.hopper.copies import in_gmem, out_of_gmem, shape_in_gmem, split
from pallas_flash.backends.hopper.forward_compute import compute
from pallas_flash.backends.hopper.forward_kernel import Inputs, Kernel
from pallas_flash.backends.hopper.forward_load import load
from pallas_flash.backends.hopper.forward_storage import (
    Copied,
    query_columns,
    storage,
    tiling,
    value_columns,
)
from pallas_flash.backends.hopper.forward_walk import Walk, plan
from pallas_flash.backends.hopper.leaves import Terms, spelled_out, with_numbers
from pallas_flash.backends.hopper.padding import Source, unused_keys, without_unused
from pallas_flash.backends.hopper.query_kernel import COMPILER_PARAMS
from pallas_flash.backends.hopper.storage import round_up
from pallas_flash.spec import AttentionSpec, Operands


def forward(spec: AttentionSpec, config: Config, operands: Operands) -> tuple[Any, Any]:
    """out [B, Tq, Hq, Dv] in q's dtype and lse [B, Hq, Tq] float32, natural log."""
    spec, operands = spelled_out(spec), with_numbers(operands)
    tiles, mask = config.forward, operands.mask
    columns, v_columns = query_columns(spec), value_columns(spec)
    walk, assigned = plan(spec, tiles, mask)
    # P is 0 there, but its product with V would spread 0 * NaN.
    unused = unused_keys(mask, spec.batch, spec.q_len, spec.kv_len)
    inputs = Inputs(
        q=in_gmem(operands.q, columns),
        k=Source(in_gmem(operands.k, columns)),
        v=without_unused(in_gmem(operands.v, v_columns), unused, v_columns, tiles.block_kv),
        assigned=assigned,
        terms=Terms(*map(tiling(spec, tiles).in_gmem, Terms.of(operands))),
        ids=masking.id_bounds(mask),
    )
    out, lse = _launch(spec, tiles, walk, inputs)
    return out_of_gmem(out, spec.value_dim), lse[:, :, : spec.q_len]


def _launch(
    spec: AttentionSpec, config: ForwardConfig, walk: Walk, inputs: Inputs
) -> tuple[Any, Any]:
    """out as it is copied, and lse over whole tiles."""

    def flash_attention_forward(gmem, out_gmem, lse_gmem, smem):
        kernel = Kernel(spec, config, walk, gmem, *split(smem, Copied, spec), out_gmem, lse_gmem)
        kernel.run(partial(load, kernel, v_is_late=True), partial(compute, kernel))

    of_out = spec.batch, spec.q_len, spec.num_q_heads, spec.value_dim
    columns = value_columns(spec)
    lse_rows = round_up(spec.q_len, config.block_q)
    return plgpu.kernel(
        flash_attention_forward,
        out_type=(
            jax.ShapeDtypeStruct(shape_in_gmem(of_out, columns), spec.dtype),
            # Whole tiles: a row that ended inside of one would be stored over the next row.
            jax.ShapeDtypeStruct((spec.batch, spec.num_q_heads, lse_rows), jnp.float32),
        ),
        grid=(inputs.assigned.tiles.shape[0],),
        grid_names=("block",),
        num_threads=config.num_warpgroups + 1,
        thread_name="wg",
        scratch_types=(storage(spec, config),),
        compiler_params=COMPILER_PARAMS,
    )(inputs)
