"""ScoreMod: an elementwise change of the scaled scores, before the mask and the softmax."""

from typing import Any

from pallas_flash.terms import subterm, term


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

    def bind(self, q_len, kv_len):
        for mod in self.mods:
            if not isinstance(mod, ScoreMod):
                raise TypeError(f"every part of a Chain must be a ScoreMod, got {mod!r}")
        return Chain(tuple(mod.bind(q_len, kv_len) for mod in self.mods))
