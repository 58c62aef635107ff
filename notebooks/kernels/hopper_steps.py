"""A Hopper forward grown step by step: each function is a whole kernel with one idea more.

All compute softmax(q k' / sqrt(head_dim)) v without a mask, for q, k, v
[batch, length, heads, head_dim] bfloat16 with lengths that are multiples of 128 and a head_dim of
64 or 128. Notebook 05 reads them in this order, `python -m benchmarks.notebook_figures steps` times
them.
"""

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .tiles import (
    BF16_TILE,
    COMPILER_PARAMS,
    ROWS,
    State,
    bf16_tile,
    empty_state,
    like,
    online_softmax,
    per_row,
    product,
    store_tile,
)

# Keys of a block in steps 1 and 2: so few that two blocks of threads fit a multiprocessor.
FEW_KEYS = 64
# And from step 3 on.
BLOCK_KV = 128
# Blocks of keys and of values that are on their way at the same time.
STAGES = 2
CONSUMERS = 2
# Where it stands: no use of the value is moved in front of it, or behind what follows.
in_order = lax.optimization_barrier


def attend(q_smem: Any, k_smem: Any, v_smem: Any, p_smem: Any, state: State) -> State:
    """The state after one more block of keys: two products, and the softmax between them."""
    s = product(q_smem, k_smem.transpose((1, 0)))
    p, m_log2, l, alpha = online_softmax(s, state.m_log2, state.l, q_smem.shape[1] ** -0.5)
    p_smem[...] = p.astype(p_smem.dtype)
    plgpu.commit_smem()
    return State(m_log2, l, state.o * per_row(alpha, state.o) + product(p_smem, v_smem))


def divided(state: State) -> Any:
    return state.o / per_row(state.l, state.o)


