"""Forward of dense attention on Hopper: K and V stream past the queries of a block.

Source: FlashAttention-2 (Dao 2023), algorithm 1, with the warp specialisation and the ping-pong of
FlashAttention-3 (Shah et al. 2024), section 3.1. One warpgroup loads by TMA, the others each own
64 queries; P feeds the second product from registers. Exponentials are taken in base 2: m and the
scores that it is compared with are multiplied by ``scale * LOG2_E``.
"""

import dataclasses
import functools
import operator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends import tile as meaning
from pallas_flash.backends.hopper.config import Config, ForwardConfig
from pallas_flash.backends.hopper.elementwise import written_out_scaled
from pallas_flash.backends.hopper.forward_storage import (
    REDUCTION_SCRATCH_BYTES,
    REGISTERS,
    WG_ROWS,
    Storage,
    query_columns,
    storage,
    tiling,
    value_columns,
)
from pallas_flash.backends.hopper.forward_walk import (
    Assigned,
    Tile,
    Walk,
    first_tile,
    for_each_tile,
    plan,
)
from pallas_flash.backends.hopper.operands import (
    Place,
    Terms,
    Tiling,
    bring,
    bring_near,
    read_rows,
    spelled_out,
    with_numbers,
)
from pallas_flash.backends.hopper.padding import Source, unused_keys, without_unused
from pallas_flash.backends.hopper.scores import Part, Zone, dropout_factor, keep
from pallas_flash.backends.hopper.storage import (
    LN_2,
    LOG2_E,
    constant_per_row,
    load_accumulator,
    padded,
    round_up,
    widen_rows,
    window,
    zero_matrix,
)
from pallas_flash.spec import AttentionSpec, Operands

# How large the exponent of a probability may be that was not divided by the largest one of its row:
# bfloat16 and float32 go up to 127, and there are keys to sum over and values to multiply with.
WIDEST_EXPONENT = 80
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
)


class Inputs(NamedTuple):
    """What the kernel reads from GMEM.

    q: [B, T, H, D], padded where TMA needs it; k, v: sources of the same. assigned: the tiles of
    each block. terms: the arrays of mask, score mod and dropout.
    """

    q: Any
    k: Any
    v: Any
    assigned: Assigned
    terms: Terms


class State(NamedTuple):
    """Running state of 64 queries: m_log2 [64] and l float32, p [64, block_kv] in q's dtype.

    l: [64], or [64, 8] sums over every eighth key (`_sums`). p are the probabilities of the last
    key block, not yet multiplied with V.
    """

    m_log2: Any
    l: Any  # noqa: E741
    p: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: what is static, and the refs."""

    spec: AttentionSpec
    config: ForwardConfig
    walk: Walk
    gmem: Inputs
    out_gmem: Any
    lse_gmem: Any
    smem: Storage

    @property
    def tiling(self) -> Tiling:
        return tiling(self.spec, self.config)

    @property
    def needs_maximum(self) -> bool:
        """Whether scores must be taken less their maximum: not where exp2 of all of them fits."""
        mod = self.spec.score_mod
        bound = None if mod is None else mod.bound
        return bound is None or self.spec.dtype != jnp.bfloat16 or bound * LOG2_E > WIDEST_EXPONENT

    @property
    def sums_late(self) -> bool:
        """Whether the sums of rows are completed at the end of a tile only.

        676 to 683 TFLOP/s at head_dim 128, 525 to 532 at 64, but 724 to 686 at 256: 4 x 4096 full,
        H100, JAX 0.11.2. With a causal mask nothing was gained.
        """
        if not self.needs_maximum:
            return True
        return self.spec.mask is None and max(self.spec.head_dim, self.spec.value_dim) <= 128

    def stage(self, step: Any) -> Any:
        """Where in SMEM the keys or values of a step lie, counted over all tiles of a block."""
        return lax.rem(step, jnp.int32(self.config.num_stages))

    def q_stage(self, tile: Tile) -> Any:
        """Where in SMEM the queries of a tile lie."""
        return lax.rem(tile.nth, jnp.int32(self.config.num_q_stages))


def forward(spec: AttentionSpec, config: Config, operands: Operands) -> tuple[Any, Any]:
    """out [B, Tq, Hq, Dv] in q's dtype and lse [B, Hq, Tq] float32, natural log."""
    spec, operands = spelled_out(spec), with_numbers(operands)
    tiles, mask = config.forward, operands.mask
    columns, v_columns = query_columns(spec), value_columns(spec, tiles.block_kv)
    walk, assigned = plan(spec, tiles, mask)
    # P is 0 there, but its product with V would spread 0 * NaN.
    unused = unused_keys(mask, spec.batch, spec.q_len, spec.kv_len)
    inputs = Inputs(
        q=padded(operands.q, columns),
        k=Source(padded(operands.k, columns)),
        v=without_unused(padded(operands.v, v_columns), unused, v_columns, tiles.block_kv),
        assigned=assigned,
        terms=Terms(*map(tiling(spec, tiles).in_gmem, Terms.of(operands))),
    )
    out, lse = _launch(spec, tiles, walk, inputs)
    return out[:, : spec.q_len, :, : spec.value_dim], lse[:, :, : spec.q_len]


