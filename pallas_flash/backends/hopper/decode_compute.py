"""The consumer of decoding: out and lse of all segments."""

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends import tile
from pallas_flash.backends.hopper.decode_kernel import Kernel, Segment, for_each_segment
from pallas_flash.backends.hopper.decode_share import is_ring
from pallas_flash.backends.hopper.decode_storage import BLOCK_KV, WG_ROWS
from pallas_flash.backends.hopper.storage import (
    LOG2_E,
    MATRIX,
    constant_per_row,
    load_accumulator,
    widen_rows,
)


class State(NamedTuple):
    """m_log2 and l [64] float32 of the queries; their accumulator is a ref."""

    m_log2: Any
    l: Any  # noqa: E741


def compute(kernel: Kernel) -> None:
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

    for_each_segment(kernel, compute_segment)
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
