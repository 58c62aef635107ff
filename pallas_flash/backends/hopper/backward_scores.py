"""What both backward kernels compute of a tile of scores, and the accumulators they do it with."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper import array_gradients, masking
from pallas_flash.backends.hopper.backward_kernel import Kernel, may_hold_padding, stage
from pallas_flash.backends.hopper.backward_storage import WG_KEYS
from pallas_flash.backends.hopper.elementwise import written_out
from pallas_flash.backends.hopper.leaves import Terms, leaves_of, rows_differ_by_head, used
from pallas_flash.backends.hopper.scores import (
    Part,
    Zone,
    dropout_factor,
    gradients_of_arrays,
    is_kept,
    with_weights,
)
from pallas_flash.backends.hopper.storage import LOG2_E, MATRIX, PER_COLUMN, zero_matrix
from pallas_flash.backends.hopper.tile_arrays import Place, read_rows
from pallas_flash.terms import KV, Q


def scores_part(kernel: Kernel, place: Place, shape: tuple[int, int], zone: Zone) -> Part:
    """The scores of some keys of a tile."""
    of_rows = kernel.of_rows
    if of_rows is None:
        of_rows = read_rows(kernel.tiling, kernel.gmem.terms, place, shape[0])
    where = place, shape, zone
    return Part.of(kernel.tiling, kernel.gmem.terms, of_rows, *where, kernel.is_wide)


def with_rows(kernel: Kernel, wg: Any) -> Kernel:
    """The kernel of a warpgroup with what its keys have of the terms' arrays, read once."""
    if rows_differ_by_head(kernel.spec, KV):
        return kernel
    place = kernel.place(kernel.q_head(0), 0)
    if not kernel.config.shares_keys:
        place = place._replace(row_start=place.row_start + wg * WG_KEYS)
    of_rows = read_rows(kernel.tiling, kernel.gmem.terms, place, WG_KEYS)
    return dataclasses.replace(kernel, of_rows=of_rows)


def scores_terms(kernel: Kernel, t: Any, part: Part, own: Any) -> Terms:
    """The terms of some keys of a tile, `own` of its rows."""
    smem = kernel.smem
    if not part.is_near:
        return part.terms(smem.tiles, stage(t, kernel.config.num_q_stages), own)
    wg = lax.axis_index("wg")
    plgpu.barrier_wait(smem.near_ready.at[wg])
    terms = part.terms(smem.tiles, stage(t, kernel.config.num_q_stages), own)
    # Read by ordinary loads, and TMA overwrites it.
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.near_free.at[wg])
    return terms


def _ends(kernel: Kernel) -> tuple[int | None, int | None]:
    """Of keys and queries, where a tile may hold some beyond that count for something."""
    spec, config = kernel.spec, kernel.config
    keys = spec.kv_len if spec.kv_len % config.block_kv else None
    # Queries over the end weigh nothing, but a mask may let them meet keys that hold NaN.
    is_cut = spec.q_len % config.block_q != 0 and may_hold_padding(spec)
    return keys, spec.q_len if is_cut else None


def per_query(row_smem: Any) -> Any:
    """One number for each column of a tile of scores."""
    return plgpu.load(row_smem, layout=PER_COLUMN, optimized=False)


class Weights(NamedTuple):
    """P, and what the gradients of the scores are multiples of."""

    p: Any
    scores: Any


def probabilities(kernel: Kernel, part: Part, terms: Terms, s: Any, lse_log2: Any) -> Weights:
    """`weights_of` a tile whose rows are keys."""
    return weights_of(part, terms, s, lse_log2, _ends(kernel))


def weights_of(part: Part, terms: Terms, s: Any, lse_log2: Any, ends: tuple[Any, Any]) -> Weights:
    """P from raw scores s, 0 where masked, and its `Weights`.

    Queries with lse_log2 = inf give 0. lse_log2 has a number for each query, or is None where s
    contains it. ends: as in `masking.masked`.
    """
    scale, addend = part.tiling.spec.scale, part.addend()
    if addend is not None:
        # To every score: less for each is taken from lse.
        lse_log2 = lse_log2 - addend * LOG2_E
    if lse_log2 is not None:
        lse_log2 = _over_keys(part, lse_log2, s)

    def to_p(logits_log2):
        p = jnp.exp2(logits_log2 if lse_log2 is None else logits_log2 - lse_log2)
        return masking.masked(part, terms.mask, p, 0.0, ends) if part.is_masked else p

    if terms.score_mod is None or addend is not None:
        p = to_p(s * (scale * LOG2_E))
        return Weights(p, p)

    def all_of_it(mod, s, q_pos, kv_pos):
        return with_weights(mod, s * scale, q_pos, kv_pos, lambda x: to_p(x * LOG2_E))

    return Weights(*written_out(all_of_it)(terms.score_mod, s, *part.positions()))