def _launch(
    spec: AttentionSpec, config: ForwardConfig, walk: Walk, inputs: Inputs
) -> tuple[Any, Any]:
    """out and lse with padded rows and columns."""
    num_wgs = config.num_warpgroups
    of_producer, of_consumer = REGISTERS[num_wgs]

    def flash_attention_forward(gmem, out_gmem, lse_gmem, smem):
        kernel = Kernel(spec, config, walk, gmem, out_gmem, lse_gmem, smem)
        wg = lax.axis_index("wg")

        @pl.when(wg == num_wgs)
        def _():
            if of_producer is not None:
                plgpu.set_max_registers(of_producer, action="decrease")
            _load(kernel)

        @pl.when(wg < num_wgs)
        def _():
            if of_producer is not None:
                plgpu.set_max_registers(of_consumer, action="increase")
            _compute(kernel, wg)

    batch, rows, heads, _ = inputs.q.shape
    lse_rows = round_up(spec.q_len, config.block_q)
    return plgpu.kernel(
        flash_attention_forward,
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, heads, inputs.v.array.shape[-1]), spec.dtype),
            # Whole tiles: a row that ended inside of one would be stored over the next row.
            jax.ShapeDtypeStruct((batch, heads, lse_rows), jnp.float32),
        ),
        grid=(inputs.assigned.tiles.shape[0],),
        grid_names=("block",),
        num_threads=num_wgs + 1,
        thread_name="wg",
        scratch_types=(storage(spec, config),),
        compiler_params=COMPILER_PARAMS,
    )(inputs)


def _load(kernel: Kernel) -> None:
    """The producer: streams the key blocks of all tiles through the stages."""
    gmem, smem = kernel.gmem, kernel.smem
    k = Stream(gmem.k, smem.k, smem.k_ready, smem.k_free)
    v = Stream(gmem.v, smem.v, smem.v_ready, smem.v_free)

    def load_tile(tile, _, first_step):
        looks = gmem.v.looks(tile.batch)

        def load_k(i):
            _load_block(kernel, tile, first_step + i, i, k, None)
            _bring_terms(kernel, tile, first_step + i, i)

        def load_v(i):
            _load_block(kernel, tile, first_step + i, i, v, looks)

        # In the order of their use.
        def load(i, _):
            load_k(i)
            load_v(i - 1)
            if smem.near_ready is not None:
                pl.when(i < tile.num_near)(lambda: _load_near(kernel, tile, i))

        load_k(jnp.int32(0))
        if smem.near_ready is not None:
            _load_near(kernel, tile, jnp.int32(0))
        lax.fori_loop(jnp.int32(1), tile.num_steps, load, None)
        load_v(tile.num_steps - 1)
        return first_step + tile.num_steps

    steps = for_each_tile(kernel.walk, gmem.assigned, load_tile)
    # Interpret mode wants every phase of a barrier observed by whoever waits on it.
    for stage in range(kernel.config.num_stages):

        @pl.when(stage < steps)
        def _(stage=stage):
            plgpu.barrier_wait(smem.k_free.at[stage])
            plgpu.barrier_wait(smem.v_free.at[stage])

    if smem.near_free is not None:
        for wg in range(kernel.config.num_warpgroups):
            plgpu.barrier_wait(smem.near_free.at[wg])


class Stream(NamedTuple):
    """K or V on its way through the stages."""

    source: Source
    tiles: Any
    ready: Any
    free: Any


def _load_block(kernel: Kernel, tile: Tile, t: Any, i: Any, stream: Stream, looks: Any) -> None:
    """Loads the keys or values of a tile's step `i`, the block's step `t`, into their stage."""
    source, tiles, ready, free = stream
    stage = kernel.stage(t)

    @pl.when(t >= kernel.config.num_stages)
    def _():
        plgpu.barrier_wait(free.at[stage])

    target = tiles.at[stage]
    kv_head = lax.div(tile.q_head, jnp.int32(kernel.spec.group))
    source.load(looks, tile.batch, kv_head, tile.kv_block(i), target, ready.at[stage])


