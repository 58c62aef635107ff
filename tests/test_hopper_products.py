"""Products that Pallas does not offer: they read SMEM as its own would."""

import importlib

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jaxlib.mlir import ir

from pallas_flash.backends.hopper import products
from pallas_flash.backends.hopper.storage import MATRIX, load_accumulator, tiled, zero_matrix

# The package has a function of the same name.
wgmma = importlib.import_module("jax.experimental.mosaic.gpu.wgmma")
pytestmark = pytest.mark.quick

ROWS, ALL_ROWS = 64, 256
OPERATIONS = {
    "add": lambda a, b: a + b,
    "addi": lambda a, b: a + b,
    "or": lambda a, b: a | b,
    "shli": lambda a, b: a << b,
    "and": lambda a, b: a & b,
    "lshr": lambda a, b: a >> b,
}


def number(value: ir.Value) -> int:
    """A descriptor, for SMEM that begins at address 0."""
    operation = value.owner
    name = operation.name.split(".")[-1]
    if name == "constant":
        return ir.IntegerAttr(operation.attributes["value"]).value
    if name == "ptrtoint":
        return 0
    return OPERATIONS[name](*map(number, operation.operands))


def lowered(body, shapes, tile: int, out_shape):
    """Lowers a kernel that has its arrays in SMEM and stores what ``body(*smem)`` returns."""

    def kernel(*refs):
        *gmem, out_gmem, smem, out_smem, ready = refs
        for source, target in zip(gmem, smem, strict=True):
            plgpu.copy_gmem_to_smem(source, target, ready)
            plgpu.barrier_wait(ready)
        out_smem[...] = body(*smem)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    in_smem = [tiled(shape, jnp.bfloat16, tile) for shape in shapes]
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        scratch_types=[in_smem, plgpu.SMEM(out_shape, jnp.float32), plgpu.Barrier()],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))


def instructions(multiply, keys: int, columns: int, tile: int) -> list[tuple[int, int, bool]]:
    """(descriptor of the right operand, columns, whether it is transposed) for each."""
    found = []
    original = wgmma.wgmma_m64

    def recorded(acc, a, b_descriptor, **keywords):
        start, step = number(b_descriptor), keywords["b_k_stride"] // 16
        own = keywords["n"], keywords["b_transpose"]
        found.extend((start + i * step, *own) for i in range(a.shape[1] // 16))
        return original(acc, a, b_descriptor=b_descriptor, **keywords)

    def body(b_smem):
        a = plgpu.layout_cast(jnp.ones((ROWS, keys), jnp.bfloat16), MATRIX)
        start = plgpu.ACC.init(zero_matrix(ROWS, columns))
        return pl.run_state(lambda acc: multiply(acc, a, b_smem))(start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wgmma, "wgmma_m64", recorded)
        patch.setattr(products, "wgmma_m64", recorded)
        lowered(body, [(keys, columns)], tile, (ROWS, columns))
    return found


@pytest.mark.parametrize(
    ("keys", "columns", "tile"),
    [(80, 256, 64), (80, 64, 64), (96, 192, 64), (80, 96, 32), (48, 32, 32), (16, 160, 32)],
)
def test_descriptors_are_those_of_pallas_for_more_rows(keys, columns, tile):
    """The product over some rows is the first instructions of that over all."""
    own = instructions(lambda acc, a, b: products.add_product(acc, a, b, tile), keys, columns, tile)
    of_pallas = instructions(plgpu.wgmma, ALL_ROWS, columns, tile)
    assert len(of_pallas) == ALL_ROWS // 16
    assert len(own) == keys // 16
    assert own == of_pallas[: len(own)]


def operands(multiply, rows: int, columns: int, tile: int) -> list[tuple[int, ...]]:
    """Descriptors of both operands, and whether these are transposed, for each instruction."""
    found = []
    original, original_first = wgmma.wgmma_m64, products._first_instruction

    def recorded(acc, a, b_descriptor, **keywords):
        turned = keywords["a_transpose"], keywords["b_transpose"]
        starts = number(a), number(b_descriptor)
        steps = keywords["a_k_stride"] // 16, keywords["b_k_stride"] // 16
        for i in range(keywords["swizzle"] // 32):
            found.append((starts[0] + i * steps[0], starts[1] + i * steps[1], *turned))
        return original(acc, a, b_descriptor=b_descriptor, **keywords)

    def recorded_first(a, b, *more):
        found.append((number(a), number(b), False, False))
        return original_first(a, b, *more)

    def body(a_smem, b_smem):
        return pl.run_scoped(
            lambda acc: load_accumulator(acc, wait_n=multiply(acc, a_smem, b_smem) or 0),
            plgpu.ACC((ROWS, rows), jnp.float32),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wgmma, "wgmma_m64", recorded)
        patch.setattr(products, "wgmma_m64", recorded)
        patch.setattr(products, "_first_instruction", recorded_first)
        lowered(body, [(ROWS, columns), (rows, columns)], tile, (ROWS, rows))
    return found


@pytest.mark.parametrize(
    ("rows", "columns", "tile"),
    [(128, 64, 64), (128, 128, 64), (80, 192, 64), (64, 256, 64), (96, 96, 32), (48, 80, 16)],
)
def test_a_product_that_sets_its_result_reads_as_that_of_pallas(rows, columns, tile):
    def own(acc, a, b):
        products.set_product(acc, products.Pair(a, b, tile))

    def of_pallas(acc, a, b):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))

    found = operands(own, rows, columns, tile)
    assert len(found) == columns // 16
    assert found == operands(of_pallas, rows, columns, tile)


def test_a_product_that_sets_its_result_has_64_rows():
    pair = products.Pair(jnp.zeros((128, 64)), jnp.zeros((64, 64)), 64)
    with pytest.raises(ValueError, match=r"acc.shape=\(128, 64\) must have 64 rows"):
        products.set_product(jnp.zeros((128, 64)), pair)
