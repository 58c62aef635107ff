"""The loading warpgroup's other work: what dS of a step adds to dQ in memory.

It multiplies dS of the math warpgroups with K, part by part of a dQ tile, and adds the products
from its registers (`dq_fragments`). So the math warpgroups store dS and go on: neither waits for
the other, nor for memory.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper import dq_fixed_point, dq_fragments
from pallas_flash.backends.hopper.backward_kernel import Kernel, stage
from pallas_flash.backends.hopper.backward_scores import accumulator
from pallas_flash.backends.hopper.backward_storage import (
    DQ_ROWS,
    dq_part,
    num_score_stages,
    query_columns,
)
from pallas_flash.backends.hopper.products import set_product_over_rows
from pallas_flash.backends.hopper.storage import divmod_of, load_accumulator


def _num_places(kernel: Kernel) -> int:
    return num_score_stages(kernel.spec, kernel.config)


def free_all(kernel: Kernel) -> None:
    """Says at the beginning that all places of dS may be written."""
    for slot in range(_num_places(kernel)):
        plgpu.barrier_arrive(kernel.smem.ds_free.at[slot])


def wait_for_place(kernel: Kernel, t: Any) -> None:
    """A math warpgroup waits until the dS before, in the place of step `t`, has been multiplied."""
    if kernel.smem.ds_free is not None:
        plgpu.barrier_wait(kernel.smem.ds_free.at[stage(t, _num_places(kernel))])


def store(kernel: Kernel, t: Any, rows: Any, ds: Any) -> None:
    """A math warpgroup stores some rows of dS of step `t`."""
    kernel.smem.ds.at[stage(t, _num_places(kernel)), rows][...] = ds


def hand_over(kernel: Kernel, t: Any) -> None:
    """It commits what it has stored, and what it has read, and says that its dS is there."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(kernel.smem.ds_ready.at[stage(t, _num_places(kernel))])


def wait_for_last(kernel: Kernel) -> None:
    """A math warpgroup waits until dS of all steps has been multiplied, and K is read no more."""
    if kernel.smem.ds_free is not None:
        for slot in range(_num_places(kernel)):
            plgpu.barrier_wait(kernel.smem.ds_free.at[slot])


def add(kernel: Kernel, t: Any, q_head: Any, q_tile: Any) -> None:
    """Adds the part of step `t` to dQ."""
    spec, config, smem = kernel.spec, kernel.config, kernel.smem
    slot, (rows, columns) = stage(t, _num_places(kernel)), dq_part(spec)
    num_parts = query_columns(spec).smem // columns
    plgpu.barrier_wait(smem.ds_ready.at[slot])

    def add_part(index, _):
        row, column = divmod_of(index, num_parts)
        nth_row = q_tile * (config.block_q // DQ_ROWS) + row
        factors = None
        if spec.deterministic:
            # Early, as they come from memory.
            factors = dq_fixed_point.read_factors(kernel, q_head, nth_row * rows, rows)

        def product(dq_acc):
            ds = smem.ds.at[slot, :, pl.ds(row * rows, rows)]
            k = smem.k.at[:, pl.ds(column * columns, columns)]
            set_product_over_rows(dq_acc, ds, k, (DQ_ROWS, columns))
            dq = load_accumulator(dq_acc, wait_n=0)
            part = nth_row * num_parts + column
            part_gmem = kernel.gmem.dq_sum.at[kernel.block.batch, q_head, part]
            dq_fragments.add(part_gmem, dq_fixed_point.as_added(dq, factors))

        pl.run_scoped(product, accumulator(rows, columns))

    # Of a number that the compiler knows it would make copies of the body, for which there are not
    # the registers.
    unknown = jnp.minimum(lax.optimization_barrier(t), 0)
    count = jnp.int32(config.block_q // DQ_ROWS * num_parts) + unknown
    lax.fori_loop(jnp.int32(0), count, add_part, None)
    plgpu.barrier_arrive(smem.ds_free.at[slot])
