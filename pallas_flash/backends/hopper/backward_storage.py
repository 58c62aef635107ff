"""SMEM and barriers of the backward kernels."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper import array_gradients, row_starts
from pallas_flash.backends.hopper.copies import Tile, copied, num_copies
from pallas_flash.backends.hopper.leaves import Terms
from pallas_flash.backends.hopper.products import INSTRUCTION_ROWS, STEP
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


class Storage(NamedTuple):
    """What a block allocates; the leading axis of q, lse_log2, starts, dout, delta is a stage.

    lse_log2 and delta, or for one or both of them starts, with its selectors: see `row_starts`. ds
    and p hold scores of several steps, with keys along rows. p and p_ready exist where the
    warpgroups share the keys; none of ds, ds_ready and ds_free where another kernel computes dQ.
    tiles: what is brought of the terms' arrays, in stages with q; near_ready, near_free: of what
    only near tiles read, for each warpgroup. gradients: those of the score mod's arrays, on their
    way out.
    """

    q: Any
    lse_log2: Any
    starts: Any
    selectors: Any
    dout: Any
    delta: Any
    k: Any
    v: Any
    p: Any
    ds: Any
    kv_ready: Any
    q_ready: Any
    dout_ready: Any
    q_free: Any
    dout_free: Any
    p_ready: Any
    ds_ready: Any
    ds_free: Any
    tiles: Terms
    near_ready: Any
    near_free: Any
    gradients: array_gradients.Refs


# Math warpgroups of a block; one more issues TMA loads and adds to dQ.
NUM_MATH_WGS = 2
# Keys of a math warpgroup: the rows of one wgmma.
WG_KEYS = 64
# Queries of a part of a dQ tile.
DQ_ROWS = 64


def registers(config: Any) -> tuple[int, int]:
    """Registers a thread of the loading and of a math warpgroup: 504 for three, all there are."""
    return (24, 240) if config.has_dq_kernel else (72, 216)


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


def query_columns(spec: AttentionSpec) -> Columns:
    """Layout of head_dim: a part of a dQ tile has the columns of a swizzle tile."""
    return head_columns(spec.head_dim)


def value_columns(spec: AttentionSpec) -> Columns:
    """Layout of value_dim."""
    return head_columns(spec.value_dim)


def dq_part(spec: AttentionSpec) -> tuple[int, int]:
    """Shape of the parts of a dQ tile that are multiplied and added to memory at a time.

    64 columns at a time read dS half as often as 32 do: 2.24 ms for 2.40, 4 x 4096 x 16 x 128 full,
    1.25 for 1.31 causal. H100, JAX 0.11.2.
    """
    return DQ_ROWS, query_columns(spec).tile


def dq_dtype(spec: AttentionSpec) -> Any:
    """Of what is added to dQ in memory."""
    return jnp.int32 if spec.deterministic else jnp.float32


def s_starts_from_rows(spec: AttentionSpec, config: Any) -> bool:
    """Whether S begins as -lse over the scale, and not as 0: the logits must be S alone.

    Nothing is to be subtracted then (`row_starts`).
    """
    # Far from where not even the largest number times the scale makes P 0.
    is_plain = spec.score_mod is None and abs(spec.scale) > 1e-30
    return is_plain and not config.shares_keys


def dp_starts_from_rows(spec: AttentionSpec, config: Any) -> bool:
    """Whether dP begins as -delta: all of it must be kept."""
    return spec.dropout is None and not config.shares_keys


def dp_follows_s(spec: AttentionSpec, config: Any) -> bool:
    """Whether dP is issued behind P, and not with S: else ptxas lacks registers for both.

    Where the loading warpgroup adds to dQ, at head_dim 128. Where there are registers dP with S is
    faster: 2.51 ms for 2.61, 4 x 4096 x 32 x 64 full, 0.735 for 0.757 at 16 x 1024 x 16 x 128 with
    a kernel for dQ. H100, JAX 0.11.2.
    """
    is_wide = query_columns(spec).smem + value_columns(spec).smem > 192
    return is_wide and not config.has_dq_kernel


def num_score_stages(spec: AttentionSpec, config: Any) -> int:
    """Steps whose dS (and P) the math warpgroups may have written and nobody has multiplied yet.

    4 x 4096, ms with three and with two: 16 x 128 full 2.095 and 2.139, but causal 1.232 and 1.215,
    32 x 64 full 2.53 and 2.51. H100, JAX 0.11.2.
    """
    return 3 if dp_follows_s(spec, config) and spec.mask is None and not config.shares_keys else 2


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
    qk, vo = query_columns(spec), value_columns(spec)
    shared, adds_dq = config.shares_keys, not config.has_dq_kernel
    num_scores = num_score_stages(spec, config)
    score_shape = (num_scores, block_kv, block_q)
    s_starts, dp_starts = s_starts_from_rows(spec, config), dp_starts_from_rows(spec, config)
    has_starts = s_starts or dp_starts
    # Every stage of a row starts where TMA can write it.
    row_width = round_up(block_q, TMA_SMEM_ALIGNMENT // jnp.dtype(f32).itemsize)
    own_keys = rows_of_keys(config)

    def barriers(count=1, arrivals=2):
        # Two arrivals: one from each math warpgroup.
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    def per_query(num_stages):
        return plgpu.SMEM((num_stages, row_width), f32)

    tiles = tiling(spec, config)
    # Beside Q come lse, or what S and dP begin as, or both; beside dO may come delta.
    arrivals_of_q = num_copies(spec.q_len, block_q, qk) + (not s_starts) + has_starts
    arrivals_of_dout = num_copies(spec.q_len, block_q, vo) + (not dp_starts)
    arrivals_of_kv = sum(num_copies(spec.kv_len, block_kv, x, own_keys) for x in (qk, vo))
    starts = (config.num_q_stages, block_q, STEP), row_starts.DTYPE, STEP
    selectors = (2, INSTRUCTION_ROWS, STEP), row_starts.DTYPE, STEP
    num_near = num_brought(tiles, near=True)
    return Storage(
        q=copied((config.num_q_stages, block_q, qk.smem), dtype, qk, spec.q_len),
        lse_log2=None if s_starts else per_query(config.num_q_stages),
        starts=tiled(*starts) if has_starts else None,
        selectors=tiled(*selectors) if has_starts else None,
        dout=copied((config.num_dout_stages, block_q, vo.smem), dtype, vo, spec.q_len),
        delta=None if dp_starts else per_query(config.num_dout_stages),
        k=copied((block_kv, qk.smem), dtype, qk, spec.kv_len, own_keys),
        v=copied((block_kv, vo.smem), dtype, vo, spec.kv_len, own_keys),
        p=tiled(score_shape, dtype, qk.tile) if hands_p_over(spec, config) else None,
        ds=tiled(score_shape, dtype, DQ_ROWS) if adds_dq else None,
        kv_ready=barriers(arrivals=arrivals_of_kv + has_starts),
        q_ready=barriers(config.num_q_stages, arrivals_of_q + num_brought(tiles)),
        dout_ready=barriers(config.num_dout_stages, arrivals_of_dout),
        q_free=barriers(config.num_q_stages),
        dout_free=barriers(config.num_dout_stages),
        p_ready=barriers(num_scores, arrivals=1) if shared else None,
        ds_ready=barriers(num_scores, arrivals=1 if shared else 2) if adds_dq else None,
        ds_free=barriers(num_scores, arrivals=1) if adds_dq else None,
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
