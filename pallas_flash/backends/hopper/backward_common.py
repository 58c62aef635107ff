"""What both backward kernels share: sizes, the walk over query tiles, the producer, probabilities.

One block owns the keys of one tile of one kv head. It streams the query tiles of all query heads
that share this kv head, so dK and dV leave it once and complete, and adds its part of dQ to float32
memory. Scores are transposed (keys along rows), so that P^T and dS^T are left operands.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.backends.hopper import array_gradients, masking
from pallas_flash.backends.hopper.backward_storage import NUM_MATH_WGS, WG_KEYS, Storage, tiling
from pallas_flash.backends.hopper.config import BackwardConfig
from pallas_flash.backends.hopper.copies import Tile
from pallas_flash.backends.hopper.elementwise import written_out
from pallas_flash.backends.hopper.leaves import Terms, leaves_of, near_of, rows_differ_by_head, used
from pallas_flash.backends.hopper.padding import Source
from pallas_flash.backends.hopper.scores import (
    Part,
    Zone,
    dropout_factor,
    gradients_of_arrays,
    keep,
    with_weights,
)
from pallas_flash.backends.hopper.storage import (
    LOG2_E,
    MATRIX,
    PER_COLUMN,
    schedule_bound,
    window,
    zero_matrix,
)
from pallas_flash.backends.hopper.tile_arrays import Place, bring, bring_near, read_rows
from pallas_flash.backends.hopper.tiling import Tiling
from pallas_flash.masks import Bounds
from pallas_flash.masks.schedule import FIRST, FULL_FIRST, FULL_LAST, LAST
from pallas_flash.scores.score_mod import AFTER, BEFORE, NEAR
from pallas_flash.spec import AttentionSpec
from pallas_flash.terms import KV

# Registers a thread: 128 * (24 + 2 * 240) stay within the 64 K of an SM.
PRODUCER_REGISTERS, MATH_REGISTERS = 24, 240


class GlobalRefs(NamedTuple):
    """What a kernel reads and writes in GMEM.

    k, v: [B, T, H, D]; q, dout: sources of the same. lse_log2, delta: [B, Hq, Tq rounded up to
    block_q] float32. schedule: [B or 1, Hq or 1, num_kv_tiles, 4] int32 or None. terms: the arrays
    of mask, score mod and dropout. ids: of `masking.id_bounds`. dq_sum: float32, added to: of
    `backward_by_keys.dq_sum_shape` or `dq_fragments.sum_shape`. gradients: of the
    score mod's arrays.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    lse_log2: Any
    delta: Any
    schedule: Any
    terms: Terms
    ids: list[Bounds]
    dq_sum: Any
    gradients: array_gradients.Refs


class Block(NamedTuple):
    """Which keys a thread block owns."""

    batch: Any
    kv_head: Any
    kv_tile: Any


