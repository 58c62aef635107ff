"""Forward of dense attention on Hopper: K and V stream past the queries of a block.

Source: FlashAttention-2 (Dao 2023), algorithm 1, with the warp specialisation and the ping-pong of
FlashAttention-3 (Shah et al. 2024), section 3.1. One warpgroup loads by TMA, the others each own
64 queries; P feeds the second product from registers. Exponentials are taken in base 2: m and the
scores that it is compared with are multiplied by ``scale * LOG2_E``.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.backends.hopper.config import Config, ForwardConfig
from pallas_flash.backends.hopper.forward_storage import (
    REDUCTION_SCRATCH_BYTES,
    WG_ROWS,
    Storage,
    query_columns,
    storage,
    value_columns,
)
from pallas_flash.backends.hopper.storage import (
    LN_2,
    LOG2_E,
    MATRIX,
    constant_per_row,
    locate,
    mask_with_scalars,
    mm,
    mm_add,
    padded,
    schedule_bound,
    widen_rows,
    window,
    without_padding,
    zero_matrix,
)
from pallas_flash.masks import Mask
from pallas_flash.masks.schedule import Blocks, kv_schedule
from pallas_flash.spec import AttentionSpec, Operands

# Registers a thread of the producer and of a consumer may use, by number of consumer warpgroups:
# 128 * (producer + consumers) stay within the 64 K of an SM. One has enough as it is.
REGISTERS = {2: (24, 240), 3: (32, 160)}
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
)


class Inputs(NamedTuple):
    """What the kernel reads from GMEM.

    q, k, v: [B, T, H, D], padded where TMA needs it. schedule: [B or 1, Hq or 1, num_q_tiles, 4]
    int32 or None. mask_leaves: the mask's arrays.
    """

    q: Any
    k: Any
    v: Any
    schedule: Any
    mask_leaves: Any


Runs = tuple[bool, bool, bool]
Edges = tuple[Any, Any, Any, Any]


class Walk(NamedTuple):
    """Which key blocks the tiles visit.

    runs: which of the loops (masked, unmasked, masked) can have anything to do. edges: first,
    full_first, full_last, last where they are the same for every tile, else None.
    """

    runs: Runs
    edges: Edges | None


class Tile(NamedTuple):
    """Which queries a block owns."""

    batch: Any
    q_head: Any
    kv_head: Any
    index: Any


class State(NamedTuple):
    """Running state of 64 queries: acc [64, Dv] float32, m_log2 and l [64] float32."""

    acc: Any
    m_log2: Any
    l: Any  # noqa: E741


@dataclasses.dataclass(frozen=True)
class Block:
    """A thread block at work: what is static, its refs, its tile and the key blocks it visits."""

    spec: AttentionSpec
    config: ForwardConfig
    runs: Runs
    gmem: Inputs
    smem: Storage
    tile: Tile
    edges: Edges

    @property
    def q_start(self) -> Any:
        return self.tile.index * self.config.block_q

    def stage(self, kv_block: Any) -> Any:
        """Where in SMEM a key block lies."""
        return lax.rem(kv_block - self.edges[0], jnp.int32(self.config.num_stages))


def forward(spec: AttentionSpec, config: Config, operands: Operands) -> tuple[Any, Any]:
    """out [B, Tq, Hq, Dv] in q's dtype and lse [B, Hq, Tq] float32, natural log."""
    assert spec.score_mod is None, "refused by the Hopper backend"
    tiles, mask = config.forward, operands.mask
    columns, v_columns = query_columns(spec), value_columns(spec, tiles.block_kv)
    walk, schedule = _plan(spec, tiles, mask)
    inputs = Inputs(
        q=padded(operands.q, columns),
        k=padded(operands.k, columns),
        v=padded(without_padding(operands.v, mask, spec.q_len), v_columns),
        schedule=schedule,
        mask_leaves=tuple(x.astype(jnp.int32) for x in jax.tree.leaves(mask)),
    )
    out, lse = _launch(spec, tiles, walk, inputs)
    return out[:, : spec.q_len, :, : spec.value_dim], lse[:, :, : spec.q_len]


def _plan(spec: AttentionSpec, config: ForwardConfig, mask: Mask | None) -> tuple[Walk, Any]:
    """Which key blocks the tiles visit, and the schedule to read it from if that differs."""
    if mask is None:
        full, last = spec.kv_len // config.block_kv, pl.cdiv(spec.kv_len, config.block_kv)
        return Walk((False, full > 0, last > full), (0, 0, full, last)), None
    blocks = Blocks(spec.q_len, spec.kv_len, config.block_q, config.block_kv, spec.batch)
    schedule = kv_schedule(mask, blocks)
    if not isinstance(schedule, np.ndarray):
        return Walk((True, True, True), None), schedule
    rows = schedule.reshape(-1, 4)
    masked_before, unmasked, masked_after = (
        bool((rows[:, i] < rows[:, i + 1]).any()) for i in range(3)
    )
    runs = (masked_before, unmasked, masked_after)
    if (rows == rows[0]).all():
        first, full_first, full_last, last = map(int, rows[0])
        return Walk(runs, (first, full_first, full_last, last)), None
    return Walk(runs, None), jnp.asarray(schedule)


