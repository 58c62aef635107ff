"""Elementwise functions (masks, score mods, their derivatives) in operations that a kernel has.

A function is traced to a program, and the program is written into the kernel operation by
operation: calls are opened, and what Mosaic GPU lacks is said in other words.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from pallas_flash.programs import called


def _floor(x: Any, **_: Any) -> Any:
    nearest = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.where(nearest > x, nearest - 1, nearest)


def _integer_pow(x: Any, *, y: int) -> Any:
    if y == 0:
        return jnp.ones_like(x)
    return 1 / lax.integer_pow(x, -y) if y < 0 else lax.integer_pow(x, y)


def _not(x: Any) -> Any:
    # Warpgroup semantics has no bitwise not of one bit.
    return x == False if x.dtype == jnp.bool_ else lax.bitwise_not(x)  # noqa: E712


def _select_n(which: Any, *cases: Any) -> Any:
    # Warpgroup semantics has no choice between matrices by one bool.
    return lax.select_n(jnp.broadcast_to(which, jnp.shape(cases[0])), *cases)


# What is said in other words.
_REWRITTEN: dict[str, Callable[..., Any]] = {
    "add_any": lambda x, y: x + y,
    "ceil": lambda x, **_: -_floor(-x),
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "floor": _floor,
    "integer_pow": _integer_pow,
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "not": _not,
    # Two operations for the three of (1 + x) (1 - x).
    "one_minus_square": lambda x, **_: 1 - x * x,
    "select_n": _select_n,
}
# What both lowerings of Mosaic GPU have, elementwise, from JAX 0.11.2 on.
_LOWERED = frozenset(
    name
    for names in (
        "abs add and bitcast_convert_type broadcast_in_dim clamp convert_element_type cos div eq",
        "exp exp2 ge gt le log log2 logistic lt max min mul ne neg one_minus_square or rem reshape",
        "round rsqrt shift_left shift_right_arithmetic shift_right_logical sign sin sqrt square",
        "squeeze sub tanh xor",
    )
    for name in names.split()
)


def written_out[T](function: Callable[..., T]) -> Callable[..., T]:
    """The same elementwise function of arrays, in operations that a kernel has."""

    def write(*args: Any, **keywords: Any) -> T:
        return jax.tree.map(_multiplied, _results(function, args, keywords), is_leaf=_is_scaled)

    return write


def written_out_scaled(function: Callable[..., Any]) -> Callable[..., tuple[Any, float]]:
    """The same of a function with one result, with a factor that it is still to be taken by."""
    return lambda *args, **keywords: tuple(_results(function, args, keywords))


class _Scaled(NamedTuple):
    """A value that is still to be multiplied with a number: with one for several in a row."""

    value: Any
    factor: float


def _is_scaled(x: Any) -> bool:
    return isinstance(x, _Scaled)


def _multiplied(x: _Scaled) -> Any:
    # A number and its inverse, each rounded, come to 1 when they are rounded together.
    is_one = x.factor == 1.0 or jnp.dtype(x.value.dtype).type(x.factor) == 1
    return x.value if is_one else x.value * x.factor


def _results(function: Callable[..., Any], args: Any, keywords: Any) -> Any:
    """The function's results, each `_Scaled`."""
    program, shape = jax.make_jaxpr(function, return_shape=True)(*args, **keywords)
    inputs = [_Scaled(x, 1.0) for x in jax.tree.leaves((args, keywords))]
    results = _write(program.jaxpr, program.consts, inputs)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _write(program: Any, consts: Any, args: list[_Scaled]) -> list[_Scaled]:
    values = dict(zip(program.invars, args, strict=True))
    values |= {v: _Scaled(x, 1.0) for v, x in zip(program.constvars, consts, strict=True)}

    def read(variable: Any) -> _Scaled:
        is_literal = isinstance(variable, core.Literal)
        return _Scaled(variable.val, 1.0) if is_literal else values[variable]

    for equation in program.eqns:
        inputs = [read(variable) for variable in equation.invars]
        inner = called(equation)
        if inner is not None:
            results = _write(*inner, inputs)
        elif (scaled := _scaled(equation, inputs)) is not None:
            results = [scaled]
        else:
            results = [_Scaled(x, 1.0) for x in _bound(equation, [_multiplied(x) for x in inputs])]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in program.outvars]


def _scaled(equation: Any, inputs: list[_Scaled]) -> _Scaled | None:
    """The product of float arrays, or None if it is not one or no factor comes with it.

    Of an array with a number known when it is traced, or of arrays that are still to be multiplied
    with one.
    """
    if equation.primitive.name not in ("mul", "div"):
        return None
    numbers = [_number(variable) for variable in equation.invars]
    if not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        return None
    if numbers == [None, None]:
        return _product(equation, *inputs)
    if equation.primitive.name == "div":
        array, number = inputs[0], numbers[1]
        number = None if not number else 1.0 / number
    else:
        array, number = (inputs[0], numbers[1]) if numbers[0] is None else (inputs[1], numbers[0])
    return None if number is None else array._replace(factor=array.factor * number)


def _product(equation: Any, a: _Scaled, b: _Scaled) -> _Scaled | None:
    """The product or quotient of two arrays with their factors, or None where both have 1."""
    if a.factor == b.factor == 1.0 or b.factor == 0.0:
        return None
    (value,) = _bound(equation, [a.value, b.value])
    is_quotient = equation.primitive.name == "div"
    return _Scaled(value, a.factor / b.factor if is_quotient else a.factor * b.factor)


def _number(variable: Any) -> float | None:
    """The value of a scalar literal, or None."""
    is_literal = isinstance(variable, core.Literal) and np.ndim(variable.val) == 0
    return float(variable.val) if is_literal else None


def _bound(equation: Any, inputs: list[Any]) -> list[Any]:
    """The results of one operation."""
    if rewrite := _REWRITTEN.get(equation.primitive.name):
        return [rewrite(*inputs, **equation.params)]
    results = equation.primitive.bind(*inputs, **equation.params)
    return results if equation.primitive.multiple_results else [results]


def missing_operations(function: Callable[..., Any], *args: Any) -> list[str]:
    """The names of the operations in a function that a kernel does not have."""

    def names(program: Any) -> Iterator[str]:
        for equation in program.eqns:
            inner = called(equation)
            if inner is not None:
                yield from names(inner[0])
            elif equation.primitive.name not in _LOWERED | _REWRITTEN.keys():
                yield equation.primitive.name

    return sorted(set(names(jax.make_jaxpr(function)(*args).jaxpr)))
