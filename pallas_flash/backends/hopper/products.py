"""What products over a number of queries or keys that is no multiple of 64 need beside Pallas'."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT_ACC_32BIT, FragmentedArray
from jax.experimental.mosaic.gpu.utils import memref_transpose
from jax.experimental.mosaic.gpu.wgmma import wgmma_fence, wgmma_m64
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from pallas_flash.backends.hopper.storage import MATRIX, TMA_ROWS

# Rows of a right operand that one instruction takes, and their bytes along its left one.
STEP, STEP_BYTES = 16, 32
# Columns of the widest swizzle tile of float32.
F32_TILE = 32


def _in_tiles(dtype: Any, columns: int) -> tuple[plgpu.RefType, int]:
    """The type of a matrix that `tiled` has allocated, and its swizzle in bytes."""
    swizzle = columns * jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((TMA_ROWS, columns))
    return plgpu.RefType((tiling, plgpu.SwizzleTransform(swizzle))), swizzle


def add_product(acc: Any, a: Any, b_smem: Any, tile: int) -> None:
    """Issues ``acc += a @ b`` like `plgpu.wgmma`, for any multiple of 16 rows of `b`.

    Pallas wants as many rows, or a multiple, as a swizzle tile has columns. a: 16-bit numbers in
    registers, [64, rows of b]; tile: columns of a swizzle tile of `b`.
    """
    b_type, swizzle = _in_tiles(a.dtype, tile)
    result = plgpu.ShapeDtypeStruct(acc.shape, jnp.dtype(jnp.float32), layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=(b_type, MATRIX, MATRIX), return_type=result)
    def multiply_add(_, b, acc, a):
        columns = acc.shape[1]
        (b_start, (_, (b_step,))), _, _ = mma_utils.create_descriptor(
            b, swizzle=swizzle, group_size=(STEP, columns), logical_k_major=True
        )
        layout, acc = acc.layout, acc.to_layout(WGMMA_LAYOUT_ACC_32BIT)
        a, numbers = wgmma_fence(a), acc.registers
        i64 = ir.IntegerType.get_signless(64)
        for i in range(a.shape[1] // STEP):
            offset = mgpu.c(mma_utils.encode_addr(i * b_step), i64)
            numbers = wgmma_m64(
                numbers,
                a[:, i * STEP : (i + 1) * STEP],
                arith.addi(b_start, offset),
                a_transpose=None,
                b_transpose=True,
                a_k_stride=None,
                b_k_stride=b_step,
                n=columns,
                # Of the left operand's part: one instruction.
                swizzle=STEP_BYTES,
                a_element_type=a.mlir_dtype,
                b_element_type=a.mlir_dtype,
            )
        nvvm.wgmma_commit_group_sync_aligned()
        acc = FragmentedArray(_registers=numbers, _layout=acc.layout, _is_signed=None)
        return acc.to_layout(layout)

    acc[...] = multiply_add(b_smem, plgpu.wgmma_accumulator_load(acc, wait_n=None), a)


def store_transposed(target_smem: Any, x: Any) -> None:
    """Stores a float32 matrix in registers to SMEM [columns of x, rows of x], in widest tiles.

    Number by number: of eight rows and four columns, which a warp has, each goes to another bank.
    To store pairs, as Pallas does, threads would first have to exchange half of their numbers.
    """
    target_type, swizzle = _in_tiles(jnp.float32, F32_TILE)

    @plgpu.inline_mgpu(arg_types=(target_type, MATRIX))
    def store_numbers(_, target, x):
        numbers = x.to_layout(WGMMA_LAYOUT_ACC_32BIT)
        numbers.store_tiled(memref_transpose(target, (1, 0, 3, 2)), swizzle)

    store_numbers(target_smem, x)