class Runs(NamedTuple):
    """Which of the three successive loops over query tiles can have anything to do.

    Masked, unmasked, masked; or where tiles beyond `ScoreMod.near` are simpler the near ones, those
    whose keys come after it, and those whose keys come before.
    """

    first: bool
    second: bool
    third: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: what is static, the refs, and the block.

    of_rows: of a warpgroup's keys what `read_rows` gives, where it is the same for all query heads.
    is_wide: of `masking.read_wide`. There is a body for each, where both may be: a branch in its
    loops would take 0.941 ms for 0.755, packed 8 x 2048 x 16 x 128, H100, JAX 0.11.2.
    """

    spec: AttentionSpec
    config: BackwardConfig
    runs: Runs
    gmem: GlobalRefs
    smem: Storage
    block: Block
    of_rows: Terms | None = None
    is_wide: bool = False

    @property
    def near(self) -> tuple[int, int] | None:
        return near_of(self.spec.score_mod)

    @property
    def kv_start(self) -> Any:
        return self.block.kv_tile * self.config.block_kv

    @property
    def tiling(self) -> Tiling:
        return tiling(self.spec, self.config)

    def place(self, q_head: Any, q_tile: Any) -> Place:
        """Of a whole tile of scores."""
        return Place(self.block.batch, q_head, self.kv_start, q_tile * self.config.block_q)

    @property
    def num_q_tiles(self) -> int:
        return pl.cdiv(self.spec.q_len, self.config.block_q)

    def q_head(self, index: Any) -> Any:
        return self.block.kv_head * self.spec.group + index


def may_hold_padding(spec: AttentionSpec) -> bool:
    """Whether there may be queries or keys that the mask leaves unused: they may hold anything."""
    if spec.mask is None:
        return False
    if jax.tree.leaves(spec.mask) or spec.q_len != spec.kv_len:
        return True
    # Certain that there are none only if every query attends to the key at its own position.
    position = np.arange(spec.q_len, dtype=np.int32)
    with jax.ensure_compile_time_eval():
        return not spec.mask.allowed(position, position).all()


def stage(step: Any, count: int) -> Any:
    return lax.rem(step, jnp.int32(count))


def for_each_q_tile(
    kernel: Kernel,
    step: Callable,
    carry: Any = None,
    end_of_head: Callable = lambda q_head, carry: carry,
) -> tuple[Any, Any]:
    """Calls ``carry = step(t, q_head, q_tile, carry, zone)`` for the tiles to visit, t = 0, 1, ..

    There is always a step, even if the mask then allows nothing. Behind the tiles of each query
    head comes ``carry = end_of_head(q_head, carry)``. Returns the number of steps and the last
    carry.
    """
    # A first step outside of the loops: ptxas spills less in them, 2.21 ms for 2.69 at 4 x 4096 x
    # 16 x 128. Where the keys are shared it gains nothing, 3.11 for 3.07 at 4 x 4096 x 8 x 256, and
    # takes time to compile. H100, JAX 0.11.2.
    peels_first = not kernel.config.shares_keys

    def one_head(index, state, is_first, peels=False):
        t, carry = state
        q_head = kernel.q_head(index)
        edges = _edges(kernel, q_head, is_first)
        if peels:
            q_tile = edges[0] if kernel.near is None else edges[1]
            carry = step(t, q_head, q_tile, carry, _zone_of_first(kernel))
        loops, num_steps = _loops(kernel, edges, int(peels))
        for has_any, loop in zip(kernel.runs, loops, strict=True):
            if has_any:
                before, zone = t + loop.before, loop.zone

                def body(q_tile, carry, before=before, zone=zone):
                    return step(before + q_tile, q_head, q_tile, carry, zone)

                carry = lax.fori_loop(loop.begin, loop.end, body, carry)
        return t + num_steps, end_of_head(q_head, carry)

    if not peels_first:
        return _for_each_head(kernel, one_head, carry)
    zero = kernel.block.kv_tile * 0
    state = one_head(zero, (zero, carry), is_first=True, peels=True)
    if kernel.spec.group == 1:
        return state
    one, group = jnp.int32(1), jnp.int32(kernel.spec.group)
    return lax.fori_loop(one, group, partial(one_head, is_first=False), state)


def for_each_q_tile_alike(
    kernel: Kernel,
    step: Callable,
    carry: Any = None,
    end_of_head: Callable = lambda q_head, carry: carry,
) -> tuple[Any, Any]:
    """The same with ``carry = step(t, q_head, q_tile, carry)``, to which all tiles are alike.

    Not where the near tiles come first (`Kernel.near`). One loop is less to compile; but where each
    warpgroup owns keys, the producer with it costs 1.475 ms for 1.407 at 4 x 4096 x 32 x 64 causal,
    H100, JAX 0.11.2.
    """

    def one_head(index, state, is_first):
        t, carry = state
        q_head = kernel.q_head(index)
        first, _, _, last = _edges(kernel, q_head, is_first)
        before = t - first

        def body(q_tile, carry):
            return step(before + q_tile, q_head, q_tile, carry)

        return t + last - first, end_of_head(q_head, lax.fori_loop(first, last, body, carry))

    return _for_each_head(kernel, one_head, carry)


def _for_each_head(kernel: Kernel, one_head: Callable, carry: Any) -> tuple[Any, Any]:
    """``state = one_head(index, state, is_first)`` for the query heads, from (0, carry) on."""
    zero = kernel.block.kv_tile * 0
    if kernel.spec.group == 1:
        return one_head(zero, (zero, carry), True)
    group = jnp.int32(kernel.spec.group)
    body = lambda index, state: one_head(index, state, index == 0)  # noqa: E731
    return lax.fori_loop(jnp.int32(0), group, body, (zero, carry))


class _Loop(NamedTuple):
    """Successive query tiles; `before` and a tile's number are the number of its step."""

    begin: Any
    end: Any
    zone: Zone
    before: Any


