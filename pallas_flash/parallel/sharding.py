"""Sharding: batch and heads split over devices without communication, every other axis gathered.

`partitioned` wraps a function of arrays with named axes. How it stays local depends on how the mesh
is seen where it is called:

- Auto axes (plain ``jit``): `custom_partitioning`, with a rule for Shardy.
- Explicit axes: ``shard_map``, with specs from the types of the arrays.
- Manual axes (inside ``shard_map``): the arrays are local already.
"""

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import NamedSharding, PartitionSpec

from pallas_flash.parallel.batching import ArrayFunction, Axes
from pallas_flash.parallel.plan import (
    Plan,
    Shape,
    Spec,
    family_of,
    full_sizes,
    gathered,
    make_plan,
    sizes_of,
)


def partitioned(
    fn: ArrayFunction, axes_in: Sequence[Axes], axes_out: Sequence[Axes]
) -> ArrayFunction:
    """Returns `fn` with a sharding rule: calls on arrays split over batch and heads stay local.

    `fn` must take every size from the arrays it is given (they are the local ones), and treat batch
    rows and heads independently, apart from results that lack an axis: these are sums over it.

    An array split along any other axis (or along heads so that a device's share does not fit the kv
    heads) is gathered with a warning; where mesh axes are Explicit this raises ValueError.
    """
    automatic = _automatic(fn, axes_in, axes_out)

    def call(*arrays):
        mesh = mesh_of(arrays)
        if mesh.manual_axes:
            _check_manual(mesh)
            results = fn(*arrays)
        elif mesh.explicit_axes:
            results = _explicit(fn, mesh, axes_in, axes_out, arrays)
        else:
            results = automatic(*arrays)
        return vary_together(results, like=arrays)

    return call


def align(arrays: Sequence[jax.Array], axes: Sequence[Axes]) -> tuple[jax.Array, ...]:
    """Returns `arrays` with the types that a call on all of them together gives their gradients.

    For the arguments of a ``custom_vjp`` whose rules call `partitioned` functions. Inside
    ``shard_map`` every array is marked as varying over all mesh axes that any of them varies over;
    with Explicit axes, batch and heads are split alike in all of them. JAX then adds up and moves
    the gradients. Elsewhere this does nothing.
    """
    mesh = mesh_of(arrays)
    if mesh.manual_axes:
        return vary_together(arrays, like=arrays)
    if mesh.explicit_axes:
        plan = _explicit_plan(mesh, axes, arrays)
        specs = (plan.spec(names, x.shape) for x, names in zip(arrays, axes, strict=True))
        return tuple(_reshard(x, mesh, spec) for x, spec in zip(arrays, specs, strict=True))
    return tuple(arrays)