def _place(kernel: Kernel, tile: Tile, i: Any) -> Place:
    """Of the scores of a tile's step `i`."""
    config = kernel.config
    starts = tile.index * config.block_q, tile.kv_block(i) * config.block_kv
    return Place(tile.batch, tile.q_head, *starts)


def _bring_terms(kernel: Kernel, tile: Tile, t: Any, i: Any) -> None:
    """Loads what the terms hold for a tile's step `i`, behind its keys."""
    smem, stage = kernel.smem, kernel.stage(t)
    place, ready = _place(kernel, tile, i), smem.k_ready.at[stage]
    bring(kernel.tiling, kernel.gmem.terms, smem.tiles, stage, place, ready)


def _load_near(kernel: Kernel, tile: Tile, i: Any) -> None:
    """Loads what only near tiles read, for each warpgroup as soon as it has read the last."""
    smem, place = kernel.smem, _place(kernel, tile, i)
    for wg in range(kernel.config.num_warpgroups):
        plgpu.barrier_wait(smem.near_free.at[wg])
        own, ready = (wg * WG_ROWS, WG_ROWS), smem.near_ready.at[wg]
        bring_near(kernel.tiling, kernel.gmem.terms, smem.tiles, place, own, ready)


def _load_q(kernel: Kernel, wg: Any, tile: Tile) -> None:
    """Starts the load of a warpgroup's queries."""
    q_smem = _q_of(kernel, wg, tile)
    start = tile.index * kernel.config.block_q + wg * WG_ROWS
    source = window(kernel.gmem.q, tile.batch, start, tile.q_head, q_smem)
    plgpu.copy_gmem_to_smem(source, q_smem, _q_ready(kernel, wg, tile))


def _q_of(kernel: Kernel, wg: Any, tile: Tile) -> Any:
    """A warpgroup's queries in SMEM."""
    return kernel.smem.q.at[kernel.q_stage(tile), wg]


def _q_ready(kernel: Kernel, wg: Any, tile: Tile) -> Any:
    """The barrier of their load."""
    return kernel.smem.q_ready.at[kernel.q_stage(tile) * kernel.config.num_warpgroups + wg]


def _compute(kernel: Kernel, wg: Any) -> None:
    """A consumer: the results of its queries in every tile."""
    smem = kernel.smem
    _load_q(kernel, wg, first_tile(kernel.walk, kernel.gmem.assigned))
    # The warpgroups' products queue up one after the other: while one is in its softmax the other
    # multiplies. The first one's turn comes first.
    last_wg = kernel.config.num_warpgroups - 1
    pl.when(wg == last_wg)(lambda: _pass_turn(kernel, wg))
    if smem.near_free is not None:
        plgpu.barrier_arrive(smem.near_free.at[wg])

    def compute_tile(tile, following, step):
        of_rows = _read_rows(kernel, wg, tile)
        plgpu.barrier_wait(_q_ready(kernel, wg, tile))
        load_next_q = partial(following, partial(_load_q, kernel, wg))
        loads_early = kernel.config.num_q_stages > 1
        if loads_early:
            load_next_q()

        def with_accumulator(acc):
            state = _attend(kernel, wg, tile, step, acc, of_rows)
            # The tile of q has served, unless the result is staged in it.
            if smem.out is not None and not loads_early:
                load_next_q()
            _multiply_last(kernel, tile, step, state, acc)
            _finish(kernel, wg, tile, state, acc)
            if smem.out is None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load_next_q()

        pl.run_scoped(with_accumulator, plgpu.ACC((WG_ROWS, smem.v.shape[-1]), jnp.float32))
        return step + tile.num_steps

    for_each_tile(kernel.walk, kernel.gmem.assigned, compute_tile)
    pl.when(wg == 0)(lambda: _take_turn(kernel, wg))
    plgpu.wait_smem_to_gmem(0)


def _read_rows(kernel: Kernel, wg: Any, tile: Tile) -> Terms:
    """What the terms' arrays hold for a warpgroup's queries."""
    place = _place(kernel, tile, jnp.int32(0))
    place = place._replace(row_start=place.row_start + wg * WG_ROWS)
    return read_rows(kernel.tiling, kernel.gmem.terms, place, WG_ROWS)


