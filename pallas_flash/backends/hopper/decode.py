"""Attention of a few queries over a cache on Hopper: the keys split over the whole GPU.

The thread blocks of a team, one for each kv head, walk side by side over an equal share of all key
blocks of the batch, row after row: how long a row is changes nothing for who works how much. A
block packs the queries of a group of heads into the rows of one product, and streams K and V once,
by TMA. Each part of a row gives its own out and lse; XLA merges them.

Source: Flash-Decoding (Dao et al. 2023); the sharing out is that of stream-K (Osama et al. 2023,
arXiv:2301.03598), with a part for each (team, row).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.decode_storage import (
    REDUCTION_SCRATCH_BYTES,
    WG_ROWS,
    DecodeConfig,
    Storage,
    columns,
    copies,
    storage,
)
from pallas_flash.backends.hopper.storage import (
    LN_2,
    LOG2_E,
    MATRIX,
    constant_per_row,
    load_accumulator,
    read_scalar,
    tma_rows,
    widen_rows,
    window,
)

COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
)


class Inputs(NamedTuple):
    """What the kernel reads from GMEM.

    q: [B, Hkv, rows, D], row t * G + g for query t of head g of a group. k, v: [B or pages, slots,
    Hkv, D]. pages: [B, pages_per_row] int32, or None where row b is "page" b. teams: [teams, 4]
    int32: first row, end of rows, first key block, end of key blocks. rows: [B, 5] int32: where the
    row's key blocks begin in the count of all, its first block, its number of blocks, the position
    of its newest key, that of its first query.
    """

    q: Any
    k: Any
    v: Any
    pages: Any
    teams: Any
    rows: Any


class Segment(NamedTuple):
    """The key blocks first..last of a row that one team visits. part: where its result goes."""

    row: Any
    first: Any
    last: Any
    newest: Any
    start: Any
    part: Any


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
    share = _share_out(spec, config, operands)
    parts, lse_parts = _launch(spec, config, _inputs(spec, operands, share))
    return _merge(spec, config, share, parts, lse_parts)


class Share(NamedTuple):
    """Who works on what. teams, rows: see `Inputs`; parts: [B, 2] int32, the first part of each row
    and how many it has."""

    teams: Any
    rows: Any
    parts: Any


def _share_out(spec: Any, config: DecodeConfig, operands: Any) -> Share:
    """An equal share of all key blocks for every team."""
    cache, num_teams, block_kv = operands.cache, config.num_teams, config.block_kv
    starts = operands.starts
    held = jnp.clip(cache.lengths, 0, spec.cache.max_len)
    first = jnp.zeros_like(held)
    if spec.cache.window is not None and not _is_ring(spec):
        first = jnp.maximum(starts - spec.cache.window + 1, 0) // block_kv
    last = pl.cdiv(jnp.minimum(held, spec.cache.num_slots), block_kv)
    count = jnp.maximum(last - first, 0)
    row = jnp.arange(spec.batch, dtype=jnp.int32)
    # A sum over a triangle: XLA's cumulative sum would be several kernels.
    end = jnp.where(row <= row[:, None], count, 0).sum(1, dtype=jnp.int32)
    total = end[-1]
    # A team has at least one block, or none of them and no part.
    busy = jnp.clip(total, 1, num_teams)
    bound = jnp.minimum(jnp.arange(num_teams + 1, dtype=jnp.int32), busy) * total // busy
    low, high = bound[:-1], bound[1:]
    first_row = (end <= low[:, None]).sum(1, dtype=jnp.int32)
    end_row = jnp.where(low < high, (end < high[:, None]).sum(1, dtype=jnp.int32) + 1, first_row)
    begin = end - count

    def team_of(block):
        return ((block + 1) * busy - 1) // jnp.maximum(total, 1)

    first_team = team_of(begin)
    num_parts = jnp.where(count > 0, team_of(end - 1) - first_team + 1, 0)
    return Share(
        teams=jnp.stack([first_row, end_row, low, high], 1),
        rows=jnp.stack([begin, first, count, held - 1, starts], 1),
        # A team's next row, and a row's next team, have the next part.
        parts=jnp.stack([first_team + row, num_parts], 1),
    )


def _is_ring(spec: Any) -> bool:
    return getattr(spec.cache, "is_ring", False)


def _inputs(spec: Any, operands: Any, share: Share) -> Inputs:
    cache = operands.cache
    q = operands.q.reshape(spec.batch, spec.q_len, spec.num_kv_heads, spec.group, spec.head_dim)
    q = q.swapaxes(1, 2).reshape(spec.batch, spec.num_kv_heads, -1, spec.head_dim)
    num_rows = q.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, tma_rows(num_rows) - num_rows), (0, 0)))
    is_paged = hasattr(cache, "block_tables")
    return Inputs(
        q=q,
        k=cache.k_pages if is_paged else cache.k,
        v=cache.v_pages if is_paged else cache.v,
        pages=jnp.clip(cache.block_tables, 0, len(cache.k_pages) - 1) if is_paged else None,
        teams=share.teams,
        rows=share.rows,
    )


def _launch(spec: Any, config: DecodeConfig, inputs: Inputs) -> tuple[Any, Any]:
    """out [parts, wgs, Hkv, rows, Dv] float32 and lse [parts, wgs, Hkv, 64] of each part."""
    num_wgs, num_kv_heads = config.num_warpgroups, spec.num_kv_heads

    def flash_decode(gmem, out_gmem, lse_gmem, smem):
        index, heads = lax.axis_index("block"), jnp.int32(num_kv_heads)
        kernel = Kernel(
            spec,
            config,
            gmem,
            out_gmem,
            lse_gmem,
            smem,
            lax.div(index, heads),
            lax.rem(index, heads),
        )
        wg = lax.axis_index("wg")
        pl.when(wg == num_wgs)(lambda: _load(kernel))
        pl.when(wg < num_wgs)(lambda: _compute(kernel, wg))

    num_parts = config.num_teams + spec.batch
    return plgpu.kernel(
        flash_decode,
        out_type=(
            jax.ShapeDtypeStruct(
                (num_parts, num_wgs, num_kv_heads, inputs.q.shape[2], columns(spec.value_dim).smem),
                jnp.float32,
            ),
            jax.ShapeDtypeStruct((num_parts, num_wgs, num_kv_heads, WG_ROWS), jnp.float32),
        ),
        grid=(config.num_teams * num_kv_heads,),
        grid_names=("block",),
        num_threads=num_wgs + 1,
        thread_name="wg",
        scratch_types=(storage(spec, config),),
        compiler_params=COMPILER_PARAMS,
    )(inputs)


def _for_each_segment(kernel: Kernel, body: Callable[[Segment, Any], Any]) -> Any:
    """Calls ``step = body(segment, step)`` for the rows that this team has keys of."""
    first_row, end_row, low, high = (
        read_scalar(kernel.gmem.teams, kernel.team, field) for field in range(4)
    )

    def visit(row, step):
        begin, first, count, newest, start = (
            read_scalar(kernel.gmem.rows, row, field) for field in range(5)
        )
        segment = Segment(
            row=row,
            first=first + jnp.maximum(low - begin, 0),
            last=first + jnp.minimum(high - begin, count),
            newest=newest,
            start=start,
            part=kernel.team + row,
        )
        return body(segment, step)

    return lax.fori_loop(first_row, end_row, visit, jnp.int32(0))


# ---------------------------------------------------------------------------------------------
# The producer


def _load(kernel: Kernel) -> None:
    """Streams the key blocks of all segments through the stages."""
    smem = kernel.smem

    def load_segment(segment, first_step):
        def load(i, _):
            t = first_step + i - segment.first
            _load_block(kernel, segment, t, i, (kernel.gmem.k, smem.k, smem.k_ready, smem.k_free))
            _load_block(kernel, segment, t, i, (kernel.gmem.v, smem.v, smem.v_ready, smem.v_free))

        lax.fori_loop(segment.first, segment.last, load, None)
        return first_step + segment.last - segment.first

    steps = _for_each_segment(kernel, load_segment)
    # Interpret mode wants every phase of a barrier observed by whoever waits on it.
    for stage in range(kernel.config.num_stages):

        @pl.when(stage < steps)
        def _(stage=stage):
            plgpu.barrier_wait(smem.k_free.at[stage])
            plgpu.barrier_wait(smem.v_free.at[stage])


def _load_block(kernel: Kernel, segment: Segment, t: Any, i: Any, stream: Any) -> None:
    """Loads key block `i` of a row, the team's step `t`, into its stage."""
    array, tiles, ready, free = stream
    stage = kernel.stage(t)

    @pl.when(t >= kernel.config.num_stages)
    def _():
        plgpu.barrier_wait(free.at[stage])

    block_kv = kernel.config.block_kv
    num_copies = copies(kernel.spec, block_kv)
    size = block_kv // num_copies
    for copy in range(num_copies):
        target = tiles.at[stage] if num_copies == 1 else tiles.at[stage, pl.ds(copy * size, size)]
        page, slot = _locate(kernel, segment.row, i * block_kv + copy * size)
        source = window(array, page, slot, kernel.head, target)
        plgpu.copy_gmem_to_smem(source, target, ready.at[stage])