def _zone_of_first(kernel: Kernel) -> Zone:
    """Of the first step of all: it may be any."""
    return Zone(kernel.near is not None or kernel.runs.first or kernel.runs.third)


def _loops(kernel: Kernel, edges: Any, done: int) -> tuple[list[_Loop], Any]:
    """The loops over a head's query tiles, and the number of its steps, `done` of them before.

    edges: four numbers of `runs` or `runs_around`.
    """
    first, begin, end, last = edges
    if kernel.near is not None:
        near = _Loop(begin + done, end, Zone(True), 0 - begin)
        after = _Loop(first, begin, Zone(False, AFTER), end - begin - first)
        return [near, after, _Loop(end, last, Zone(False, BEFORE), 0 - first)], last - first
    next_tile = first + done
    if done:
        end, begin = jnp.maximum(end, next_tile), jnp.maximum(begin, next_tile)
    loops = [
        _Loop(next_tile, begin, Zone(True), 0 - first),
        _Loop(begin, end, Zone(False), 0 - first),
        _Loop(end, last, Zone(True), 0 - first),
    ]
    return loops, last - first


def _edges(kernel: Kernel, q_head: Any, is_first: Any) -> tuple[Any, Any, Any, Any]:
    """first, full_first, full_last and last query tile that a head visits, int32.

    The first head visits one, even if the mask then allows nothing.
    """
    zero = kernel.block.kv_tile * 0
    if kernel.gmem.schedule is None:
        return zero, zero, zero + kernel.num_q_tiles, zero + kernel.num_q_tiles
    where = (kernel.gmem.schedule, kernel.block.batch, q_head, kernel.block.kv_tile)
    first, full_first, full_last, last = (
        schedule_bound(*where, edge) for edge in (FIRST, FULL_FIRST, FULL_LAST, LAST)
    )
    if kernel.near is not None:
        full_last = jnp.where(is_first, jnp.maximum(full_last, full_first + 1), full_last)
        last = jnp.maximum(last, full_last)
        return first, full_first, full_last, last
    # All four are the same then.
    more = jnp.where(is_first & (first == last), 1, 0)
    return first, full_first + more, full_last + more, last + more


class Stream(NamedTuple):
    """Tiles with a float32 number per query that pass through stages: Q with lse, dO with delta."""

    source: Source
    looks: Any
    row_gmem: Any
    tile_smem: Any
    row_smem: Any
    ready: Any
    free: Any
    num_stages: int


