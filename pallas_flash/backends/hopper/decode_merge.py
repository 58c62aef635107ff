"""The results of the parts of a row, joined: a second kernel, one thread block for each query.

``out = sum_n w_n out_n`` with ``w_n = exp(lse_n - lse)``. Source: Flash-Decoding (Dao et al. 2023).
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.decode_share import Share, key_blocks, row_work, team_of
from pallas_flash.backends.hopper.decode_storage import DecodeConfig
from pallas_flash.backends.hopper.storage import LN_2, read_scalar, round_up

# A number for each thread of a warpgroup.
WIDTH = 128
# Parts that are read at a time: their latency passes together.
TOGETHER = 8


def width_of(value_dim: int) -> int:
    """Columns of a part in memory."""
    return round_up(value_dim, WIDTH)


def merge(
    spec: Any, config: DecodeConfig, share: Share, parts: Any, lse_log2: Any
) -> tuple[Any, Any]:
    """out [B, Tq, Hq, Dv] and lse [B, Hq, Tq], both float32, natural log.

    parts: [parts, Hkv, rows, width] float32; lse_log2: [parts, Hkv, rows] float32, in base 2.
    """
    width = parts.shape[-1]
    shape = (spec.batch, spec.q_len, spec.num_q_heads)

    def flash_decode_merge(share, parts_gmem, lse_gmem, out_gmem, out_lse_gmem):
        index, heads = lax.axis_index("query"), jnp.int32(spec.num_q_heads)
        head, query = lax.rem(index, heads), lax.div(index, heads)
        batch, q = lax.div(query, jnp.int32(spec.q_len)), lax.rem(query, jnp.int32(spec.q_len))
        kv_head = lax.div(head, jnp.int32(spec.group))
        row = q * spec.group + lax.rem(head, jnp.int32(spec.group))
        first, count = _span(spec, config, share, batch)

        def join(step, state):
            parts = [_part(step * TOGETHER + i) for i in range(TOGETHER)]
            return _join(state, parts)

        def _part(n):
            part = first + jnp.clip(n, 0, jnp.maximum(count - 1, 0))
            lse = jnp.where(n < count, lse_gmem[part, kv_head, row], -jnp.inf)
            layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // WIDTH)
            return _constant(lse, width), plgpu.load(
                parts_gmem.at[part, kv_head, row], layout=layout, optimized=False
            )

        zero = _constant(jnp.float32(0.0), width)
        state = _constant(jnp.float32(-jnp.inf), width), zero, zero
        steps = lax.div(count + TOGETHER - 1, jnp.int32(TOGETHER))
        m, total, acc = lax.fori_loop(jnp.int32(0), steps, join, state)
        out_gmem[batch, q, head] = acc / jnp.where(total == 0.0, 1.0, total)
        out_lse_gmem[batch, head, q] = (m + jnp.log2(total)) * LN_2

    out, lse = plgpu.kernel(
        flash_decode_merge,
        out_type=(
            jax.ShapeDtypeStruct((*shape, width), jnp.float32),
            # The same number in every column.
            jax.ShapeDtypeStruct((spec.batch, spec.num_q_heads, spec.q_len, width), jnp.float32),
        ),
        grid=(spec.batch * spec.q_len * spec.num_q_heads,),
        grid_names=("query",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(share, parts, lse_log2)
    return out[..., : spec.value_dim], lse[..., 0]


def _span(spec: Any, config: DecodeConfig, share: Share, row: Any) -> tuple[Any, Any]:
    """The number of a row's first part, and how many it has."""
    length, count, end = (read_scalar(x, row) for x in (share.lengths, share.counts, share.ends))
    work = row_work(*key_blocks(spec, length, length - count))
    total = read_scalar(share.ends, jnp.int32(spec.batch - 1))
    first, last = (team_of(x, total, config.num_teams) for x in (end - work, end - 1))
    return first + row, jnp.where(work > 0, last - first + 1, 0)


def _constant(x: Any, width: int) -> Any:
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // WIDTH)
    return plgpu.layout_cast(jnp.broadcast_to(x, (width,)), layout)


def _join(state: Any, parts: list[Any]) -> Any:
    """(m, total, acc) with more parts, pairs of an lse in base 2 and out; all are vectors."""
    m, total, acc = state
    new_m = m
    for lse, _ in parts:
        new_m = jnp.maximum(new_m, lse)
    shift = jnp.where(new_m == -jnp.inf, 0.0, new_m)
    alpha = jnp.exp2(m - shift)
    total, acc = total * alpha, acc * alpha
    for lse, out in parts:
        weight = jnp.exp2(lse - shift)
        total += weight
        # What a row does not have may be NaN.
        acc += jnp.where(weight > 0.0, out, 0.0) * weight
    return new_m, total, acc
