"""A consumer of the forward: the results of 64 queries in every tile."""

import functools
import operator
from functools import partial
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends import tile as meaning
from pallas_flash.backends.hopper import copies, masking
from pallas_flash.backends.hopper.elementwise import written_out_scaled
from pallas_flash.backends.hopper.forward_kernel import Kernel
from pallas_flash.backends.hopper.forward_storage import WG_ROWS, query_columns, value_columns
from pallas_flash.backends.hopper.forward_walk import Tile, first_tile, for_each_tile
from pallas_flash.backends.hopper.leaves import Terms
from pallas_flash.backends.hopper.products import Pair, add_product, scaled_rows, set_product
from pallas_flash.backends.hopper.scores import Part, Zone, dropout_factor, keep
from pallas_flash.backends.hopper.storage import (
    LN_2,
    LOG2_E,
    constant_per_row,
    load_accumulator,
    widen_rows,
    zero_matrix,
)

# How far scores in base 2 may exceed the number that they are taken less, where the accumulator is
# rescaled rarely: P is 256 at most then.
SLACK = 8.0


class State(NamedTuple):
    """Running state of 64 queries: m_log2 [64] and l float32, p [64, block_kv] in q's dtype.

    m_log2: the maximum of all scores, or a number that they exceed by `SLACK` at most. l: [64], or
    [64, 8] sums over every eighth key (`_sums`). p are the probabilities of the last key block, not
    yet multiplied with V.
    """

    m_log2: Any
    l: Any  # noqa: E741
    p: Any


def compute(kernel: Kernel, wg: Any) -> None:
    """A consumer: the results of its queries in every tile."""
    smem = kernel.smem
    _load_q(kernel, wg, first_tile(kernel.walk, kernel.gmem.assigned))
    # The warpgroups' products queue up one after the other: while one is in its softmax the other
    # multiplies. The first one's turn comes first.
    last_wg = kernel.config.num_warpgroups - 1
    pl.when(wg == last_wg)(lambda: _pass_turn(kernel, wg))
    kernel.free_near(wg)

    def compute_tile(tile, following, step):
        of_rows = kernel.read_rows(wg, tile)
        plgpu.barrier_wait(kernel.q_ready(wg, tile))
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


def _load_q(kernel: Kernel, wg: Any, tile: Tile) -> None:
    """Starts the load of a warpgroup's queries."""
    start, target = kernel.q_start(wg, tile), _q_of(kernel, wg, tile)
    ready = kernel.q_ready(wg, tile)
    copies.load(kernel.gmem.q, tile.batch, start, tile.q_head, target, ready)


def _q_of(kernel: Kernel, wg: Any, tile: Tile) -> copies.Tile:
    """A warpgroup's queries in SMEM."""
    return kernel.copied.q.part(kernel.q_stage(tile), wg)


def _attend(
    kernel: Kernel, wg: Any, tile: Tile, first_step: Any, acc: Any, of_rows: Terms
) -> State:
    """The state after all key blocks of a tile; acc lacks the last one."""

    def scores(i, zone):
        return kernel.part(wg, tile, i, of_rows, zone)

    def step(i, state, zone):
        return _step(kernel, wg, q, first_step + i, state, acc, scores(i, zone))

    q = _q_of(kernel, wg, tile).whole
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
        set_product(s_acc, Pair(q, smem.k.at[stage], query_columns(kernel.spec).tile))
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
        set_product(s_acc, Pair(q, smem.k.at[k_stage], query_columns(kernel.spec).tile))
        plgpu.barrier_wait(smem.v_ready.at[v_stage])
        add_product(acc, state.p, smem.v.at[v_stage], value_columns(kernel.spec).tile)
        _pass_turn(kernel, wg)
        s = load_accumulator(s_acc, wait_n=1)
        terms = _terms(kernel, wg, k_stage, part)
        new, alpha = _softmax(kernel, s, state, part, terms)
        out = load_accumulator(acc, wait_n=0)
        plgpu.barrier_arrive(smem.v_free.at[v_stage])
        # Cast behind the wait: the product still read the registers of the last P, and ptxas would
        # serialise all products (its warning C7513).
        p = new.p.astype(kernel.spec.dtype)
        if kernel.rescales_rarely:
            # Ahead of the branch, where the exponentials leave room for it.
            p = lax.optimization_barrier(p)
        acc[...] = _rescaled(kernel, out, alpha)
        return new._replace(p=p)

    return pl.run_scoped(products, plgpu.ACC((WG_ROWS, smem.k.shape[1]), jnp.float32))


