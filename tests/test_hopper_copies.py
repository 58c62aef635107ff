"""Copies of tiles, by a kernel that does nothing else, in interpret mode."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from interpreted import interpreted, is_caught, with_races
from pallas_flash.backends.hopper import copies
from pallas_flash.backends.hopper.storage import head_columns

pytestmark = pytest.mark.usefixtures("shim")

# Five times the eight that are copied at a time, so one more than there are warps.
ROWS = 40
FAULTS = ["read-before-it-is-there", "freed-before-it-is-read", "stored-without-a-fence"]


def plus_one(x, *, fault=None):
    """x [B, T, H, D] + 1 for the last batch row and head, through one tile at a time in SMEM."""
    _, length, _, dim = x.shape
    columns = head_columns(dim)

    def kernel(x_gmem, out_gmem, x_smem, out_smem, ready, free):
        batch, head = (jnp.int32(n - 1) for n in (x.shape[0], x.shape[2]))
        starts = [jnp.int32(start) for start in range(0, length, ROWS)]
        taken, given = (copies.Tile.of(smem, length) for smem in (x_smem, out_smem))

        def read():
            value = taken.whole[...]
            plgpu.commit_smem()
            return value

        @pl.when(jax.lax.axis_index("wg") == 0)
        def _():
            for start in starts:
                if fault == FAULTS[0]:
                    value = read()
                plgpu.barrier_wait(ready)
                if fault == FAULTS[1]:
                    plgpu.barrier_arrive(free)
                if fault != FAULTS[0]:
                    value = read()
                if fault != FAULTS[1]:
                    plgpu.barrier_arrive(free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                given.whole[...] = value + 1
                if fault != FAULTS[2]:
                    plgpu.commit_smem()
                copies.store(given, out_gmem, batch, start, head)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(jax.lax.axis_index("wg") == 1)
        def _():
            for start in starts:
                copies.load(x_gmem, batch, start, head, taken, ready)
                plgpu.barrier_wait(free)

    tile = copies.copied((ROWS, columns.smem), x.dtype, columns, length)
    num_copies = copies.num_copies(length, ROWS, columns)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(copies.shape_in_gmem(x.shape, columns), x.dtype),
        num_threads=2,
        thread_name="wg",
        scratch_types=(tile, tile, plgpu.Barrier(num_arrivals=num_copies), plgpu.Barrier()),
    )(copies.in_gmem(x, columns))
    return copies.out_of_gmem(out, dim)[-1, :, -1]


def numbered(length, dim):
    """[2, length, 2, dim]: integers, hardly one of them twice in a tile."""
    numbers = np.arange(4 * length * dim).reshape(2, length, 2, dim) % 1021
    return jnp.asarray(numbers, jnp.float16)


@interpreted
@pytest.mark.parametrize("length", [83, 64, 5], ids="t{}".format)
# One column of tiles, full, with 40 columns of 64 or 5 of 16; two columns; five.
@pytest.mark.parametrize("dim", [64, 40, 5, 128, 72], ids="d{}".format)
def test_a_tile_arrives_and_leaves_as_it_was(length, dim):
    x = numbered(length, dim)
    out, has_raced = with_races(jax.jit(plus_one), x)
    assert not has_raced
    np.testing.assert_array_equal(out, x[-1, :, -1] + 1)


@interpreted
@pytest.mark.parametrize("fault", [None, *FAULTS])
@pytest.mark.parametrize("dim", [64, 128], ids="d{}".format)
@pytest.mark.parametrize("length", [83, 88], ids="t{}".format)
def test_a_race_for_a_tile_is_caught(length, dim, fault):
    run = jax.jit(lambda x: plus_one(x, fault=fault))
    assert is_caught(run, numbered(length, dim)) == (fault is not None)
