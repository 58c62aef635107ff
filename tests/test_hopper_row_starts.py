"""What S and dP of the backward begin as: float32 numbers as sums of bfloat16 ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash.backends.hopper import row_starts

pytestmark = pytest.mark.quick


def added(columns, which):
    """What the step of the product adds for each query: the same for each of 64 keys."""
    left = np.asarray(row_starts.selectors()[which], np.float32)
    columns = jnp.pad(columns, ((0, 0), (0, left.shape[1] - columns.shape[1])))
    sums = left @ np.asarray(columns, np.float32).T
    assert (sums == sums[:1]).all()
    return sums[0]


def test_parts_add_up_to_every_bit():
    rng = np.random.default_rng(0)
    s, dp = rng.normal(size=(2, 1000)) * 10.0 ** rng.integers(-20, 20, (2, 1000))
    s, dp = s.astype(np.float32), dp.astype(np.float32)
    columns = row_starts.columns_of(jnp.asarray(s), jnp.asarray(dp))
    assert columns.shape == (1000, 8)
    np.testing.assert_array_equal(added(columns, row_starts.S), s)
    np.testing.assert_array_equal(added(columns, row_starts.DP), dp)


@pytest.mark.parametrize("which", [row_starts.S, row_starts.DP])
def test_one_may_begin_as_zero(which):
    starts = [None, None]
    starts[which] = jnp.asarray([3.7, -1e-3])
    columns = row_starts.columns_of(*starts)
    assert (added(columns, which) == np.float32([3.7, -1e-3])).all()
    assert (added(columns, 1 - which) == 0).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_infinity_of_one_leaves_the_other_alone(sign):
    columns = row_starts.columns_of(jnp.asarray([sign * jnp.inf]), jnp.asarray([2.5]))
    assert added(columns, row_starts.S) * sign > 3e38
    assert added(columns, row_starts.DP) == 2.5
