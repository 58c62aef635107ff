"""A warpgroup's part of a dQ tile where each owns keys: half of it, over the keys of both."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_flash.backends.hopper import dq_fixed_point
from pallas_flash.backends.hopper.backward_kernel import Kernel
from pallas_flash.backends.hopper.products import store_transposed


def product(kernel: Kernel, wg: Any, ds_smem: Any, dq_acc: Any) -> None:
    """dQ = dS K over the keys of both warpgroups: half the columns, or half the rows.

    Or half the rows of dQ^T = K^T dS^T.
    """
    rows, columns = dq_acc.shape
    if kernel.config.transposes_dq:
        part = kernel.smem.k.at[:, pl.ds(wg * rows, rows)]
        plgpu.wgmma(dq_acc, part.transpose((1, 0)), ds_smem.transpose((1, 0)))
    elif kernel.config.splits_dq_columns:
        part = kernel.smem.k.at[:, pl.ds(wg * columns, columns)]
        plgpu.wgmma(dq_acc, ds_smem.transpose((1, 0)), part)
    else:
        part = ds_smem.at[:, pl.ds(wg * rows, rows)]
        plgpu.wgmma(dq_acc, part.transpose((1, 0)), kernel.smem.k)


def _start(kernel: Kernel, wg: Any, q_tile: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The first row and column of this warpgroup's part of a dQ tile."""
    row, column = q_tile * kernel.config.block_q, q_tile * 0
    if kernel.config.splits_dq_columns:
        return row, wg * shape[1]
    return row + wg * shape[0], column


def factors(kernel: Kernel, wg: Any, q_head: Any, q_tile: Any, shape: tuple[int, ...]) -> Any:
    """Of its rows in fixed point, or None."""
    if not kernel.spec.deterministic:
        return None
    row, _ = _start(kernel, wg, q_tile, shape)
    return dq_fixed_point.read_factors(kernel, q_head, row, shape[0])


def add(kernel: Kernel, wg: Any, q_head: Any, q_tile: Any, dq: Any) -> None:
    """Adds this warpgroup's part of a dQ tile to memory, asynchronously."""
    staging_smem = kernel.smem.dq.at[wg]
    num_rows, num_columns = staging_smem.shape
    row, column = _start(kernel, wg, q_tile, staging_smem.shape)
    # The add before has read the buffer. Later adds of the arrays' gradients may still read theirs;
    # but not every tile has these where some are near and some are not.
    later = 0 if kernel.near is not None else len(kernel.smem.gradients.matrices)
    plgpu.wait_smem_to_gmem(later, wait_read_only=True)
    if kernel.config.transposes_dq:
        store_transposed(staging_smem, dq)
    else:
        staging_smem[...] = dq
    plgpu.commit_smem()
    rows, columns = pl.ds(row, num_rows), pl.ds(column, num_columns)
    part_gmem = kernel.gmem.dq_sum.at[kernel.block.batch, rows, q_head, columns]
    plgpu.copy_smem_to_gmem(staging_smem, part_gmem, reduction_op="add")
