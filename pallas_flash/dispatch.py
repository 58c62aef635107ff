"""Which backend serves a request, and why the others do not."""

import functools
import warnings
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_flash.backends import blockwise, hopper, reference
from pallas_flash.backends.backend import Backend, BoundToDevice
from pallas_flash.parallel import vary_together
from pallas_flash.spec import AttentionSpec
from pallas_flash.tuning import table

# In order of preference. `reference` needs T x S memory: it serves only who names it.
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (hopper.BACKEND, blockwise.BACKEND, reference.BACKEND)
}
DEFAULTS = (hopper.BACKEND, blockwise.BACKEND)


def explain_backends(spec: AttentionSpec) -> dict[str, str | None]:
    """For every backend the reason why it does not serve `spec` on this machine, or None."""
    return {b.name: b.unsupported(spec) or no_device(b) for b in BACKENDS.values()}


def select_backend(spec: AttentionSpec, name: str | None = None) -> Backend:
    """The backend that serves `spec`: the one named, or the first that can.

    The choice does not look for the device of an unnamed backend: a program may be lowered for a
    GPU on a machine without one. `run` makes the last choice when the program is lowered.

    Raises:
      ValueError: if the named backend does not exist or cannot serve the request.
    """
    if name is None:
        return next(b for b in DEFAULTS if b.unsupported(spec) is None and not wrong_gpu(b))
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} must be one of {sorted(BACKENDS)} or None")
    if reason := BACKENDS[name].unsupported(spec) or wrong_gpu(BACKENDS[name]):
        raise ValueError(f"backend={name!r} cannot serve this request: {reason}")
    return BACKENDS[name]


def warn_of_fallback(spec: AttentionSpec) -> None:
    """Says, once per reason, that a GPU is present and its fastest kernels are not used."""
    if jax.default_backend() != "gpu":
        return
    chosen = select_backend(spec)
    for b in DEFAULTS[: DEFAULTS.index(chosen)]:
        warn_once(
            f"flash_attention uses the backend {chosen.name!r}, which is slower than {b.name!r}: "
            f"{b.unsupported(spec) or no_device(b)}. Name a backend to silence this."
        )


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def wrong_gpu(b: BoundToDevice) -> str | None:
    """The reason why this machine's GPU, if there is one, cannot run `b`."""
    if b.platform != "cuda" or jax.default_backend() != "gpu":
        return None
    return b.unsuited(jax.local_devices(backend="gpu")[0])


def no_device(b: BoundToDevice) -> str | None:
    if b.platform is not None and jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU, the default device is a {jax.default_backend()}"
    return wrong_gpu(b)


def run(direction: str, spec: AttentionSpec, name: str | None, config: Any, *arrays: Any) -> Any:
    """Calls ``forward`` or ``backward`` of the backend that fits the platform lowered for."""
    chosen = select_backend(spec, name)
    if chosen.platform is None:
        return _call(chosen, direction, spec, config, *arrays)
    on_gpu = functools.partial(_call, chosen, direction, spec, config)
    if name is None:
        elsewhere = functools.partial(_call, blockwise.BACKEND, direction, spec, None)
    else:
        elsewhere = functools.partial(refuse, on_gpu, chosen)
    return lax.platform_dependent(*arrays, cuda=on_gpu, default=elsewhere)


def _call(b: Backend, direction: str, spec: AttentionSpec, config: Any, *arrays: Any) -> Any:
    config = table.config_for(b, spec) if config is None else config
    results, tree = jax.tree.flatten(getattr(b, direction)(spec, config, *arrays))
    # Inside shard_map a kernel's results do not know over which devices they vary.
    return jax.tree.unflatten(tree, vary_together(results, like=jax.tree.leaves(arrays)))


def refuse(like, b: BoundToDevice, *arrays: Any) -> Any:
    """Results of the right shapes whose lowering raises: the backend's device is missing."""
    shapes = jax.eval_shape(like, *arrays)
    flat, tree = jax.tree.flatten(shapes)
    avals = tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in flat)
    results = _refuse_p.bind(avals=avals, backend=b.name)
    return jax.tree.unflatten(tree, vary_together(results, like=jax.tree.leaves(arrays)))


_refuse_p = Primitive("refuse")
_refuse_p.multiple_results = True
_refuse_p.def_abstract_eval(lambda *, avals, backend: avals)


def _raise_on_lowering(ctx, *, avals, backend):
    platforms = ctx.module_context.platforms
    raise ValueError(
        f"backend={backend!r} needs an NVIDIA GPU, but this program is compiled for "
        f"{', '.join(platforms)}; leave backend=None to use what fits the device"
    )


mlir.register_lowering(_refuse_p, _raise_on_lowering)
