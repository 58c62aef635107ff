"""The producer of decoding: streams the key blocks of all segments through the stages."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.decode_kernel import Kernel, Row, for_each_segment
from pallas_flash.backends.hopper.decode_storage import BLOCK_KV, copies
from pallas_flash.backends.hopper.storage import read_scalar, window


def load(kernel: Kernel) -> None:
    """Streams the key blocks of all segments through the stages."""
    smem = kernel.smem

    def load_segment(segment, first_step):
        def load_step(i, _):
            _load_block(kernel, segment.row, first_step + i - segment.first, i)

        lax.fori_loop(segment.first, segment.last, load_step, None)
        return first_step + segment.last - segment.first

    steps = for_each_segment(kernel, load_segment)
    # Interpret mode wants every phase of a barrier observed by whoever waits on it.
    for stage in range(kernel.config.num_stages):

        @pl.when(stage < steps)
        def _(stage=stage):
            plgpu.barrier_wait(smem.k_free.at[stage])
            plgpu.barrier_wait(smem.v_free.at[stage])


def _load_block(kernel: Kernel, row: Row, t: Any, i: Any) -> None:
    """Loads K and V of a row's key block `i`, the team's step `t`, into their stage."""
    gmem, smem, stage = kernel.gmem, kernel.smem, kernel.stage(t)
    num_copies = copies(kernel.spec)
    size = BLOCK_KV // num_copies
    # Read before the wait: the memory's latency passes meanwhile.
    places = [_locate(kernel, row, i * BLOCK_KV + n * size) for n in range(num_copies)]
    for array, tiles, ready, free in (
        (gmem.k, smem.k, smem.k_ready, smem.k_free),
        (gmem.v, smem.v, smem.v_ready, smem.v_free),
    ):

        @pl.when(t >= kernel.config.num_stages)
        def _(free=free):
            plgpu.barrier_wait(free.at[stage])

        for n, (page, slot) in enumerate(places):
            target = tiles.at[stage]
            if num_copies > 1:
                target = tiles.at[stage, pl.ds(n * size, size)]
            source = window(array, page, slot, kernel.head, target)
            plgpu.copy_gmem_to_smem(source, target, ready.at[stage])


def _locate(kernel: Kernel, row: Row, slot: Any) -> tuple[Any, Any]:
    """The page of a row's slot, and which slot of the page it is."""
    pages = kernel.gmem.pages
    if pages is None:
        return row.index, slot
    page_size = jnp.int32(kernel.spec.cache.page_size)
    # The last block of a row may reach beyond its last page.
    index = jnp.minimum(lax.div(slot, page_size), pages.shape[1] - 1)
    return read_scalar(pages, row.index, index), lax.rem(slot, page_size)
