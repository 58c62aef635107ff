"""Attention of a few queries over a cache on Hopper: the keys split over the whole GPU.

The thread blocks of a team, one for each kv head, walk side by side over an equal share of all key
blocks of the batch, row after row: how long a row is changes nothing for who works how much. A
block packs the queries of a group of heads into the rows of one product, and streams K and V once,
by TMA. Each part of a row gives its own out and lse, which `decode_merge` joins.

Source: Flash-Decoding (Dao et al. 2023).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends import tile
from pallas_flash.backends.hopper.decode_merge import merge, width_of
from pallas_flash.backends.hopper.decode_share import (
    Share,
    blocks_of_work,
    is_ring,
    key_blocks,
    row_work,
    share_begin,
    share_out,
)
from pallas_flash.backends.hopper.decode_storage import (
    BLOCK_KV,
    REDUCTION_SCRATCH_BYTES,
    WG_ROWS,
    DecodeConfig,
    Storage,
    copies,
    storage,
)
from pallas_flash.backends.hopper.storage import (
    LOG2_E,
    MATRIX,
    constant_per_row,
    load_accumulator,
    read_scalar,
    tma_rows,
    widen_rows,
    window,
)

# Threads of a block: the one that loads, the one that computes.
PRODUCER, CONSUMER = range(2)
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
)


class Inputs(NamedTuple):
    """What the kernel reads from GMEM.

    q: [B, Hkv, rows, D], row t * G + g for query t of head g of a group. k, v: [B or pages, slots,
    Hkv, D]. pages: [B, pages_per_row] int32, or None where row b is "page" b.
    """

    q: Any
    k: Any
    v: Any
    pages: Any
    share: Share


class Row(NamedTuple):
    """One row of the batch: its number, tokens, first query's position, first key block, and where
    its work begins and ends in that of all."""

    index: Any
    length: Any
    start: Any
    first_block: Any
    begin: Any
    end: Any


class Segment(NamedTuple):
    """The key blocks first..last of a row that one team visits, none perhaps.

    part: where the result goes; is_first: of the team's; next_row: the number of the team's next
    row, or -1.
    """

    row: Row
    first: Any
    last: Any
    part: Any
    is_first: Any
    next_row: Any


class State(NamedTuple):
    """m_log2 and l [64] float32 of the queries; their accumulator is a ref."""

    m_log2: Any
    l: Any  # noqa: E741


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: what is static, and the refs."""

    spec: Any
    config: DecodeConfig
    gmem: Inputs
    out_gmem: Any
    lse_gmem: Any
    smem: Storage
    team: Any
    head: Any

    def stage(self, step: Any) -> Any:
        """Where in SMEM the keys and values of a step lie, counted over all segments."""
        return lax.rem(step, jnp.int32(self.config.num_stages))


def forward(spec: Any, config: DecodeConfig, operands: Any) -> tuple[Any, Any]:
    """out [B, Tq, Hq, Dv] in q's dtype and lse [B, Hq, Tq] float32, natural log."""
    num_teams = config.num_teams
    share = share_out(spec, num_teams, operands.cache.lengths, operands.counts)
    parts, lse_log2 = _launch(spec, config, _inputs(spec, operands, share))
    out, lse = merge(spec, config, share, parts, lse_log2)
    return out.astype(spec.dtype), lse


def _inputs(spec: Any, operands: Any, share: Share) -> Inputs:
    cache = operands.cache
    q = operands.q.reshape(spec.batch, spec.q_len, spec.num_kv_heads, spec.group, spec.head_dim)
    q = q.swapaxes(1, 2).reshape(spec.batch, spec.num_kv_heads, -1, spec.head_dim)
    num_rows = q.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, tma_rows(num_rows) - num_rows), (0, 0)))
    if not hasattr(cache, "block_tables"):
        return Inputs(q, cache.k, cache.v, None, share)
    pages = jnp.clip(cache.block_tables, 0, len(cache.k_pages) - 1)
    return Inputs(q, cache.k_pages, cache.v_pages, pages, share)


