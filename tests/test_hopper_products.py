"""Products that Pallas does not offer: they read SMEM as its own would."""

import importlib

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jaxlib.mlir import ir

from pallas_flash.backends.hopper import products
from pallas_flash.backends.hopper.storage import MATRIX, tiled, zero_matrix

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


def instructions(multiply, keys: int, columns: int, tile: int) -> list[tuple[int, int, bool]]:
    """(descriptor of the right operand, columns, whether it is transposed) for each."""
    found = []
    original = wgmma.wgmma_m64

    def recorded(acc, a, b_descriptor, **keywords):
        start, step = number(b_descriptor), keywords["b_k_stride"] // 16
        own = keywords["n"], keywords["b_transpose"]
        found.extend((start + i * step, *own) for i in range(a.shape[1] // 16))
        return original(acc, a, b_descriptor=b_descriptor, **keywords)

    def body(b_gmem, out_gmem, b_smem, out_smem, ready):
        plgpu.copy_gmem_to_smem(b_gmem, b_smem, ready)
        plgpu.barrier_wait(ready)
        a = plgpu.layout_cast(jnp.ones((ROWS, keys), jnp.bfloat16), MATRIX)
        start = plgpu.ACC.init(zero_matrix(ROWS, columns))
        out_smem[...] = pl.run_state(lambda acc: multiply(acc, a, b_smem))(start)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((ROWS, columns), jnp.float32),
        scratch_types=[
            tiled((keys, columns), jnp.bfloat16, tile),
            plgpu.SMEM((ROWS, columns), jnp.float32),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wgmma, "wgmma_m64", recorded)
        patch.setattr(products, "wgmma_m64", recorded)
        b = jax.ShapeDtypeStruct((keys, columns), jnp.bfloat16)
        jax.jit(run).trace(b).lower(lowering_platforms=("cuda",))
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
