"""How much error is allowed, judged against the float64 oracle.

Exact dtypes must agree to rounding. A low-precision result may err at most twice (gradients: three
times) as much as plain attention computed in that precision, and 1.1 times in the mean, plus the
dtype's rounding.
"""

import jax.numpy as jnp
import numpy as np


def assert_close_to_oracle(ours, oracle, name: str, rtol: float = 2e-5) -> None:
    """float32 (or float64, with its own rtol) against the oracle, relative to its largest value."""
    ours, oracle = np.asarray(ours, np.float64), np.asarray(oracle, np.float64)
    assert ours.shape == oracle.shape, (name, ours.shape, oracle.shape)
    infinite = np.isinf(oracle)
    np.testing.assert_array_equal(ours[infinite], oracle[infinite], err_msg=name)
    ours, oracle = ours[~infinite], oracle[~infinite]
    error = np.abs(ours - oracle).max(initial=0.0)
    limit = rtol * max(1.0, np.abs(oracle).max(initial=0.0))
    assert error <= limit, f"{name}: error {error:.3g} above {limit:.3g}"


def assert_as_good_as_plain(
    ours, plain, oracle, name: str, factor: float, mean_factor: float = 1.1, roundings: int = 1
) -> None:
    """A low-precision result against what plain attention in that precision makes of it."""
    dtype = ours.dtype
    ours, plain, oracle = (np.asarray(x).astype(np.float64) for x in (ours, plain, oracle))
    assert np.isfinite(ours).all(), f"{name}: not finite"
    rounding = roundings * float(jnp.finfo(dtype).eps) * np.abs(oracle).max()
    ours, plain = np.abs(ours - oracle), np.abs(plain - oracle)
    assert ours.max() <= factor * plain.max() + rounding, (name, ours.max(), plain.max(), rounding)
    mean_limit = mean_factor * plain.mean() + 0.05 * rounding
    assert ours.mean() <= mean_limit, (name, ours.mean(), plain.mean())
