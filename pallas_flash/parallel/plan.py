"""The plan of a sharded call: which mesh axes split which named axes of its arrays.

Axes are split in families: "batch"; "heads" with "kv_heads" nested in it (head ``h`` of N uses
kv head ``h // (N // n)``); every mapped axis ("vmap0", ...). An array spans a family with its full
size N, with 1 (broadcast), or with a divisor n of N. A result that lacks a split axis is the sum of
what the devices along it computed: the gradient of an array broadcast over batch or heads.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash.parallel.batching import Axes

MeshAxes = tuple[str, ...]
# For every dimension of an array, the mesh axes that split it.
Spec = tuple[MeshAxes, ...]
Shape = tuple[int, ...]


def family_of(name: str) -> str | None:
    """The family an axis belongs to, or None for an axis that is never split."""
    if name == "kv_heads":
        return "heads"
    return name if name in ("batch", "heads") or name.startswith("vmap") else None


def full_sizes(axes: Sequence[Axes], shapes: Sequence[Shape]) -> dict[str, int]:
    """The full size of every family: the largest that any array has."""
    full: dict[str, int] = {}
    for names, shape in zip(axes, shapes, strict=True):
        for name, size in zip(names, shape, strict=True):
            family = family_of(name)
            if family:
                full[family] = max(size, full.get(family, 1))
    return full


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which mesh axes split which family; what that means for every array."""

    mesh: Mapping[str, int]
    split: Mapping[str, MeshAxes]

    def count(self, mesh_axes: MeshAxes) -> int:
        return math.prod(self.mesh[a] for a in mesh_axes)

    def dim(self, name: str, size: int) -> tuple[MeshAxes, MeshAxes]:
        """(axes that split the dimension, axes along which a device picks one entry of the rest).

        Example: 2 kv heads under 4 shards of heads stay whole and every device picks its one.
        """
        axes = self.split.get(family_of(name) or "", ())
        used = 0
        while used < len(axes) and size % self.count(axes[: used + 1]) == 0:
            used += 1
        picks = axes[used:] if size > self.count(axes[:used]) else ()
        return axes[:used], picks

    def fits(self, name: str, size: int) -> bool:
        """Whether the share of every device needs whole entries, or one, of this dimension."""
        axes, picks = self.dim(name, size)
        return not picks or self.count(picks) % (size // self.count(axes)) == 0

    def spec(self, names: Axes, shape: Shape) -> Spec:
        return tuple(self.dim(n, s)[0] for n, s in zip(names, shape, strict=True))

    def pick(self, x: jax.Array, names: Axes, shape: Shape) -> jax.Array:
        """The part of `x` that this device needs; `shape` is the global shape."""
        for i, (name, size) in enumerate(zip(names, shape, strict=True)):
            _, picks = self.dim(name, size)
            if picks:
                x = lax.dynamic_slice_in_dim(x, self._entry(picks, x.shape[i]), 1, axis=i)
        return x

    def unpick(self, x: jax.Array, names: Axes, shape: Shape) -> jax.Array:
        """Transpose of `pick`: this device's summand of a result of global shape `shape`."""
        for i, (name, size) in enumerate(zip(names, shape, strict=True)):
            axes, picks = self.dim(name, size)
            if picks:
                local = size // self.count(axes)
                whole = jnp.zeros((*x.shape[:i], local, *x.shape[i + 1 :]), x.dtype)
                x = lax.dynamic_update_slice_in_dim(whole, x, self._entry(picks, local), axis=i)
        return x

    def _entry(self, picks: MeshAxes, entries: int) -> jax.Array:
        return lax.axis_index(picks) // (self.count(picks) // entries)

    def summed(self, names: Axes, shape: Shape) -> MeshAxes:
        """The mesh axes over which a result is a sum of the devices' results."""
        have = set(itertools.chain(*self.spec(names, shape)))
        return tuple(a for axes in self.split.values() for a in axes if a not in have)


def make_plan(
    mesh: Mapping[str, int], axes: Sequence[Axes], shapes: Sequence[Shape], specs: Sequence[Spec]
) -> Plan:
    """Splits each family as the array that splits it most does, as far as all arrays fit that."""
    full = full_sizes(axes, shapes)
    split: dict[str, MeshAxes] = {}
    dims = [d for array in zip(axes, shapes, specs, strict=True) for d in zip(*array, strict=True)]
    for family, full_size in full.items():
        taken = set(itertools.chain(*split.values()))
        best: MeshAxes = ()
        for name, _, mesh_axes in dims:
            if family_of(name) == family and taken.isdisjoint(mesh_axes):
                size = math.prod(mesh[a] for a in mesh_axes)
                if full_size % size == 0 and size > math.prod(mesh[a] for a in best):
                    best = mesh_axes
        while not all(
            Plan(mesh, {family: best}).fits(name, size)
            for name, size, _ in dims
            if family_of(name) == family
        ):
            best = best[:-1]
        split[family] = best
    return Plan(mesh, split)


def gathered(
    plan: Plan, axes: Sequence[Axes], shapes: Sequence[Shape], specs: Sequence[Spec]
) -> list[str]:
    """One sentence for every dimension that the plan takes in another way than it is split."""
    sentences = []
    for names, shape, spec in zip(axes, shapes, specs, strict=True):
        for name, size, have, want in zip(names, shape, spec, plan.spec(names, shape), strict=True):
            if have != want[: len(have)]:
                why = "batch and heads are the axes that can be split"
                if family_of(name):
                    kv_heads = sizes_of(axes, shapes).get("kv_heads", 1)
                    why = (
                        f"with num_kv_heads={kv_heads} and the other arrays as they are, the call "
                        f"can split it over mesh axes {want}"
                    )
                sentences.append(
                    f"axis {name!r} of size {size} of an array {list(names)} is split over mesh "
                    f"axes {have}; {why}"
                )
    return sentences


def sizes_of(axes: Sequence[Axes], shapes: Sequence[Shape]) -> dict[str, int]:
    """The size of every named axis in the array where it is largest."""
    sizes: dict[str, int] = {}
    for names, shape in zip(axes, shapes, strict=True):
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return sizes
