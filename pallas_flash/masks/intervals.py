"""What a function of positions may give in whole blocks: its program, run on intervals.

An integer is known by its lowest and highest value in a block, a bool by whether it is always and
whether it is ever True. What is not understood is not known, and whatever is made of it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from pallas_flash.programs import called

INT32 = np.iinfo(np.int32)


class Interval(NamedTuple):
    """Bounds, inclusive, that broadcast over blocks: int64, or bool."""

    lo: Any
    hi: Any

    @property
    def is_bool(self) -> bool:
        return np.asarray(self.lo).dtype == np.bool_

    @property
    def is_one(self) -> Any:
        return self.lo == self.hi


def bounds(function: Callable[..., Any], *args: Interval) -> Interval | None:
    """Bounds of an elementwise function of int32 arrays, or None if they are not known."""
    shape = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    program = jax.make_jaxpr(function)(*[shape] * len(args))
    (result,) = _run(program.jaxpr, program.consts, args)
    return result


def _run(program: Any, consts: Any, args: Sequence[Interval | None]) -> list[Interval | None]:
    known = dict(zip(program.invars, args, strict=True))
    known |= dict(zip(program.constvars, map(_constant, consts), strict=True))

    def read(variable: Any) -> Interval | None:
        is_literal = isinstance(variable, core.Literal)
        return _constant(variable.val) if is_literal else known[variable]

    for equation in program.eqns:
        inputs = [read(variable) for variable in equation.invars]
        inner = called(equation)
        if inner is not None:
            results = _run(*inner, inputs)
        else:
            results = [_apply(equation, inputs)] * len(equation.outvars)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in program.outvars]


def _constant(x: Any) -> Interval | None:
    x = np.asarray(x)
    if x.ndim or not (x.dtype == np.bool_ or np.issubdtype(x.dtype, np.integer)):
        return None
    x = x if x.dtype == np.bool_ else x.astype(np.int64)
    return Interval(x, x)


def _apply(equation: Any, inputs: list[Interval | None]) -> Interval | None:
    dtype = equation.outvars[0].aval.dtype
    rule = _RULES.get(equation.primitive.name)
    if equation.primitive.name == "convert_element_type":
        rule = partial(_convert, to_bool=dtype == np.bool_)
    if rule is None or any(x is None for x in inputs) or dtype not in (np.int32, np.bool_):
        return None
    found = rule(*inputs)
    if found is None or found.is_bool != (dtype == np.bool_):
        return None
    if not found.is_bool and (np.min(found.lo) < INT32.min or np.max(found.hi) > INT32.max):
        # It would wrap around.
        return None
    return found


def _mul(x: Interval, y: Interval) -> Interval:
    corners = np.stack(np.broadcast_arrays(*(a * b for a in x for b in y)))
    return Interval(corners.min(0), corners.max(0))


def _number(x: Interval) -> int | None:
    """The value of a positive constant, or None."""
    return int(x.lo) if np.ndim(x.lo) == 0 and x.lo == x.hi and x.lo > 0 else None


def _truncated(x: Any, n: int) -> Any:
    return np.sign(x) * (np.abs(x) // n)


def _div(x: Interval, y: Interval) -> Interval | None:
    n = _number(y)
    return None if n is None else Interval(_truncated(x.lo, n), _truncated(x.hi, n))


def _rem(x: Interval, y: Interval) -> Interval | None:
    n = _number(y)
    if n is None:
        return None
    low, high = (a - n * _truncated(a, n) for a in x)
    is_one_period = (_truncated(x.lo, n) == _truncated(x.hi, n)) & ((x.lo >= 0) | (x.hi <= 0))
    lowest, highest = np.where(x.lo < 0, 1 - n, 0), np.where(x.hi > 0, n - 1, 0)
    return Interval(np.where(is_one_period, low, lowest), np.where(is_one_period, high, highest))


def _eq(x: Interval, y: Interval) -> Interval:
    return Interval(x.is_one & y.is_one & (x.lo == y.lo), (x.lo <= y.hi) & (y.lo <= x.hi))


def _not(x: Interval) -> Interval | None:
    return Interval(~x.hi, ~x.lo) if x.is_bool else None


def _select(which: Interval, *cases: Interval) -> Interval | None:
    if not which.is_bool or len(cases) != 2:
        return None
    no, yes = cases
    either = np.minimum(no.lo, yes.lo), np.maximum(no.hi, yes.hi)
    picked = zip(no, yes, either, strict=True)
    return Interval(*(np.where(which.lo, y, np.where(which.hi, e, n)) for n, y, e in picked))


def _convert(x: Interval, to_bool: bool) -> Interval | None:
    if x.is_bool == to_bool:
        return x
    if to_bool:
        zero = np.int64(0)
        return _not(_eq(x, Interval(zero, zero)))
    return Interval(np.asarray(x.lo, np.int64), np.asarray(x.hi, np.int64))


def _of_bools(operation: Callable[[Any, Any], Any]) -> Callable[..., Interval | None]:
    """A rule for an operation on bools that never falls when one of them rises."""

    def rule(x: Interval, y: Interval) -> Interval | None:
        return Interval(operation(x.lo, y.lo), operation(x.hi, y.hi)) if x.is_bool else None

    return rule


_RULES: dict[str, Callable[..., Interval | None]] = {
    "add": lambda x, y: Interval(x.lo + y.lo, x.hi + y.hi),
    "sub": lambda x, y: Interval(x.lo - y.hi, x.hi - y.lo),
    "mul": _mul,
    "neg": lambda x: Interval(-x.hi, -x.lo),
    "max": lambda x, y: Interval(np.maximum(x.lo, y.lo), np.maximum(x.hi, y.hi)),
    "min": lambda x, y: Interval(np.minimum(x.lo, y.lo), np.minimum(x.hi, y.hi)),
    "abs": lambda x: Interval(
        np.maximum(0, np.maximum(x.lo, -x.hi)), np.maximum(np.abs(x.lo), np.abs(x.hi))
    ),
    "sign": lambda x: Interval(np.sign(x.lo), np.sign(x.hi)),
    "div": _div,
    "rem": _rem,
    "eq": _eq,
    "ne": lambda x, y: _not(_eq(x, y)),
    "lt": lambda x, y: Interval(x.hi < y.lo, x.lo < y.hi),
    "le": lambda x, y: Interval(x.hi <= y.lo, x.lo <= y.hi),
    "gt": lambda x, y: Interval(x.lo > y.hi, x.hi > y.lo),
    "ge": lambda x, y: Interval(x.lo >= y.hi, x.hi >= y.lo),
    "and": _of_bools(np.logical_and),
    "or": _of_bools(np.logical_or),
    "not": _not,
    "select_n": _select,
    "broadcast_in_dim": lambda x: x,
    "reshape": lambda x: x,
    "squeeze": lambda x: x,
    "copy": lambda x: x,
}
