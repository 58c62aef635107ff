"""SMEM and barriers of the backward kernels."""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper.storage import Columns, head_columns, tiled
from pallas_flash.spec import AttentionSpec

# dS (and P) are written for step t + 1 while the other warpgroup still multiplies those of step t.
NUM_SCORE_STAGES = 2


class Storage(NamedTuple):
    """What a block allocates; the leading axis of q, lse_log2, dout, delta is a stage.

    ds and p hold scores of two steps, dq each warpgroup's part. p, scrubbed and outputs_ready
    exist where the warpgroups share the keys, k_read where they do not.
    """

    q: Any
    lse_log2: Any
    dout: Any
    delta: Any
    k: Any
    v: Any
    p: Any
    ds: Any
    dq: Any
    kv_ready: Any
    q_ready: Any
    dout_ready: Any
    q_free: Any
    dout_free: Any
    ds_ready: Any
    k_read: Any
    scrubbed: Any
    outputs_ready: Any


def query_columns(spec: AttentionSpec, config: Any) -> Columns:
    """Layout of head_dim: cut in two where the warpgroups share a product by columns."""
    if config.splits_columns:
        return head_columns(spec.head_dim, parts=2, widest_tile=32)
    return head_columns(spec.head_dim, parts=2 if config.splits_dq_columns else 1)


def value_columns(spec: AttentionSpec, config: Any) -> Columns:
    """Layout of value_dim."""
    if config.splits_columns:
        return head_columns(spec.value_dim, parts=2, widest_tile=32)
    return head_columns(spec.value_dim, parts=1)


def dq_part(spec: AttentionSpec, config: Any) -> tuple[int, int]:
    """Shape of the part of a dQ tile that one warpgroup computes and adds to memory."""
    width = query_columns(spec, config).smem
    if config.splits_dq_columns:
        return config.block_q, width // 2
    return config.block_q // 2, width


def storage(spec: AttentionSpec, config: Any) -> Storage:
    """What a block allocates."""
    block_q, block_kv = config.block_q, config.block_kv
    dtype, f32 = spec.dtype, jnp.float32
    qk, vo = query_columns(spec, config), value_columns(spec, config)
    dq_shape = dq_part(spec, config)
    dq_tile = next(tile for tile in (32, 16, 8) if dq_shape[1] % tile == 0)
    score_shape = (NUM_SCORE_STAGES, block_kv, block_q)

    # One arrival from each math warpgroup, or one for each of two TMA copies.
    both = plgpu.Barrier(num_arrivals=2)

    def each(count):
        return plgpu.Barrier(num_arrivals=2, num_barriers=count)

    shared = config.splits_columns
    return Storage(
        q=tiled((config.num_q_stages, block_q, qk.smem), dtype, qk.tile),
        lse_log2=plgpu.SMEM((config.num_q_stages, block_q), f32),
        dout=tiled((config.num_dout_stages, block_q, vo.smem), dtype, vo.tile),
        delta=plgpu.SMEM((config.num_dout_stages, block_q), f32),
        k=tiled((block_kv, qk.smem), dtype, qk.tile),
        v=tiled((block_kv, vo.smem), dtype, vo.tile),
        # The two operands of a product must be swizzled alike: P meets dO, dS meets Q and K.
        p=tiled(score_shape, dtype, vo.tile) if shared else None,
        ds=tiled(score_shape, dtype, qk.tile),
        dq=tiled((2, *dq_shape), f32, dq_tile),
        kv_ready=both,
        q_ready=each(config.num_q_stages),
        dout_ready=each(config.num_dout_stages),
        q_free=each(config.num_q_stages),
        dout_free=each(config.num_dout_stages),
        ds_ready=each(NUM_SCORE_STAGES),
        k_read=None if shared else both,
        scrubbed=both if shared else None,
        outputs_ready=both if shared else None,
    )
