"""Attention on NVIDIA Hopper GPUs, in Pallas Mosaic GPU (wgmma and TMA)."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.backend import Backend
from pallas_flash.backends.hopper import array_gradients
from pallas_flash.backends.hopper.config import (
    Config,
    default_backward_config,
    default_forward_config,
    one_step_from,
)
from pallas_flash.backends.hopper.config import misfit as config_misfit
from pallas_flash.backends.hopper.leaves import spelled_out
from pallas_flash.backends.hopper.scores import missing_in_terms
from pallas_flash.spec import AttentionSpec, Operands

HEAD_DIMS = range(16, 257, 8)
DTYPES = (jnp.bfloat16, jnp.float16)
COMPUTE_CAPABILITY = "9.0"
# ptxas of these CUDA versions, from the first to below the second, gives wrong causal masks; JAX's
# own Pallas attention refuses them too.
MISCOMPILING_CUDA = (12080, 12091)


def unsupported(spec: AttentionSpec) -> str | None:
    """The reason why these kernels cannot serve a spec, or None."""
    if spec.dtype not in DTYPES:
        return f"dtype={spec.dtype} must be bfloat16 or float16"
    for name in ("head_dim", "value_dim"):
        if getattr(spec, name) not in HEAD_DIMS:
            return f"{name}={getattr(spec, name)} must be a multiple of 8 from 16 to 256"
    reason = _unsupported_terms(spec) or _unsupported_gradients(spec)
    return reason or misfit(spec, default_config(spec))


@functools.lru_cache(1024)
def _unsupported_terms(spec: AttentionSpec) -> str | None:
    """The reason why the kernels cannot serve the mask or the score mod of a spec, or None."""
    missing = missing_in_terms(spec)
    if missing:
        return f"functions that use {', '.join(missing)} are not in the Hopper kernels"
    return None


def _unsupported_gradients(spec: AttentionSpec) -> str | None:
    """The reason why the gradients cannot be deterministic, or None."""
    if not spec.deterministic or spec.score_mod is None:
        return None
    if added := array_gradients.added_in_any_order(spec):
        return (
            f"with deterministic=True: gradients of arrays along queries or distances "
            f"({', '.join(added)}) are added up in any order"
        )
    if spec.score_mod.lipschitz is None:
        return (
            "with deterministic=True: no bound of the score mod's derivative (lipschitz) is known"
        )
    return None


def misfit(spec: AttentionSpec, config: Config) -> str | None:
    """The reason why a configuration cannot serve a spec that is supported, or None."""
    for name in ("forward", "backward"):
        if reason := config_misfit(spelled_out(spec), getattr(config, name)):
            return f"the {name} kernel {reason}"
    return None


def unsuited(device: Any) -> str | None:
    """The reason why these kernels cannot run on a GPU, or None."""
    capability = getattr(device, "compute_capability", None)
    if capability != COMPUTE_CAPABILITY:
        return (
            f"it needs a GPU of compute capability {COMPUTE_CAPABILITY}, this one "
            f"({device.device_kind}) has {capability}"
        )
    version = _cuda_version()
    if MISCOMPILING_CUDA[0] <= version < MISCOMPILING_CUDA[1]:
        return f"CUDA 12.8.0 to 12.9.0 miscompiles causal kernels, this is {version}"
    return None


def _cuda_version() -> int:
    """Of the CUDA runtime, e.g. 12091 for 12.9.1."""
    from jax._src.lib import cuda_versions

    assert cuda_versions is not None, "asked only where a GPU is present"
    return cuda_versions.cuda_runtime_get_version()


def default_config(spec: AttentionSpec) -> Config:
    """A sound configuration for any spec that is supported."""
    spec = spelled_out(spec)
    return Config(forward=default_forward_config(spec), backward=default_backward_config(spec))


def candidate_configs(spec: AttentionSpec, config: Config, direction: str) -> list[Config]:
    """The configurations that fit, one step from `config` in its part for a direction."""
    parts = one_step_from(getattr(config, direction))
    configs = [dataclasses.replace(config, **{direction: part}) for part in parts]
    return [c for c in configs if misfit(spec, c) is None]


# The kernels are imported when they are traced: a CPU never does.
def _forward(spec: AttentionSpec, config: Config, operands: Operands) -> tuple[Any, Any]:
    from pallas_flash.backends.hopper.forward import forward

    return _run_once(forward(spec, config, operands))


def _backward(
    spec: AttentionSpec,
    config: Config,
    operands: Operands,
    out: Any,
    lse: Any,
    dout: Any,
    dlse: Any,
) -> tuple[Any, Any, Any, list[Any]]:
    from pallas_flash.backends.hopper.backward import backward

    return _run_once(backward(spec, config, operands, out, lse, dout, dlse))


def _run_once(results: Any) -> Any:
    """A kernel's results, which XLA reads from memory and does not compute anew.

    Where one is stacked by a scan, as residuals are, and read elsewhere too, XLA would put a copy
    of the kernel beside the update of the stack, and run both.
    """
    return lax.optimization_barrier(results)


BACKEND = Backend(
    name="hopper",
    platform="cuda",
    unsuited=unsuited,
    config_type=Config,
    unsupported=unsupported,
    default_config=default_config,
    forward=_forward,
    backward=_backward,
    misfit=misfit,
    candidate_configs=candidate_configs,
)
