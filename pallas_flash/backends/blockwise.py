"""FlashAttention-2 in plain JAX: tile by tile, linear memory, on any device and in any dtype.

Source: FlashAttention-2 (Dao 2023), algorithm 1 (forward: queries outside, one division at the
end) and algorithm 2 (backward: keys outside).

The last tile of a sequence starts earlier rather than being padded, so nothing is copied and every
length is exact; what it covers a second time is masked by `Grid.allowed`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash import softmax_state
from pallas_flash.backends import tile
from pallas_flash.backends.backend import Backend, delta_of
from pallas_flash.masks import schedule
from pallas_flash.masks.schedule import Blocks
from pallas_flash.parallel import vary_together
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import Tile, floating, floating_axes, map_operands


@dataclass(frozen=True)
class BlockwiseConfig:
    """Sizes of a tile of scores, in positions.

    Raises:
      ValueError: if a size is not positive.
    """

    block_q: int
    block_kv: int

    def __post_init__(self):
        for name, size in (("block_q", self.block_q), ("block_kv", self.block_kv)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")


class Grid(NamedTuple):
    """The tiles of one request."""

    spec: AttentionSpec
    blocks: Blocks
    operands: Operands

    @classmethod
    def of(cls, spec: AttentionSpec, config: BlockwiseConfig, operands: Operands) -> "Grid":
        sizes = (min(config.block_q, spec.q_len), min(config.block_kv, spec.kv_len))
        return cls(spec, Blocks(spec.q_len, spec.kv_len, *sizes, spec.batch), operands)

    @property
    def block_q(self) -> int:
        return self.blocks.block_q

    @property
    def block_kv(self) -> int:
        return self.blocks.block_kv

    def tile(self, i: Any, j: Any) -> Tile:
        q_start = jnp.minimum(i * self.block_q, self.spec.q_len - self.block_q)
        kv_start = jnp.minimum(j * self.block_kv, self.spec.kv_len - self.block_kv)
        spec, blocks = self.spec, self.blocks
        return Tile(spec.batch, q_start, blocks.block_q, kv_start, blocks.block_kv, spec.q_len)

    def bounds(self, make_schedule) -> tuple[Any, Any]:
        """First and last block that any row or head of the batch has to visit, per tile."""
        table = jnp.asarray(make_schedule(self.operands.mask, self.blocks))
        empty = table[..., schedule.FIRST] == table[..., schedule.LAST]
        first = jnp.where(empty, jnp.iinfo(jnp.int32).max, table[..., schedule.FIRST])
        return first.min((0, 1)), table[..., schedule.LAST].max((0, 1))

    def allowed(self, i: Any, j: Any) -> jax.Array:
        """Where a tile may attend and no earlier tile has covered it: [B or 1, Hq or 1, q, kv]."""
        here = self.tile(i, j)
        q_pos, kv_pos = here.positions()
        fresh = (q_pos >= i * self.block_q) & (kv_pos >= j * self.block_kv)
        mask = map_operands(here.align, self.operands.mask)
        return tile.allowed(mask, q_pos, kv_pos) & fresh

    def scores(self, i: Any, j: Any, q: jax.Array, k: jax.Array):
        """Logits [B, Hq, q, kv] of tile (i, j), where they count, and their vjp.

        q: [B, Hkv, G, q, D]; k: [B, Hkv, kv, D]. The vjp gives (ds of the raw scores, the
        gradients of the score mod's aligned arrays).
        """
        here = self.tile(i, j)
        q_pos, kv_pos = here.positions()
        arrays, rebuild = floating(map_operands(here.align, self.operands.score_mod))
        arrays = [x.astype(self.spec.state_dtype) for x in arrays]

        def logits(s, arrays):
            return tile.logits(s, q_pos, kv_pos, self.spec.scale, rebuild(arrays))

        s = _dot("bkgqd,bksd->bkgqs", q, k, self.spec)
        s = s.reshape(self.spec.batch, self.spec.num_q_heads, self.block_q, self.block_kv)
        s, vjp = jax.vjp(logits, s, arrays)
        return s, self.allowed(i, j), vjp

    def dropped(self, i: Any, j: Any, p: jax.Array) -> jax.Array:
        """Probabilities of tile (i, j), or their gradients, after dropout: [B, Hq, q, kv]."""
        here = self.tile(i, j)
        bits = map_operands(here.align, self.operands.dropout)
        return tile.dropped(p, bits, *here.positions())


def _dot(equation: str, a: jax.Array, b: jax.Array, spec: AttentionSpec) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=spec.state_dtype)


def grouped(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """[B, T, Hq, D] to [B, Hkv, G, T, D]."""
    batch, length, _, dim = x.shape
    x = x.reshape(batch, length, spec.num_kv_heads, spec.group, dim)
    return x.transpose(0, 2, 3, 1, 4)


def ungrouped(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """[B, Hkv, G, T, D] to [B, T, Hq, D]."""
    return x.transpose(0, 3, 1, 2, 4).reshape(spec.batch, -1, spec.num_q_heads, x.shape[-1])


def split_heads(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """[B or 1, Hq or 1, ...] to [B or 1, Hkv or 1, G or 1, ...]."""
    heads = (spec.num_kv_heads, spec.group) if x.shape[1] > 1 else (1, 1)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _rows(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _loop(grid: Grid, count: int, first: Any, last: Any, body, carry):
    """`body(i, carry)` for the blocks first..last of `count`; a lone block needs no loop."""
    if count == 1:
        return body(0, carry)
    # Inside shard_map results vary over the mesh in their types, and so must what they begin with.
    leaves, tree = jax.tree.flatten(carry)
    carry = jax.tree.unflatten(tree, vary_together(leaves, like=jax.tree.leaves(grid.operands)))
    return lax.fori_loop(first, last, body, carry)


def _put(x: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, start, axis)


def forward(spec: AttentionSpec, config: BlockwiseConfig, operands: Operands):
    """out [B, Tq, Hq, Dv] and lse [B, Hq, Tq]."""
    grid = Grid.of(spec, config, operands)
    q = grouped(operands.q, spec)
    k, v = operands.k.transpose(0, 2, 1, 3), operands.v.transpose(0, 2, 1, 3)
    first, last = grid.bounds(schedule.kv_schedule)
    rows = (spec.batch, spec.num_kv_heads, spec.group, grid.block_q)

    def query_tile(i, results):
        out, lse = results
        q_start = grid.tile(i, 0).q_start
        q_tile = _rows(q, q_start, grid.block_q, 3)

        def key_tile(j, state):
            kv_start = grid.tile(i, j).kv_start
            k_tile, v_tile = (_rows(x, kv_start, grid.block_kv, 2) for x in (k, v))
            s, ok, _ = grid.scores(i, j, q_tile, k_tile)
            _, used_kv = tile.in_use(ok, spec.num_kv_heads)
            tile_shape = s.shape
            s = jnp.where(ok, s, -jnp.inf).reshape(*rows, -1)
            m = jnp.maximum(state.m, s.max(-1))
            p = softmax_state.exp_shifted(s, m[..., None])
            alpha = softmax_state.exp_shifted(state.m, m)
            kept = grid.dropped(i, j, p.reshape(tile_shape)).reshape(p.shape).astype(spec.dtype)
            pv = _dot("bkgqs,bksd->bkgqd", kept, jnp.where(used_kv, v_tile, 0), spec)
            return softmax_state.SoftmaxState(
                state.acc * alpha[..., None] + pv, m, state.l * alpha + p.sum(-1)
            )

        state = softmax_state.init(rows, spec.value_dim, spec.state_dtype)
        state = _loop(grid, grid.blocks.num_kv, first[i], last[i], key_tile, state)
        out_tile, lse_tile = softmax_state.finalize(state)
        fresh = (q_start + lax.broadcasted_iota(jnp.int32, rows, 3)) >= i * grid.block_q
        out_tile = out_tile.astype(out.dtype)
        out_tile = jnp.where(fresh[..., None], out_tile, _rows(out, q_start, grid.block_q, 3))
        lse_tile = jnp.where(fresh, lse_tile, _rows(lse, q_start, grid.block_q, 3))
        return _put(out, out_tile, q_start, 3), _put(lse, lse_tile, q_start, 3)

    heads = (spec.batch, spec.num_kv_heads, spec.group)
    out = jnp.zeros((*heads, spec.q_len, spec.value_dim), spec.dtype)
    lse = jnp.zeros((*heads, spec.q_len), spec.state_dtype)
    out, lse = _loop(grid, grid.blocks.num_q, 0, grid.blocks.num_q, query_tile, (out, lse))
    return ungrouped(out, spec), lse.reshape(spec.batch, spec.num_q_heads, spec.q_len)


class _Gradients(NamedTuple):
    """Sums over the tiles, in the state's dtype. dk, dv: of the present key tile."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    d_score_mod: list[jax.Array]


def backward(
    spec: AttentionSpec, config: BlockwiseConfig, operands: Operands, out, lse, dout, dlse
):
    """dq, dk, dv and the gradients of the score mod's arrays."""
    delta = delta_of(out, dout, dlse)
    grid = Grid.of(spec, config, operands)
    q, dout = grouped(operands.q, spec), grouped(dout, spec)
    k, v = operands.k.transpose(0, 2, 1, 3), operands.v.transpose(0, 2, 1, 3)
    first, last = grid.bounds(schedule.q_schedule)
    axes = floating_axes(operands.score_mod)

    def step(i, j, k_tile, v_tile, sums: _Gradients) -> _Gradients:
        here = grid.tile(i, j)
        q_tile, do_tile = (_rows(x, here.q_start, grid.block_q, 3) for x in (q, dout))
        lse_tile, delta_tile = (_rows(x, here.q_start, grid.block_q, 2) for x in (lse, delta))
        s, ok, logits_vjp = grid.scores(i, j, q_tile, k_tile)
        used_q, used_kv = tile.in_use(ok, spec.num_kv_heads)
        used_q = split_heads(used_q, spec)
        q_tile, do_tile = jnp.where(used_q, q_tile, 0), jnp.where(used_q, do_tile, 0)
        k_tile, v_tile = jnp.where(used_kv, k_tile, 0), jnp.where(used_kv, v_tile, 0)

        p = tile.probabilities(s, lse_tile, ok)
        dp = _dot("bkgqd,bksd->bkgqs", do_tile, v_tile, spec).reshape(s.shape)
        dp = grid.dropped(i, j, dp)
        ds = jnp.where(ok, p * (dp - delta_tile[..., None]), 0)
        ds, d_arrays = logits_vjp(ds)
        p = grid.dropped(i, j, p)
        p, ds = (x.reshape(*q_tile.shape[:4], -1).astype(spec.dtype) for x in (p, ds))
        dq_tile = _rows(sums.dq, here.q_start, grid.block_q, 3)
        return _Gradients(
            _put(sums.dq, dq_tile + _dot("bkgqs,bksd->bkgqd", ds, k_tile, spec), here.q_start, 3),
            sums.dk + _dot("bkgqs,bkgqd->bksd", ds, q_tile, spec),
            sums.dv + _dot("bkgqs,bkgqd->bksd", p, do_tile, spec),
            [here.add(x, a, d) for x, a, d in zip(sums.d_score_mod, axes, d_arrays, strict=True)],
        )

    def key_tile(j, carry):
        dq, dk, dv, d_score_mod = carry
        kv_start = grid.tile(0, j).kv_start
        k_tile, v_tile = (_rows(x, kv_start, grid.block_kv, 2) for x in (k, v))
        dk_tile, dv_tile = (jnp.zeros(x.shape, spec.state_dtype) for x in (k_tile, v_tile))
        sums = _Gradients(dq, dk_tile, dv_tile, d_score_mod)
        visit = lambda i, sums: step(i, j, k_tile, v_tile, sums)  # noqa: E731
        sums = _loop(grid, grid.blocks.num_q, first[j], last[j], visit, sums)
        dk = _put(dk, _rows(dk, kv_start, grid.block_kv, 2) + sums.dk.astype(dk.dtype), kv_start, 2)
        dv = _put(dv, _rows(dv, kv_start, grid.block_kv, 2) + sums.dv.astype(dv.dtype), kv_start, 2)
        return sums.dq, dk, dv, sums.d_score_mod

    own = floating(operands.score_mod)[0]
    carry = (
        jnp.zeros(q.shape, spec.state_dtype),
        jnp.zeros_like(k),
        jnp.zeros_like(v),
        [jnp.zeros(x.shape, spec.state_dtype) for x in own],
    )
    dq, dk, dv, d_score_mod = _loop(
        grid, grid.blocks.num_kv, 0, grid.blocks.num_kv, key_tile, carry
    )
    dk, dv = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
    d_score_mod = [d.astype(x.dtype) for d, x in zip(d_score_mod, own, strict=True)]
    return ungrouped(dq, spec).astype(spec.dtype), dk, dv, d_score_mod


def default_config(spec: AttentionSpec) -> BlockwiseConfig:
    """Tiles that stay in a CPU's cache, or that keep a GPU busy for longer than a launch takes."""
    block = 128 if jax.default_backend() == "cpu" else 512
    return BlockwiseConfig(block_q=block, block_kv=block)


BACKEND = Backend(
    name="blockwise",
    platform=None,
    unsuited=lambda device: None,
    config_type=BlockwiseConfig,
    unsupported=lambda spec: None,
    default_config=default_config,
    forward=forward,
    backward=backward,
)