def _attend(
    kernel: Kernel, wg: Any, tile: Tile, first_step: Any, acc: Any, of_rows: Terms
) -> State:
    """The state after all key blocks of a tile; acc lacks the last one."""
    q_start = tile.index * kernel.config.block_q + wg * WG_ROWS

    def scores(i, zone):
        place = _place(kernel, tile, i)._replace(row_start=q_start)
        shape = WG_ROWS, kernel.config.block_kv
        return Part.of(kernel.tiling, kernel.gmem.terms, of_rows, place, shape, zone)

    def step(i, state, zone):
        return _step(kernel, wg, q, first_step + i, state, acc, scores(i, zone))

    q = _q_of(kernel, wg, tile)
    first_part = scores(jnp.int32(0), Zone(not kernel.walk.starts_full))
    state = _first_step(kernel, wg, q, first_step, first_part)
    for i, zone in enumerate(kernel.walk.zones):
        if kernel.walk.runs[i]:
            # The first step is done.
            start, end = jnp.maximum(tile.runs[i], 1), tile.runs[i + 1]
            state = lax.fori_loop(start, end, partial(step, zone=zone), state)
    return state


def _take_turn(kernel: Kernel, wg: Any) -> None:
    """Waits until the warpgroup before has issued its products."""
    if kernel.smem.turn is not None:
        plgpu.barrier_wait(kernel.smem.turn.at[wg])


def _pass_turn(kernel: Kernel, wg: Any) -> None:
    """Lets the next warpgroup issue its products."""
    if kernel.smem.turn is not None:
        following = jnp.where(wg == kernel.config.num_warpgroups - 1, 0, wg + 1)
        plgpu.barrier_arrive(kernel.smem.turn.at[following])


def _first_step(kernel: Kernel, wg: Any, q: Any, t: Any, part: Part) -> State:
    """The state after a tile's first key block; `t` counts the steps of all tiles."""
    smem, stage = kernel.smem, kernel.stage(t)
    no_sums = zero_matrix(WG_ROWS, 8) if kernel.sums_late else constant_per_row(WG_ROWS, 0.0)
    lowest = -jnp.inf if kernel.needs_maximum else 0.0
    nothing = State(m_log2=constant_per_row(WG_ROWS, lowest), l=no_sums, p=None)

    def product(s_acc):
        plgpu.barrier_wait(smem.k_ready.at[stage])
        _take_turn(kernel, wg)
        plgpu.wgmma(s_acc, q, smem.k.at[stage].transpose((1, 0)))
        _pass_turn(kernel, wg)
        s = load_accumulator(s_acc, wait_n=0)
        terms = _terms(kernel, wg, stage, part)
        state, _ = _softmax(kernel, s, nothing, part, terms)
        return state._replace(p=state.p.astype(kernel.spec.dtype))

    return pl.run_scoped(product, plgpu.ACC((WG_ROWS, smem.k.shape[1]), jnp.float32))


def _step(kernel: Kernel, wg: Any, q: Any, t: Any, state: State, acc: Any, part: Part) -> State:
    """The state after one more key block.

    While the softmax of this block is computed the P of the one before is multiplied with its V
    (FlashAttention-3, section 3.2).
    """
    smem, k_stage, v_stage = kernel.smem, kernel.stage(t), kernel.stage(t - 1)

    def products(s_acc):
        plgpu.barrier_wait(smem.k_ready.at[k_stage])
        _take_turn(kernel, wg)
        plgpu.wgmma(s_acc, q, smem.k.at[k_stage].transpose((1, 0)))
        plgpu.barrier_wait(smem.v_ready.at[v_stage])
        plgpu.wgmma(acc, state.p, smem.v.at[v_stage])
        _pass_turn(kernel, wg)
        s = load_accumulator(s_acc, wait_n=1)
        terms = _terms(kernel, wg, k_stage, part)
        new, alpha = _softmax(kernel, s, state, part, terms)
        out = load_accumulator(acc, wait_n=0)
        plgpu.barrier_arrive(smem.v_free.at[v_stage])
        acc[...] = out * widen_rows(alpha, out.shape) if kernel.needs_maximum else out
        # Cast behind the wait: the product still read the registers of the last P, and ptxas would
        # serialise all products (its warning C7513).
        return new._replace(p=new.p.astype(kernel.spec.dtype))

    return pl.run_scoped(products, plgpu.ACC((WG_ROWS, smem.k.shape[1]), jnp.float32))


def _multiply_last(kernel: Kernel, tile: Tile, first_step: Any, state: State, acc: Any) -> None:
    """Adds the product with V of a tile's last step."""
    smem, stage = kernel.smem, kernel.stage(first_step + tile.num_steps - 1)
    plgpu.barrier_wait(smem.v_ready.at[stage])
    plgpu.wgmma(acc, state.p, smem.v.at[stage])
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(smem.v_free.at[stage])


