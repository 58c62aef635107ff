"""The producer of kernels whose blocks own queries: streams the key blocks past them."""

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper import copies
from pallas_flash.backends.hopper.forward_storage import WG_ROWS
from pallas_flash.backends.hopper.forward_walk import Tile, for_each_tile
from pallas_flash.backends.hopper.padding import Source
from pallas_flash.backends.hopper.query_kernel import QueryKernel
from pallas_flash.backends.hopper.tile_arrays import bring, bring_near


def load(kernel: QueryKernel, v_is_late: bool) -> None:
    """The producer: streams the key blocks of all tiles through the stages.

    v_is_late: whether the values of a step are needed behind the keys of the next one.
    """
    gmem, smem = kernel.gmem, kernel.smem
    k = Stream(gmem.k, kernel.copied.k, smem.k_ready, smem.k_free)
    v = Stream(gmem.v, kernel.copied.v, smem.v_ready, smem.v_free)
    # Of a tile the first step is outside of the loop, or none.
    begin = 1 if v_is_late else 0

    def load_tile(tile, _, first_step):
        k_looks, v_looks = gmem.k.looks(tile.batch), gmem.v.looks(tile.batch)

        def load_k(i):
            _load_block(kernel, tile, first_step + i, i, k, k_looks)
            _bring_terms(kernel, tile, first_step + i, i)

        def load_v(i):
            _load_block(kernel, tile, first_step + i, i, v, v_looks)

        # In the order of their use.
        def load_step(i, _):
            load_k(i)
            load_v(i - begin)
            if smem.near_ready is not None:
                pl.when(i < tile.num_near)(lambda: _load_near(kernel, tile, i))

        if v_is_late:
            load_k(jnp.int32(0))
            if smem.near_ready is not None:
                _load_near(kernel, tile, jnp.int32(0))
        lax.fori_loop(jnp.int32(begin), tile.num_steps, load_step, None)
        if v_is_late:
            load_v(tile.num_steps - 1)
        return first_step + tile.num_steps

    steps = for_each_tile(kernel.walk, gmem.assigned, load_tile)
    # Interpret mode wants every phase of a barrier observed by whoever waits on it.
    for stage in range(kernel.config.num_stages):

        @pl.when(stage < steps)
        def _(stage=stage):
            plgpu.barrier_wait(smem.k_free.at[stage])
            plgpu.barrier_wait(smem.v_free.at[stage])

    if smem.near_free is not None:
        for wg in range(kernel.config.num_warpgroups):
            plgpu.barrier_wait(smem.near_free.at[wg])


class Stream(NamedTuple):
    """K or V on its way through the stages."""

    source: Source
    tiles: copies.Tile
    ready: Any
    free: Any


def _load_block(
    kernel: QueryKernel, tile: Tile, t: Any, i: Any, stream: Stream, looks: Any
) -> None:
    """Loads the keys or values of a tile's step `i`, the block's step `t`, into their stage."""
    source, tiles, ready, free = stream
    stage = kernel.stage(t)

    @pl.when(t >= kernel.config.num_stages)
    def _():
        plgpu.barrier_wait(free.at[stage])

    target = tiles.part(stage)
    kv_head = lax.div(tile.q_head, jnp.int32(kernel.spec.group))
    source.load(looks, tile.batch, kv_head, tile.kv_block(i), target, ready.at[stage])


def _bring_terms(kernel: QueryKernel, tile: Tile, t: Any, i: Any) -> None:
    """Loads what the terms hold for a tile's step `i`, behind its keys."""
    smem, stage = kernel.smem, kernel.stage(t)
    place, ready = kernel.place(tile, i), smem.k_ready.at[stage]
    bring(kernel.tiling, kernel.gmem.terms, smem.tiles, stage, place, ready)


def _load_near(kernel: QueryKernel, tile: Tile, i: Any) -> None:
    """Loads what only near tiles read, for each warpgroup as soon as it has read the last."""
    smem, place = kernel.smem, kernel.place(tile, i)
    for wg in range(kernel.config.num_warpgroups):
        plgpu.barrier_wait(smem.near_free.at[wg])
        own, ready = (wg * WG_ROWS, WG_ROWS), smem.near_ready.at[wg]
        bring_near(kernel.tiling, kernel.gmem.terms, smem.tiles, place, own, ready)
