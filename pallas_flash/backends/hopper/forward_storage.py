"""SMEM and barriers of the forward kernel."""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper.copies import Tile, copied, num_copies
from pallas_flash.backends.hopper.leaves import Terms
from pallas_flash.backends.hopper.storage import (
    SHARED_MEMORY_LIMIT,
    Columns,
    head_columns,
    shared_memory_bytes,
)
from pallas_flash.backends.hopper.tiling import Tiling, in_smem, num_brought
from pallas_flash.spec import AttentionSpec
from pallas_flash.terms import Q

# Queries of a consumer warpgroup: the rows of one wgmma.
WG_ROWS = 64
# Registers a thread of the producer and of a consumer may use, by number of consumer warpgroups:
# 128 * (producer + consumers) stay within the 64 K of an SM. One has enough as it is.
REGISTERS = {1: (None, 255), 2: (24, 240), 3: (32, 160)}
# Of a consumer's, those for everything but scores, probabilities and the accumulator, about.
OTHER_REGISTERS = 32
# What Pallas sets apart for reductions over rows. None here crosses warps, so little will do.
REDUCTION_SCRATCH_BYTES = 1024


class Storage(NamedTuple):
    """What a block allocates.

    The leading axis of out and lse counts warpgroups, that of k and v stages, those of q stages and
    warpgroups. `out` is None where there is no room, and the result is staged in the tile of q.
    `turn` orders the warpgroups' use of the matrix units, or is None. tiles: what is brought of the
    terms' arrays, in stages with k; near_ready, near_free: of what only near tiles read, for each
    warpgroup, or None.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any
    tiles: Terms
    near_ready: Any
    near_free: Any


def query_columns(spec: AttentionSpec) -> Columns:
    """Layout of head_dim."""
    return head_columns(spec.head_dim)


def value_columns(spec: AttentionSpec) -> Columns:
    """Layout of value_dim."""
    return head_columns(spec.value_dim)


def tiling(spec: AttentionSpec, config: Any) -> Tiling:
    """How the scores are cut into tiles: queries along rows."""
    return Tiling(spec, Q, config.block_q, config.block_kv)


def registers(spec: AttentionSpec, config: Any) -> int:
    """How many a thread of a consumer needs, about.

    Scores and accumulator are 64 rows of float32, P has 16 bits: a thread holds half a row of them.
    """
    accumulator = value_columns(spec).smem // 2
    return accumulator + config.block_kv // 2 + config.block_kv // 4 + OTHER_REGISTERS


def storage(spec: AttentionSpec, config: Any) -> Storage:
    """The scratch types of a block."""
    wgs, stages, block_kv = config.num_warpgroups, config.num_stages, config.block_kv
    qk, vo = query_columns(spec), value_columns(spec)
    tiles = tiling(spec, config)
    num_near = num_brought(tiles, near=True)
    separate = Storage(
        q=copied((config.num_q_stages, wgs, WG_ROWS, qk.smem), spec.dtype, qk, spec.q_len),
        k=copied((stages, block_kv, qk.smem), spec.dtype, qk, spec.kv_len),
        v=copied((stages, block_kv, vo.smem), spec.dtype, vo, spec.kv_len),
        out=copied((wgs, WG_ROWS, vo.smem), spec.dtype, vo, spec.q_len),
        lse=plgpu.SMEM((wgs, WG_ROWS), jnp.float32),
        q_ready=plgpu.Barrier(
            num_arrivals=num_copies(spec.q_len, WG_ROWS, qk),
            num_barriers=config.num_q_stages * wgs,
        ),
        k_ready=plgpu.Barrier(
            num_arrivals=num_copies(spec.kv_len, block_kv, qk) + num_brought(tiles),
            num_barriers=stages,
        ),
        v_ready=plgpu.Barrier(
            num_arrivals=num_copies(spec.kv_len, block_kv, vo), num_barriers=stages
        ),
        k_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=wgs) if config.takes_turns else None,
        tiles=in_smem(tiles, stages),
        near_ready=plgpu.Barrier(num_arrivals=num_near, num_barriers=wgs) if num_near else None,
        near_free=plgpu.Barrier(num_barriers=wgs) if num_near else None,
    )
    # The result can be staged in the queries' place if the next ones are not on their way there.
    out_fits_q = config.num_q_stages == 1 and (vo.smem, vo.tile) == (qk.smem, qk.tile)
    if out_fits_q and shared_memory_bytes(separate) + REDUCTION_SCRATCH_BYTES > SHARED_MEMORY_LIMIT:
        return separate._replace(out=None)
    return separate


class Copied(NamedTuple):
    """The tiles that TMA copies, as it does."""

    q: Tile
    k: Tile
    v: Tile
    out: Tile | None
