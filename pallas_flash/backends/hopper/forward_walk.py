"""The forward's way: which tiles of queries a block has, and which key blocks they visit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.backends.hopper import assignment
from pallas_flash.backends.hopper.config import ForwardConfig
from pallas_flash.backends.hopper.leaves import near_of, rows_share_matrices
from pallas_flash.backends.hopper.scores import Zone
from pallas_flash.backends.hopper.storage import read_scalar
from pallas_flash.masks import Mask
from pallas_flash.masks.schedule import Blocks, kv_schedule
from pallas_flash.scores.score_mod import AFTER, BEFORE
from pallas_flash.spec import AttentionSpec

Edges = tuple[Any, Any, Any, Any]


class Walk(NamedTuple):
    """Which key blocks the tiles visit.

    The last one first; or, where tiles beyond `ScoreMod.near` are simpler, the near ones, those
    that come after it, and those that come before.

    starts_full: whether the first step of every tile needs no mask. zones: of the three loops after
    it. runs: which of these can have anything to do. meets: the same if they had the first step to
    do as well. edges: four numbers of `schedule.runs` or
    `runs_around` where they are the same for every tile and the compiler may know them, else None.
    """

    starts_full: bool
    zones: tuple[Zone, Zone, Zone]
    runs: tuple[bool, bool, bool]
    meets: tuple[bool, bool, bool]
    edges: Edges | None

    @property
    def starts_near(self) -> bool:
        return self.zones == NEAR_FIRST


LAST_FIRST = Zone(True), Zone(False), Zone(True)
NEAR_FIRST = Zone(True), Zone(False, AFTER), Zone(False, BEFORE)


class Tile(NamedTuple):
    """Queries of one head, and the key blocks that they visit.

    nth: of the block, from 0 on. edges, starts_near: of `Walk`. index: which queries.
    """

    nth: Any
    batch: Any
    q_head: Any
    index: Any
    edges: Edges
    starts_near: bool

    @property
    def num_steps(self) -> Any:
        """One key block is visited even if the mask then allows nothing."""
        return jnp.maximum(self.edges[3] - self.edges[0], 1)

    @property
    def num_near(self) -> Any:
        """How many steps come first where the near ones do: one even if there is nothing to do."""
        return jnp.maximum(self.edges[2] - self.edges[1], 1)

    def kv_block(self, step: Any) -> Any:
        """The key block of a step: under a causal mask those that need it are the last."""
        first, begin, _, _ = self.edges
        from_last = first + (self.num_steps - 1 - step)
        if not self.starts_near:
            return from_last
        # Those behind the near ones come as if the near ones had been the last; then the others.
        is_after = step < self.num_steps - (begin - first)
        others = jnp.where(is_after, from_last + self.num_near, from_last)
        return jnp.where(step < self.num_near, begin + (self.num_near - 1 - step), others)

    @property
    def runs(self) -> Edges:
        """Where the loops begin and end, in steps."""
        first, begin, end, _ = self.edges
        if self.starts_near:
            return jnp.int32(0), self.num_near, self.num_steps - (begin - first), self.num_steps
        last = first + self.num_steps
        return jnp.int32(0), last - end, last - begin, self.num_steps


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
        return walk, Assigned(*map(jnp.asarray, assignment.table(edges, order)))
    return walk, Assigned(*map(jnp.asarray, assignment.table_at_run_time(schedule, order)))


def _visits(spec: AttentionSpec, config: ForwardConfig, mask: Mask | None) -> tuple[Walk, Any]:
    """Which key blocks the tiles visit, and the schedule: [B or 1, Hq or 1, num_q_tiles, 4].

    The schedule is a NumPy array unless the mask holds arrays.
    """
    num_q_tiles = pl.cdiv(spec.q_len, config.block_q)
    near = near_of(spec.score_mod)
    if mask is None and near is None:
        full, last = spec.kv_len // config.block_kv, pl.cdiv(spec.kv_len, config.block_kv)
        schedule = np.broadcast_to(np.array([0, 0, full, last], np.int32), (1, 1, num_q_tiles, 4))
    else:
        blocks = Blocks(spec.q_len, spec.kv_len, config.block_q, config.block_kv, spec.batch)
        schedule = kv_schedule(mask, blocks, near)
        if isinstance(schedule, np.ndarray) and near is None:
            # Where no block is full it does not matter where they would be: then none comes behind.
            first, begin, end, last = np.moveaxis(schedule, -1, 0)
            has_full = begin < end
            begin, end = np.where(has_full, begin, first), np.where(has_full, end, first)
            schedule = np.stack([first, begin, end, last], -1)
    zones = LAST_FIRST if near is None else NEAR_FIRST
    if not isinstance(schedule, np.ndarray):
        return Walk(False, zones, (True, True, True), (True, True, True), None), schedule
    edges = schedule.reshape(-1, 4)
    # Not where a tile has many columns: of some numbers of steps that it knows the compiler makes a
    # slower loop, 0.772 ms for 0.724 at 4 x 4096 x 8 x 256. At head_dim 128 to know them gains 2%.
    # H100, JAX 0.11.2.
    is_known = (edges == edges[0]).all() and max(spec.head_dim, spec.value_dim) <= 128
    uniform = tuple(edges[0].tolist()) if is_known else None
    before, full, after = np.diff(edges, axis=1).T
    if near is not None:
        runs = bool((full > 1).any()), bool(after.any()), bool(before.any())
        return Walk(False, zones, runs, (True, *runs[1:]), uniform), schedule
    # The first step is outside of the loops.
    runs = (
        bool((after > 1).any()),
        bool((full > (after == 0)).any()),
        bool((before > ((after == 0) & (full == 0))).any()),
    )
    is_empty = after + full + before == 0
    # A tile without keys has a step as well, which the mask must empty.
    meets = bool(((after > 0) | is_empty).any()), bool(full.any()), bool(before.any())
    starts_full = bool(((full > 0) & (after == 0)).all())
    return Walk(starts_full, zones, runs, meets, uniform), schedule


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
    edges = fields[assignment.EDGES] if walk.edges is None else map(jnp.int32, walk.edges)
    first, begin, end, last = edges
    return Tile(nth, batch, q_head, index, (first, begin, end, last), walk.starts_near)
