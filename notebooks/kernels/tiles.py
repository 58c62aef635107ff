"""What the kernels of this folder share: tiles in shared memory, products, one step of softmax.

Arrays in memory are [batch, length, heads, head_dim] bfloat16; lengths are whole tiles.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

# Queries of a warpgroup: the 64 rows of one matrix instruction of Hopper (wgmma).
ROWS = 64
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# How a matrix lies in the registers of a warpgroup, and a vector with a number for each row of it.
MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(1)
PER_COLUMN = MATRIX.reduce(0)
# How TMA lays a tile down so that wgmma reads it without bank conflicts: 8 rows x 128 bytes.
BF16_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
F32_TILE = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024)


def bf16_tile(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=BF16_TILE)


def f32_tile(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.float32, transforms=F32_TILE)


class State(NamedTuple):
    """What has been summed for 64 queries: m_log2, l [64] and o [64, head_dim], float32.

    m_log2: the largest score so far, times log2(e). l: sum of exp2(s - m_log2). o: not divided yet.
    """

    m_log2: Any
    l: Any
    o: Any


def empty_state(head_dim: int) -> State:
    return State(
        plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW),
        plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), MATRIX),
    )


def per_row(x: Any, like: Any) -> Any:
    """A matrix shaped like `like` whose rows are constant."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def product(a: Any, b: Any, meanwhile: Callable[[], None] | None = None) -> Any:
    """a @ b in float32: two tiles in shared memory, the result in registers, awaited.

    meanwhile: called when the product has been issued and is not awaited yet.
    """

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        if meanwhile is not None:
            meanwhile()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def online_softmax(s: Any, m_log2: Any, l: Any, scale: float) -> tuple[Any, Any, Any, Any]:
    """p [64, block_kv] of raw scores s, the new m_log2 and l, and what older sums shrink by."""
    new_m = jnp.maximum(m_log2, s.max(axis=1) * (scale * LOG2_E))
    alpha = jnp.exp2(m_log2 - new_m)
    p = jnp.exp2(s * (scale * LOG2_E) - per_row(new_m, s))
    return p, new_m, l * alpha + p.sum(axis=1), alpha


def causal_scores(s: Any, q_start: Any, kv_start: Any) -> Any:
    """s with -inf where the key comes after the query."""
    q_pos = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=MATRIX) + q_start
    kv_pos = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=MATRIX) + kv_start
    return jnp.where(kv_pos <= q_pos, s, -jnp.inf)


def store_tile(x: Any, smem: Any, gmem: Any) -> None:
    """Registers -> shared memory -> memory, and waits."""
    smem[...] = x.astype(smem.dtype)
    # What the threads wrote becomes visible to the copy engine.
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)
    plgpu.wait_smem_to_gmem(0)


def like(x: jax.Array, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype)
