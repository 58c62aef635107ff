"""What both backward kernels share: sizes, the walk over query tiles, the producer, probabilities.

One block owns the keys of one tile of one kv head. It streams the query tiles of all query heads
that share this kv head, so dK and dV leave it once and complete, and adds its part of dQ to float32
memory. Scores are transposed (keys along rows), so that P^T and dS^T are left operands.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.backends.hopper import array_gradients
from pallas_flash.backends.hopper.backward_storage import Storage, tiling
from pallas_flash.backends.hopper.config import BackwardConfig
from pallas_flash.backends.hopper.elementwise import written_out
from pallas_flash.backends.hopper.operands import Place, Terms, Tiling, bring
from pallas_flash.backends.hopper.padding import Source
from pallas_flash.backends.hopper.scores import (
    Part,
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
from pallas_flash.masks.schedule import FIRST, FULL_FIRST, FULL_LAST, LAST
from pallas_flash.spec import AttentionSpec

# Math warpgroups of a block; one more warpgroup only issues TMA loads.
NUM_MATH_WGS = 2
# Registers a thread: 128 * (24 + 2 * 240) stay within the 64 K of an SM.
PRODUCER_REGISTERS, MATH_REGISTERS = 24, 240


class GlobalRefs(NamedTuple):
    """What a kernel reads and writes in GMEM.

    k, v: [B, T, H, D]; q, dout: sources of the same. lse_log2, delta: [B, Hq, Tq rounded up to
    block_q] float32. schedule: [B or 1, Hq or 1, num_kv_tiles, 4] int32 or None. terms: the arrays
    of mask, score mod and dropout. dq_acc: [B, Tq, Hq, D] float32, added to. gradients: of the
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
    dq_acc: Any
    gradients: array_gradients.Refs


class Block(NamedTuple):
    """Which keys a thread block owns."""

    batch: Any
    kv_head: Any
    kv_tile: Any


