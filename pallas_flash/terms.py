"""Terms: masks and score modifications as pytrees whose arrays carry named axes.

Everything that varies between attention variants is an elementwise function of a query position
and a key position. What such a function reads besides the positions (lengths, slopes, a bias, a
dense mask) are arrays, and each array says which of the four axes of the scores it spans:

    lengths: Array = operand("batch", dtype=jnp.integer)
    bias: Array = operand("batch", "heads", "q", "kv", dtype=jnp.floating)

An array may also span the distances ``kv_pos - q_pos`` (axis "distance", first entry for
``1 - q_len``): T + S - 1 numbers that every tile reads a slice of.

From these names alone a backend cuts the part that belongs to a tile, ``vmap`` folds its axis into
the batch, a sharding is derived and a gradient is added up in the array's own shape. The function
itself receives every array already *aligned*: cut to the tile and shaped to broadcast against the
tile's scores. It never indexes.

Every array spans "batch" first. A size is 1 (broadcast, never expanded) or the full size; the batch
size of an operand may be any divisor ``b`` of the batch ``B``, batch row ``i`` reading operand row
``i // (B // b)``.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import lax

BATCH, HEADS, Q, KV = "batch", "heads", "q", "kv"
SCORE_AXES = (BATCH, HEADS, Q, KV)
# Of ``kv_pos - q_pos``, in place of both: entry 0 is for the distance ``1 - q_len``.
DISTANCE = "distance"
DISTANCE_AXES = (BATCH, HEADS, DISTANCE)

Axes = tuple[str, ...]
T = TypeVar("T")


def operand(*axes: str, dtype: Any, default: Any = dataclasses.MISSING) -> Any:
    """Field of a term that holds an array over `axes`, or a tuple of arrays over them.

    `axes` is a subsequence of the scores' axes, or ends in "distance". `dtype` is the kind of
    number the array must hold, e.g. ``jnp.integer``; None for any kind.
    """
    if axes[:1] != (BATCH,) or not any(
        tuple(a for a in known if a in axes) == axes for known in (SCORE_AXES, DISTANCE_AXES)
    ):
        raise ValueError(
            f"operand axes {axes} must start with 'batch' and keep {SCORE_AXES} or {DISTANCE_AXES}"
        )
    return dataclasses.field(default=default, metadata={"axes": axes, "dtype": dtype})


def subterm() -> Any:
    """Field of a term that holds another term, or a tuple of terms."""
    return dataclasses.field(metadata={"subterm": True})


def parameter() -> Any:
    """Field of a term that holds an array from which its ``bind`` makes operands."""
    return dataclasses.field(metadata={"parameter": True})


@dataclass_transform(frozen_default=True, field_specifiers=(operand, subterm, parameter))
def term[T](cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and a pytree.

    Operands, parameters and subterms are its children.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    data = tuple(f.name for f in fields if f.metadata)
    static = tuple(f.name for f in fields if not f.metadata)

    def flatten(x: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(x, n) for n in data), tuple(getattr(x, n) for n in static)

    def flatten_with_keys(x: T) -> tuple[Any, tuple[Any, ...]]:
        children, rest = flatten(x)
        keys = map(jax.tree_util.GetAttrKey, data)
        return tuple(zip(keys, children, strict=True)), rest

    def unflatten(rest: tuple[Any, ...], children: Any) -> T:
        # Not by the constructor: it may check, and may take its arguments in another form.
        x = object.__new__(cls)
        for name, value in zip((*data, *static), (*children, *rest), strict=True):
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def parts(tree: Any) -> Iterator[Any]:
    """All terms that a term is made of, itself first."""
    if isinstance(tree, tuple):
        for part in tree:
            yield from parts(part)
    elif tree is not None:
        yield tree
        for field in dataclasses.fields(tree):
            if "subterm" in field.metadata:
                yield from parts(getattr(tree, field.name))


class OperandField(NamedTuple):
    """What a term declares of one of its arrays."""

    name: str
    axes: Axes
    dtype: Any


def leaf_fields(tree: Any) -> list[OperandField]:
    """The declaration of every array in a term, in the order of ``jax.tree.leaves``."""
    if tree is None:
        return []
    if isinstance(tree, tuple):
        return [field for part in tree for field in leaf_fields(part)]
    if not dataclasses.is_dataclass(tree):
        raise TypeError(f"expected a mask or a score mod, got {type(tree).__name__}")
    found: list[OperandField] = []
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if "subterm" in field.metadata:
            found += leaf_fields(value)
        elif "axes" in field.metadata and value is not None:
            name = f"{type(tree).__name__}.{field.name}"
            names = [name]
            if isinstance(value, tuple):
                names = [f"{name}[{i}]" for i in range(len(value))]
            found += [OperandField(name, **field.metadata) for name in names]
    return found


def canonical[T](tree: T, sizes: dict[str, int]) -> T:
    """The term with every array at its full rank, shapes and dtypes checked against the rule.

    Raises:
      ValueError: if an array has another kind of dtype, or does not broadcast to its axes' sizes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    checked = []
    for array, field in zip(leaves, leaf_fields(tree), strict=True):
        array = jnp.asarray(array)
        if field.dtype is not None and not jnp.issubdtype(array.dtype, field.dtype):
            raise ValueError(
                f"{field.name}: dtype={array.dtype} must be {_DTYPE_NAMES[field.dtype]}"
            )
        full = tuple(sizes[axis] for axis in field.axes)
        shape = (1,) * (len(full) - array.ndim) + array.shape
        fits = len(shape) == len(full)
        if not fits or any(n not in (1, f) for n, f in zip(shape, full, strict=True)):
            raise ValueError(
                f"{field.name}: shape={array.shape} must broadcast to "
                f"[{', '.join(field.axes)}] = {list(full)}"
            )
        checked.append(array.reshape(shape))
    return jax.tree.unflatten(treedef, checked)


