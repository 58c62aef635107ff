"""The backward's loading warpgroup: K and V once, then tile by tile what belongs to queries.

Between the loads it adds to dQ (`backward_dq`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_flash.backends.hopper import backward_dq, copies
from pallas_flash.backends.hopper.backward_kernel import Kernel, stage
from pallas_flash.backends.hopper.backward_storage import NUM_MATH_WGS, WG_KEYS
from pallas_flash.backends.hopper.backward_walk import for_each_q_tile, for_each_q_tile_alike
from pallas_flash.backends.hopper.padding import Source
from pallas_flash.backends.hopper.tile_arrays import Place, bring, bring_near
from pallas_flash.scores.score_mod import NEAR


class Stream(NamedTuple):
    """Tiles that pass through stages: Q, with lse or without, and dO, with delta or without."""

    source: Source
    looks: Any
    row_gmem: Any
    tiles: copies.Tile
    row_smem: Any
    ready: Any
    free: Any
    num_stages: int


def load_tiles(kernel: Kernel) -> None:
    """The producer: K and V once, then Q with lse and dO with delta, tile by tile."""
    gmem, smem, block, config = kernel.gmem, kernel.smem, kernel.block, kernel.config
    tiles = kernel.copied
    for array_gmem, tile in ((gmem.k, tiles.k), (gmem.v, tiles.v)):
        copies.load(array_gmem, block.batch, kernel.kv_start, block.kv_head, tile, smem.kv_ready)
    if smem.selectors is not None:
        plgpu.copy_gmem_to_smem(gmem.selectors, smem.selectors, smem.kv_ready)

    q = Stream(
        *(gmem.q, gmem.q.looks(block.batch), gmem.lse_log2, tiles.q, smem.lse_log2),
        *(smem.q_ready, smem.q_free, config.num_q_stages),
    )
    dout = Stream(
        *(gmem.dout, gmem.dout.looks(block.batch), gmem.delta, tiles.dout, smem.delta),
        *(smem.dout_ready, smem.dout_free, config.num_dout_stages),
    )

    def load(t, q_head, q_tile):
        _load_stage(kernel, q, t, q_head, q_tile)
        slot, place = stage(t, config.num_q_stages), kernel.place(q_head, q_tile)
        ready = smem.q_ready.at[slot]
        if smem.starts is not None:
            rows = pl.ds(q_tile * config.block_q, config.block_q)
            # Never a constant: Pallas refuses a slice that it can see is too wide.
            columns = pl.ds(block.batch * 0, smem.starts.shape[-1])
            starts = gmem.starts.at[block.batch, q_head, rows, columns]
            plgpu.copy_gmem_to_smem(starts, smem.starts.at[slot], ready)
        bring(kernel.tiling, gmem.terms, smem.tiles, slot, place, ready)
        _load_stage(kernel, dout, t, q_head, q_tile)

    def load_in_zone(t, q_head, q_tile, _, zone=None):
        load(t, q_head, q_tile)
        if smem.near_ready is not None and zone.where == NEAR:
            _load_near(kernel, kernel.place(q_head, q_tile))

    run = partial(for_each_q_tile, kernel)
    if kernel.near is None and (config.shares_keys or not config.has_dq_kernel):
        run = partial(for_each_q_tile_alike, kernel)
    if config.has_dq_kernel:
        steps, _ = run(load_in_zone)
    else:
        steps = _load_and_add(kernel, run, load_in_zone)
    if smem.near_free is not None:
        _drain(smem.near_free, NUM_MATH_WGS, NUM_MATH_WGS)
    _drain(smem.q_free, config.num_q_stages, steps)
    _drain(smem.dout_free, config.num_dout_stages, steps)


def _load_and_add(kernel: Kernel, run: Any, load: Any) -> Any:
    """Loads the tiles of all steps, whose number it returns, as many ahead of dQ as may be."""
    ahead, zero = kernel.config.num_q_stages - 1, kernel.block.kv_tile * 0
    # What the math warpgroups may still have to `scrub` is read after their first dS.
    plgpu.barrier_wait(kernel.smem.kv_ready)
    backward_dq.free_all(kernel)

    def step(t, q_head, q_tile, before, *zone):
        load(t, q_head, q_tile, None, *zone)
        tiles = (*before, (q_head, q_tile))
        pl.when(t >= ahead)(lambda: backward_dq.add(kernel, t - ahead, *tiles[0]))
        return tiles[1:]

    steps, last = run(step, ((zero, zero),) * ahead)
    for i, tile in enumerate(last):
        t = steps - ahead + i
        pl.when(t >= 0)(partial(backward_dq.add, kernel, t, *tile))
    return steps


def _load_stage(kernel: Kernel, stream: Stream, t: Any, q_head: Any, q_tile: Any) -> None:
    slot = stage(t, stream.num_stages)

    @pl.when(t >= stream.num_stages)
    def _():
        plgpu.barrier_wait(stream.free.at[slot])

    batch, start = kernel.block.batch, q_tile * kernel.config.block_q
    ready = stream.ready.at[slot]
    stream.source.load(stream.looks, batch, q_head, q_tile, stream.tiles.part(slot), ready)
    if stream.row_gmem is None:
        return
    block_q = kernel.config.block_q
    row = stream.row_gmem.at[batch, q_head, pl.ds(start, block_q)]
    plgpu.copy_gmem_to_smem(row, stream.row_smem.at[slot, pl.ds(0, block_q)], ready)


def _load_near(kernel: Kernel, place: Place) -> None:
    """Loads what only near tiles read, for each math warpgroup as soon as it has read the last."""
    smem = kernel.smem
    for wg in range(NUM_MATH_WGS):
        plgpu.barrier_wait(smem.near_free.at[wg])
        own, ready = (wg * WG_KEYS, WG_KEYS), smem.near_ready.at[wg]
        bring_near(kernel.tiling, kernel.gmem.terms, smem.tiles, place, own, ready)


def _drain(free: Any, num_stages: int, steps: Any) -> None:
    """Waits for the last use of every stage.

    Interpret mode of JAX 0.11.2 wants every phase of a barrier observed by whoever waits on it.
    """

    def wait(slot):
        @pl.when(slot < steps)
        def _():
            plgpu.barrier_wait(free.at[slot])

    for slot in range(num_stages):
        wait(slot)
