"""Products that Pallas does not offer: that set their result, and over any number of rows."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu.fragmented_array import (
    WGMMA_LAYOUT,
    WGMMA_LAYOUT_ACC_32BIT,
    FragmentedArray,
)
from jax.experimental.mosaic.gpu.utils import memref_transpose
from jax.experimental.mosaic.gpu.wgmma import wgmma_fence, wgmma_m64
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

from pallas_flash.backends.hopper.storage import MATRIX, PER_ROW, TMA_ROWS

# Rows of a right operand that one instruction takes, and their bytes along its left one.
STEP, STEP_BYTES = 16, 32
# Rows of a left operand that one instruction takes.
INSTRUCTION_ROWS = 64


def _in_tiles(dtype: Any, columns: int) -> tuple[plgpu.RefType, int]:
    """The type of a matrix that `tiled` has allocated, and its swizzle in bytes."""
    swizzle = columns * jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((TMA_ROWS, columns))
    return plgpu.RefType((tiling, plgpu.SwizzleTransform(swizzle))), swizzle


class Pair(NamedTuple):
    """Operands of a product, both in swizzle tiles of `tile` columns.

    a_smem: 16-bit numbers [64, k]; b_smem: [rows, k], at most 256 rows.
    """

    a_smem: Any
    b_smem: Any
    tile: int


def set_product(acc: Any, *pairs: Pair) -> None:
    """Issues ``acc = a @ b.T``, or the sum of several such products, whatever `acc` holds.

    `plgpu.wgmma` adds. For that Mosaic GPU first sets the accumulator to 0 by instructions of its
    own, one for every two numbers of a thread, between a product and the wait for its operands.
    """
    rows, columns = acc.shape
    if rows != INSTRUCTION_ROWS:
        raise ValueError(f"{acc.shape=} must have {INSTRUCTION_ROWS} rows")
    types = [_in_tiles(pair.a_smem.dtype, pair.tile)[0] for pair in pairs for _ in range(2)]
    widths = [pair.a_smem.shape[1] for pair in pairs]
    tiles = [pair.tile for pair in pairs]
    result = plgpu.ShapeDtypeStruct(acc.shape, jnp.dtype(jnp.float32), layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=tuple(types), return_type=result)
    def multiply(_, *operands):
        nvvm.wgmma_fence_aligned()
        numbers = None
        for a, b, tile, width in zip(operands[::2], operands[1::2], tiles, widths, strict=True):
            element = ir.MemRefType(a.type).element_type
            for starts, strides in _steps(a, b, tile, columns, width):
                numbers = _add(numbers, starts, strides, columns, element)
        return _committed(numbers)

    acc[...] = multiply(*(x for pair in pairs for x in (pair.a_smem, pair.b_smem)))


def _steps(
    a: Any, b: Any, tile: int, columns: int, width: int
) -> Iterator[tuple[tuple[Any, Any], tuple[int, int]]]:
    """For every instruction of ``a @ b.T`` the operands' descriptors, and the strides of both."""
    swizzle = tile * (STEP_BYTES // STEP)
    (a_start, (_, (a_step,))), (_, a_group), _ = mma_utils.create_descriptor(
        a, swizzle=swizzle, group_size=(INSTRUCTION_ROWS, tile), logical_k_major=False
    )
    (b_start, (_, (b_step,))), (_, b_group), _ = mma_utils.create_descriptor(
        memref_transpose(b, (1, 0, 3, 2)),
        swizzle=swizzle,
        group_size=(tile, columns),
        logical_k_major=True,
    )
    for i in range(width // STEP):
        group, step = divmod(i, tile // STEP)
        a_place = _moved(a_start, group * a_group + step * a_step)
        yield (a_place, _moved(b_start, group * b_group + step * b_step)), (a_step, b_step)


def set_product_over_rows(acc: Any, a_smem: Any, b_smem: Any, tiles: tuple[int, int]) -> None:
    """Issues ``acc = a.T @ b``, whatever `acc` holds.

    a_smem: 16-bit numbers [k, 64]; b_smem: [k, columns]; tiles: columns of the swizzle tiles of
    each. `plgpu.wgmma` wants the same for both.
    """
    rows, columns = acc.shape
    if rows != INSTRUCTION_ROWS:
        raise ValueError(f"{acc.shape=} must have {INSTRUCTION_ROWS} rows")
    types, swizzles = zip(*(_in_tiles(a_smem.dtype, tile) for tile in tiles), strict=True)
    result = plgpu.ShapeDtypeStruct(acc.shape, jnp.dtype(jnp.float32), layout=MATRIX)
    num_steps = a_smem.shape[0] // STEP

    @plgpu.inline_mgpu(arg_types=types, return_type=result)
    def multiply_over_rows(_, a, b):
        (a_start, (_, (a_step,))), _, _ = mma_utils.create_descriptor(
            memref_transpose(a, (1, 0, 3, 2)),
            swizzle=swizzles[0],
            group_size=(rows, STEP),
            logical_k_major=False,
        )
        (b_start, (_, (b_step,))), _, _ = mma_utils.create_descriptor(
            b, swizzle=swizzles[1], group_size=(STEP, columns), logical_k_major=True
        )
        element = ir.MemRefType(a.type).element_type
        nvvm.wgmma_fence_aligned()
        numbers = None
        for i in range(num_steps):
            starts = _moved(a_start, i * a_step), _moved(b_start, i * b_step)
            numbers = _add(numbers, starts, (a_step, b_step), columns, element, True)
        return _committed(numbers)

    acc[...] = multiply_over_rows(a_smem, b_smem)


def _add(
    numbers: Any,
    starts: tuple[Any, Any],
    strides: tuple[int, int],
    columns: int,
    element: Any,
    over_rows: bool = False,
) -> Any:
    """The registers and ``a @ b.T`` over `STEP` columns, or that alone where they are None.

    Or ``a.T @ b`` over as many rows. starts: descriptors of both operands.
    """
    if numbers is None:
        shape = WGMMA_LAYOUT_ACC_32BIT.registers_shape((INSTRUCTION_ROWS, columns))
        return _first_instruction(*starts, columns, element, over_rows).reshape(shape)
    return wgmma_m64(
        numbers,
        *starts,
        a_transpose=over_rows,
        b_transpose=over_rows,
        a_k_stride=strides[0],
        b_k_stride=strides[1],
        n=columns,
        # Of the left operand's part: one instruction.
        swizzle=STEP_BYTES,
        a_element_type=element,
        b_element_type=element,
    )


def _committed(numbers: Any) -> Any:
    """The matrix in the registers of products that have been issued."""
    nvvm.wgmma_commit_group_sync_aligned()
    layout = WGMMA_LAYOUT_ACC_32BIT
    matrix = FragmentedArray(_registers=numbers, _layout=layout, _is_signed=None)
    return matrix.to_layout(WGMMA_LAYOUT)


def _moved(descriptor: Any, offset: int) -> Any:
    """The descriptor of an operand that begins so many bytes further on."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.addi(descriptor, mgpu.c(mma_utils.encode_addr(offset), i64))


def _first_instruction(
    a_descriptor: Any, b_descriptor: Any, columns: int, element: Any, over_rows: bool = False
) -> Any:
    """The registers of ``a @ b.T`` over `STEP` columns: p is false, so nothing is added to it.

    Or of ``a.T @ b`` over as many rows.
    """
    count = columns // 2
    numbers, order = ", ".join(f"${i}" for i in range(count)), int(over_rows)
    ptx = (
        "{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned."
        f"m{INSTRUCTION_ROWS}n{columns}k{STEP}.f32.{element}.{element} "
        f"{{{numbers}}}, ${count}, ${count + 1}, p, 1, 1, {order}, {order}; }}"
    )
    number = ir.VectorType.get((1,), ir.F32Type.get())
    found = llvm.inline_asm(
        llvm.StructType.get_literal([number] * count),
        [a_descriptor, b_descriptor],
        ptx,
        ",".join(["=f"] * count + ["l", "l"]),
        has_side_effects=True,
        asm_dialect=0,
    )
    registers = [llvm.extractvalue(number, found, [i]) for i in range(count)]
    return np.array(registers, dtype=object)


def add_product(acc: Any, a: Any, b_smem: Any, tile: int) -> None:
    """Issues ``acc += a @ b`` for any multiple of 16 rows of `b`.

    `plgpu.wgmma` wants as many rows, or a multiple, as a swizzle tile has columns. a: 16-bit
    numbers in registers, [64, rows of b]; tile: columns of a swizzle tile of `b`.
    """
    if b_smem.shape[0] % tile == 0:
        plgpu.wgmma(acc, a, b_smem)
        return
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
        for i in range(a.shape[1] // STEP):
            numbers = wgmma_m64(
                numbers,
                a[:, i * STEP : (i + 1) * STEP],
                _moved(b_start, i * b_step),
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


def scaled_rows(x: Any, factor: Any) -> Any:
    """x [64, columns] float32 with each row times its factor [64], by those warps that need it.

    A warp of whose 16 rows all have a factor of 1 does nothing.
    """
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32), layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=(MATRIX, PER_ROW), return_type=result)
    def scale_where_needed(_, x, factor):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        own = (vector.extract(each, [], [0]) for each in factor.registers.flat)
        differs = (arith.cmpf(arith.CmpFPredicate.UNE, each, mgpu.c(1.0, f32)) for each in own)
        is_needed = functools.reduce(arith.ori, differs)
        is_needed = nvvm.vote_sync(mgpu.c(0xFFFFFFFF, i32), is_needed, nvvm.VoteSyncKind.any)
        registers = list(x.registers.flat)
        types = [each.type for each in registers]
        branch = scf.IfOp(is_needed, types, has_else=True)  # type: ignore[call-arg]
        with ir.InsertionPoint(branch.then_block):
            scaled = x * factor.broadcast_in_dim(x.shape, (0,), x.layout)
            scf.yield_(list(scaled.registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(registers)
        results = np.array(list(branch.results), dtype=object).reshape(x.registers.shape)
        return FragmentedArray(_registers=results, _layout=x.layout, _is_signed=None)

    return scale_where_needed(x, factor)
