"""Kernels whose blocks own queries, past which K and V stream: the forward, and the one for dQ."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper import masking
from pallas_flash.backends.hopper.config import ForwardConfig
from pallas_flash.backends.hopper.forward_storage import (
    REDUCTION_SCRATCH_BYTES,
    REGISTERS,
    WG_ROWS,
    tiling,
)
from pallas_flash.backends.hopper.forward_walk import Tile, Walk
from pallas_flash.backends.hopper.leaves import Terms
from pallas_flash.backends.hopper.scores import Part, Zone
from pallas_flash.backends.hopper.tile_arrays import Place, read_rows
from pallas_flash.backends.hopper.tiling import Tiling
from pallas_flash.spec import AttentionSpec

COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
)


@dataclasses.dataclass(frozen=True)
class QueryKernel:
    """One launch: what is static, and the refs.

    gmem has at least k, v, assigned, terms and ids of `forward_kernel.Inputs`; smem k, v, their
    barriers, tiles and those of near tiles of `forward_storage.Storage`; copied q, k and v.
    """

    spec: AttentionSpec
    config: ForwardConfig
    walk: Walk
    gmem: Any
    smem: Any
    copied: Any

    @property
    def tiling(self) -> Tiling:
        return tiling(self.spec, self.config)

    def run(self, load: Callable[[], None], compute: Callable[[Any], None]) -> None:
        """``load()`` by the last warpgroup, ``compute(wg)`` by the others."""
        wg, num_wgs = lax.axis_index("wg"), self.config.num_warpgroups
        of_producer, of_consumer = REGISTERS[num_wgs]

        @pl.when(wg == num_wgs)
        def _():
            if of_producer is not None:
                plgpu.set_max_registers(of_producer, action="decrease")
            load()

        @pl.when(wg < num_wgs)
        def _():
            if of_producer is not None:
                plgpu.set_max_registers(of_consumer, action="increase")
            compute(wg)

    def stage(self, step: Any) -> Any:
        """Where in SMEM the keys or values of a step lie, counted over all tiles of a block."""
        return lax.rem(step, jnp.int32(self.config.num_stages))

    def q_stage(self, tile: Tile) -> Any:
        """Where in SMEM the queries of a tile lie."""
        return lax.rem(tile.nth, jnp.int32(self.config.num_q_stages))

    def q_ready(self, wg: Any, tile: Tile) -> Any:
        """The barrier of the load of a warpgroup's queries."""
        return self.smem.q_ready.at[self.q_stage(tile) * self.config.num_warpgroups + wg]

    def q_start(self, wg: Any, tile: Tile) -> Any:
        """The first query of a warpgroup."""
        return tile.index * self.config.block_q + wg * WG_ROWS

    def place(self, tile: Tile, i: Any) -> Place:
        """Of the scores of a tile's step `i`."""
        starts = tile.index * self.config.block_q, tile.kv_block(i) * self.config.block_kv
        return Place(tile.batch, tile.q_head, *starts)

    def read_rows(self, wg: Any, tile: Tile) -> Terms:
        """What the terms' arrays hold for a warpgroup's queries."""
        place = self.place(tile, jnp.int32(0))._replace(row_start=self.q_start(wg, tile))
        return read_rows(self.tiling, self.gmem.terms, place, WG_ROWS)

    def part(self, wg: Any, tile: Tile, i: Any, of_rows: Terms, zone: Zone) -> Part:
        """A warpgroup's scores of a tile's step `i`."""
        place = self.place(tile, i)._replace(row_start=self.q_start(wg, tile))
        shape = WG_ROWS, self.config.block_kv
        is_wide = masking.read_wide(self.gmem.ids if zone.is_masked else [], tile.batch * 0)
        return Part.of(self.tiling, self.gmem.terms, of_rows, place, shape, zone, is_wide)

    def terms(self, wg: Any, stage: Any, part: Part) -> Terms:
        """The terms of a part of a tile, whose keys have arrived."""
        smem = self.smem
        if part.is_near:
            plgpu.barrier_wait(smem.near_ready.at[wg])
        terms = part.terms(smem.tiles, stage, pl.ds(wg * WG_ROWS, WG_ROWS))
        if part.reads_smem:
            # They were read by ordinary loads, and TMA overwrites them.
            plgpu.commit_smem()
        if part.is_near:
            plgpu.barrier_arrive(smem.near_free.at[wg])
        return terms

    def free_near(self, wg: Any) -> None:
        """Says at the beginning that nothing is in the way of what only near tiles read."""
        if self.smem.near_free is not None:
            plgpu.barrier_arrive(self.smem.near_free.at[wg])
