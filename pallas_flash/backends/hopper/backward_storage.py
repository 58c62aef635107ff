"""SMEM and barriers of the backward kernels."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper import array_gradients
from pallas_flash.backends.hopper.copies import Tile, copied, is_split, num_copies
from pallas_flash.backends.hopper.leaves import Terms, near_of
from pallas_flash.backends.hopper.storage import (
    TMA_SMEM_ALIGNMENT,
    Columns,
    head_columns,
    round_up,
    tiled,
)
from pallas_flash.backends.hopper.tiling import Tiling, in_smem, num_brought
from pallas_flash.scores.score_mod import NEAR
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import KV

# dS (and P) are written for step t + 1 while the other warpgroup still multiplies those of step t.
NUM_SCORE_STAGES = 2


class Storage(NamedTuple):
    """What a block allocates; the leading axis of q, lse_log2, dout, delta is a stage.

    ds and p hold scores of two steps, with keys along rows, or along columns where the product for
    dQ is transposed. p and p_ready exist where the warpgroups share the keys; dq, each warpgroup's
    part of a tile on its way out, where they do not; none of ds, dq, ds_ready and k_read where
    another kernel computes dQ. tiles: what is brought of the
    terms' arrays, in stages with q; near_ready, near_free: of what only near tiles read, for each
    warpgroup. gradients: of the score mod's arrays, on their way out.
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
    p_ready: Any
    ds_ready: Any
    k_read: Any
    tiles: Terms
    near_ready: Any
    near_free: Any
    gradients: array_gradients.Refs


# Math warpgroups of a block; one more warpgroup only issues TMA loads.
NUM_MATH_WGS = 2
# Keys of a math warpgroup: the rows of one wgmma.
WG_KEYS = 64


def seen[T: (AttentionSpec, Operands)](owner: T, config: Any) -> T:
    """What the kernel sees of a request: in some configurations all tiles are near.

    Where warpgroups share their keys, since what only near tiles read is brought for each one's own
    keys; with one stage of queries, since at head_dim 128 sums for the others have no room beside.
    """
    has_others = not config.shares_keys and config.num_q_stages > 1
    if has_others or owner.score_mod is None:
        return owner
    return dataclasses.replace(owner, score_mod=owner.score_mod.at(NEAR))


def tiling(spec: AttentionSpec, config: Any) -> Tiling:
    """How the scores are cut into tiles: keys along rows."""
    return Tiling(spec, KV, config.block_kv, config.block_q)


def query_columns(spec: AttentionSpec, config: Any) -> Columns:
    """Layout of head_dim: cut in two where the warpgroups split dQ by columns."""
    return head_columns(spec.head_dim, parts=2 if config.splits_dq_columns else 1)


def value_columns(spec: AttentionSpec) -> Columns:
    """Layout of value_dim."""
    return head_columns(spec.value_dim)


def dq_part(spec: AttentionSpec, config: Any) -> tuple[int, int]:
    """Shape of the part of a dQ tile that one warpgroup computes and adds to memory."""
    width = query_columns(spec, config).smem
    if config.splits_dq_columns:
        return config.block_q, width // 2
    return config.block_q // 2, width


def dq_dtype(spec: AttentionSpec) -> Any:
    """Of what is added to dQ in memory."""
    return jnp.int32 if spec.deterministic else jnp.float32


def overlaps_steps(spec: AttentionSpec, config: Any) -> bool:
    """Whether a step of `backward_by_keys` begins while the one before it ends.

    Forward and backward 1.646 ms for 1.708 at 4 x 4096 x 16 x 128 causal, 1.939 for 1.976 with
    softcap, 2.091 for 1.980 with dropout; at head_dim 80 1.480 for 1.482, without a mask 2.694 for
    2.567; 2.029 for 1.780 at 4 x 4095, where Q is copied in pieces, and is handed back later here.
    H100, JAX 0.11.2. In float16 ptxas serialises all products (its warning C7512), 428 TFLOP/s for
    557. A score mod's arrays need more of a step for their gradients than it keeps.
    """
    has_tiles = config.block_q == 64 and config.num_q_stages > 1 and not config.shares_keys
    is_faster = max(spec.head_dim, spec.value_dim) > 96 and not is_split(spec.q_len)
    is_faster &= spec.dtype == jnp.bfloat16 and spec.dropout is None and not config.has_dq_kernel
    needs_more = array_gradients.leaves(spec) or near_of(spec.score_mod) is not None
    return has_tiles and is_faster and not needs_more


