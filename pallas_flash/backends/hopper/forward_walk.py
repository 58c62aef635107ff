"""The forward's way: which tiles of queries a block has, and which key blocks they visit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.backends.hopper import assignment
from pallas_flash.backends.hopper.config import ForwardConfig
from pallas_flash.backends.hopper.operands import rows_share_matrices
from pallas_flash.backends.hopper.storage import read_scalar
from pallas_flash.masks import Mask
from pallas_flash.masks.schedule import Blocks, kv_schedule
from pallas_flash.spec import AttentionSpec

Edges = tuple[Any, Any, Any, Any]


class Walk(NamedTuple):
    """Which key blocks the tiles visit, the last one first.

    starts_full: whether the first step of every tile needs no mask. runs: which of the loops after
    it (masked, unmasked, masked) can have anything to do. edges: first, full_first, full_last, last
    where they are the same for every tile, else None.
    """

    starts_full: bool
    runs: tuple[bool, bool, bool]
    edges: Edges | None


class Tile(NamedTuple):
    """Queries of one head, and the key blocks that they visit.

    nth: of the block, from 0 on. edges: first, full_first, full_last, last. index: which queries.
    """

    nth: Any
    batch: Any
    q_head: Any
    index: Any
    edges: Edges

    @property
    def num_steps(self) -> Any:
        """One key block is visited even if the mask then allows nothing."""
        return jnp.maximum(self.edges[3] - self.edges[0], 1)

    def kv_block(self, step: Any) -> Any:
        """The key block of a step: under a causal mask those that need it are the last."""
        return self.edges[0] + (self.num_steps - 1 - step)

    @property
    def runs(self) -> Edges:
        """Where the loops (masked, unmasked, masked) begin and end, in steps."""
        first, full_first, full_last, _ = self.edges
        last = first + self.num_steps
        return jnp.int32(0), last - full_last, last - full_first, self.num_steps


class Assigned(NamedTuple):
    """The tiles of all blocks, see assignment.py.

    tiles: [blocks, rounds, fields] int32; num_tiles: [blocks] int32.
    """

    tiles: Any
    num_tiles: Any


def plan(spec: AttentionSpec, config: ForwardConfig, mask: Mask | None) -> tuple[Walk, Assigned]:
    """Which key blocks the tiles visit, and which tiles each block has."""
    walk, schedule = _visits(spec, config, mask)
    heads = spec.batch, spec.num_q_heads
    order = assignment.Order(*heads, config.heads_per_group, rows_share_matrices(spec))
    if isinstance(schedule, np.ndarray):
        edges = np.broadcast_to(schedule, (*heads, *schedule.shape[2:]))
        tiles = jnp.asarray(assignment.table(edges, order))
    else:
        tiles = assignment.table_at_run_time(schedule, order)
    num_tiles = (tiles[..., assignment.BATCH] >= 0).sum(1)
    return walk, Assigned(tiles, num_tiles.astype(jnp.int32))


def _visits(spec: AttentionSpec, config: ForwardConfig, mask: Mask | None) -> tuple[Walk, Any]:
    """Which key blocks the tiles visit, and the schedule: [B or 1, Hq or 1, num_q_tiles, 4].

    The schedule is a NumPy array unless the mask holds arrays.
    """
    num_q_tiles = pl.cdiv(spec.q_len, config.block_q)
    if mask is None:
        full, last = spec.kv_len // config.block_kv, pl.cdiv(spec.kv_len, config.block_kv)
        schedule = np.broadcast_to(np.array([0, 0, full, last], np.int32), (1, 1, num_q_tiles, 4))
    else:
        blocks = Blocks(spec.q_len, spec.kv_len, config.block_q, config.block_kv, spec.batch)
        schedule = kv_schedule(mask, blocks)
    if not isinstance(schedule, np.ndarray):
        return Walk(False, (True, True, True), None), schedule
    edges = schedule.reshape(-1, 4)
    before, full, after = np.diff(edges, axis=1).T
    # The first step is outside of the loops.
    runs = (
        bool((after > 1).any()),
        bool((full > (after == 0)).any()),
        bool((before > ((after == 0) & (full == 0))).any()),
    )
    starts_full = bool(((full > 0) & (after == 0)).all())
    is_uniform = (edges == edges[0]).all()
    return Walk(starts_full, runs, tuple(edges[0].tolist()) if is_uniform else None), schedule


def for_each_tile(walk: Walk, assigned: Assigned, body: Callable[[Tile, Any, Any], Any]) -> Any:
    """Calls ``step = body(tile, following, step)`` for the tiles of this block, step = 0 at first.

    following: calls its argument with the next tile, if there is one.
    """
    count = read_scalar(assigned.num_tiles, lax.axis_index("block"))

    def nth(n, state):
        step, fields = state
        # Read a tile ahead: the memory's latency passes meanwhile.
        next_fields = _fields(walk, assigned, n + 1)

        def following(function):
            pl.when(n + 1 < count)(lambda: function(_tile(walk, n + 1, next_fields)))

        return body(_tile(walk, n, fields), following, step), next_fields

    first = (jnp.int32(0), _fields(walk, assigned, jnp.int32(0)))
    return lax.fori_loop(jnp.int32(0), count, nth, first)[0]


def first_tile(walk: Walk, assigned: Assigned) -> Tile:
    """The first tile of this block: each has one."""
    return _tile(walk, jnp.int32(0), _fields(walk, assigned, jnp.int32(0)))


def _fields(walk: Walk, assigned: Assigned, n: Any) -> tuple[Any, ...]:
    """What the table holds of the n-th tile of this block."""
    fields = range(assignment.NUM_FIELDS if walk.edges is None else assignment.EDGES.start)
    return tuple(read_scalar(assigned.tiles, lax.axis_index("block"), n, x) for x in fields)


def _tile(walk: Walk, nth: Any, fields: tuple[Any, ...]) -> Tile:
    batch, q_head, index = fields[: assignment.EDGES.start]
    if walk.edges is not None:
        first, full_first, full_last, last = map(jnp.int32, walk.edges)
    else:
        first, full_first, full_last, last = fields[assignment.EDGES]
    return Tile(nth, batch, q_head, index, (first, full_first, full_last, last))
