"""A float32 sum of dQ in GMEM that math warpgroups add to from their registers.

A part of a dQ tile lies there as a product leaves it in a warpgroup's registers: for every eight
columns 16 bytes of each thread, two columns of a row and the same two of the row eight below. So a
warp adds 512 bytes side by side, without a way through SMEM; `dq_of_sum` puts them in order.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import getelementptr, memref_ptr
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.backends.hopper.backward_storage import NUM_MATH_WGS, dq_part, query_columns
from pallas_flash.backends.hopper.config import BackwardConfig
from pallas_flash.backends.hopper.storage import MATRIX, divmod_of, tiled, tma_rows
from pallas_flash.spec import AttentionSpec

WG_THREADS = 128
# Numbers that a thread adds at once.
VECTOR = 4


def dq_sum_shape(spec: AttentionSpec, config: BackwardConfig) -> tuple[int, ...]:
    """[B, Hq, parts of tiles, numbers of a part]: a tile has a part for each math warpgroup."""
    parts = pl.cdiv(spec.q_len, config.block_q) * NUM_MATH_WGS
    return spec.batch, spec.num_q_heads, parts, math.prod(dq_part(spec, config))


def add(part_gmem: Any, dq: Any) -> None:
    """Adds a matrix in registers to its part of the sum."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), MATRIX))
    def add_fragments(_, part, dq):
        void = ir.Type.parse("!llvm.void")
        for address, registers in _fragments(part, dq.registers):
            numbers = [vector.extract(pair, [], [i]) for pair in registers for i in range(2)]
            ptx = "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};"
            llvm.inline_asm(void, [address, *numbers], ptx, "l,f,f,f,f", has_side_effects=True)

    add_fragments(part_gmem, dq)


def _load(part_gmem: Any, rows: int, columns: int) -> Any:
    """The matrix in a part of the sum."""
    result = plgpu.ShapeDtypeStruct((rows, columns), jnp.dtype(jnp.float32), layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def load_fragments(_, part):
        layout, f32 = MATRIX.to_mgpu(), ir.F32Type.get()
        four, two = (ir.VectorType.get((n,), f32) for n in (VECTOR, 2))
        registers = np.empty(layout.registers_shape((rows, columns)), object)
        for address, places in _fragments(part, np.arange(registers.size)):
            loaded = llvm.load(four, address)
            numbers = [vector.extract(loaded, [], [i]) for i in range(VECTOR)]
            for i, place in enumerate(places):
                pair = vector.from_elements(two, numbers[2 * i : 2 * i + 2])
                registers.flat[place] = pair
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load_fragments(part_gmem)


def _fragments(part: Any, registers: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """For each 16 bytes that a thread has of a part: their address, and its two registers."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    thread = arith.remui(mgpu.thread_idx(), mgpu.c(WG_THREADS, i32))
    place = arith.muli(thread, mgpu.c(VECTOR, i32))
    own = getelementptr(memref_ptr(part), [place], f32)
    for i, pair in enumerate(registers.reshape(-1, 2)):
        yield getelementptr(own, [i * WG_THREADS * VECTOR], f32), pair


def dq_of_sum(spec: AttentionSpec, config: BackwardConfig, dq_sum: Any) -> Any:
    """dQ [B, Tq, Hq, D] in the spec's dtype, with its scale."""
    num_tiles = pl.cdiv(spec.q_len, config.block_q)
    qk, (rows, columns) = query_columns(spec, config), dq_part(spec, config)

    def flash_attention_dq(sum_gmem, dq_gmem, dq_smem):
        wg = lax.axis_index("wg")
        batch_and_head, tile = divmod_of(lax.axis_index("tile"), num_tiles)
        batch, head = divmod_of(batch_and_head, spec.num_q_heads)
        part = tile * NUM_MATH_WGS + wg
        dq = _load(sum_gmem.at[batch, head, part], rows, columns) * spec.scale
        part_smem = dq_smem.at[wg]
        part_smem[...] = dq.astype(spec.dtype)
        plgpu.commit_smem()
        own = pl.ds(tile * rows, rows), head, pl.ds(wg * columns, columns)
        plgpu.copy_smem_to_gmem(part_smem, dq_gmem.at[batch, *own])
        plgpu.wait_smem_to_gmem(0)

    assert config.splits_dq_columns, "the parts of a tile are its columns"
    shape = spec.batch, tma_rows(spec.q_len), spec.num_q_heads, qk.gmem
    dq = plgpu.kernel(
        flash_attention_dq,
        out_type=jax.ShapeDtypeStruct(shape, spec.dtype),
        # One axis: the others of a CUDA grid end at 65535.
        grid=(spec.batch * spec.num_q_heads * num_tiles,),
        grid_names=("tile",),
        num_threads=NUM_MATH_WGS,
        thread_name="wg",
        scratch_types=(tiled((NUM_MATH_WGS, rows, columns), spec.dtype, qk.tile),),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )(dq_sum)
    return dq[:, : spec.q_len, :, : spec.head_dim]
