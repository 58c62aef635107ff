"""Functions with a backward pass of their own that JAX differentiates forward too.

JAX refuses forward mode for a ``custom_vjp``. `both_modes` adds it: where JAX asks for a derivative
it gets a linear map of the tangents with two bodies. Evaluated, it computes tangents; transposed,
it is the backward pass of the ``custom_vjp``, and the other body is never even traced. The map can
be differentiated again, by the derivatives of its body.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir


class LinearMap(NamedTuple):
    """``(residuals, tangents) -> results``, lists of arrays, linear in the tangents.

    forward: computes it. transposed: ``(residuals, cotangents of results) -> cotangents`` of the
    tangents. types: of the results.
    """

    forward: Callable[[list[Any], list[Any]], list[Any]]
    transposed: Callable[[list[Any], list[Any]], list[Any]]
    types: tuple[Any, ...]

    def __call__(self, residuals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        return _linear_map_p.bind(*residuals, *tangents, of=self, num_residuals=len(residuals))


_linear_map_p = Primitive("linear_map")
_linear_map_p.multiple_results = True
_linear_map_p.def_abstract_eval(lambda *_, of, num_residuals: list(of.types))


@_linear_map_p.def_impl
def _evaluate(*args: Any, of: LinearMap, num_residuals: int) -> list[Any]:
    return of.forward(list(args[:num_residuals]), list(args[num_residuals:]))


def _jvp(primals: Any, tangents: Any, *, of: LinearMap, num_residuals: int) -> tuple[Any, Any]:
    n = num_residuals
    moved = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    if all(i >= n for i in moved):
        d_linear = [ad.instantiate_zeros(t) for t in tangents[n:]]
        return of(primals[:n], primals[n:]), of(primals[:n], d_linear)

    def of_moved(*values):
        args = list(primals)
        for i, x in zip(moved, values, strict=True):
            args[i] = x
        return of.forward(args[:n], args[n:])

    return jax.jvp(of_moved, [primals[i] for i in moved], [tangents[i] for i in moved])


def _transpose(cotangents: Any, *args: Any, of: LinearMap, num_residuals: int) -> list[Any]:
    residuals, tangents = args[:num_residuals], args[num_residuals:]
    found = of.transposed(list(residuals), [ad.instantiate_zeros(x) for x in cotangents])
    wanted = (ad.is_undefined_primal(x) for x in tangents)
    return [None] * num_residuals + [
        x if is_wanted else None for x, is_wanted in zip(found, wanted, strict=True)
    ]


def _batch(axis: Any, args: Any, dims: Any, *, of: LinearMap, num_residuals: int) -> tuple:
    residuals, in_axes = args[:num_residuals], (list(dims[:num_residuals]), 0)
    # Every tangent is mapped, so that each has a cotangent for every instance.
    tangents = [
        batching.bdim_at_front(x, dim, axis.size, axis.explicit_mesh_axis)
        for x, dim in zip(args[num_residuals:], dims[num_residuals:], strict=True)
    ]
    mapped = functools.partial(
        jax.vmap, in_axes=in_axes, axis_size=axis.size, spmd_axis_name=axis.spmd_name
    )
    types = (unmapped_aval(axis.size, 0, t, axis.explicit_mesh_axis) for t in of.types)
    results = LinearMap(mapped(of.forward), mapped(of.transposed), tuple(types))
    return results(residuals, tangents), [0] * len(of.types)


ad.primitive_jvps[_linear_map_p] = _jvp
ad.primitive_transposes[_linear_map_p] = _transpose
batching.fancy_primitive_batchers[_linear_map_p] = _batch
mlir.register_lowering(_linear_map_p, mlir.lower_fun(_evaluate, multiple_results=True))
# Its body may hold a custom_partitioning, which needs them and which JAX does not see there.
prim_requires_devices_during_lowering.add(_linear_map_p)


def both_modes(function: Any, tangent: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with a forward mode.

    Args:
      function: a ``custom_vjp`` of ``(static, *primals)`` with ``nondiff_argnums=(0,)``.
      tangent: ``(static, residuals, tangents) -> `` tangents of the results, in differentiable JAX;
        residuals: what the forward rule of `function` keeps; tangents: a list in the order of
        ``jax.tree.leaves(primals)``, None for what does not move.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def both(static, *primals):
        return function(static, *primals)

    @functools.partial(both.defjvp, symbolic_zeros=True)
    def rule(static, primals, tangents):
        results, residuals = function.fwd(static, *primals)
        residuals, tree = jax.tree.flatten(residuals)
        primal_tree: Any = jax.tree.structure(primals)
        result_tree = jax.tree.structure(results)
        tangents = primal_tree.flatten_up_to(tangents)
        moved = [i for i, x in enumerate(tangents) if not isinstance(x, SymbolicZero)]

        def forward(residuals, values):
            all_tangents = [None] * len(tangents)
            for i, x in zip(moved, values, strict=True):
                all_tangents[i] = x
            found = tangent(static, jax.tree.unflatten(tree, residuals), all_tangents)
            return jax.tree.leaves(found)

        def transposed(residuals, cotangents):
            cotangents = jax.tree.unflatten(result_tree, cotangents)
            found = function.bwd(static, jax.tree.unflatten(tree, residuals), cotangents)
            found = primal_tree.flatten_up_to(found)
            return [found[i] for i in moved]

        types = (jax.typeof(x).to_tangent_aval() for x in jax.tree.leaves(results))
        linear = LinearMap(forward, transposed, tuple(types))
        found = linear(residuals, [tangents[i] for i in moved])
        return results, jax.tree.unflatten(result_tree, found)

    return both