def _locate(kernel: Kernel, row: Any, slot: Any) -> tuple[Any, Any]:
    """The page of a row's slot, and which slot of the page it is."""
    pages = kernel.gmem.pages
    if pages is None:
        return row, slot
    page_size = jnp.int32(kernel.spec.cache.page_size)
    # The last block of a row may reach beyond its last page.
    index = jnp.minimum(lax.div(slot, page_size), pages.shape[1] - 1)
    return read_scalar(pages, row, index), lax.rem(slot, page_size)


# ---------------------------------------------------------------------------------------------
# The consumers


def _compute(kernel: Kernel, wg: Any) -> None:
    """A consumer: every num_warpgroups-th key block of each segment."""

    def compute_segment(segment, step):
        _load_q(kernel, wg, segment)

        def with_accumulator(acc):
            state = _attend(kernel, wg, segment, step, acc)
            _finish(kernel, wg, segment, state, acc)

        pl.run_scoped(with_accumulator, plgpu.ACC((WG_ROWS, kernel.smem.v.shape[-1]), jnp.float32))
        return step + segment.last - segment.first

    _for_each_segment(kernel, compute_segment)
    plgpu.wait_smem_to_gmem(0)


def _load_q(kernel: Kernel, wg: Any, segment: Segment) -> None:
    """Loads the queries of a row and group of heads; zeros fill the tile."""
    q_smem, ready = kernel.smem.q.at[wg], kernel.smem.q_ready.at[wg]
    rows, width = q_smem.shape
    # Never a constant: Pallas refuses a slice that it can see is too wide.
    zero = segment.row * 0
    source = kernel.gmem.q.at[segment.row, kernel.head, pl.ds(zero, rows), pl.ds(zero, width)]
    plgpu.copy_gmem_to_smem(source, q_smem, ready)
    plgpu.barrier_wait(ready)