def _over_keys(part: Part, per_query: Any, s: Any) -> Any:
    """A matrix like s from one number for each query."""
    return lax.broadcast_in_dim(per_query, s.shape, [0 if part.tiling.rows == Q else 1])


def marked(terms: Terms, weights: Weights) -> Weights:
    """The weights, with -P for P where dropout drops it.

    P is in registers until dP is there anyway; of the choices themselves ptxas would keep bits,
    in 5 operations a score.
    """
    if terms.dropout is None:
        return weights
    p = jnp.where(is_kept(terms, weights.p.shape), weights.p, -weights.p)
    p = lax.optimization_barrier(p)
    return Weights(p, jnp.abs(p) if terms.score_mod is None else weights.scores)


def kept(terms: Terms, p: Any) -> Any:
    """P from `marked`, but 0 where dropout drops."""
    return p if terms.dropout is None else jnp.maximum(p, 0.0)


def weight_factors(part: Part, are_kept: Any, dp: Any, delta: Any) -> Any:
    """What P is multiplied with in the gradient of the logits: dP, after dropout, less delta.

    are_kept: what dropout keeps, if there is any; it asks for delta, which else is None where dp
    contains it.
    """
    spec = part.tiling.spec
    if delta is not None:
        delta = _over_keys(part, delta, dp)
    if spec.dropout is not None:
        return jnp.where(are_kept, dp * dropout_factor(spec) - delta, -delta)
    return dp if delta is None else dp - delta


def array_gradients_of(part: Part, terms: Terms, s: Any, p: Any, x: Any) -> list[Any]:
    """What each score of a part adds to the gradients of the score mod's arrays.

    None for those that are not used there. x: of `weight_factors`.
    """
    if not array_gradients.leaves(part.tiling.spec):
        return []
    mod, scaled = part.tiling.spec.score_mod, s * part.tiling.spec.scale
    leaves = leaves_of(mod, KV)
    here = [i for i in used(mod, part.zone.where) if leaves[i].is_float]
    found = written_out(gradients_of_arrays)(terms.score_mod, scaled, *part.positions(), p * x)
    by_leaf = dict(zip(here, found, strict=True))
    return [by_leaf.get(i) for i, leaf in enumerate(leaves) if leaf.is_float]


def scrub(tile_smem: Any) -> None:
    """Zeroes what is not finite in a part of K or V, where padded keys may hold anything.

    Their P and dS are 0, but dP = dO V^T and dQ = dS K would still take up 0 * NaN. Nothing is
    hidden: where such a key counts, lse or delta and so every gradient of its rows is not finite.
    """
    x = plgpu.load(tile_smem, layout=MATRIX, optimized=False)
    is_finite = jnp.abs(x.astype(jnp.float32)) < jnp.inf
    tile_smem[...] = jnp.where(is_finite, x, jnp.zeros_like(x))
    plgpu.commit_smem()


def accumulator(rows: int, columns: int) -> Any:
    return plgpu.ACC((rows, columns), jnp.float32)


def zero_accumulator(rows: int, columns: int) -> Any:
    """A zero accumulator to carry through ``pl.run_state``."""
    return plgpu.ACC.init(zero_matrix(rows, columns))


def free_stages(kernel: Kernel, t: Any) -> None:
    """Hands the tiles of step `t` back to the producer.

    lse, delta and the terms' matrices were read by ordinary loads: a ``commit_smem`` must lie
    between those and this, since TMA overwrites them.
    """
    plgpu.barrier_arrive(kernel.smem.q_free.at[stage(t, kernel.config.num_q_stages)])
    plgpu.barrier_arrive(kernel.smem.dout_free.at[stage(t, kernel.config.num_dout_stages)])
