"""ChunkedCausal: causal attention that starts anew with every chunk of positions."""

from pallas_flash.masks.mask import Mask, Range, kind_of
from pallas_flash.terms import term


@term
class ChunkedCausal(Mask):
    """Allowed where ``kv_pos <= q_pos`` and ``kv_pos // chunk == q_pos // chunk``.

    Args:
      chunk: number of positions of a chunk, at least 1.

    Raises:
      TypeError, ValueError: if `chunk` is not an integer, or below 1.
    """

    chunk: int

    def __post_init__(self):
        if not isinstance(self.chunk, int):
            raise TypeError(f"chunk={self.chunk!r} must be an integer")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1")

    def _start(self, pos):
        # The remainder is of one position per row: no division for each score.
        return pos - pos % self.chunk

    def allowed(self, q_pos, kv_pos):
        return (kv_pos <= q_pos) & (kv_pos >= self._start(q_pos))

    def kv_range(self, q_pos):
        return Range(self._start(q_pos), q_pos + 1)

    def q_range(self, kv_pos):
        return Range(kv_pos, self._start(kv_pos) + self.chunk)

    def block_kind(self, q_lo, q_hi, kv_lo, kv_hi):
        # Query i sees start(i)..i. Together the queries of a block see start(q_lo)..q_hi without
        # a gap, and what each of them sees is start(q_hi)..q_lo.
        return kind_of(
            (kv_lo <= q_hi) & (kv_hi >= self._start(q_lo)),
            (kv_hi <= q_lo) & (kv_lo >= self._start(q_hi)),
        )