def _attend(kernel: Kernel, wg: Any, segment: Segment, first_step: Any, acc: Any) -> State:
    """The state after this warpgroup's key blocks of a segment."""
    wgs = jnp.int32(kernel.config.num_warpgroups)
    # By the team's steps and not the segment's, so that every stage has one consumer.
    offset = lax.rem(wg + wgs - lax.rem(first_step, wgs), wgs)
    first, last = segment.first + offset, segment.last
    # Key blocks that all queries see whole; without a window they come first.
    full = jnp.int32(0)
    if kernel.spec.cache.window is None:
        full = lax.div(segment.start + 1, jnp.int32(kernel.config.block_kv))
    full = jnp.clip(full, first, jnp.maximum(first, last))

    def visit(n, state, is_masked):
        i = first + n * wgs
        return _step(kernel, segment, first_step + i - segment.first, i, state, acc, is_masked)

    def count(end):
        return lax.div(end - first + wgs - 1, wgs)

    num_full, num_all = count(full), jnp.maximum(count(last), 0)
    state = State(constant_per_row(WG_ROWS, -jnp.inf), constant_per_row(WG_ROWS, 0.0))
    state = lax.fori_loop(jnp.int32(0), num_full, lambda n, s: visit(n, s, False), state)
    return lax.fori_loop(num_full, num_all, lambda n, s: visit(n, s, True), state)


def _step(
    kernel: Kernel, segment: Segment, t: Any, i: Any, state: State, acc: Any, is_masked: bool
) -> State:
    """The state after key block `i`, which is the team's step `t`."""
    smem, stage = kernel.smem, kernel.stage(t)
    block_kv = kernel.config.block_kv
    q_smem = smem.q.at[lax.axis_index("wg")]

    def scores(s_acc):
        plgpu.barrier_wait(smem.k_ready.at[stage])
        plgpu.wgmma(s_acc, q_smem, smem.k.at[stage].transpose((1, 0)))
        s = load_accumulator(s_acc, wait_n=0)
        plgpu.barrier_arrive(smem.k_free.at[stage])
        return s * (kernel.spec.scale * LOG2_E)

    s = pl.run_scoped(scores, plgpu.ACC((WG_ROWS, block_kv), jnp.float32))
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
    slot = slot + i * kernel.config.block_kv
    if not _is_ring(kernel.spec):
        return slot, slot <= segment.newest
    num_slots = kernel.spec.cache.num_slots
    # How many tokens ago a slot was written.
    age = lax.rem(segment.newest, jnp.int32(num_slots)) - slot
    age = jnp.where(age < 0, age + num_slots, age)
    pos = segment.newest - age
    return pos, (pos >= 0) & (slot < num_slots)


