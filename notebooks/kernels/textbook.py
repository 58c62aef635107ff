"""The three forms of attention of the story, to be measured: standard, FlashAttention and -2.

Each is attention(q, k, v, causal=...) over [batch, length, heads, head_dim] with its gradient. The
kernels follow the papers' algorithms for Hopper's copy engine and matrix unit, one warpgroup a
block, untuned. Lengths must be multiples of 128; the arrays bfloat16, head_dim 64 or 128.

Sources: FlashAttention (Dao et al. 2022, arXiv:2205.14135), algorithms 1 and 4;
FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithms 1 and 2.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .tiles import (
    BF16_TILE,
    COMPILER_PARAMS,
    F32_TILE,
    LN_2,
    LOG2_E,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    State,
    bf16_tile,
    causal_scores,
    empty_state,
    f32_tile,
    like,
    online_softmax,
    per_row,
    product,
    store_tile,
)

# Keys of a block: so few that two blocks of threads of the second form share a multiprocessor (511
# TFLOP/s for 402 with 128, 4 x 4096 x 16 x 128, H100, JAX 0.11.2).
BLOCK_KV = 64
STAGES = 2


def standard(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
    """Algorithm 0: every score and every probability is written to memory and read again."""
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    s = s * q.shape[-1] ** -0.5
    if causal:
        s = jnp.where(jnp.tril(jnp.ones(s.shape[2:], bool)), s, -jnp.inf)
    p = jax.nn.softmax(s).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", p, v)


def _with_backward(forward: Any, backward: Any) -> Any:
    """attention(q, k, v, causal=...) from forward -> (out, lse) and backward -> (dq, dk, dv)."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def attention(q, k, v, causal):
        return forward(q, k, v, causal)[0]

    def save(q, k, v, causal):
        out, lse = forward(q, k, v, causal)
        return out, (q, k, v, out, lse)

    def pull(causal, residuals, dout):
        q, k, v, out, lse = residuals
        delta = jnp.einsum("bthd,bthd->bht", out, dout, preferred_element_type=jnp.float32)
        return backward(q, k, v, dout, lse, delta, causal)

    attention.defvjp(save, pull)
    return lambda q, k, v, *, causal: attention(q, k, v, causal)


# ---------------------------------------------------------------------------------------------
# FlashAttention (2022): keys outside, queries inside. A block of the GPU owns one (batch, head) and
# walks over both; o, m and l live in memory and are read, rescaled and written at every step.