def load_tiles(kernel: Kernel) -> None:
    """The producer: K and V once, then Q with lse and dO with delta, tile by tile."""
    gmem, smem, block, config = kernel.gmem, kernel.smem, kernel.block, kernel.config
    for array_gmem, tile_smem in ((gmem.k, smem.k), (gmem.v, smem.v)):
        part = window(array_gmem, block.batch, kernel.kv_start, block.kv_head, tile_smem)
        plgpu.copy_gmem_to_smem(part, tile_smem, smem.kv_ready)

    q = Stream(
        *(gmem.q, gmem.q.looks(block.batch), gmem.lse_log2, smem.q, smem.lse_log2),
        *(smem.q_ready, smem.q_free, config.num_q_stages),
    )
    dout = Stream(
        *(gmem.dout, gmem.dout.looks(block.batch), gmem.delta, smem.dout, smem.delta),
        *(smem.dout_ready, smem.dout_free, config.num_dout_stages),
    )

    def load(t, q_head, q_tile, _):
        _load_stage(kernel, q, t, q_head, q_tile)
        slot, place = stage(t, config.num_q_stages), kernel.place(q_head, q_tile)
        ready = smem.q_ready.at[slot]
        bring(kernel.tiling, gmem.terms, smem.tiles, slot, place, ready)
        _load_stage(kernel, dout, t, q_head, q_tile)

    def load_in_zone(t, q_head, q_tile, _, zone):
        load(t, q_head, q_tile, None)
        if smem.near_ready is not None and zone.where == NEAR:
            _load_near(kernel, kernel.place(q_head, q_tile))

    if config.shares_keys and kernel.near is None:
        steps, _ = for_each_q_tile_alike(kernel, load)
    else:
        steps, _ = for_each_q_tile(kernel, load_in_zone)
    if smem.near_free is not None:
        _drain(smem.near_free, NUM_MATH_WGS, NUM_MATH_WGS)
    _drain(smem.q_free, config.num_q_stages, steps)
    _drain(smem.dout_free, config.num_dout_stages, steps)


def _load_stage(kernel: Kernel, stream: Stream, t: Any, q_head: Any, q_tile: Any) -> None:
    slot = stage(t, stream.num_stages)

    @pl.when(t >= stream.num_stages)
    def _():
        plgpu.barrier_wait(stream.free.at[slot])

    batch, start = kernel.block.batch, q_tile * kernel.config.block_q
    tile_smem, ready = Tile(stream.tile_smem.at[slot], None), stream.ready.at[slot]
    stream.source.load(stream.looks, batch, q_head, q_tile, tile_smem, ready)
    row = stream.row_gmem.at[batch, q_head, pl.ds(start, kernel.config.block_q)]
    plgpu.copy_gmem_to_smem(row, stream.row_smem.at[slot], ready)


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


def scores_part(kernel: Kernel, place: Place, shape: tuple[int, int], zone: Zone) -> Part:
    """The scores of some keys of a tile."""
    of_rows = kernel.of_rows
    if of_rows is None:
        of_rows = read_rows(kernel.tiling, kernel.gmem.terms, place, shape[0])
    where = place, shape, zone
    return Part.of(kernel.tiling, kernel.gmem.terms, of_rows, *where, kernel.is_wide)


def with_rows(kernel: Kernel, wg: Any) -> Kernel:
    """The kernel of a warpgroup with what its keys have of the terms' arrays, read once."""
    if rows_differ_by_head(kernel.spec, KV):
        return kernel
    place = kernel.place(kernel.q_head(0), 0)
    if not kernel.config.shares_keys:
        place = place._replace(row_start=place.row_start + wg * WG_KEYS)
    of_rows = read_rows(kernel.tiling, kernel.gmem.terms, place, WG_KEYS)
    return dataclasses.replace(kernel, of_rows=of_rows)


def scores_terms(kernel: Kernel, t: Any, part: Part, own: Any) -> Terms:
    """The terms of some keys of a tile, `own` of its rows."""
    smem = kernel.smem
    if not part.is_near:
        return part.terms(smem.tiles, stage(t, kernel.config.num_q_stages), own)
    wg = lax.axis_index("wg")
    plgpu.barrier_wait(smem.near_ready.at[wg])
    terms = part.terms(smem.tiles, stage(t, kernel.config.num_q_stages), own)
    # Read by ordinary loads, and TMA overwrites it.
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.near_free.at[wg])
    return terms


def _ends(kernel: Kernel) -> tuple[int | None, int | None]:
    """Of keys and queries, where a tile may hold some beyond that count for something."""
    spec, config = kernel.spec, kernel.config
    keys = spec.kv_len if spec.kv_len % config.block_kv else None
    # Queries over the end weigh nothing, but a mask may let them meet keys that hold NaN.
    is_cut = spec.q_len % config.block_q != 0 and may_hold_padding(spec)
    return keys, spec.q_len if is_cut else None