def _launch(
    spec: AttentionSpec, config: ForwardConfig, walk: Walk, inputs: Inputs
) -> tuple[Any, Any]:
    """out and lse with padded rows and columns."""
    num_wgs = config.num_warpgroups

    def flash_attention_forward(gmem, out_gmem, lse_gmem, smem):
        tile = _locate(spec, config, lax.axis_index("tile"))
        block = Block(spec, config, walk.runs, gmem, smem, tile, _edges(walk, gmem, tile))
        wg = lax.axis_index("wg")

        @pl.when(wg == num_wgs)
        def _():
            if num_wgs in REGISTERS:
                plgpu.set_max_registers(REGISTERS[num_wgs][0], action="decrease")
            _load(block)

        @pl.when(wg < num_wgs)
        def _():
            if num_wgs in REGISTERS:
                plgpu.set_max_registers(REGISTERS[num_wgs][1], action="increase")
            state = _compute(block, wg)
            _finish(block, wg, state, out_gmem, lse_gmem)

    batch, rows, heads, _ = inputs.q.shape
    num_q_tiles = pl.cdiv(spec.q_len, config.block_q)
    return plgpu.kernel(
        flash_attention_forward,
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, heads, inputs.v.shape[-1]), spec.dtype),
            # Whole tiles: a row that ended inside of one would be stored over the next row.
            jax.ShapeDtypeStruct((batch, heads, num_q_tiles * config.block_q), jnp.float32),
        ),
        # One axis: the others of a CUDA grid end at 65535.
        grid=(num_q_tiles * batch * heads,),
        grid_names=("tile",),
        num_threads=num_wgs + 1,
        thread_name="wg",
        scratch_types=(storage(spec, config),),
        compiler_params=COMPILER_PARAMS,
    )(inputs)


def _locate(spec: AttentionSpec, config: ForwardConfig, index: Any) -> Tile:
    """The tile of a block: group by group of heads, in each the last queries first.

    Under a causal mask the last queries have the most keys, and short tiles at the end even out.
    """
    num_q_tiles = pl.cdiv(spec.q_len, config.block_q)
    num_heads = spec.batch * spec.num_q_heads
    head, tile = locate(index, num_q_tiles, num_heads, config.heads_per_group)
    batch = lax.div(head, jnp.int32(spec.num_q_heads))
    q_head = head - batch * spec.num_q_heads
    kv_head = lax.div(q_head, jnp.int32(spec.group))
    return Tile(batch, q_head, kv_head, num_q_tiles - 1 - tile)


def _edges(walk: Walk, gmem: Inputs, tile: Tile) -> Edges:
    """first, full_first, full_last and last key block of a tile, int32."""
    if walk.edges is not None:
        first, full_first, full_last, last = map(jnp.int32, walk.edges)
        return first, full_first, full_last, last
    where = (tile.batch, tile.q_head, tile.index)
    first, full_first, full_last, last = (
        schedule_bound(gmem.schedule, *where, column) for column in range(4)
    )
    return first, full_first, full_last, last


def _load(block: Block) -> None:
    """The producer: streams the key blocks through the stages."""
    smem = block.smem
    first, *_, last = block.edges

    def load(i, _):
        _load_block(block, i, block.gmem.k, smem.k, smem.k_ready, smem.k_free)
        _load_block(block, i, block.gmem.v, smem.v, smem.v_ready, smem.v_free)

    lax.fori_loop(first, last, load, None)
    # Interpret mode wants every phase of a barrier observed by whoever waits on it.
    for stage in range(block.config.num_stages):

        @pl.when(stage < last - first)
        def _(stage=stage):
            plgpu.barrier_wait(smem.k_free.at[stage])
            plgpu.barrier_wait(smem.v_free.at[stage])


def _load_block(block: Block, i: Any, array: Any, tiles: Any, ready: Any, free: Any) -> None:
    """Loads key block `i` of K or V as soon as its stage is free."""
    stage = block.stage(i)

    @pl.when(i - block.edges[0] >= block.config.num_stages)
    def _():
        plgpu.barrier_wait(free.at[stage])

    target = tiles.at[stage]
    source = window(array, block.tile.batch, i * tiles.shape[1], block.tile.kv_head, target)
    plgpu.copy_gmem_to_smem(source, target, ready.at[stage])