def flash1_forward(q: Any, k: Any, v: Any, causal: bool) -> tuple[Any, Any]:
    """out [B, T, H, D] bfloat16 and lse [B, H, T] float32, natural log."""
    batch, length, heads, head_dim = q.shape
    scale = head_dim**-0.5
    rows = (batch, heads, length)

    def kernel(q_gmem, k_gmem, v_gmem, o_gmem, m_gmem, l_gmem, smem, arrived):
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        k_smem, v_smem, p_smem, o_smem, m_smem, l_smem = smem

        def with_keys(j, _):
            keys = pl.ds(j * BLOCK_KV, BLOCK_KV)
            plgpu.copy_gmem_to_smem(k_gmem.at[b, keys, h], k_smem, arrived.at[0])
            plgpu.copy_gmem_to_smem(v_gmem.at[b, keys, h], v_smem, arrived.at[1])
            plgpu.barrier_wait(arrived.at[0])
            plgpu.barrier_wait(arrived.at[1])
            # Queries before these keys see none of them.
            first = j * (BLOCK_KV // ROWS) if causal else 0

            def with_queries(index, q_smem, o_old, m_old, l_old):
                i = first + index[0]
                s = product(q_smem, k_smem.transpose((1, 0)))
                if causal:
                    s = causal_scores(s, i * ROWS, j * BLOCK_KV)
                old_m, old_l = (plgpu.load(x, layout=PER_ROW) for x in (m_old, l_old))
                p, m, l, alpha = online_softmax(s, old_m, old_l, scale)
                p_smem[...] = p.astype(p_smem.dtype)
                plgpu.commit_smem()
                pv = product(p_smem, v_smem)
                # The first paper keeps o divided: two divisions a step.
                o = plgpu.load(o_old, layout=plgpu.Layout.WGMMA)
                o = o * per_row(old_l * alpha / l, o) + pv / per_row(l, pv)
                # The stores of the last step have read these.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_smem[...], m_smem[...], l_smem[...] = o, m, l
                plgpu.commit_smem()
                at = pl.ds(i * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(o_smem, o_gmem.at[b, at, h])
                plgpu.copy_smem_to_gmem(m_smem, m_gmem.at[b, h, at])
                plgpu.copy_smem_to_gmem(l_smem, l_gmem.at[b, h, at])

            matrix, row = lambda i: (first + i, 0), lambda i: (first + i,)
            plgpu.emit_pipeline(
                with_queries,
                grid=(length // ROWS - first,),
                in_specs=[
                    plgpu.BlockSpec((ROWS, head_dim), matrix, transforms=BF16_TILE),
                    plgpu.BlockSpec((ROWS, head_dim), matrix, transforms=F32_TILE),
                    plgpu.BlockSpec((ROWS,), row),
                    plgpu.BlockSpec((ROWS,), row),
                ],
                max_concurrent_steps=STAGES,
            )(q_gmem.at[b, :, h], o_gmem.at[b, :, h], m_gmem.at[b, h], l_gmem.at[b, h])
            # The next keys read what these have written.
            plgpu.wait_smem_to_gmem(0)

        lax.fori_loop(0, k.shape[1] // BLOCK_KV, with_keys, None)

    keys, vector = bf16_tile(BLOCK_KV, head_dim), plgpu.SMEM((ROWS,), jnp.float32)
    tiles = (keys, keys, bf16_tile(ROWS, BLOCK_KV), f32_tile(ROWS, head_dim), vector, vector)
    o = jax.new_ref(jnp.zeros(q.shape, jnp.float32))
    m = jax.new_ref(jnp.full(rows, -jnp.inf, jnp.float32))
    l = jax.new_ref(jnp.zeros(rows, jnp.float32))
    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(batch, heads),
        grid_names=("batch", "head"),
        scratch_types=(tiles, plgpu.Barrier(num_barriers=2)),
        compiler_params=COMPILER_PARAMS,
    )(q, k, v, o, m, l)
    return o[...].astype(q.dtype), LN_2 * m[...] + jnp.log(l[...])


# ---------------------------------------------------------------------------------------------
# FlashAttention-2 (2023): queries outside, keys inside. A block of the GPU owns 64 queries; o, m
# and l stay in its registers, and o is divided once, at the end.


def flash2_forward(q: Any, k: Any, v: Any, causal: bool) -> tuple[Any, Any]:
    """out [B, T, H, D] bfloat16 and lse [B, H, T] float32, natural log."""
    batch, length, heads, head_dim = q.shape
    scale = head_dim**-0.5

    def kernel(q_gmem, k_gmem, v_gmem, out_gmem, lse_gmem, q_smem, p_smem, lse_smem, arrived):
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        # The longest rows of a causal mask first.
        i = length // ROWS - 1 - lax.axis_index("q_tile")
        rows = pl.ds(i * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem, arrived)
        plgpu.barrier_wait(arrived)

        def with_keys(index, k_smem, v_smem, state):
            s = product(q_smem, k_smem.transpose((1, 0)))
            if causal:
                s = causal_scores(s, i * ROWS, index[0] * BLOCK_KV)
            p, m_log2, l, alpha = online_softmax(s, state.m_log2, state.l, scale)
            p_smem[...] = p.astype(p_smem.dtype)
            plgpu.commit_smem()
            return State(m_log2, l, state.o * per_row(alpha, state.o) + product(p_smem, v_smem))

        keys = plgpu.BlockSpec((BLOCK_KV, head_dim), lambda j: (j, 0), transforms=BF16_TILE)
        state = plgpu.emit_pipeline(
            with_keys,
            # Keys after these queries are not visited.
            grid=(lax.div(i * ROWS, BLOCK_KV) + 1 if causal else k.shape[1] // BLOCK_KV,),
            in_specs=[keys, keys],
            max_concurrent_steps=STAGES,
            init_carry=empty_state(head_dim),
        )(k_gmem.at[b, :, h], v_gmem.at[b, :, h])
        lse_smem[...] = LN_2 * (state.m_log2 + jnp.log2(state.l))
        store_tile(state.o / per_row(state.l, state.o), q_smem, out_gmem.at[b, rows, h])
        plgpu.copy_smem_to_gmem(lse_smem, lse_gmem.at[b, h, rows])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(like(q), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)),
        grid=(batch, heads, length // ROWS),
        grid_names=("batch", "head", "q_tile"),
        scratch_types=(
            bf16_tile(ROWS, head_dim),
            bf16_tile(ROWS, BLOCK_KV),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
        ),
        compiler_params=COMPILER_PARAMS,
    )(q, k, v)


# ---------------------------------------------------------------------------------------------
# Backward: keys outside in both papers. dk and dv stay on the chip, dq goes to memory at every
# step. FlashAttention has one block a (batch, head), which reads and writes dq; in FlashAttention-2
# every block of keys has its own, and all add to dq at once (`reduction_op`).


def _dq_of_one_pair(tiles: Any, k_smem: Any, v_smem: Any, accumulators: Any, mask: Any) -> Any:
    """What 64 queries gain in dq from 64 keys; adds to dk and dv. Scores are [keys, queries]."""
    q_smem, dout_smem, lse_smem, delta_smem, p_smem, ds_smem = tiles
    dk_acc, dv_acc = accumulators
    scale = q_smem.shape[1] ** -0.5

    def per_column(ref, x):
        return lax.broadcast_in_dim(plgpu.load(ref, layout=PER_COLUMN), x.shape, [1])

    s = product(k_smem, q_smem.transpose((1, 0)))
    p = mask(jnp.exp2(s * (scale * LOG2_E) - LOG2_E * per_column(lse_smem, s)))
    p_smem[...] = p.astype(p_smem.dtype)
    plgpu.commit_smem()
    plgpu.wgmma(dv_acc, p_smem, dout_smem)
    plgpu.wgmma_wait(0)
    dp = product(v_smem, dout_smem.transpose((1, 0)))
    ds = p * (dp - per_column(delta_smem, dp)) * scale
    ds_smem[...] = ds.astype(ds_smem.dtype)
    plgpu.commit_smem()
    plgpu.wgmma(dk_acc, ds_smem, q_smem)
    plgpu.wgmma_wait(0)
    return product(ds_smem.transpose((1, 0)), k_smem)


def _backward(q, k, v, dout, lse, delta, causal, *, is_flash2: bool) -> tuple[Any, Any, Any]:
    """dq, dk, dv [B, T, H, D] bfloat16."""
    batch, length, heads, head_dim = q.shape

    def kernel(gmem, dq_gmem, dk_gmem, dv_gmem, smem, arrived):
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        k_smem, v_smem, p_smem, ds_smem, dq_smem = smem

        def with_keys(j, accumulators):
            keys = pl.ds(j * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(gmem["k"].at[b, keys, h], k_smem, arrived.at[0])
            plgpu.copy_gmem_to_smem(gmem["v"].at[b, keys, h], v_smem, arrived.at[1])
            plgpu.barrier_wait(arrived.at[0])
            plgpu.barrier_wait(arrived.at[1])
            first = j if causal else 0

            def with_queries(index, q_smem, dout_smem, lse_smem, delta_smem, *dq_old):
                i = first + index[0]

                def mask(p):
                    if not causal:
                        return p
                    kv_pos, q_pos = (
                        plgpu.broadcasted_iota(jnp.int32, p.shape, d, layout=plgpu.Layout.WGMMA)
                        for d in (0, 1)
                    )
                    return jnp.where(kv_pos + j * ROWS <= q_pos + i * ROWS, p, 0.0)

                tiles = (q_smem, dout_smem, lse_smem, delta_smem, p_smem, ds_smem)
                dq = _dq_of_one_pair(tiles, k_smem, v_smem, accumulators, mask)
                if dq_old:
                    dq = dq + plgpu.load(dq_old[0], layout=plgpu.Layout.WGMMA)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_smem[...] = dq
                plgpu.commit_smem()
                target = dq_gmem.at[b, pl.ds(i * ROWS, ROWS), h]
                plgpu.copy_smem_to_gmem(dq_smem, target, reduction_op="add" if is_flash2 else None)

            matrix, row = lambda i: (first + i, 0), lambda i: (first + i,)
            bf16 = plgpu.BlockSpec((ROWS, head_dim), matrix, transforms=BF16_TILE)
            f32 = plgpu.BlockSpec((ROWS, head_dim), matrix, transforms=F32_TILE)
            vector = plgpu.BlockSpec((ROWS,), row)
            dq_spec, dq = ([], []) if is_flash2 else ([f32], [dq_gmem.at[b, :, h]])
            plgpu.emit_pipeline(
                with_queries,
                grid=(length // ROWS - first,),
                in_specs=[bf16, bf16, vector, vector, *dq_spec],
                max_concurrent_steps=STAGES,
            )(
                gmem["q"].at[b, :, h], gmem["dout"].at[b, :, h],
                gmem["lse"].at[b, h], gmem["delta"].at[b, h], *dq,
            )  # fmt: skip
            dk_acc, dv_acc = accumulators
            plgpu.wait_smem_to_gmem(0)
            store_tile(dk_acc[...], k_smem, dk_gmem.at[b, keys, h])
            store_tile(dv_acc[...], v_smem, dv_gmem.at[b, keys, h])

        def one_block(j, _=None):
            acc = plgpu.ACC((ROWS, head_dim))
            pl.run_scoped(lambda *accumulators: with_keys(j, accumulators), acc, acc)

        if is_flash2:
            one_block(lax.axis_index("kv_tile"))
        else:
            lax.fori_loop(0, k.shape[1] // ROWS, one_block, None)

    keys, scores = bf16_tile(ROWS, head_dim), bf16_tile(ROWS, ROWS)
    kv_tiles = (k.shape[1] // ROWS,) if is_flash2 else ()
    dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32))
    arrays = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta}
    dk, dv = plgpu.kernel(
        kernel,
        out_type=(like(k), like(v)),
        grid=(batch, heads, *kv_tiles),
        grid_names=("batch", "head", "kv_tile")[: 2 + len(kv_tiles)],
        scratch_types=(
            (keys, keys, scores, scores, f32_tile(ROWS, head_dim)),
            plgpu.Barrier(num_barriers=2),
        ),
        compiler_params=COMPILER_PARAMS,
    )(arrays, dq)
    return dq[...].astype(q.dtype), dk, dv


flash1 = _with_backward(flash1_forward, functools.partial(_backward, is_flash2=False))
flash2 = _with_backward(flash2_forward, functools.partial(_backward, is_flash2=True))
FORMS = {"standard": standard, "flash1": flash1, "flash2": flash2}