def per_query(row_smem: Any) -> Any:
    """One number for each column of a tile of scores."""
    return plgpu.load(row_smem, layout=PER_COLUMN, optimized=False)


class Weights(NamedTuple):
    """P^T, and what the gradients of the scores are multiples of."""

    p: Any
    scores: Any


def probabilities(kernel: Kernel, part: Part, terms: Terms, s: Any, lse_log2: Any) -> Weights:
    """P^T from raw scores s, 0 where masked, and its `Weights`.

    Rows with lse_log2 = inf give 0.
    """
    scale, lse_log2 = kernel.spec.scale, lax.broadcast_in_dim(lse_log2, s.shape, [1])

    def to_p(logits_log2):
        p = jnp.exp2(logits_log2 - lse_log2)
        return masking.masked(part, terms.mask, p, 0.0, _ends(kernel)) if part.is_masked else p

    if terms.score_mod is None:
        p = to_p(s * (scale * LOG2_E))
        return Weights(p, p)

    def all_of_it(mod, s, q_pos, kv_pos):
        return with_weights(mod, s * scale, q_pos, kv_pos, lambda x: to_p(x * LOG2_E))

    return Weights(*written_out(all_of_it)(terms.score_mod, s, *part.positions()))


def weight_factors(part: Part, terms: Terms, dp: Any, delta: Any) -> Any:
    """What P is multiplied with in the gradient of the logits: dP, after dropout, less delta."""
    kept, spec = keep(terms, dp), part.tiling.spec
    kept = kept if spec.dropout is None else kept * dropout_factor(spec)
    return kept - lax.broadcast_in_dim(delta, dp.shape, [1])


def array_gradients_of(part: Part, terms: Terms, s: Any, p: Any, x: Any) -> list[Any]:
    """What each score of a part adds to the gradients of the score mod's arrays.

    None for those that are not used there. x: of `weight_factors`.
    """
    if not array_gradients.leaves(part.tiling.spec):
        return []
    mod, scaled = part.tiling.spec.score_mod, s * part.tiling.spec.scale
    leaves = leaves_of(mod, KV)
    here = [i for i in used(mod, part.zone.where) if leaves[i].is_float]
    found = written_out(gradients_of_arrays)(terms.score_mod, scaled, *part.positions(), p * x)
    by_leaf = dict(zip(here, found, strict=True))
    return [by_leaf.get(i) for i, leaf in enumerate(leaves) if leaf.is_float]


def scrub(tile_smem: Any) -> None:
    """Zeroes what is not finite in a part of K or V, where padded keys may hold anything.

    Their P and dS are 0, but dP = dO V^T and dQ = dS K would still take up 0 * NaN. Nothing is
    hidden: where such a key counts, lse or delta and so every gradient of its rows is not finite.
    """
    x = plgpu.load(tile_smem, layout=MATRIX, optimized=False)
    is_finite = jnp.abs(x.astype(jnp.float32)) < jnp.inf
    tile_smem[...] = jnp.where(is_finite, x, jnp.zeros_like(x))
    plgpu.commit_smem()


def accumulator(rows: int, columns: int) -> Any:
    return plgpu.ACC((rows, columns), jnp.float32)


def zero_accumulator(rows: int, columns: int) -> Any:
    """A zero accumulator to carry through ``pl.run_state``."""
    return plgpu.ACC.init(zero_matrix(rows, columns))


def free_stages(kernel: Kernel, t: Any) -> None:
    """Hands the tiles of step `t` back to the producer.

    lse, delta and the terms' matrices were read by ordinary loads: a ``commit_smem`` must lie
    between those and this, since TMA overwrites them.
    """
    plgpu.barrier_arrive(kernel.smem.q_free.at[stage(t, kernel.config.num_q_stages)])
    plgpu.barrier_arrive(kernel.smem.dout_free.at[stage(t, kernel.config.num_dout_stages)])