def _softmax(kernel: Kernel, s: Any, state: State, part: Part, terms: Terms) -> tuple[State, Any]:
    """The state with raw scores s [64, block_kv], p in float32, and what older sums shrink by."""
    s, to_log2 = _logits(kernel, part, terms, s)
    if not kernel.needs_maximum:
        p = jnp.exp2(s * to_log2)
        l = state.l + _sums(kernel, p)  # noqa: E741
        return lax.optimization_barrier((State(state.m_log2, l, keep(terms, p)), None))
    m_log2 = jnp.maximum(state.m_log2, s.max(axis=1) * to_log2)
    shift = m_log2
    if part.is_masked or kernel.spec.score_mod is not None:
        # A row that has met no key yet: -inf - -inf would be NaN.
        shift = jnp.where(m_log2 == -jnp.inf, 0.0, m_log2)
    alpha = jnp.exp2(state.m_log2 - shift)
    p = jnp.exp2(s * to_log2 - widen_rows(shift, s.shape))
    sums = _sums(kernel, p)
    l = state.l * (widen_rows(alpha, sums.shape) if kernel.sums_late else alpha) + sums  # noqa: E741
    return lax.optimization_barrier((State(m_log2, l, keep(terms, p)), alpha))


def _sums(kernel: Kernel, p: Any) -> Any:
    """Sums over p [64, block_kv]: [64] over all keys, or [64, 8] over every eighth key.

    For the latter the threads that share a row need not meet.
    """
    if not kernel.sums_late:
        return p.sum(axis=1)
    return functools.reduce(operator.add, (p[:, i : i + 8] for i in range(0, p.shape[1], 8)))


def _terms(kernel: Kernel, wg: Any, stage: Any, part: Part) -> Terms:
    """The terms of a part of a tile. Frees the stage of K, which has been multiplied."""
    smem, own = kernel.smem, pl.ds(wg * WG_ROWS, WG_ROWS)
    if part.is_near:
        plgpu.barrier_wait(smem.near_ready.at[wg])
    terms = part.terms(smem.tiles, stage, own)
    if part.reads_smem:
        # They were read by ordinary loads, and TMA overwrites them.
        plgpu.commit_smem()
    if part.is_near:
        plgpu.barrier_arrive(smem.near_free.at[wg])
    plgpu.barrier_arrive(smem.k_free.at[stage])
    return terms


def _logits(kernel: Kernel, part: Part, terms: Terms, s: Any) -> tuple[Any, float]:
    """Scores, -inf where they do not count, and the factor that takes them to base 2."""
    spec, block_kv = kernel.spec, kernel.config.block_kv
    to_log2 = spec.scale * LOG2_E
    if spec.score_mod is not None:
        modified = partial(meaning.logits, scale=spec.scale)
        positions = part.positions()
        s, factor = written_out_scaled(modified)(s, *positions, score_mod=terms.score_mod)
        to_log2 = LOG2_E * factor
    if to_log2 <= 0:
        # The maximum could not be taken before the scale.
        s, to_log2 = s * to_log2, 1.0
    is_cut = spec.kv_len % block_kv != 0
    if part.is_masked and (spec.mask is not None or is_cut):
        allowed = part.allowed(terms)
        if is_cut:
            inside = part.positions()[1] < spec.kv_len
            allowed = inside if allowed is None else allowed & inside
        s = jnp.where(allowed, s, -jnp.inf)
    return s, to_log2


def _finish(kernel: Kernel, wg: Any, tile: Tile, state: State, acc: Any) -> None:
    """Stores out and lse."""
    smem = kernel.smem
    sums = state.l.sum(axis=1) if kernel.sums_late else state.l
    empty = sums == 0.0
    kept = dropout_factor(kernel.spec)
    inverse = jnp.where(empty, 0.0, kept / jnp.where(empty, 1.0, sums))
    out = load_accumulator(acc, wait_n=0)
    out = out * widen_rows(inverse, out.shape)
    out_smem = _q_of(kernel, wg, tile) if smem.out is None else smem.out.at[wg]
    lse_smem = smem.lse.at[wg]
    # The stores of the tile before have read these.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem[...] = out.astype(kernel.spec.dtype)
    lse_smem[...] = (state.m_log2 + jnp.log2(sums)) * LN_2
    plgpu.commit_smem()
    q_start = tile.index * kernel.config.block_q + wg * WG_ROWS
    target = window(kernel.out_gmem, tile.batch, q_start, tile.q_head, out_smem)
    plgpu.copy_smem_to_gmem(out_smem, target)
    rows = pl.ds(q_start, WG_ROWS)
    plgpu.copy_smem_to_gmem(lse_smem, kernel.lse_gmem.at[tile.batch, tile.q_head, rows])