def _launch(spec: Any, config: DecodeConfig, inputs: Inputs) -> tuple[Any, Any]:
    """out [parts, Hkv, rows, width] float32 and lse [parts, Hkv, 64] of each part, in base 2."""
    num_kv_heads = spec.num_kv_heads

    def flash_decode(gmem, out_gmem, lse_gmem, smem):
        index, heads = lax.axis_index("block"), jnp.int32(num_kv_heads)
        team, head = lax.div(index, heads), lax.rem(index, heads)
        kernel = Kernel(spec, config, gmem, out_gmem, lse_gmem, smem, team, head)
        wg = lax.axis_index("wg")
        pl.when(wg == PRODUCER)(lambda: _load(kernel))
        pl.when(wg == CONSUMER)(lambda: _compute(kernel))

    num_parts = config.num_teams + spec.batch
    rows, width = inputs.q.shape[2], width_of(spec.value_dim)
    return plgpu.kernel(
        flash_decode,
        out_type=(
            jax.ShapeDtypeStruct((num_parts, num_kv_heads, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((num_parts, num_kv_heads, WG_ROWS), jnp.float32),
        ),
        grid=(config.num_teams * num_kv_heads,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=(storage(spec, config),),
        compiler_params=COMPILER_PARAMS,
    )(inputs)


def _for_each_segment(kernel: Kernel, body: Callable[[Segment, Any], Any]) -> Any:
    """``step = body(segment, step)`` for the rows that this team has a part of, from step 0 on."""
    share, num_teams = kernel.gmem.share, kernel.config.num_teams
    last_row = jnp.int32(kernel.spec.batch - 1)
    total = read_scalar(share.ends, last_row)
    low, high = (share_begin(kernel.team + i, total, num_teams) for i in range(2))
    first_row, end_row = (read_scalar(share.first_rows, kernel.team + i) for i in range(2))
    # The share ends inside of `end_row`, if that has begun before.
    has_part = (low < high) & (end_row <= last_row)
    has_part &= _row(kernel, jnp.minimum(end_row, last_row)).begin < high
    end_row = jnp.where(low < high, end_row + has_part.astype(jnp.int32), first_row)

    def visit(index, carry):
        row, step = carry
        # Read a row ahead: the memory's latency passes meanwhile.
        following = _row(kernel, jnp.minimum(index + 1, last_row))
        segment = Segment(
            row,
            first=row.first_block + blocks_of_work(jnp.maximum(low, row.begin) - row.begin),
            last=row.first_block + blocks_of_work(jnp.minimum(high, row.end) - row.begin),
            part=kernel.team + index,
            is_first=index == first_row,
            next_row=jnp.where(index + 1 < end_row, index + 1, -1),
        )
        return following, body(segment, step)

    first = _row(kernel, jnp.minimum(first_row, last_row)), jnp.int32(0)
    return lax.fori_loop(first_row, end_row, visit, first)[1]


def _row(kernel: Kernel, index: Any) -> Row:
    share = kernel.gmem.share
    length, count, end = (
        read_scalar(array, index) for array in (share.lengths, share.counts, share.ends)
    )
    start = length - count
    blocks = key_blocks(kernel.spec, length, start)
    return Row(index, length, start, blocks[0], end - row_work(*blocks), end)


# ---------------------------------------------------------------------------------------------
# The producer


def _load(kernel: Kernel) -> None:
    """Streams the key blocks of all segments through the stages."""
    smem = kernel.smem

    def load_segment(segment, first_step):
        def load(i, _):
            _load_block(kernel, segment.row, first_step + i - segment.first, i)

        lax.fori_loop(segment.first, segment.last, load, None)
        return first_step + segment.last - segment.first

    steps = _for_each_segment(kernel, load_segment)
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


# ---------------------------------------------------------------------------------------------
# The consumer


def _compute(kernel: Kernel) -> None:
    """The results of all segments."""
    smem = kernel.smem

    def compute_segment(segment, step):
        # The first one's queries; those of the others are loaded when the tile is free.
        pl.when(segment.is_first)(lambda: _load_q(kernel, segment.row.index))
        plgpu.barrier_wait(smem.q_ready)

        def with_accumulator(acc):
            state = _attend(kernel, segment, step, acc)
            pl.when(segment.next_row >= 0)(lambda: _load_q(kernel, segment.next_row))
            _finish(kernel, segment, state, acc)

        pl.run_scoped(with_accumulator, plgpu.ACC((WG_ROWS, smem.v.shape[-1]), jnp.float32))
        return step + segment.last - segment.first

    _for_each_segment(kernel, compute_segment)
    plgpu.wait_smem_to_gmem(0)


def _load_q(kernel: Kernel, row: Any) -> None:
    """Starts the load of the queries of a row and group of heads; zeros fill the tile."""
    q_smem = kernel.smem.q
    # Never a constant: Pallas refuses a slice that it can see is too wide.
    zero = row * 0
    rows, width = q_smem.shape
    source = kernel.gmem.q.at[row, kernel.head, pl.ds(zero, rows), pl.ds(zero, width)]
    plgpu.copy_gmem_to_smem(source, q_smem, kernel.smem.q_ready)


def _attend(kernel: Kernel, segment: Segment, first_step: Any, acc: Any) -> State:
    """The state after the key blocks of a segment."""
    first, last = segment.first, segment.last
    # Key blocks that all queries see whole; without a window they come first.
    full = first
    if kernel.spec.cache.window is None:
        full = lax.div(segment.row.start + 1, jnp.int32(BLOCK_KV))
        full = jnp.clip(full, first, last)

    def visit(i, state, is_masked):
        return _step(kernel, segment, first_step + i - first, i, state, acc, is_masked)

    state = State(constant_per_row(WG_ROWS, -jnp.inf), constant_per_row(WG_ROWS, 0.0))
    state = lax.fori_loop(first, full, lambda i, s: visit(i, s, False), state)
    return lax.fori_loop(full, last, lambda i, s: visit(i, s, True), state)


def _step(
    kernel: Kernel, segment: Segment, t: Any, i: Any, state: State, acc: Any, is_masked: bool
) -> State:
    """The state after key block `i`, which is the team's step `t`."""
    smem, stage = kernel.smem, kernel.stage(t)

    def scores(s_acc):
        plgpu.barrier_wait(smem.k_ready.at[stage])
        plgpu.wgmma(s_acc, smem.q, smem.k.at[stage].transpose((1, 0)))
        s = load_accumulator(s_acc, wait_n=0)
        plgpu.barrier_arrive(smem.k_free.at[stage])
        # Score mods that do not look at positions are all that this kernel serves.
        return tile.logits(s, None, None, kernel.spec.scale, kernel.spec.score_mod) * LOG2_E

    s = pl.run_scoped(scores, plgpu.ACC((WG_ROWS, BLOCK_KV), jnp.float32))
    if is_masked:
        s = jnp.where(_allowed(kernel, segment, i), s, -jnp.inf)
    m_log2 = jnp.maximum(state.m_log2, s.max(axis=1))
    shift = jnp.where(m_log2 == -jnp.inf, 0.0, m_log2) if is_masked else m_log2
    alpha = jnp.exp2(state.m_log2 - shift)
    p = jnp.exp2(s - widen_rows(shift, s.shape))
    l = state.l * alpha + p.sum(axis=1)  # noqa: E741
    out = load_accumulator(acc, wait_n=0)
    acc[...] = out * widen_rows(alpha, out.shape)
    plgpu.barrier_wait(smem.v_ready.at[stage])
    v_smem = smem.v.at[stage]
    if is_masked:
        _zero_unused(kernel, segment, i, v_smem)
    plgpu.wgmma(acc, p.astype(kernel.spec.dtype), v_smem)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(smem.v_free.at[stage])
    return State(m_log2, l)


def _positions(kernel: Kernel, segment: Segment, i: Any, shape: Any, axis: int) -> tuple[Any, Any]:
    """Positions of the keys of block `i` along an axis of a matrix, and which of them exist."""
    slot = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)
    slot = slot + i * BLOCK_KV
    if not is_ring(kernel.spec):
        return slot, slot <= (segment.row.length - 1)
    num_slots = kernel.spec.cache.num_slots
    # How many tokens ago a slot was written.
    age = lax.rem((segment.row.length - 1), jnp.int32(num_slots)) - slot
    age = jnp.where(age < 0, age + num_slots, age)
    pos = (segment.row.length - 1) - age
    return pos, (pos >= 0) & (slot < num_slots)


def _allowed(kernel: Kernel, segment: Segment, i: Any) -> Any:
    """Which scores of a block count: [64, BLOCK_KV] bool."""
    shape = (WG_ROWS, BLOCK_KV)
    kv_pos, exists = _positions(kernel, segment, i, shape, 1)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    q_pos = lax.div(row, jnp.int32(kernel.spec.group)) + segment.row.start
    allowed = exists & (kv_pos <= q_pos)
    window_size = kernel.spec.cache.window
    return allowed if window_size is None else allowed & (kv_pos > q_pos - window_size)


def _zero_unused(kernel: Kernel, segment: Segment, i: Any, v_smem: Any) -> None:
    """Zeroes the values that no query sees: their P is 0, but 0 * NaN would not be."""
    v = plgpu.load(v_smem, layout=MATRIX, optimized=False)
    kv_pos, used = _positions(kernel, segment, i, v.shape, 0)
    if kernel.spec.cache.window is not None:
        used = used & (kv_pos > segment.row.start - kernel.spec.cache.window)
    v_smem[...] = jnp.where(used, v, jnp.zeros_like(v))
    plgpu.commit_smem()


def _finish(kernel: Kernel, segment: Segment, state: State, acc: Any) -> None:
    """Stores out and lse of a segment."""
    out_smem, lse_smem = kernel.smem.out, kernel.smem.lse
    is_empty = state.l == 0.0
    inverse = jnp.where(is_empty, 0.0, 1.0 / jnp.where(is_empty, 1.0, state.l))
    out = load_accumulator(acc, wait_n=0)
    # The stores of the segment before have read these.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem[...] = out * widen_rows(inverse, out.shape)
    lse_smem[...] = state.m_log2 + jnp.log2(state.l)
    plgpu.commit_smem()
    # Never a constant, see `_load_q`.
    zero = segment.row.index * 0
    rows, width = out_smem.shape
    target = kernel.out_gmem.at[segment.part, kernel.head, pl.ds(zero, rows), pl.ds(zero, width)]
    plgpu.copy_smem_to_gmem(out_smem, target)
    plgpu.copy_smem_to_gmem(lse_smem, kernel.lse_gmem.at[segment.part, kernel.head])