def s_starts_from_rows(spec: AttentionSpec, config: Any) -> bool:
    """Whether S begins as -lse over the scale, and not as 0; then dP begins as -delta, too.

    So lse and delta take no registers beside them, and nothing is to be subtracted: causal 598
    TFLOP/s for 559 at head_dim 128, 490 for 478 at 64, 4 x 4096, but without a mask 487 for 529 at
    64. H100, JAX 0.11.2. The logits must be S alone, and all of dP must be kept.
    """
    is_plain = spec.score_mod is None and spec.dropout is None and spec.scale != 0
    is_faster = config.block_q != 128 or spec.mask is not None
    is_faster &= not overlaps_steps(spec, config)
    return is_plain and is_faster and not config.shares_keys


def dp_starts_from_rows(spec: AttentionSpec, config: Any) -> bool:
    """Whether dP begins as -delta: also where a score mod needs S as it is.

    Forward and backward 1.386 ms for 1.418 with T5's bias, 2.029 for 2.069 with softcap (the cases
    of benchmarks/features.py), H100, JAX 0.11.2.
    """
    if spec.score_mod is None and not overlaps_steps(spec, config):
        return s_starts_from_rows(spec, config)
    return spec.dropout is None and not config.shares_keys


def rows_of_keys(config: Any) -> int:
    """Of a gradient of keys or values that a math warpgroup stores: all where they share them."""
    return config.block_kv if config.shares_keys else WG_KEYS


def hands_p_over(spec: AttentionSpec, config: Any) -> bool:
    """Whether one warpgroup computes P for the other one, too.

    The gradients of arrays need the scores beside P, in float32, for which SMEM has no room: then
    the other one computes both again.
    """
    return config.shares_keys and not array_gradients.leaves(spec)


def storage(spec: AttentionSpec, config: Any) -> Storage:
    """What a block allocates."""
    block_q, block_kv = config.block_q, config.block_kv
    dtype, f32 = spec.dtype, jnp.float32
    qk, vo = query_columns(spec, config), value_columns(spec)
    rows, columns = dq_part(spec, config)
    dq_tile = next(tile for tile in (32, 16, 8) if columns % tile == 0)
    shared, adds_dq = config.shares_keys, not config.has_dq_kernel
    score_tile = (block_q, block_kv) if config.transposes_dq else (block_kv, block_q)
    score_shape = (NUM_SCORE_STAGES, *score_tile)
    # Every stage of a row starts where TMA can write it.
    row_width = round_up(block_q, TMA_SMEM_ALIGNMENT // jnp.dtype(f32).itemsize)
    own_keys = rows_of_keys(config)

    def barriers(count=1, arrivals=2):
        # Two arrivals: one from each math warpgroup.
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    def arrivals_of_queries(columns):
        # One more for the numbers beside them.
        return num_copies(spec.q_len, block_q, columns) + 1

    tiles = tiling(spec, config)
    num_near = num_brought(tiles, near=True)
    return Storage(
        q=copied((config.num_q_stages, block_q, qk.smem), dtype, qk, spec.q_len),
        lse_log2=plgpu.SMEM((config.num_q_stages, row_width), f32),
        dout=copied((config.num_dout_stages, block_q, vo.smem), dtype, vo, spec.q_len),
        delta=plgpu.SMEM((config.num_dout_stages, row_width), f32),
        k=copied((block_kv, qk.smem), dtype, qk, spec.kv_len, own_keys),
        v=copied((block_kv, vo.smem), dtype, vo, spec.kv_len, own_keys),
        p=tiled(score_shape, dtype, qk.tile) if hands_p_over(spec, config) else None,
        # Swizzled like Q and K, which it meets in products.
        ds=tiled(score_shape, dtype, qk.tile) if adds_dq else None,
        dq=tiled((NUM_MATH_WGS, rows, columns), dq_dtype(spec), dq_tile)
        if adds_dq and not shared
        else None,
        kv_ready=barriers(
            arrivals=sum(num_copies(spec.kv_len, block_kv, x, own_keys) for x in (qk, vo))
        ),
        q_ready=barriers(config.num_q_stages, arrivals_of_queries(qk) + num_brought(tiles)),
        dout_ready=barriers(config.num_dout_stages, arrivals_of_queries(vo)),
        q_free=barriers(config.num_q_stages),
        dout_free=barriers(config.num_dout_stages),
        p_ready=barriers(NUM_SCORE_STAGES, arrivals=1) if shared else None,
        ds_ready=barriers(NUM_SCORE_STAGES, arrivals=1 if shared else 2) if adds_dq else None,
        k_read=barriers(arrivals=1 if shared else 2) if adds_dq else None,
        tiles=in_smem(tiles, config.num_q_stages),
        near_ready=barriers(NUM_MATH_WGS, num_near) if num_near else None,
        near_free=barriers(NUM_MATH_WGS, 1) if num_near else None,
        gradients=array_gradients.in_smem(tiles, WG_KEYS),
    )


class Copied(NamedTuple):
    """The tiles that TMA copies, as it does. From those of k and v their gradients are stored."""

    q: Tile
    dout: Tile
    k: Tile
    v: Tile
