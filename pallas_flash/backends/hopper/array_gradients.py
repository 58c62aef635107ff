"""Gradients of the arrays that a score mod holds, in the array's own shape.

The backward has them as matrices, a number for each score. For an array along the keys, or with one
number for a head, each block sums over its queries and stores a vector for every query head; XLA
sums the rest: deterministic, [B, Hq, Tkv] a term. A matrix or a band of distances is added to
float32 memory by TMA, tile by tile, in the array's own batch and heads; so is an array along the
queries, to one row for each row of a tile, which XLA sums.

In the backward the keys are the rows of a tile.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_flash.backends.hopper.leaves import Kind, Leaf, leaves_of
from pallas_flash.backends.hopper.storage import constant_per_row, round_up, tiled, tma_rows
from pallas_flash.backends.hopper.tile_arrays import Place, matrix_part
from pallas_flash.backends.hopper.tiling import Tiling
from pallas_flash.spec import AttentionSpec
from pallas_flash.terms import KV, floating, leaf_fields


class Refs(NamedTuple):
    """Where the gradients go: in GMEM, or on their way there in SMEM.

    sums: GMEM [n, B, Hq, Tkv over whole tiles] float32, SMEM [n, block_kv]; None if n = 0.
    matrices: GMEM [b, h, rows, columns] float32, added to; SMEM [2, 64, block_q].
    """

    sums: Any
    matrices: tuple[Any, ...]


def leaves(spec: AttentionSpec) -> list[Leaf]:
    """The arrays of the score mod that have a gradient."""
    return [leaf for leaf in leaves_of(spec.score_mod, KV) if leaf.is_float]


def is_added(leaf: Leaf) -> bool:
    """Whether its gradient is added to memory tile by tile, and not summed over queries."""
    return leaf.kind not in (Kind.NUMBER, Kind.PER_ROW)


def added_in_any_order(spec: AttentionSpec) -> list[str]:
    """The names of the score mod's arrays whose gradients `is_added`."""
    pairs = zip(leaf_fields(spec.score_mod), leaves_of(spec.score_mod, KV), strict=True)
    return [field.name for field, leaf in pairs if leaf.is_float and is_added(leaf)]


def num_sums(spec: AttentionSpec) -> int:
    """How many of them are sums over queries."""
    return sum(not is_added(leaf) for leaf in leaves(spec))


# ---------------------------------------------------------------------------------------------
# Outside of the kernel


def in_smem(tiling: Tiling, wg_rows: int) -> Refs:
    """Scratch types of a block."""
    count = num_sums(tiling.spec)
    tile = tiling.swizzle_tile(Kind.BAND, jnp.float32)
    shape = (tiling.num_rows // wg_rows, wg_rows, tiling.num_columns)
    matrices = [tiled(shape, jnp.float32, tile) for x in leaves(tiling.spec) if is_added(x)]
    sums = plgpu.SMEM((count, tiling.num_rows), jnp.float32) if count else None
    return Refs(sums, tuple(matrices))


def sums_in_gmem(tiling: Tiling) -> Any:
    """Shape of the sums, or None if there are none."""
    spec, count = tiling.spec, num_sums(tiling.spec)
    shape = (count, spec.batch, spec.num_q_heads, round_up(spec.kv_len, tiling.num_rows))
    return jax.ShapeDtypeStruct(shape, jnp.float32) if count else None


def zero_matrices(tiling: Tiling) -> tuple[jax.Array, ...]:
    """Float32 memory to add the gradients of matrices, bands and arrays along the queries to."""
    spec, zeros = tiling.spec, []
    for leaf in leaves(spec):
        if leaf.kind in (Kind.MATRIX, Kind.PER_COLUMN):
            rows = tma_rows(spec.kv_len) if leaf.kind is Kind.MATRIX else tiling.num_rows
            columns = round_up(spec.q_len, tiling.swizzle_tile(leaf.kind, jnp.float32))
            zeros.append((leaf.batch, leaf.heads, rows, columns))
        elif leaf.kind is Kind.BAND:
            zeros.append((leaf.batch, leaf.heads, tiling.num_rows, tiling.band_length(leaf.near)))
    return tuple(jnp.zeros(shape, jnp.float32) for shape in zeros)


def folded(tiling: Tiling, score_mod: Any, found: Refs) -> list[jax.Array]:
    """The gradients in the arrays' own shapes and dtypes."""
    spec, matrices, sums, gradients = tiling.spec, iter(found.matrices), 0, []
    for leaf, array in zip(leaves(spec), floating(score_mod)[0], strict=True):
        if leaf.kind is Kind.MATRIX:
            x = next(matrices)[:, :, : spec.kv_len, : spec.q_len].swapaxes(2, 3)
        elif leaf.kind is Kind.BAND:
            x = tiling.distances(leaf.near, next(matrices))
        elif leaf.kind is Kind.PER_COLUMN:
            x = next(matrices)[..., : spec.q_len].sum(2)
        else:
            x = found.sums[sums][..., : spec.kv_len]
            sums += 1
            x = x.reshape(leaf.batch, -1, *x.shape[1:]).sum(1)
            x = x if leaf.heads > 1 else x.sum(1, keepdims=True)
            x = x if leaf.kind is Kind.PER_ROW else x.sum(-1)
        gradients.append(x.reshape(array.shape).astype(array.dtype))
    return gradients


# ---------------------------------------------------------------------------------------------
# In the kernel


def no_sums(spec: AttentionSpec, rows: int) -> tuple[Any, ...]:
    """What `add` begins with for every query head."""
    return tuple(constant_per_row(rows, 0.0) for _ in range(num_sums(spec)))


def add(
    tiling: Tiling, gmem: Refs, smem: Refs, wg: Any, place: Place, found: list[Any], sums: Any
) -> tuple[Any, ...]:
    """The sums with what a tile adds to them; adds its matrices to memory, asynchronously.

    place: of the whole tile; found: the gradients [64, block_q] of this warpgroup's keys, None for
    arrays that have none here.
    """
    new: list[Any] = []
    matrix = 0
    for leaf, x in zip(leaves(tiling.spec), found, strict=True):
        if not is_added(leaf):
            new.append(sums[len(new)] if x is None else sums[len(new)] + x.sum(axis=1))
            continue
        if x is None:
            matrix += 1
            continue
        staging, array = smem.matrices[matrix].at[wg], gmem.matrices[matrix]
        matrix += 1
        # Its add of the step before has read it.
        plgpu.wait_smem_to_gmem(len(smem.matrices) - 1, wait_read_only=True)
        staging[...] = x
        plgpu.commit_smem()
        batch, head, rows, columns = matrix_part(tiling, leaf, place)
        own = pl.ds(rows.start + wg * staging.shape[0], staging.shape[0])
        target = array.at[batch, head, own, columns]
        plgpu.copy_smem_to_gmem(staging, target, reduction_op="add")
    return tuple(new)


def store_sums(gmem: Refs, smem: Refs, wg: Any, place: Place, sums: tuple[Any, ...]) -> None:
    """Stores the sums of a query head over all its queries."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    rows = sums[0].shape[0]
    own = pl.ds(wg * rows, rows)
    for i, x in enumerate(sums):
        smem.sums.at[i, own][...] = x
    plgpu.commit_smem()
    target = pl.ds(place.row_start + wg * rows, rows)
    for i in range(len(sums)):
        part = gmem.sums.at[i, place.batch, place.q_head, target]
        plgpu.copy_smem_to_gmem(smem.sums.at[i, own], part)