def _compute(block: Block, wg: Any) -> State:
    """A consumer: the running state of its queries after all key blocks."""
    smem, tile = block.smem, block.tile
    q_start = block.q_start + wg * WG_ROWS
    q_smem = smem.q.at[wg]
    source = window(block.gmem.q, tile.batch, q_start, tile.q_head, q_smem)
    plgpu.copy_gmem_to_smem(source, q_smem, smem.q_ready.at[wg])
    plgpu.barrier_wait(smem.q_ready.at[wg])
    mask = block.spec.mask
    if mask is not None:
        leaves = block.gmem.mask_leaves
        mask = mask_with_scalars(mask, leaves, block.spec.batch, tile.batch, tile.q_head)

    def unmasked(i, state):
        return _step(block, wg, i, state, None)

    def masked(i, state):
        return _step(block, wg, i, state, lambda: _allowed(block, mask, q_start, i))

    state = State(
        acc=zero_matrix(WG_ROWS, smem.v.shape[-1]),
        m_log2=constant_per_row(WG_ROWS, -jnp.inf),
        l=constant_per_row(WG_ROWS, 0.0),
    )
    # Sets the warpgroups half a step apart: one is in its softmax while the other multiplies.
    if smem.turn is not None:
        pl.when(wg == 1)(lambda: _swap_turns(block))
    for i, step in enumerate((masked, unmasked, masked)):
        if block.runs[i]:
            state = lax.fori_loop(block.edges[i], block.edges[i + 1], step, state)
    if smem.turn is not None:
        pl.when(wg == 0)(lambda: _swap_turns(block))
    return state


def _swap_turns(block: Block) -> None:
    """Meets the other warpgroup: one leaves the matrix units, the other may use them."""
    if block.smem.turn is not None:
        plgpu.barrier_arrive(block.smem.turn)
        plgpu.barrier_wait(block.smem.turn)


def _step(block: Block, wg: Any, i: Any, state: State, allowed: Any) -> State:
    """The state after key block `i`. allowed: makes the mask of the block, or None."""
    smem, stage = block.smem, block.stage(i)
    plgpu.barrier_wait(smem.k_ready.at[stage])
    k_transposed = smem.k.at[stage].transpose((1, 0))
    s = mm(smem.q.at[wg], k_transposed, during=lambda: _swap_turns(block))
    plgpu.barrier_arrive(smem.k_free.at[stage])
    p, state = _softmax(block, s, state, allowed)
    p = p.astype(block.spec.dtype)
    # Keeps the softmax on this side of the barriers.
    state, p = lax.optimization_barrier((state, p))
    if smem.turn is not None:
        plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(smem.v_ready.at[stage])
    if smem.turn is not None:
        plgpu.barrier_wait(smem.turn)
    acc = mm_add(state.acc, p, smem.v.at[stage])
    plgpu.barrier_arrive(smem.v_free.at[stage])
    return state._replace(acc=acc)


def _softmax(block: Block, s: Any, state: State, allowed: Any) -> tuple[Any, State]:
    """P [64, block_kv] float32 of raw scores, and the state rescaled to the new maximum."""
    to_log2 = block.spec.scale * LOG2_E
    if to_log2 <= 0:
        # The maximum could not be taken before the scale.
        s, to_log2 = s * to_log2, 1.0
    if allowed is not None:
        s = jnp.where(allowed(), s, -jnp.inf)
    m_log2 = jnp.maximum(state.m_log2, s.max(axis=1) * to_log2)
    shift = m_log2
    if allowed is not None:
        # A row that has met no key yet: -inf - -inf would be NaN.
        shift = jnp.where(m_log2 == -jnp.inf, 0.0, m_log2)
    alpha = jnp.exp2(state.m_log2 - shift)
    p = jnp.exp2(s * to_log2 - widen_rows(shift, s.shape))
    return p, State(
        acc=state.acc * widen_rows(alpha, state.acc.shape),
        m_log2=m_log2,
        l=state.l * alpha + p.sum(axis=1),
    )


def _allowed(block: Block, mask: Mask | None, q_start: Any, kv_block: Any) -> Any:
    """Which scores of a block count: [64, block_kv] bool."""
    block_kv, kv_len = block.config.block_kv, block.spec.kv_len
    shape = (WG_ROWS, block_kv)
    kv_pos = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX) + kv_block * block_kv
    if mask is None:
        return kv_pos < kv_len
    q_pos = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX) + q_start
    allowed = mask.allowed(q_pos, kv_pos)
    return allowed & (kv_pos < kv_len) if kv_len % block_kv else allowed


def _finish(block: Block, wg: Any, state: State, out_gmem: Any, lse_gmem: Any) -> None:
    """Stores out and lse."""
    smem, tile = block.smem, block.tile
    empty = state.l == 0.0
    inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, state.l))
    out = state.acc * widen_rows(inverse, state.acc.shape)
    # The tile of q has served; where out is laid out alike it goes there.
    out_smem = (smem.q if smem.out is None else smem.out).at[wg]
    lse_smem = smem.lse.at[wg]
    out_smem[...] = out.astype(block.spec.dtype)
    lse_smem[...] = (state.m_log2 + jnp.log2(state.l)) * LN_2
    plgpu.commit_smem()
    q_start = block.q_start + wg * WG_ROWS
    target = window(out_gmem, tile.batch, q_start, tile.q_head, out_smem)
    plgpu.copy_smem_to_gmem(out_smem, target)
    rows = pl.ds(q_start, WG_ROWS)
    plgpu.copy_smem_to_gmem(lse_smem, lse_gmem.at[tile.batch, tile.q_head, rows])
    plgpu.wait_smem_to_gmem(0)
