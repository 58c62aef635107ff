"""vmap and sharding for functions of arrays with named axes."""

from collections.abc import Collection, Sequence

from pallas_flash.parallel.batching import ArrayFunction, Axes, foldable
from pallas_flash.parallel.sharding import align, partitioned, vary_together

__all__ = ["align", "distributed", "foldable", "partitioned", "vary_together"]


def distributed(
    fn: ArrayFunction,
    axes_in: Sequence[Axes],
    axes_out: Sequence[Axes],
    *,
    shared: Collection[int] = (),
) -> ArrayFunction:
    """Returns `fn` that folds under vmap (`foldable`) and stays local if split (`partitioned`)."""
    return foldable(fn, axes_in, axes_out, shared=shared, wrap=partitioned)
