"""RelativeBias: T5's learned bias, one number for each head and bucket of distances."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.scores.distance_bias import FlatEndedBias
from pallas_flash.scores.score_mod import ScoreMod
from pallas_flash.terms import parameter, term


@term
class RelativeBias(ScoreMod):
    """``s + table[h, bucket(kv_pos - q_pos)]``.

    Near distances have a bucket each; from half of a side's buckets on they grow by powers, up to
    `max_distance`, from which all share the last one.

    Args:
      table: [Hq or 1, buckets] floating point; gets its gradient, summed in float32. (Flax's T5
        keeps the table of an embedding as [buckets, Hq]: transpose it.)
      bidirectional: half of the buckets for later keys, as in an encoder. Else later keys all have
        the bucket of distance 0, as in a decoder under a causal mask.
      max_distance: from here on the last bucket.
      offset: by how much every query stands later than its number.

    Raises:
      ValueError: if `table` is not such an array, has too few buckets, or `max_distance` is not
        beyond the distances that have a bucket each.

    Source: T5 (Raffel et al. 2020, arXiv:1910.10683), section 2.1.
    """

    table: jax.Array = parameter()
    bidirectional: bool = True
    max_distance: int = 128
    offset: int = 0

    def bind(self, q_len, kv_len):
        table = jnp.asarray(self.table)
        if table.ndim != 2 or not jnp.issubdtype(table.dtype, jnp.floating):
            raise ValueError(
                f"RelativeBias.table must be floating point [heads, buckets], got "
                f"{table.dtype}{list(table.shape)}"
            )
        # Every distance once, outside of the kernels: what they return is a gradient for each
        # distance, and the sum below adds these up, in float32 at least.
        far = self._far(table.shape[1])
        near = self.offset - int(far[-1]), self.offset + int(far[-1] if self.bidirectional else 0)
        wide = table.astype(jnp.promote_types(table.dtype, jnp.float32))

        def numbers(distances):
            bucket = self._bucket(np.asarray(distances) - self.offset, far, table.shape[1])
            # A sum forward and backward: XLA's scatter takes longer, and adds in any order.
            is_it = jnp.asarray(bucket, jnp.int32) == jnp.arange(table.shape[1])[:, None]
            return jnp.where(is_it, wide[:, :, None], 0).sum(1)[None]

        before, after = (numbers([x])[..., 0] for x in near)
        return FlatEndedBias(numbers(np.arange(1 - q_len, kv_len)), before, after, near)

    def _far(self, num_buckets: int) -> np.ndarray:
        """The first distance of every bucket for several, and the first of the last one."""
        per_side = num_buckets // 2 if self.bidirectional else num_buckets
        near = per_side // 2
        if near < 1:
            raise ValueError(
                f"RelativeBias.table has {num_buckets} buckets, it must have at least "
                f"{4 if self.bidirectional else 2}"
            )
        if self.max_distance <= near:
            raise ValueError(f"max_distance={self.max_distance} must be above {near}")
        count = per_side - near
        growth = math.log(self.max_distance / near) / count
        # The first distance of each bucket from `near` on; the slack keeps exact powers exact.
        starts = [math.ceil(near * math.exp(growth * i) - 1e-6) for i in range(1, count)]
        return np.array([near, *starts], np.int32)

    def _bucket(self, distances: np.ndarray, far: np.ndarray, num_buckets: int) -> np.ndarray:
        """The bucket [n] of distances ``kv_pos - q_pos`` [n]; far: of `_far`."""
        per_side = num_buckets // 2 if self.bidirectional else num_buckets
        near = per_side // 2
        away = np.abs(distances) if self.bidirectional else np.maximum(-distances, 0)
        beyond = np.searchsorted(far, away, side="right")
        bucket = np.where(away < near, away, near - 1 + beyond)
        return bucket + per_side * (distances > 0) if self.bidirectional else bucket