class Runs(NamedTuple):
    """Which of the three successive loops over query tiles can have anything to do."""

    masked_before: bool
    unmasked: bool
    masked_after: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: what is static, the refs, and the block."""

    spec: AttentionSpec
    config: BackwardConfig
    runs: Runs
    gmem: GlobalRefs
    smem: Storage
    block: Block

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
    unmasked: Callable,
    masked: Callable,
    carry: Any = None,
    end_of_head: Callable = lambda q_head, carry: carry,
) -> tuple[Any, Any]:
    """Calls ``carry = step(t, q_head, q_tile, carry)`` for the tiles to visit, t = 0, 1, ..

    There is always a first step, outside of any loop, even if the mask then allows nothing. Behind
    the tiles of each query head comes ``carry = end_of_head(q_head, carry)``. Returns the number of
    steps and the last carry.
    """
    runs = kernel.runs

    def one_head(index, state, is_first):
        t, carry = state
        q_head = kernel.q_head(index)
        first, full_first, full_last, last = _edges(kernel, q_head)

        def loop(start, end, step, carry):
            def body(q_tile, carry):
                return step(t + (q_tile - first), q_head, q_tile, carry)

            return lax.fori_loop(start, end, body, carry)

        begin = first
        if is_first:
            # Peeled: ptxas spills less in the loops, +3% at head_dim 128, H100, JAX 0.11.2.
            step = masked if runs.masked_before or runs.masked_after else unmasked
            carry = step(t, q_head, first, carry)
            begin, last = first + 1, jnp.maximum(last, first + 1)
        if runs.masked_before:
            carry = loop(begin, full_first, masked, carry)
        if runs.unmasked:
            carry = loop(jnp.maximum(begin, full_first), full_last, unmasked, carry)
        if runs.masked_after:
            carry = loop(jnp.maximum(begin, full_last), last, masked, carry)
        return t + (last - first), end_of_head(q_head, carry)

    zero = kernel.block.kv_tile * 0
    state = one_head(zero, (zero, carry), is_first=True)
    if kernel.spec.group == 1:
        return state
    one, group = jnp.int32(1), jnp.int32(kernel.spec.group)
    return lax.fori_loop(one, group, partial(one_head, is_first=False), state)


def _edges(kernel: Kernel, q_head: Any) -> tuple[Any, Any, Any, Any]:
    """first, full_first, full_last and last query tile that a head visits, int32."""
    zero = kernel.block.kv_tile * 0
    if kernel.gmem.schedule is None:
        return zero, zero, zero + kernel.num_q_tiles, zero + kernel.num_q_tiles
    where = (kernel.gmem.schedule, kernel.block.batch, q_head, kernel.block.kv_tile)
    first, full_first, full_last, last = (
        schedule_bound(*where, edge) for edge in (FIRST, FULL_FIRST, FULL_LAST, LAST)
    )
    return first, full_first, full_last, last


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

    steps, _ = for_each_q_tile(kernel, load, load)
    _drain(smem.q_free, config.num_q_stages, steps)
    _drain(smem.dout_free, config.num_dout_stages, steps)


def _load_stage(kernel: Kernel, stream: Stream, t: Any, q_head: Any, q_tile: Any) -> None:
    slot = stage(t, stream.num_stages)

    @pl.when(t >= stream.num_stages)
    def _():
        plgpu.barrier_wait(stream.free.at[slot])

    batch, start = kernel.block.batch, q_tile * kernel.config.block_q
    tile_smem, ready = stream.tile_smem.at[slot], stream.ready.at[slot]
    stream.source.load(stream.looks, batch, q_head, q_tile, tile_smem, ready)
    row = stream.row_gmem.at[batch, q_head, pl.ds(start, kernel.config.block_q)]
    plgpu.copy_gmem_to_smem(row, stream.row_smem.at[slot], ready)


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


def scores_part(kernel: Kernel, place: Place, shape: tuple[int, int], masked: bool) -> Part:
    """The scores of some keys of a tile."""
    return Part.of(kernel.tiling, kernel.gmem.terms, place, shape, masked)


def scores_terms(kernel: Kernel, t: Any, part: Part, own: Any) -> Terms:
    """The terms of some keys of a tile, `own` of its rows."""
    return part.terms(kernel.smem.tiles, stage(t, kernel.config.num_q_stages), own)


def _allowed(kernel: Kernel, part: Part, terms: Terms) -> Any:
    """Which scores of a masked part count: [keys, queries] bool."""
    q_pos, kv_pos = part.positions()
    spec = kernel.spec
    conditions = []
    if spec.kv_len % kernel.config.block_kv:
        conditions.append(kv_pos < spec.kv_len)
    if spec.q_len % kernel.config.block_q and may_hold_padding(spec):
        # Queries over the end weigh nothing, but a mask may let them meet keys that hold NaN.
        conditions.append(q_pos < spec.q_len)
    if spec.mask is not None:
        conditions.append(part.allowed(terms))
    assert conditions, "a masked loop without anything to mask"
    return functools.reduce(operator.and_, conditions)


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
    allowed = _allowed(kernel, part, terms) if part.is_masked else None

    def to_p(logits_log2):
        p = jnp.exp2(logits_log2 - lse_log2)
        return p if allowed is None else jnp.where(allowed, p, 0.0)

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

    x: of `weight_factors`.
    """
    if not array_gradients.leaves(part.tiling.spec):
        return []
    scaled = s * part.tiling.spec.scale
    return written_out(gradients_of_arrays)(terms.score_mod, scaled, *part.positions(), p * x)


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


def add_dq(kernel: Kernel, wg: Any, q_head: Any, q_tile: Any, dq: Any) -> None:
    """Adds this warpgroup's part of a dQ tile to float32 memory, asynchronously."""
    config, staging_smem = kernel.config, kernel.smem.dq.at[wg]
    num_buffers, rows, width = staging_smem.shape
    row, column = q_tile * config.block_q, kernel.block.kv_tile * 0
    if config.splits_dq_columns:
        column = column + wg * dq.shape[1]
    else:
        row = row + wg * rows
    # Later adds of the arrays' gradients may still read theirs. Where the warpgroups share keys the
    # same step comes back to a buffer, without such adds between.
    later = num_buffers - 1
    if not config.shares_keys:
        later += len(kernel.smem.gradients.matrices)
    for i in range(dq.shape[1] // width):
        buffer_smem = staging_smem.at[i % num_buffers]
        # The adds before have read the buffer.
        plgpu.wait_smem_to_gmem(later, wait_read_only=True)
        buffer_smem[...] = dq[:, i * width : (i + 1) * width]
        plgpu.commit_smem()
        part = pl.ds(column + i * width, width)
        at = (kernel.block.batch, pl.ds(row, rows), q_head, part)
        plgpu.copy_smem_to_gmem(buffer_smem, kernel.gmem.dq_acc.at[at], reduction_op="add")


def free_stages(kernel: Kernel, t: Any) -> None:
    """Hands the tiles of step `t` back to the producer.

    lse, delta and the terms' matrices were read by ordinary loads: a ``commit_smem`` must lie
    between those and this, since TMA overwrites them.
    """
    plgpu.barrier_arrive(kernel.smem.q_free.at[stage(t, kernel.config.num_q_stages)])
    plgpu.barrier_arrive(kernel.smem.dout_free.at[stage(t, kernel.config.num_dout_stages)])