def one_warpgroup(q: Any, k: Any, v: Any) -> Any:
    """Step 1: a block is one warpgroup with 64 queries; it loads, waits, computes, in turn."""
    batch, length, heads, head_dim = q.shape

    def kernel(q_gmem, k_gmem, v_gmem, out_gmem, q_smem, k_smem, v_smem, p_smem, arrived):
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        rows = pl.ds(lax.axis_index("q_tile") * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem, arrived.at[0])
        plgpu.barrier_wait(arrived.at[0])

        def step(i, state):
            keys = pl.ds(i * FEW_KEYS, FEW_KEYS)
            plgpu.copy_gmem_to_smem(k_gmem.at[b, keys, h], k_smem, arrived.at[1])
            plgpu.copy_gmem_to_smem(v_gmem.at[b, keys, h], v_smem, arrived.at[2])
            plgpu.barrier_wait(arrived.at[1])
            plgpu.barrier_wait(arrived.at[2])
            return attend(q_smem, k_smem, v_smem, p_smem, state)

        state = lax.fori_loop(0, k.shape[1] // FEW_KEYS, step, empty_state(head_dim))
        store_tile(divided(state), q_smem, out_gmem.at[b, rows, h])

    keys = bf16_tile(FEW_KEYS, head_dim)
    return plgpu.kernel(
        kernel,
        out_type=like(q),
        grid=(batch, heads, length // ROWS),
        grid_names=("batch", "head", "q_tile"),
        scratch_types=(
            bf16_tile(ROWS, head_dim),
            keys,
            keys,
            bf16_tile(ROWS, FEW_KEYS),
            plgpu.Barrier(num_barriers=3),
        ),
        compiler_params=COMPILER_PARAMS,
    )(q, k, v)


def pipelined(q: Any, k: Any, v: Any) -> Any:
    """Step 2: the next blocks of keys and values travel while this one is computed."""
    batch, length, heads, head_dim = q.shape

    def kernel(q_gmem, k_gmem, v_gmem, out_gmem, q_smem, p_smem, arrived):
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        rows = pl.ds(lax.axis_index("q_tile") * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem, arrived)
        plgpu.barrier_wait(arrived)

        def step(_, k_smem, v_smem, state):
            return attend(q_smem, k_smem, v_smem, p_smem, state)

        keys = plgpu.BlockSpec((FEW_KEYS, head_dim), lambda i: (i, 0), transforms=BF16_TILE)
        stream = plgpu.emit_pipeline(
            step,
            grid=(k.shape[1] // FEW_KEYS,),
            in_specs=[keys, keys],
            max_concurrent_steps=STAGES,
            init_carry=empty_state(head_dim),
        )
        state = stream(k_gmem.at[b, :, h], v_gmem.at[b, :, h])
        store_tile(divided(state), q_smem, out_gmem.at[b, rows, h])

    return plgpu.kernel(
        kernel,
        out_type=like(q),
        grid=(batch, heads, length // ROWS),
        grid_names=("batch", "head", "q_tile"),
        scratch_types=(
            bf16_tile(ROWS, head_dim),
            bf16_tile(ROWS, FEW_KEYS),
            plgpu.Barrier(),
        ),
        compiler_params=COMPILER_PARAMS,
    )(q, k, v)


# ---------------------------------------------------------------------------------------------
# From step 3 on a block has 128 queries and three warpgroups: two consumers with 64 queries each,
# and a producer that only loads.


def launch(consume: Any, q: Any, k: Any, v: Any) -> Any:
    """The kernel whose consumers run `consume(smem, bars, wg, steps) -> out [64, head_dim]`."""
    batch, length, heads, head_dim = q.shape
    steps = k.shape[1] // BLOCK_KV
    block_q = CONSUMERS * ROWS

    def kernel(q_gmem, k_gmem, v_gmem, out_gmem, smem, bars):
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        wg, first = lax.axis_index("wg"), lax.axis_index("q_tile") * block_q

        @pl.when(wg == CONSUMERS)
        def _():
            # Loading needs few registers; the consumers get the rest.
            plgpu.set_max_registers(24, action="decrease")
            produce(k_gmem.at[b, :, h], v_gmem.at[b, :, h], smem, bars, steps)

        @pl.when(wg < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            rows = pl.ds(first + wg * ROWS, ROWS)
            q_smem = smem["q"].at[wg]
            plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem, bars["q"].at[wg])
            plgpu.barrier_wait(bars["q"].at[wg])
            store_tile(consume(smem, bars, wg, steps), q_smem, out_gmem.at[b, rows, h])

    keys = bf16_tile(STAGES, BLOCK_KV, head_dim)
    ready = plgpu.Barrier(num_barriers=STAGES)
    # A stage is free when both consumers have said so.
    free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES)
    each = plgpu.Barrier(num_barriers=CONSUMERS)
    tiles = {
        "q": bf16_tile(CONSUMERS, ROWS, head_dim),
        "p": bf16_tile(CONSUMERS, ROWS, BLOCK_KV),
        "k": keys,
        "v": keys,
    }
    barriers = {
        "q": each, "turn": each, "k": ready, "v": ready, "k_free": free, "v_free": free
    }  # fmt: skip
    return plgpu.kernel(
        kernel,
        out_type=like(q),
        grid=(batch, heads, length // block_q),
        grid_names=("batch", "head", "q_tile"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=(tiles, barriers),
        compiler_params=COMPILER_PARAMS,
    )(q, k, v)


def produce(k_gmem: Any, v_gmem: Any, smem: Any, bars: Any, steps: int) -> None:
    """The producer: fills a stage as soon as both consumers have read it."""

    def load(i, _):
        stage, keys = lax.rem(i, STAGES), pl.ds(i * BLOCK_KV, BLOCK_KV)
        for name, gmem in (("k", k_gmem), ("v", v_gmem)):

            @pl.when(i >= STAGES)
            def _(name=name):
                plgpu.barrier_wait(bars[f"{name}_free"].at[stage])

            plgpu.copy_gmem_to_smem(gmem.at[keys], smem[name].at[stage], bars[name].at[stage])

    lax.fori_loop(0, steps, load, None)
    # Every signal is waited for, the last ones too.
    for stage in range(min(STAGES, steps)):
        plgpu.barrier_wait(bars["k_free"].at[stage])
        plgpu.barrier_wait(bars["v_free"].at[stage])


def turns(bars: Any, wg: Any) -> tuple[Any, Any]:
    """What waits for a consumer's turn with the matrix units, and what passes it to the other."""

    def wait():
        plgpu.barrier_wait(bars["turn"].at[wg])

    def give():
        plgpu.barrier_arrive(bars["turn"].at[CONSUMERS - 1 - wg])

    return wait, give


def consume_in_order(smem: Any, bars: Any, wg: Any, steps: int, takes_turns: bool) -> Any:
    """A consumer's result; with turns, one multiplies while the other is in its softmax.

    A turn is for two products: P V of a block of keys and the scores of the next.
    """
    q_smem, p_smem = smem["q"].at[wg], smem["p"].at[wg]
    scale = q_smem.shape[1] ** -0.5
    wait_for_turn, pass_turn = turns(bars, wg) if takes_turns else (lambda: None, lambda: None)

    def step(i, state):
        stage = lax.rem(i, STAGES)
        plgpu.barrier_wait(bars["k"].at[stage])
        s = product(q_smem, smem["k"].at[stage].transpose((1, 0)), meanwhile=pass_turn)
        plgpu.barrier_arrive(bars["k_free"].at[stage])
        p, m_log2, l, alpha = online_softmax(s, state.m_log2, state.l, scale)
        p_smem[...] = p.astype(p_smem.dtype)
        plgpu.commit_smem()
        o = state.o * per_row(alpha, state.o)
        plgpu.barrier_wait(bars["v"].at[stage])
        wait_for_turn()
        o = o + product(p_smem, smem["v"].at[stage])
        plgpu.barrier_arrive(bars["v_free"].at[stage])
        return State(m_log2, l, o)

    # The first consumer's turn comes first.
    pl.when(wg == 1)(pass_turn)
    wait_for_turn()
    state = lax.fori_loop(0, steps, step, empty_state(q_smem.shape[1]))
    pass_turn()
    pl.when(wg == 0)(wait_for_turn)
    return divided(state)


def with_producer(q: Any, k: Any, v: Any) -> Any:
    """Step 3: a warpgroup of its own loads; two others share every block of keys."""
    return launch(partial(consume_in_order, takes_turns=False), q, k, v)


def in_turns(q: Any, k: Any, v: Any) -> Any:
    """Step 4: the consumers take turns with the matrix units (FlashAttention-3, section 3.1)."""
    return launch(partial(consume_in_order, takes_turns=True), q, k, v)


def consume_overlapped(smem: Any, bars: Any, wg: Any, steps: int) -> Any:
    """A consumer's result; the scores of the next block are computed during this one's softmax."""
    q_smem, p_smem = smem["q"].at[wg], smem["p"].at[wg]
    head_dim = q_smem.shape[1]

    def softmax(s, m_log2, l):
        return online_softmax(s, m_log2, l, head_dim**-0.5)

    def put(p):
        p_smem[...] = p.astype(p_smem.dtype)
        plgpu.commit_smem()

    def step(i, state):
        k_stage, v_stage = lax.rem(i, STAGES), lax.rem(i - 1, STAGES)

        def two_products(s_acc, pv_acc):
            plgpu.barrier_wait(bars["k"].at[k_stage])
            plgpu.wgmma(s_acc, q_smem, smem["k"].at[k_stage].transpose((1, 0)))
            plgpu.barrier_wait(bars["v"].at[v_stage])
            plgpu.wgmma(pv_acc, p_smem, smem["v"].at[v_stage])
            # The scores are there; the other product goes on while their softmax is computed.
            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            plgpu.barrier_arrive(bars["k_free"].at[k_stage])
            p, m_log2, l, alpha = lax.optimization_barrier(softmax(s, state.m_log2, state.l))
            o = state.o + plgpu.wgmma_accumulator_load(pv_acc, wait_n=0)
            plgpu.barrier_arrive(bars["v_free"].at[v_stage])
            put(p)
            return State(m_log2, l, o * per_row(alpha, o))

        accumulators = plgpu.ACC((ROWS, BLOCK_KV)), plgpu.ACC((ROWS, head_dim))
        return pl.run_scoped(two_products, *accumulators)

    start, first, last = empty_state(head_dim), 0, (steps - 1) % STAGES
    plgpu.barrier_wait(bars["k"].at[first])
    s = product(q_smem, smem["k"].at[first].transpose((1, 0)))
    plgpu.barrier_arrive(bars["k_free"].at[first])
    p, m_log2, l, _ = softmax(s, start.m_log2, start.l)
    put(p)
    state = lax.fori_loop(1, steps, step, State(m_log2, l, start.o))
    plgpu.barrier_wait(bars["v"].at[last])
    o = state.o + product(p_smem, smem["v"].at[last])
    plgpu.barrier_arrive(bars["v_free"].at[last])
    return divided(state._replace(o=o))


def overlapped(q: Any, k: Any, v: Any) -> Any:
    """Step 5: softmax and products of one warpgroup at the same time (section 3.2)."""
    return launch(consume_overlapped, q, k, v)


def consume_in_registers(smem: Any, bars: Any, wg: Any, steps: int) -> Any:
    """The same; p waits in registers for its product, and o is rescaled in its accumulator."""
    q_smem = smem["q"].at[wg]
    head_dim = q_smem.shape[1]
    wait_for_turn, pass_turn = turns(bars, wg)

    def first_step(start):
        plgpu.barrier_wait(bars["k"].at[0])
        wait_for_turn()
        s = product(q_smem, smem["k"].at[0].transpose((1, 0)), meanwhile=pass_turn)
        plgpu.barrier_arrive(bars["k_free"].at[0])
        p, m_log2, l, _ = online_softmax(s, start.m_log2, start.l, head_dim**-0.5)
        return m_log2, l, p.astype(jnp.bfloat16)

    def step(i, state, o_acc):
        m_log2, l, p = state
        k_stage, v_stage = lax.rem(i, STAGES), lax.rem(i - 1, STAGES)

        def two_products(s_acc):
            plgpu.barrier_wait(bars["k"].at[k_stage])
            wait_for_turn()
            plgpu.wgmma(s_acc, q_smem, smem["k"].at[k_stage].transpose((1, 0)))
            plgpu.barrier_wait(bars["v"].at[v_stage])
            plgpu.wgmma(o_acc, p, smem["v"].at[v_stage])
            pass_turn()
            # The scores are there; the other product goes on while their softmax is computed.
            s = in_order(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))
            plgpu.barrier_arrive(bars["k_free"].at[k_stage])
            new_p, new_m, new_l, alpha = in_order(online_softmax(s, m_log2, l, head_dim**-0.5))
            o = in_order(plgpu.wgmma_accumulator_load(o_acc, wait_n=0))
            plgpu.barrier_arrive(bars["v_free"].at[v_stage])
            o_acc[...] = o * per_row(alpha, o)
            # Cast behind the wait: until then the product reads the registers of the last p.
            return new_m, new_l, new_p.astype(jnp.bfloat16)

        return pl.run_scoped(two_products, plgpu.ACC((ROWS, BLOCK_KV)))

    def with_accumulator(o_acc):
        pl.when(wg == 1)(pass_turn)
        state = first_step(empty_state(head_dim))
        m_log2, l, p = lax.fori_loop(1, steps, partial(step, o_acc=o_acc), state)
        last = (steps - 1) % STAGES
        plgpu.barrier_wait(bars["v"].at[last])
        plgpu.wgmma(o_acc, p, smem["v"].at[last])
        o = plgpu.wgmma_accumulator_load(o_acc, wait_n=0)
        plgpu.barrier_arrive(bars["v_free"].at[last])
        pl.when(wg == 0)(wait_for_turn)
        return divided(State(m_log2, l, o))

    return pl.run_scoped(with_accumulator, plgpu.ACC((ROWS, head_dim)))


def in_registers(q: Any, k: Any, v: Any) -> Any:
    """Step 6: the overlap without a way through shared memory, and in turns."""
    return launch(consume_in_registers, q, k, v)


STEPS = {
    "1 one warpgroup": one_warpgroup,
    "2 pipelined": pipelined,
    "3 a producer": with_producer,
    "4 in turns": in_turns,
    "5 overlapped": overlapped,
    "6 in registers": in_registers,
}
