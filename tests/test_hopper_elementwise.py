"""Elementwise functions as they are written into a kernel: the same values, in few operations."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_flash as pf
from pallas_flash.backends.hopper.elementwise import written_out, written_out_scaled
from pallas_flash.backends.hopper.scores import with_weights

pytestmark = pytest.mark.quick

X = np.linspace(-3, 3, 41, dtype=np.float32)
FUNCTIONS = {
    "softcap": lambda x: 5.0 * jnp.tanh(x / 5.0),
    "product-of-scaled": lambda x: (3.0 * jnp.sin(x)) * (jnp.cos(x) / 7.0),
    "quotient-of-scaled": lambda x: (3.0 * x) / (4.0 * (x * x + 1.0)),
    "scaled-by-zero": lambda x: x * (0.0 * jnp.exp(x)),
    "quotient-by-negative": lambda x: x / (-2.0 * jnp.exp(x)),
    "silu": jax.nn.silu,
    "uses-a-scaled-value-twice": lambda x: (2.0 * x) * (2.0 * x) + 2.0 * x,
    "integers": lambda x: (x.astype(jnp.int32) * 3 * x.astype(jnp.int32)).astype(x.dtype),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_derivatives_are_the_functions(name):
    function = FUNCTIONS[name]
    np.testing.assert_allclose(written_out(function)(X), function(X), rtol=1e-6, atol=1e-6)
    value, factor = written_out_scaled(function)(X)
    np.testing.assert_allclose(value * factor, function(X), rtol=1e-6, atol=1e-6)
    derivative = jax.vmap(jax.grad(lambda x: function(x)))
    np.testing.assert_allclose(written_out(derivative)(X), derivative(X), rtol=1e-5, atol=1e-6)


def test_numbers_of_a_derivative_become_one():
    """Softcap's P and weight: a product before tanh, one behind it, a square, and P times it."""

    def weights(s):
        mod = pf.Softcap(50.0)
        return with_weights(mod, s * 0.125, None, None, lambda x: jnp.exp2(x * 1.4427))

    program = jax.make_jaxpr(written_out(weights))(X).jaxpr
    counts = collections.Counter(equation.primitive.name for equation in program.eqns)
    assert counts == {"mul": 4, "tanh": 1, "exp2": 1, "sub": 1}
