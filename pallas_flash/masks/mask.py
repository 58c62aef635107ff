"""Mask: who may attend to whom, told elementwise and for whole blocks."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.terms import subterm, term


class BlockKind(enum.IntEnum):
    """What a mask does to a block of scores. PARTIAL is always a safe answer."""

    SKIP = 0
    PARTIAL = 1
    FULL = 2


class Bounds(NamedTuple):
    """The lowest and the highest of an array's numbers in each block, shaped like the blocks."""

    lo: Any
    hi: Any


class Range(NamedTuple):
    """The positions first <= pos < end; None where nothing bounds that side.

    A bound is one number, or one for each position that was asked about.
    """

    first: Any = None
    end: Any = None


# Bounds before and behind all positions: an end of BEFORE_ALL leaves nothing.
BEFORE_ALL, BEHIND_ALL = -(2**30), 2**30


class Mask:
    """A condition on (query position, key position); combine with ``&``, ``|`` and ``~``.

    A subclass is decorated with `term`, declares its arrays with `operand` and defines `allowed`;
    `block_kind` lets kernels skip blocks and drop the mask's arithmetic.
    """

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        """Whether a query may attend to a key, elementwise over int32 positions (from 0)."""
        raise NotImplementedError(f"{type(self).__name__} must define allowed(q_pos, kv_pos)")

    def block_kind(self, q_lo: Any, q_hi: Any, kv_lo: Any, kv_hi: Any) -> Any:
        """The `BlockKind` of blocks that span q_lo..q_hi and kv_lo..kv_hi, bounds inclusive.

        Arrays without positions are as in `allowed`. Integers that span the queries or the keys
        are the `Bounds` of each block here. Other arrays are None.
        """
        return (q_lo + kv_lo) * 0 + BlockKind.PARTIAL

    def kv_range(self, q_pos: Any) -> Range | None:
        """The keys that each query may attend to if they are always one `Range`, else None.

        Elementwise like `allowed`; of the mask's arrays those along keys are None here. A bound
        that is the same for all queries is one number, not made of `q_pos`, of which kernels could
        make nothing.
        """
        return None

    def q_range(self, kv_pos: Any) -> Range | None:
        """The queries that may attend to each key if they are always one `Range`, else None."""
        return None

    def bind(self, q_len: int, kv_len: int) -> "Mask":
        """The same mask, told once how long the two sequences are."""
        return self

    def show(self, q_len: int, kv_len: int, **options: Any) -> str:
        """A picture of the mask as text, by element or by block: `masks.picture.show`."""
        from pallas_flash.masks import picture

        return picture.show(self, q_len, kv_len, **options)

    def plot(self, q_len: int, kv_len: int, **options: Any) -> Any:
        """The same picture by matplotlib: `masks.picture.plot`."""
        from pallas_flash.masks import picture

        return picture.plot(self, q_len, kv_len, **options)

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            f"{type(self).__name__} has no truth value: combine masks with &, | and ~, "
            "not with 'and', 'or' and 'not'"
        )


def conjuncts(mask: Mask | None) -> list[Mask]:
    """The masks that ``&`` joins to this one."""
    if isinstance(mask, And):
        return conjuncts(mask.left) + conjuncts(mask.right)
    return [] if mask is None else [mask]


def kind_of(any_allowed: Any, all_allowed: Any) -> Any:
    """`BlockKind` from two conditions on a block; `all_allowed` must imply `any_allowed`."""
    return any_allowed.astype(np.int32) + all_allowed.astype(np.int32)


def _min(a: Any, b: Any) -> Any:
    # numpy for masks without arrays: their schedule is known when the program is traced.
    return (jnp if isinstance(a + b, jax.Array) else np).minimum(a, b)


@term
class And(Mask):
    """Allowed where both masks allow."""

    left: Mask = subterm()
    right: Mask = subterm()

    def allowed(self, q_pos, kv_pos):
        return self.left.allowed(q_pos, kv_pos) & self.right.allowed(q_pos, kv_pos)

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        bounds = (q_lo, q_hi, kv_lo, kv_hi)
        return _min(self.left.block_kind(*bounds), self.right.block_kind(*bounds))

    def bind(self, q_len, kv_len):
        return And(self.left.bind(q_len, kv_len), self.right.bind(q_len, kv_len))


@term
class Or(Mask):
    """Allowed where either mask allows."""

    left: Mask = subterm()
    right: Mask = subterm()

    def allowed(self, q_pos, kv_pos):
        return self.left.allowed(q_pos, kv_pos) | self.right.allowed(q_pos, kv_pos)

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        bounds = (q_lo, q_hi, kv_lo, kv_hi)
        return -_min(-self.left.block_kind(*bounds), -self.right.block_kind(*bounds))

    def bind(self, q_len, kv_len):
        return Or(self.left.bind(q_len, kv_len), self.right.bind(q_len, kv_len))


@term
class Not(Mask):
    """Allowed where the mask forbids."""

    mask: Mask = subterm()

    def allowed(self, q_pos, kv_pos):
        # Not `~`: Mosaic GPU's warpgroup lowering has no bitwise not of a one-bit type.
        return self.mask.allowed(q_pos, kv_pos) == False  # noqa: E712

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        return BlockKind.FULL - self.mask.block_kind(q_lo, q_hi, kv_lo, kv_hi)

    def bind(self, q_len, kv_len):
        return Not(self.mask.bind(q_len, kv_len))
