"""The arrays that masks, score mods and dropout hold, and the kind of each.

By the axes that it really spans, an array gives a tile of one batch row and head a number or a
vector along the tile's rows (read from GMEM by the warpgroups), or a vector along its columns or a
matrix (brought to SMEM by the producer). An array over distances is a matrix too: it is expanded
once to a band, one row for each row of a tile, each shifted by one; linear memory, and every tile
is a plain slice of it.

Rows are the queries in the forward and the keys in the backward, whose scores are transposed.
"""

import dataclasses
import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_flash.backends.hopper.storage import L2_BYTES_PER_GROUP
from pallas_flash.dropout import KeepBits
from pallas_flash.masks import Mask
from pallas_flash.scores.score_mod import AFTER, BEFORE, ScoreMod
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.terms import BATCH, DISTANCE, HEADS, KV, Axes, Q, leaf_axes

# Rows of a band, about.
BAND_ROWS = 128


class Kind(enum.Enum):
    """What an array gives a tile of scores."""

    NUMBER = enum.auto()
    PER_ROW = enum.auto()
    PER_COLUMN = enum.auto()
    MATRIX = enum.auto()
    BAND = enum.auto()

    @property
    def is_matrix(self) -> bool:
        return self in (Kind.MATRIX, Kind.BAND)


class Leaf(NamedTuple):
    """What is static about one array of a term.

    batch, heads: its sizes along these axes, 1 where broadcast. dtype: in the kernel's memory.
    is_bool: whether its numbers stand for bools. is_float: whether it may have a gradient. of_mask:
    whether it is a mask's. near: of a band that only tiles near it read (`ScoreMod.near`), or None.
    """

    kind: Kind
    batch: int
    heads: int
    dtype: Any
    is_bool: bool
    is_float: bool
    of_mask: bool
    near: tuple[int, int] | None = None


class Terms(NamedTuple):
    """One thing for each term of a request: the term itself, or what its arrays became."""

    mask: Any
    score_mod: Any
    dropout: Any

    @classmethod
    def of(cls, owner: AttentionSpec | Operands) -> "Terms":
        return cls(owner.mask, owner.score_mod, owner.dropout)


def leaves_of(term: Any, rows: str) -> list[Leaf]:
    """The arrays of a term, in the order of ``jax.tree.leaves``."""
    pairs = zip(jax.tree.leaves(term), leaf_axes(term), strict=True)
    found = [_leaf(x, axes, rows)._replace(of_mask=isinstance(term, Mask)) for x, axes in pairs]
    near = near_of(term)
    if near is None:
        return found
    elsewhere = {*used(term, BEFORE), *used(term, AFTER)}
    return [
        leaf._replace(near=near) if leaf.kind is Kind.BAND and i not in elsewhere else leaf
        for i, leaf in enumerate(found)
    ]


def near_of(term: Any) -> tuple[int, int] | None:
    """`ScoreMod.near` of any term."""
    return term.near if isinstance(term, ScoreMod) else None


def used(term: Any, where: str) -> list[int]:
    """Which of a term's arrays it uses there, in the order of what it is there."""
    structure = jax.tree.structure(term)
    numbers = jax.tree.unflatten(structure, range(len(jax.tree.leaves(term))))
    return jax.tree.leaves(numbers.at(where) if isinstance(term, ScoreMod) else numbers)


def _leaf(x: Any, axes: Axes, rows: str) -> Leaf:
    sizes = dict(zip(axes, x.shape, strict=True))
    along = {axis for axis in (Q, KV, DISTANCE) if sizes.get(axis, 1) > 1}
    if DISTANCE in along:
        kind = Kind.BAND
    elif len(along) == 2:
        kind = Kind.MATRIX
    elif along:
        kind = Kind.PER_ROW if along == {rows} else Kind.PER_COLUMN
    else:
        kind = Kind.NUMBER
    is_bool = x.dtype == jnp.bool_
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if is_float:
        narrow = kind.is_matrix and x.dtype.itemsize <= 4
        dtype = x.dtype if narrow else jnp.dtype(jnp.float32)
    elif is_bool and kind.is_matrix:
        dtype = jnp.dtype(jnp.int8)
    elif jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        dtype = jnp.dtype(jnp.uint32)
    else:
        dtype = jnp.dtype(jnp.int32)
    shared = sizes.get(BATCH, 1), sizes.get(HEADS, 1)
    return Leaf(kind, *shared, dtype, is_bool, is_float, of_mask=False)


def spelled_out(spec: AttentionSpec) -> AttentionSpec:
    """The spec as the kernels have it: with dropout's numbers for each query and key."""
    if not isinstance(spec.dropout, KeepBits):
        return spec
    make = functools.partial(KeepBits.spelled_out, q_len=spec.q_len, kv_len=spec.kv_len)
    numbers: Any = jax.eval_shape(make, spec.dropout)
    return dataclasses.replace(spec, dropout=numbers)


def with_numbers(operands: Operands) -> Operands:
    """The operands of a spec that is `spelled_out`."""
    if operands.dropout is None:
        return operands
    numbers: Any = operands.dropout.spelled_out(operands.q.shape[1], operands.k.shape[1])
    return dataclasses.replace(operands, dropout=numbers)


def reads_matrices(spec: AttentionSpec) -> bool:
    """Whether every tile reads an array over queries and keys."""
    return any(
        leaf.kind.is_matrix and leaf.near is None
        for term in Terms.of(spec)
        for leaf in leaves_of(term, Q)
    )


def rows_share_matrices(spec: AttentionSpec) -> bool:
    """Whether the rows of a batch read arrays over queries and keys that outgrow the L2 cache.

    Then all rows should come to a head before the next one does.
    """
    # As gradients: in float32, and with a band's row for each row of a tile.
    numbers = {
        Kind.MATRIX: spec.q_len * spec.kv_len,
        Kind.BAND: (spec.q_len + spec.kv_len) * BAND_ROWS,
    }
    shared = sum(
        4 * leaf.heads * numbers[leaf.kind]
        for term in Terms.of(spec)
        for leaf in leaves_of(term, Q)
        if leaf.kind.is_matrix and leaf.near is None and leaf.batch < spec.batch
    )
    return shared > L2_BYTES_PER_GROUP


def rows_differ_by_head(spec: AttentionSpec, rows: str) -> bool:
    """Whether `read_rows` gives query heads of one kv head different values."""
    return spec.group > 1 and any(
        leaf.heads > 1 and leaf.kind in (Kind.NUMBER, Kind.PER_ROW)
        for term in Terms.of(spec)
        for leaf in leaves_of(term, rows)
    )