def _allowed(kernel: Kernel, segment: Segment, i: Any) -> Any:
    """Which scores of a block count: [64, block_kv] bool."""
    shape = (WG_ROWS, kernel.config.block_kv)
    kv_pos, exists = _positions(kernel, segment, i, shape, 1)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    q_pos = lax.div(row, jnp.int32(kernel.spec.group)) + segment.start
    allowed = exists & (kv_pos <= q_pos)
    window_size = kernel.spec.cache.window
    return allowed if window_size is None else allowed & (kv_pos > q_pos - window_size)


def _zero_unused(kernel: Kernel, segment: Segment, i: Any, v_smem: Any) -> None:
    """Zeroes the values that no query sees: their P is 0, but 0 * NaN would not be."""
    v = plgpu.load(v_smem, layout=MATRIX, optimized=False)
    kv_pos, used = _positions(kernel, segment, i, v.shape, 0)
    if kernel.spec.cache.window is not None:
        used = used & (kv_pos > segment.start - kernel.spec.cache.window)
    v_smem[...] = jnp.where(used, v, jnp.zeros_like(v))
    plgpu.commit_smem()


def _finish(kernel: Kernel, wg: Any, segment: Segment, state: State, acc: Any) -> None:
    """Stores out and lse (base 2) of a segment."""
    out_smem, lse_smem = kernel.smem.out.at[wg], kernel.smem.lse.at[wg]
    is_empty = state.l == 0.0
    inverse = jnp.where(is_empty, 0.0, 1.0 / jnp.where(is_empty, 1.0, state.l))
    out = load_accumulator(acc, wait_n=0)
    # The stores of the segment before have read these.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem[...] = out * widen_rows(inverse, out.shape)
    lse_smem[...] = state.m_log2 + jnp.log2(state.l)
    plgpu.commit_smem()
    zero = segment.row * 0
    rows, width = out_smem.shape
    where = (segment.part, wg, kernel.head)
    target = kernel.out_gmem.at[*where, pl.ds(zero, rows), pl.ds(zero, width)]
    plgpu.copy_smem_to_gmem(out_smem, target)
    plgpu.copy_smem_to_gmem(lse_smem, kernel.lse_gmem.at[*where])


# ---------------------------------------------------------------------------------------------
# The merge


def _merge(
    spec: Any, config: DecodeConfig, share: Share, parts: Any, lse_log2: Any
) -> tuple[Any, Any]:
    """out and lse of the rows, from those of their parts."""
    num_rows = spec.q_len * spec.group
    n = jnp.arange(config.num_teams, dtype=jnp.int32)
    first, count = share.parts[:, :1], share.parts[:, 1:]
    # Parts that a row does not have read its last one again, with weight 0.
    index = first + jnp.clip(n, 0, jnp.maximum(count - 1, 0))
    # [B, teams, wgs, Hkv, rows]
    lse_log2 = jnp.where(
        (n < count)[..., None, None, None], lse_log2[index][..., :num_rows], -jnp.inf
    )
    m = lse_log2.max((1, 2), keepdims=True)
    m = jnp.where(m == -jnp.inf, 0.0, m)
    weight = jnp.exp2(lse_log2 - m)
    l = weight.sum((1, 2), keepdims=True)  # noqa: E741
    share_of = (weight / jnp.where(l == 0.0, 1.0, l))[..., None]
    values = jnp.where(share_of > 0, parts[index][..., :num_rows, : spec.value_dim], 0.0)
    out = (share_of * values).sum((1, 2)).astype(spec.dtype)
    lse = ((m + jnp.log2(l)) * LN_2)[:, 0, 0]
    shape = (spec.batch, spec.num_kv_heads, spec.q_len, spec.group)
    out = out.reshape(*shape, -1).swapaxes(1, 2)
    out = out.reshape(spec.batch, spec.q_len, spec.num_q_heads, spec.value_dim)
    lse = lse.reshape(shape).swapaxes(2, 3)
    return out, lse.reshape(spec.batch, spec.num_q_heads, spec.q_len)
