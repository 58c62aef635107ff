"""Reading programs (jaxprs) of elementwise functions."""

from typing import Any

# Where an equation that calls another program keeps it.
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def called(equation: Any) -> tuple[Any, Any] | None:
    """The program that an equation calls and its constants, or None."""
    if equation.primitive.name in ("cond", "scan", "while"):
        return None
    for name in _CALLED:
        inner = equation.params.get(name)
        if inner is not None:
            return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
    return None