_DTYPE_NAMES = {
    jnp.bool_: "bool; an additive mask is a Bias",
    jnp.integer: "an integer dtype",
    jnp.floating: "floating point; a mask is a DenseMask",
}


def leaf_axes(tree: Any) -> list[Axes]:
    """The axes of every array in a term, in the order of ``jax.tree.leaves``."""
    return [field.axes for field in leaf_fields(tree)]


def map_operands[T](f: Callable[[Any, Axes], Any], tree: T) -> T:
    """The term with every array replaced by ``f(array, axes)``."""
    leaves, treedef = jax.tree.flatten(tree)
    new = [f(x, axes) for x, axes in zip(leaves, leaf_axes(tree), strict=True)]
    return jax.tree.unflatten(treedef, new)


def floating(tree: Any) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The floating point arrays of a term, those with a gradient, and how to put others in."""
    leaves, treedef = jax.tree.flatten(tree)
    index = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def rebuild(arrays: list[jax.Array]) -> Any:
        new = list(leaves)
        for i, x in zip(index, arrays, strict=True):
            new[i] = x
        return jax.tree.unflatten(treedef, new)

    return [leaves[i] for i in index], rebuild


def floating_axes(tree: Any) -> list[Axes]:
    """The axes of the arrays that `floating` finds."""
    pairs = zip(jax.tree.leaves(tree), leaf_axes(tree), strict=True)
    return [axes for x, axes in pairs if jnp.issubdtype(x.dtype, jnp.floating)]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where a tile of scores lies: first position and number of positions along both axes.

    q_len: the number of queries of the whole problem, from which distances are counted.
    """

    batch: int
    q_start: Any
    q_size: int
    kv_start: Any
    kv_size: int
    q_len: int

    def _starts(self, shape: tuple[int, ...], axes: Axes) -> list[Any]:
        distance = self.kv_start - self.q_start + self.q_len - self.q_size
        start = {Q: self.q_start, KV: self.kv_start, DISTANCE: distance}
        starts = [0 if n == 1 else start.get(axis, 0) for n, axis in zip(shape, axes, strict=True)]
        return [jnp.asarray(x, jnp.int32) for x in starts]

    def _sizes(self, shape: tuple[int, ...], axes: Axes) -> list[int]:
        full = {Q: self.q_size, KV: self.kv_size, DISTANCE: self.q_size + self.kv_size - 1}
        return [n if n == 1 else full.get(axis, n) for n, axis in zip(shape, axes, strict=True)]

    def cut(self, array: jax.Array, axes: Axes) -> jax.Array:
        """The part of `array` that belongs to the tile; whole along axes that tiles do not cut."""
        starts, sizes = self._starts(array.shape, axes), self._sizes(array.shape, axes)
        return lax.dynamic_slice(array, starts, sizes)

    def align(self, array: jax.Array, axes: Axes) -> jax.Array:
        """Cuts `array` to the tile and shapes it to broadcast against [B, Hq, q_size, kv_size]."""
        cut = self.cut(array, axes)
        by_axis = dict(zip(axes, cut.shape, strict=True))
        if by_axis.get(DISTANCE, 1) > 1:
            cut = spread_distances(cut, self.q_size, self.kv_size)
            by_axis |= {Q: self.q_size, KV: self.kv_size}
        cut = cut.reshape([by_axis.get(axis, 1) for axis in SCORE_AXES])
        rows = cut.shape[0]
        return cut if rows in (1, self.batch) else jnp.repeat(cut, self.batch // rows, axis=0)

    def add(self, total: jax.Array, axes: Axes, part: jax.Array) -> jax.Array:
        """Adds `part` to its place in `total`: the transpose of `align`, and of `cut`."""
        rows = total.shape[axes.index(BATCH)]
        if part.shape[0] != rows:
            part = part.reshape(rows, -1, *part.shape[1:]).sum(1)
        sizes = self._sizes(total.shape, axes)
        if DISTANCE in axes and sizes[axes.index(DISTANCE)] > 1:
            part = sum_distances(part)
        part = part.reshape(sizes)
        starts = self._starts(total.shape, axes)
        old = lax.dynamic_slice(total, starts, part.shape)
        return lax.dynamic_update_slice(total, old + part, starts)

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Query positions [1, 1, q_size, 1] and key positions [1, 1, 1, kv_size], int32."""
        q = lax.broadcasted_iota(jnp.int32, (1, 1, self.q_size, 1), 2)
        kv = lax.broadcasted_iota(jnp.int32, (1, 1, 1, self.kv_size), 3)
        return q + jnp.asarray(self.q_start, jnp.int32), kv + jnp.asarray(self.kv_start, jnp.int32)


def spread_distances(x: jax.Array, q_size: int, kv_size: int) -> jax.Array:
    """``y[..., i, j] = x[..., j - i + q_size - 1]``: [..., q + kv - 1] to [..., q, kv].

    Copies of ``x`` and one more entry, read in rows that are one entry shorter: no gather.
    """
    *outer, count = x.shape
    x = jnp.concatenate([x, x[..., :1]], -1)
    x = jnp.broadcast_to(x[..., None, :], (*outer, q_size, count + 1)).reshape(*outer, -1)
    return x[..., : q_size * count].reshape(*outer, q_size, count)[..., q_size - 1 :]


def sum_distances(y: jax.Array) -> jax.Array:
    """The transpose of `spread_distances`: [..., q, kv] to [..., q + kv - 1]."""
    *outer, q_size, kv_size = y.shape
    none = [(0, 0)] * len(outer)
    y = jnp.pad(y, [*none, (0, 0), (q_size - 1, 0)]).reshape(*outer, -1)
    y = jnp.pad(y, [*none, (0, q_size)]).reshape(*outer, q_size, q_size + kv_size)
    return y.sum(-2)[..., :-1]