def vary_together(arrays: Sequence[jax.Array], like: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Returns `arrays`, varying in shard_map's types over every mesh axis that any of `like` does.

    A Pallas kernel's results carry no record of how they vary: where the results of two backends
    meet (the branches of ``lax.platform_dependent``), both must pass through here.
    """
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in like))

    def cast(x):
        missing = varying - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return tuple(cast(x) for x in arrays)


def mesh_of(arrays: Sequence[jax.Array]) -> jax.sharding.AbstractMesh:
    """The mesh that the types of the arrays refer to, else the one in context (may be empty)."""
    for x in arrays:
        mesh = jax.typeof(x).sharding.mesh
        if not mesh.empty:
            return mesh
    return jax.sharding.get_abstract_mesh()


@functools.cache
def warn_once(message: str) -> None:
    """Warns, the first time that it is called with this message."""
    warnings.warn(message, stacklevel=2)


def _local(
    fn: ArrayFunction,
    plan: Plan,
    axes_in: Sequence[Axes],
    axes_out: Sequence[Axes],
    shapes_in: Sequence[Shape],
    shapes_out: Sequence[Shape],
) -> ArrayFunction:
    """What one device computes: `fn` of its share, and the sums that cross devices."""

    def local(*arrays):
        results = fn(*(plan.pick(*array) for array in zip(arrays, axes_in, shapes_in, strict=True)))
        summands = (plan.unpick(*r) for r in zip(results, axes_out, shapes_out, strict=True))
        return tuple(
            lax.psum(x, over) if (over := plan.summed(names, shape)) else x
            for x, names, shape in zip(summands, axes_out, shapes_out, strict=True)
        )

    return local


# ---------------------------------------------------------------------------------------------
# Auto axes: the partitioner asks.


def _automatic(
    fn: ArrayFunction, axes_in: Sequence[Axes], axes_out: Sequence[Axes]
) -> ArrayFunction:
    """`fn` as a call whose parts are made when XLA partitions the program."""

    def partition(mesh, args, results):
        sizes = dict(mesh.shape)
        shapes = [x.shape for x in args]
        shapes_out = [x.shape for x in results]
        specs = [_spec_of(x) for x in args]
        plan = make_plan(
            sizes,
            [*axes_in, *axes_out],
            [*shapes, *shapes_out],
            [*specs, *(_spec_of(x) for x in results)],
        )
        for sentence in gathered(plan, axes_in, shapes, specs):
            warn_once(f"flash_attention gathers it on every device: {sentence}")

        def shardings(axes, shapes):
            specs = [plan.spec(*array) for array in zip(axes, shapes, strict=True)]
            return tuple(NamedSharding(mesh, _partition_spec(spec)) for spec in specs)

        local = _local(fn, plan, axes_in, axes_out, shapes, shapes_out)
        return mesh, local, shardings(axes_out, shapes_out), shardings(axes_in, shapes)

    def rule(mesh, operand_types, result_types):
        shapes = [tuple(t.shape) for t in (*operand_types, *result_types)]
        return _shardy_rule(tuple(mesh.shape.values()), axes_in, axes_out, shapes)

    # Under jit so that the trace below and the one of custom_partitioning are the same, cached.
    traced_once = jax.jit(lambda *arrays: tuple(fn(*arrays)))
    call = custom_partitioning(lambda *arrays: traced_once(*arrays))
    call.def_partition(partition=partition, sharding_rule=rule)
    # Called eagerly, custom_partitioning would run `fn` op by op and leave each to the partitioner.
    compiled = jax.jit(lambda *arrays: call(*arrays), inline=True)

    def unless_effects(*arrays):
        # custom_partitioning drops effects, e.g. the callbacks of a kernel in interpret mode.
        has_effects = jax.make_jaxpr(traced_once)(*arrays).effects
        return (traced_once if has_effects else compiled)(*arrays)

    return unless_effects


def _shardy_rule(
    mesh_sizes: Shape, axes_in: Sequence[Axes], axes_out: Sequence[Axes], shapes: Sequence[Shape]
) -> SdyShardingRule:
    """A factor for every family; one of its own for every dimension that nothing shares.

    An axis that can't be split gets factors of its own instead of "need_replication" ones: Shardy
    would gather these before `partition` sees (and names) them.
    """
    axes = [*axes_in, *axes_out]
    full = full_sizes(axes, shapes)
    kv_heads = sizes_of(axes, shapes).get("kv_heads", 1)
    groups = full.get("heads", 1) // kv_heads
    nested = 1 < kv_heads < full.get("heads", 1) and _splits_whole(kv_heads, mesh_sizes)
    own = (f"own{i}" for i in itertools.count())

    def factor(name: str, size: int):
        family = family_of(name)
        if family == "heads" and nested and size == full["heads"]:
            return CompoundFactor("kv_heads", "groups")
        if name == "kv_heads" and 1 < size == kv_heads < full["heads"]:
            return "kv_heads"
        return family if family and 1 < size == full[family] else next(own)

    mappings = [
        ArrayMapping(*(factor(n, s) for n, s in zip(names, shape, strict=True)))
        for names, shape in zip(axes, shapes, strict=True)
    ]
    n = len(axes_in)
    sizes: dict[str, Any] = {"groups": groups} if nested else {}
    return SdyShardingRule(tuple(mappings[:n]), tuple(mappings[n:]), **sizes)


def _splits_whole(size: int, mesh_sizes: Shape) -> bool:
    """Whether mesh axes in any order divide `size`, down to 1, without one being split itself.

    Shardy would split a mesh axis of 4 over 2 kv heads and 2 of their groups, which JAX's
    custom_partitioning can't express.
    """
    for order in itertools.permutations(s for s in mesh_sizes if s > 1):
        left = size
        for s in order:
            if left > 1 and left % s:
                return False
            left = left // s or 1
    return True


def _spec_of(x: jax.ShapeDtypeStruct) -> Spec:
    """The mesh axes of every dimension, from a NamedSharding."""
    if x.sharding is None:
        return ((),) * len(x.shape)
    if not isinstance(x.sharding, NamedSharding):
        raise NotImplementedError(
            f"flash_attention over several devices needs NamedShardings, got {x.sharding}"
        )
    return _spec(x.sharding.spec, len(x.shape))


def _spec(spec: PartitionSpec, ndim: int) -> Spec:
    full = (*spec, *(None,) * (ndim - len(spec)))
    return tuple(() if a is None else a if isinstance(a, tuple) else (a,) for a in full)


def _partition_spec(spec: Spec) -> PartitionSpec:
    return PartitionSpec(*(axes or None for axes in spec))


# ---------------------------------------------------------------------------------------------
# Explicit axes: the types say it.


def _explicit_plan(mesh, axes: Sequence[Axes], arrays: Sequence[jax.Array]) -> Plan:
    """The plan for arrays with shardings in their types. Raises ValueError if it isn't local."""
    shapes = [x.shape for x in arrays]
    specs = [_spec(jax.typeof(x).sharding.spec, x.ndim) for x in arrays]
    plan = make_plan(mesh.shape, axes, shapes, specs)
    sentences = gathered(plan, axes, shapes, specs)
    if sentences:
        raise ValueError(
            f"flash_attention can't stay local: {sentences[0]}; use jax.sharding.reshard before it"
        )
    return plan


def _explicit(fn, mesh, axes_in, axes_out, arrays):
    """Calls `fn` in a shard_map over the Explicit axes of the mesh."""
    plan = _explicit_plan(mesh, axes_in, arrays)
    shapes_in = [x.shape for x in arrays]
    results = jax.eval_shape(fn, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
    shapes_out = [x.shape for x in results]
    specs_in = [plan.spec(*array) for array in zip(axes_in, shapes_in, strict=True)]
    specs_out = [plan.spec(*array) for array in zip(axes_out, shapes_out, strict=True)]
    inside = partitioned(fn, axes_in, axes_out)
    mapped = jax.shard_map(
        _local(inside, plan, axes_in, axes_out, shapes_in, shapes_out),
        mesh=mesh,
        in_specs=tuple(map(_partition_spec, specs_in)),
        out_specs=tuple(map(_partition_spec, specs_out)),
        axis_names=set(mesh.explicit_axes),
        check_vma=False,
    )
    return mapped(*(_reshard(x, mesh, s) for x, s in zip(arrays, specs_in, strict=True)))


def _reshard(x: jax.Array, mesh, spec: Spec) -> jax.Array:
    if _spec(jax.typeof(x).sharding.spec, x.ndim) == spec:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, _partition_spec(spec)))


# ---------------------------------------------------------------------------------------------
# Manual axes: the arrays are local already.


def _check_manual(mesh) -> None:
    """Raises, or warns, if the mesh has axes that are not Manual beside Manual ones."""
    explicit, auto = (
        tuple(a for a in axes if mesh.shape[a] > 1) for axes in (mesh.explicit_axes, mesh.auto_axes)
    )
    where = (
        f"flash_attention in a shard_map over mesh axes {tuple(mesh.manual_axes)} can't stay local"
    )
    if explicit:
        raise NotImplementedError(
            f"{where} over the Explicit axes {explicit}: make them Manual too (axis_names)"
        )
    if auto:
        # custom_partitioning isn't told the mesh there, and can't split a part of it.
        warn_once(
            f"{where} over the Auto axes {auto}: XLA may gather what is split over them; "
            "make them Manual too (axis_names)"
        )
