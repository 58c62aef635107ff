"""SMEM and barriers of the kernel for dQ, whose blocks own queries."""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper.copies import Tile, copied, num_copies
from pallas_flash.backends.hopper.forward_storage import (
    OTHER_REGISTERS,
    WG_ROWS,
    query_columns,
    tiling,
    value_columns,
)
from pallas_flash.backends.hopper.leaves import Terms
from pallas_flash.backends.hopper.tiling import in_smem, num_brought
from pallas_flash.spec import AttentionSpec


class Storage(NamedTuple):
    """What a block allocates.

    The leading axis of k and v counts stages, that of q, out and dout stages and warpgroups, that
    of delta warpgroups. dQ is staged in the place of its queries. tiles: what is brought of the
    terms' arrays, in stages with k; near_ready, near_free: of what only near tiles read, for each
    warpgroup, or None.
    """

    q: Any
    out: Any
    dout: Any
    k: Any
    v: Any
    delta: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    tiles: Terms
    near_ready: Any
    near_free: Any


def registers(spec: AttentionSpec, config: Any) -> int:
    """How many a thread of a consumer needs, about.

    S, dP and dQ are 64 rows of float32, a thread holds half a row; dS comes in their place.
    """
    return query_columns(spec).smem // 2 + config.block_kv + OTHER_REGISTERS


def storage(spec: AttentionSpec, config: Any) -> Storage:
    """The scratch types of a block."""
    wgs, stages, block_kv = config.num_warpgroups, config.num_stages, config.block_kv
    qk, vo = query_columns(spec), value_columns(spec)
    tiles = tiling(spec, config)
    num_near = num_brought(tiles, near=True)
    queries = config.num_q_stages, wgs, WG_ROWS

    def barriers(arrivals):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)

    return Storage(
        q=copied((*queries, qk.smem), spec.dtype, qk, spec.q_len),
        out=copied((*queries, vo.smem), spec.dtype, vo, spec.q_len),
        dout=copied((*queries, vo.smem), spec.dtype, vo, spec.q_len),
        k=copied((stages, block_kv, qk.smem), spec.dtype, qk, spec.kv_len),
        v=copied((stages, block_kv, vo.smem), spec.dtype, vo, spec.kv_len),
        delta=plgpu.SMEM((wgs, WG_ROWS), jnp.float32),
        q_ready=plgpu.Barrier(
            num_arrivals=sum(num_copies(spec.q_len, WG_ROWS, x) for x in (qk, vo, vo)),
            num_barriers=config.num_q_stages * wgs,
        ),
        k_ready=barriers(num_copies(spec.kv_len, block_kv, qk) + num_brought(tiles)),
        v_ready=barriers(num_copies(spec.kv_len, block_kv, vo)),
        k_free=barriers(wgs),
        v_free=barriers(wgs),
        tiles=in_smem(tiles, stages),
        near_ready=plgpu.Barrier(num_arrivals=num_near, num_barriers=wgs) if num_near else None,
        near_free=plgpu.Barrier(num_barriers=wgs) if num_near else None,
    )


class Copied(NamedTuple):
    """The tiles that TMA copies, as it does. dQ is stored from those of q."""

    q: Tile
    out: Tile
    dout: Tile
    k: Tile
    v: Tile
