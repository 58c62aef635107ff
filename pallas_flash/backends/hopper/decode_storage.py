"""SMEM and barriers of the decode kernel, and its configuration."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper.storage import (
    NUM_SMS,
    TMA_ROWS,
    Columns,
    head_columns,
    shared_memory_bytes,
    tiled,
    tma_rows,
)
from pallas_flash.scores import Chain, Softcap
from pallas_flash.terms import parts

HEAD_DIMS = range(16, 257, 8)
DTYPES = (jnp.bfloat16, jnp.float16)
# Queries of a tile: the rows of one wgmma.
WG_ROWS = 64
# Keys of a block. 128 are no faster: 0.3605 ms for 0.3566 at 8 x 32768, H100, JAX 0.11.2.
BLOCK_KV = 64
REDUCTION_SCRATCH_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel cuts its work.

    Fields:
      num_stages: blocks of K and V in flight.
      num_teams: teams of thread blocks, one block for each kv head, that share the keys out.

    Raises:
      ValueError: if a number is outside its range.
    """

    num_stages: int
    num_teams: int

    def __post_init__(self):
        for name in ("num_stages", "num_teams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def shared_memory_bytes(self, spec: Any) -> int:
        """SMEM of a block, from what the kernel allocates."""
        return shared_memory_bytes(storage(spec, self)) + REDUCTION_SCRATCH_BYTES


class Storage(NamedTuple):
    """What a block allocates. The leading axis of k, v and their barriers counts stages."""

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


def columns(dim: int) -> Columns:
    """Layout of a head dimension."""
    return head_columns(dim)


def copies(spec: Any) -> int:
    """How many copies bring the K of a block: one, unless pages are smaller."""
    return max(1, BLOCK_KV // getattr(spec.cache, "page_size", BLOCK_KV))


def storage(spec: Any, config: DecodeConfig) -> Storage:
    """The scratch types of a block."""
    stages = config.num_stages
    qk, vo = columns(spec.head_dim), columns(spec.value_dim)
    arrivals = copies(spec)
    return Storage(
        q=tiled((WG_ROWS, qk.smem), spec.dtype, qk.tile),
        k=tiled((stages, BLOCK_KV, qk.smem), spec.dtype, qk.tile),
        v=tiled((stages, BLOCK_KV, vo.smem), spec.dtype, vo.tile),
        out=tiled((WG_ROWS, vo.smem), jnp.float32, min(vo.tile, 32)),
        lse=plgpu.SMEM((WG_ROWS,), jnp.float32),
        q_ready=plgpu.Barrier(),
        k_ready=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        k_free=plgpu.Barrier(num_barriers=stages),
        v_free=plgpu.Barrier(num_barriers=stages),
    )


def unsupported(spec: Any) -> str | None:
    """The reason why the kernel cannot serve a `DecodeSpec`, or None."""
    if spec.dtype not in DTYPES:
        return f"dtype={spec.dtype} must be bfloat16 or float16"
    for name in ("head_dim", "value_dim"):
        dim = getattr(spec, name)
        if dim not in HEAD_DIMS or columns(dim).gmem != dim:
            return f"{name}={dim} must be a multiple of 8 from 16 to 64, or of 16 up to 256"
    if spec.mask is not None:
        return f"masks are not in the Hopper decode kernel: {type(spec.mask).__name__}"
    for part in parts(spec.score_mod):
        if not isinstance(part, Softcap | Chain):
            return f"the Hopper decode kernel has no score mod but Softcap: {type(part).__name__}"
    if spec.q_len * spec.group > WG_ROWS:
        return f"{spec.q_len} queries of {spec.group} heads that share keys are more than {WG_ROWS}"
    page_size = getattr(spec.cache, "page_size", None)
    if page_size is None and tma_rows(spec.cache.num_slots) != spec.cache.num_slots:
        return f"slots={spec.cache.num_slots} must be a multiple of {TMA_ROWS}"
    if page_size is not None and (
        page_size % TMA_ROWS or (page_size % BLOCK_KV and BLOCK_KV % page_size)
    ):
        return f"page_size={page_size} must be 8, 16, 32 or a multiple of 64"
    return None


# K and V in flight of a block, in bytes. More is slower: 0.3486 ms for 0.3521 with 160 KB at
# 8 x 32768, 0.545 for 0.585 at 64 rows of 128 to 32768 keys, H100, JAX 0.11.2.
BYTES_IN_FLIGHT = 64 * 2**10


def default_decode_config(spec: Any) -> DecodeConfig:
    """A sound configuration for any head_dim and value_dim of 16 to 256."""
    width = columns(spec.head_dim).smem + columns(spec.value_dim).smem
    bytes_per_stage = BLOCK_KV * width * spec.dtype.itemsize
    return DecodeConfig(
        num_stages=max(2, -(-BYTES_IN_FLIGHT // bytes_per_stage)),
        num_teams=max(1, NUM_SMS // spec.num_kv_heads),
    )