def _rescaled(kernel: Kernel, out: Any, alpha: Any) -> Any:
    """The accumulator [64, value_dim], its rows times alpha [64], None for 1."""
    if not kernel.needs_maximum:
        return out
    if kernel.rescales_rarely:
        return scaled_rows(out, alpha)
    return out * widen_rows(alpha, out.shape)


def _multiply_last(kernel: Kernel, tile: Tile, first_step: Any, state: State, acc: Any) -> None:
    """Adds the product with V of a tile's last step."""
    smem, stage = kernel.smem, kernel.stage(first_step + tile.num_steps - 1)
    plgpu.barrier_wait(smem.v_ready.at[stage])
    add_product(acc, state.p, smem.v.at[stage], value_columns(kernel.spec).tile)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(smem.v_free.at[stage])


def _softmax(kernel: Kernel, s: Any, state: State, part: Part, terms: Terms) -> tuple[State, Any]:
    """The state with raw scores s [64, block_kv], p in float32, and what older sums shrink by."""
    s, to_log2, addend = _logits(kernel, part, terms, s)
    if not kernel.needs_maximum:
        p = jnp.exp2(s * to_log2)
        l = state.l + _sums(kernel, p)  # noqa: E741
        return lax.optimization_barrier((State(state.m_log2, l, keep(terms, p)), None))
    m_log2 = s.max(axis=1) * to_log2
    if addend is not None:
        m_log2 = m_log2 + addend * LOG2_E
    if kernel.rescales_rarely:
        m_log2 = jnp.where(m_log2 > state.m_log2 + SLACK, m_log2, state.m_log2)
    else:
        m_log2 = jnp.maximum(state.m_log2, m_log2)
    shift = m_log2
    if part.is_masked or kernel.spec.score_mod is not None:
        # A row that has met no key yet: -inf - -inf would be NaN.
        shift = jnp.where(m_log2 == -jnp.inf, 0.0, m_log2)
    alpha = jnp.exp2(state.m_log2 - shift)
    if addend is not None:
        shift = shift - addend * LOG2_E
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
    terms = kernel.terms(wg, stage, part)
    plgpu.barrier_arrive(kernel.smem.k_free.at[stage])
    return terms


def _logits(kernel: Kernel, part: Part, terms: Terms, s: Any) -> tuple[Any, float, Any]:
    """Scores, -inf where they do not count, and the factor that takes them to base 2.

    And a number that is still to be added to all of them, behind the factor but in base e, or None.
    """
    spec, block_kv = kernel.spec, kernel.config.block_kv
    to_log2, addend = spec.scale * LOG2_E, part.addend()
    if spec.score_mod is not None and addend is None:
        modified = partial(meaning.logits, scale=spec.scale)
        positions = part.positions()
        s, factor = written_out_scaled(modified)(s, *positions, score_mod=terms.score_mod)
        to_log2 = LOG2_E * factor
    if to_log2 <= 0:
        # The maximum could not be taken before the scale.
        s, to_log2 = s * to_log2, 1.0
    is_cut = spec.kv_len % block_kv != 0
    if part.is_masked and (spec.mask is not None or is_cut):
        ends = None, spec.kv_len if is_cut else None
        s = masking.masked(part, terms.mask, s, -jnp.inf, ends)
    return s, to_log2, addend


def _finish(kernel: Kernel, wg: Any, tile: Tile, state: State, acc: Any) -> None:
    """Stores out and lse."""
    smem = kernel.smem
    sums = state.l.sum(axis=1) if kernel.sums_late else state.l
    empty = sums == 0.0
    kept = dropout_factor(kernel.spec)
    inverse = jnp.where(empty, 0.0, kept / jnp.where(empty, 1.0, sums))
    out = load_accumulator(acc, wait_n=0)
    out = out * widen_rows(inverse, out.shape)
    own = kernel.copied.out
    staging = _q_of(kernel, wg, tile) if own is None else own.part(wg)
    lse_smem = smem.lse.at[wg]
    # The stores of the tile before have read these.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging.whole[...] = out.astype(kernel.spec.dtype)
    lse_smem[...] = (state.m_log2 + jnp.log2(sums)) * LN_2
    plgpu.commit_smem()
    q_start = kernel.q_start(wg, tile)
    copies.store(staging, kernel.out_gmem, tile.batch, q_start, tile.q_head)
    rows = pl.ds(q_start, WG_ROWS)
    plgpu.copy_smem_to_gmem(lse_smem, kernel.lse_gmem.at[tile.batch, tile.q_head, rows])
