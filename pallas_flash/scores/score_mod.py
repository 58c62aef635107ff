"""ScoreMod: an elementwise change of the scaled scores, before the mask and the softmax."""

import math
from typing import Any

from pallas_flash.terms import subterm, term

# Where a score lies by its distance ``kv_pos - q_pos``: within `ScoreMod.near`, or on a side of it.
NEAR, BEFORE, AFTER = "near", "before", "after"


class ScoreMod:
    """``score -> score``, elementwise; its arrays get true gradients in their own shape.

    A subclass is decorated with `term`, declares its arrays with `operand` and defines `apply`.
    """

    def apply(self, s: Any, q_pos: Any, kv_pos: Any) -> Any:
        """The new scores, from scaled scores and int32 positions (from 0), elementwise."""
        raise NotImplementedError(f"{type(self).__name__} must define apply(s, q_pos, kv_pos)")

    @property
    def bound(self) -> float | None:
        """What the new scores' absolute values never exceed, where that is known."""
        return None

    @property
    def lipschitz(self) -> float | None:
        """What its derivative's absolute value never exceeds, where that is known."""
        return None

    @property
    def near(self) -> tuple[int, int] | None:
        """Two distances, from the first of which down and from the second up it is simpler."""
        return None

    @property
    def addend(self) -> Any:
        """An array, broadcastable to [B, Hq, Tq, Tkv], if to add it is all that `apply` does."""
        return None

    def at(self, where: str) -> "ScoreMod":
        """What it is `NEAR`, `BEFORE` or `AFTER`; of its arrays no others than it needs there."""
        return self

    def bind(self, q_len: int, kv_len: int) -> "ScoreMod":
        """The same mod, told once how long the two sequences are."""
        return self


@term
class Chain(ScoreMod):
    """Several score mods, applied from left to right.

    Raises:
      TypeError: if a part is not a ScoreMod.
    """

    mods: tuple[ScoreMod, ...] = subterm()

    def apply(self, s, q_pos, kv_pos):
        for mod in self.mods:
            s = mod.apply(s, q_pos, kv_pos)
        return s

    @property
    def bound(self):
        return self.mods[-1].bound if self.mods else None

    @property
    def lipschitz(self):
        factors = [mod.lipschitz for mod in self.mods]
        return None if None in factors else math.prod(factors)

    @property
    def addend(self):
        if type(self) is not Chain:
            # A subclass may do more.
            return None
        addends = [mod.addend for mod in self.mods]
        return None if not addends or any(x is None for x in addends) else sum(addends)

    @property
    def near(self):
        found = [mod.near for mod in self.mods if mod.near is not None]
        return (min(x for x, _ in found), max(x for _, x in found)) if found else None

    def at(self, where):
        return Chain(tuple(mod.at(where) for mod in self.mods))

    def bind(self, q_len, kv_len):
        for mod in self.mods:
            if not isinstance(mod, ScoreMod):
                raise TypeError(f"every part of a Chain must be a ScoreMod, got {mod!r}")
        return Chain(tuple(mod.bind(q_len, kv_len) for mod in self.mods))
