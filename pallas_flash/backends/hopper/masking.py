"""Masking: a tile without the scores that a mask forbids, in one comparison for each score.

Masks that allow each row of a tile one range of its columns (`Mask.kv_range`, or `Mask.q_range` in
the backward, whose rows are keys) are joined into one range, two numbers for each row. Documents
join the same comparison: with ``code = id * span + column``, a score counts where ``code - (id of
its row * span + first) < count``, unsigned; the columns of another document are at least half a
span away. This ends where codes overflow: where a request has such ids (`read_wide`) a branch
compares the ids themselves. What is neither range nor document is asked of each score.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.elementwise import written_out
from pallas_flash.backends.hopper.storage import MATRIX, PER_ROW, read_scalar
from pallas_flash.masks import Bounds, Mask, SegmentIds
from pallas_flash.masks.mask import BEFORE_ALL, BEHIND_ALL, Range, conjuncts
from pallas_flash.terms import Q

# Ids from -WIDE to WIDE - 1 have codes that do not overflow in tiles of up to 256 columns.
WIDE = 2**22


class Documents(NamedTuple):
    """The ids of a tile's rows, [rows] or a number, and of its columns, a matrix or a number."""

    of_rows: Any
    of_columns: Any


def id_bounds(mask: Mask | None) -> list[Bounds]:
    """[1] int32, the `Bounds` of each array of documents' ids that may be too large for codes."""
    ids = [x for x in jax.tree.leaves(_documents(mask)) if jnp.iinfo(x.dtype).max >= WIDE]
    # Unsigned ones beyond int32 become negative ones: still no two are the same.
    ids = [x.astype(jnp.int32) for x in ids]
    return [Bounds(x.min().reshape(1), x.max().reshape(1)) for x in ids]


def read_wide(bounds: list[Bounds], zero: Any) -> Any:
    """Whether any id is too large for codes: False if there is none that could be.

    bounds: in GMEM; zero: a number of the kernel's.
    """
    wide = [(read_scalar(lo, zero) < -WIDE) | (read_scalar(hi, zero) >= WIDE) for lo, hi in bounds]
    return functools.reduce(operator.or_, wide) if wide else False


def _documents(mask: Mask | None) -> SegmentIds | None:
    """The first of the masks joined by ``&`` that tells documents apart."""
    return next((part for part in conjuncts(mask) if isinstance(part, SegmentIds)), None)


def masked(part: Any, mask: Mask | None, x: Any, fill: float, ends: tuple[Any, Any]) -> Any:
    """A matrix `x` of a `Part` of a tile, with `fill` where the mask forbids.

    mask: with matrices for its arrays. ends: of the positions along rows and columns, or None
    where a tile holds none beyond.
    """
    by_queries = part.tiling.rows == Q
    find = _kv_range if by_queries else _q_range
    masks, of_rows = conjuncts(mask), conjuncts(part.mask_of_rows())
    pos = jax.ShapeDtypeStruct((1,), jnp.int32)
    ranges = [jax.eval_shape(find, own, pos) for own in of_rows]
    with_codes: Any = None if part.is_wide is True else _documents(mask)
    # One bound costs what its mask costs. In the backward so do two: 0.746 ms for 0.769 with a
    # window, 16384 x 16 x 128, and 0.688 for 0.696 causal, 8 x 2048, H100, JAX 0.11.2.
    joins = with_codes is not None or (by_queries and len(jax.tree.leaves((ranges, ends))) > 1)
    bounds: list[Any] = [Range(end=ends[1])]
    documents, others = None, []
    row = functools.cache(lambda: _rows(part))
    if ends[0] is not None:
        bounds.append(Range(end=jnp.where(row() < ends[0], BEHIND_ALL, BEFORE_ALL)))
    whole: Any
    own: Any
    for whole, own, found in zip(masks, of_rows, ranges, strict=True):
        if whole is with_codes:
            ids = (own.q, whole.kv) if by_queries else (own.kv, whole.q)
            documents = Documents(*ids)
        elif joins and found is not None:
            # Positions that nothing comes of do not lower: their layout could be any.
            depends = any(x.ndim for x in jax.tree.leaves(found))
            bounds.append(written_out(find)(own, row() if depends else jnp.int32(0)))
        else:
            others.append(whole)

    def without(forbidden: Any, x: Any) -> Any:
        allowed = written_out(lambda mask: mask.allowed(*part.positions()))(forbidden)
        # One number may tell it for all scores of a tile.
        return jnp.where(jnp.broadcast_to(allowed, x.shape), x, fill)

    allowed = _in_range(part, functools.reduce(_joined, bounds), documents)
    x = x if allowed is None else jnp.where(allowed, x, fill)
    if documents is not None and not isinstance(part.is_wide, bool):
        x = lax.cond(part.is_wide, lambda x: without(with_codes, x), lambda x: x, x)
    for each in others:
        x = without(each, x)
    return x


def _rows(part: Any) -> Any:
    """The positions of a part's rows."""
    row = plgpu.broadcasted_iota(jnp.int32, part.shape[:1], 0, layout=PER_ROW)
    return row + part.place.row_start


def _kv_range(mask: Mask, q_pos: Any) -> Range | None:
    return mask.kv_range(q_pos)


def _q_range(mask: Mask, kv_pos: Any) -> Range | None:
    return mask.q_range(kv_pos)


def _joined(a: Range, b: Range) -> Range:
    """What lies in both."""
    first = [x for x in (a.first, b.first) if x is not None]
    end = [x for x in (a.end, b.end) if x is not None]
    return Range(
        functools.reduce(jnp.maximum, first) if first else None,
        functools.reduce(jnp.minimum, end) if end else None,
    )


def _in_range(part: Any, of_rows: Range, documents: Documents | None) -> Any:
    """Which scores lie in the range of their row, and in its document, or None if all do."""
    count = part.shape[1]
    column = plgpu.broadcasted_iota(jnp.int32, part.shape, 1, layout=MATRIX)

    def within(bound: Any) -> Any:
        """Counted from the part's first column, from 0 to `count`."""
        return jnp.clip(bound - part.place.column_start, 0, count)

    def wide(x: Any) -> Any:
        return lax.broadcast_in_dim(x, part.shape, [0] if x.ndim else [])

    first, end = of_rows
    if documents is None and first is None:
        return None if end is None else column < wide(within(end))
    if documents is None and end is None:
        return column >= wide(within(first))
    # Both in one comparison: what lies before the first is a large number.
    first = jnp.int32(0) if first is None else within(first)
    end = jnp.int32(count) if end is None else within(end)
    size = jnp.maximum(end - first, 0)
    if documents is not None:
        own, other = documents
        if jnp.issubdtype(other.dtype, jnp.signedinteger):
            # No column for a negative id.
            size = size & ~(own >> 31)
        span = jnp.int32(2 * count)
        first = own.astype(jnp.int32) * span + first
        column = other.astype(jnp.int32) * span + column
    return (column - wide(first)).astype(jnp.uint32) < wide(size).astype(jnp.uint32)
