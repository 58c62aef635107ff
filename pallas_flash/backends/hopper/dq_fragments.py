"""A sum of dQ in GMEM that a warpgroup adds to from its registers.

A part of dQ, 64 queries by some columns, lies there as a product leaves it in registers: for every
eight columns four numbers of each thread, two columns of a row and the same two of the row eight
below. What a warp adds with an instruction lies side by side: of float32 the four numbers of all
threads, 512 bytes; of int32, which are added one by one, first each thread's first number, then all
second ones. So there is no way through SMEM; `dq_of_sum` puts them in order.
"""

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

from pallas_flash.backends.hopper import dq_fixed_point
from pallas_flash.backends.hopper.backward_storage import dq_part, query_columns
from pallas_flash.backends.hopper.config import BackwardConfig
from pallas_flash.backends.hopper.storage import (
    MATRIX,
    PER_ROW,
    divmod_of,
    round_up,
    tiled,
    tma_rows,
    widen_rows,
    window,
)
from pallas_flash.spec import AttentionSpec

WG_THREADS = 128
# Numbers of a thread for every eight columns, in two registers.
NUMBERS = 4
# Of a block of `dq_of_sum`.
NUM_WGS = 2


def dq_sum_shape(spec: AttentionSpec, config: BackwardConfig) -> tuple[int, ...]:
    """[B, Hq, parts of whole tiles, numbers of a part]: a row of parts after the other."""
    rows, columns = dq_part(spec)
    num_rows = round_up(spec.q_len, config.block_q) // rows
    parts = num_rows * (query_columns(spec).smem // columns)
    return spec.batch, spec.num_q_heads, parts, rows * columns


def add(part_gmem: Any, dq: Any) -> None:
    """Adds a matrix in registers to its part of the sum."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), MATRIX))
    def add_fragments(_, part, dq):
        void = ir.Type.parse("!llvm.void")
        of_floats = isinstance(dq.mlir_dtype, ir.FloatType)
        ptx = "red.relaxed.gpu.global.add.s32 [$0], $1;", "l,r"
        if of_floats:
            ptx = "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f"
        for addresses, registers in _fragments(part, dq.registers, of_floats):
            numbers = [vector.extract(pair, [], [i]) for pair in registers for i in range(2)]
            for address, added in zip(addresses, _split(numbers, len(addresses)), strict=True):
                llvm.inline_asm(void, [address, *added], *ptx, has_side_effects=True)

    add_fragments(part_gmem, dq)


def _load(part_gmem: Any, rows: int, columns: int) -> Any:
    """The matrix in a part of the sum."""
    of_floats = jnp.issubdtype(part_gmem.dtype, jnp.floating)
    result = plgpu.ShapeDtypeStruct((rows, columns), part_gmem.dtype, layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def load_fragments(_, part):
        layout, number = MATRIX.to_mgpu(), ir.MemRefType(part.type).element_type
        registers = np.empty(layout.registers_shape((rows, columns)), object)
        for addresses, places in _fragments(part, np.arange(registers.size), of_floats):
            at_once = NUMBERS // len(addresses)
            loaded = [llvm.load(ir.VectorType.get((at_once,), number), x) for x in addresses]
            numbers = [vector.extract(x, [], [i]) for x in loaded for i in range(at_once)]
            for place, pair in zip(places, _split(numbers, 2), strict=True):
                pair = vector.from_elements(ir.VectorType.get((2,), number), pair)
                registers.flat[place] = pair
        is_signed = None if of_floats else True
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)

    return load_fragments(part_gmem)


def _split(numbers: list[Any], count: int) -> list[list[Any]]:
    """The numbers in so many lists of the same length."""
    length = len(numbers) // count
    return [numbers[i * length : (i + 1) * length] for i in range(count)]


def _fragments(
    part: Any, registers: np.ndarray, of_floats: bool
) -> Iterator[tuple[list[Any], np.ndarray]]:
    """For every eight columns of a part a thread's two registers, and where their numbers lie.

    They lie side by side from one address on, or each at its own.
    """
    i32, number = ir.IntegerType.get_signless(32), ir.MemRefType(part.type).element_type
    thread = arith.remui(mgpu.thread_idx(), mgpu.c(WG_THREADS, i32))
    if of_floats:
        thread = arith.muli(thread, mgpu.c(NUMBERS, i32))
    own = getelementptr(memref_ptr(part), [thread], number)
    offsets = [0] if of_floats else [i * WG_THREADS for i in range(NUMBERS)]
    for i, pair in enumerate(registers.reshape(-1, 2)):
        begin = i * WG_THREADS * NUMBERS
        yield [getelementptr(own, [begin + x], number) for x in offsets], pair


def dq_of_sum(spec: AttentionSpec, config: BackwardConfig, dq_sum: Any, factors: Any) -> Any:
    """dQ [B, Tq, Hq, D] in the spec's dtype, with its scale.

    factors: [B, Hq, Tq over whole tiles] of a sum in fixed point, or None.
    """
    qk, (rows, columns) = query_columns(spec), dq_part(spec)
    num_tiles, parts_of_row = pl.cdiv(spec.q_len, rows), qk.smem // columns

    def flash_attention_dq(sum_gmem, units_gmem, dq_gmem, dq_smem):
        wg = lax.axis_index("wg")
        # Each warpgroup has 64 queries of its own.
        index = lax.axis_index("block") * NUM_WGS + wg
        batch_and_head, tile = divmod_of(index, num_tiles)
        batch, head = divmod_of(batch_and_head, spec.num_q_heads)
        own_smem = dq_smem.at[wg]

        def one_part(column, _):
            dq = _load(sum_gmem.at[batch, head, tile * parts_of_row + column], rows, columns)
            if units_gmem is not None:
                units = units_gmem.at[batch, head, pl.ds(tile * rows, rows)]
                units = plgpu.load(units, layout=PER_ROW, optimized=False)
                dq = dq.astype(jnp.float32) * widen_rows(units, dq.shape)
            dq = (dq * spec.scale).astype(spec.dtype)
            own_smem.at[:, pl.ds(column * columns, columns)][...] = dq

        @pl.when(index < num_all)
        def _():
            lax.fori_loop(jnp.int32(0), jnp.int32(parts_of_row), one_part, None)
            plgpu.commit_smem()
            target = window(dq_gmem, batch, tile * rows, head, own_smem)
            plgpu.copy_smem_to_gmem(own_smem, target)
            plgpu.wait_smem_to_gmem(0)

    num_all = spec.batch * spec.num_q_heads * num_tiles
    shape = spec.batch, tma_rows(spec.q_len), spec.num_q_heads, qk.gmem
    dq = plgpu.kernel(
        flash_attention_dq,
        out_type=jax.ShapeDtypeStruct(shape, spec.dtype),
        # One axis: the others of a CUDA grid end at 65535.
        grid=(pl.cdiv(num_all, NUM_WGS),),
        grid_names=("block",),
        num_threads=NUM_WGS,
        thread_name="wg",
        scratch_types=(tiled((NUM_WGS, rows, qk.smem), spec.dtype, qk.tile),),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )(dq_sum, None if factors is None else dq_fixed_point.units(factors))
    return dq[:, : spec.q_len, :, : spec.head_dim]
