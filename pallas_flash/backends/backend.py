"""Backend: a record of functions that compute attention on one kind of device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_flash.spec import AttentionSpec


class BoundToDevice(Protocol):
    """What a record says of the device that it needs; the fields are those of `Backend`."""

    @property
    def name(self) -> str: ...

    @property
    def platform(self) -> str | None: ...

    @property
    def unsuited(self) -> Callable[[Any], str | None]: ...


@dataclass(frozen=True)
class Backend:
    """One way to compute attention. All backends share one meaning and one pair of residuals.

    Fields:
      name: what users write in ``backend=``.
      platform: the lowering platform it needs ("cuda"), or None if it runs everywhere.
      unsuited: the reason why it cannot run on a device of its platform, or None if it can.
      config_type: the frozen class of its configurations.
      unsupported: the reason why it cannot serve a spec, or None if it can.
      default_config: a sound configuration for a spec; never searches.
      misfit: ``(spec, config) -> `` the reason why a configuration cannot serve a spec, or None.
      candidate_configs: ``(spec, config, direction)`` -> the configurations that fit and are one
        step from `config` in what "forward" or "backward" uses of it, which is its field of that
        name; none where there is nothing to tune.
      forward: ``(spec, config, operands) -> out [B, Tq, Hq, Dv], lse [B, Hq, Tq]``. lse is the
        natural log of the softmax denominator, float32 (float64 for float64 inputs). A row that
        may attend to nothing has out = 0 and lse = -inf.
      backward: ``(spec, config, operands, out, lse, dout, dlse) -> dq, dk, dv, dscore_mod``, in
        the operands' shapes and dtypes, from the results of `forward` and their cotangents;
        dscore_mod is a list with one gradient for each floating point array of the score
        mod, in the order of ``jax.tree.leaves``.

    Values at keys that no query may attend to (padding) never reach a result, NaN included, as far
    as `Mask.block_kind` tells which keys these are.
    """

    name: str
    platform: str | None
    unsuited: Callable[[Any], str | None]
    config_type: type
    unsupported: Callable[[AttentionSpec], str | None]
    default_config: Callable[[AttentionSpec], Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    misfit: Callable[[AttentionSpec, Any], str | None] = lambda spec, config: None
    candidate_configs: Callable[[AttentionSpec, Any, str], list[Any]] = (
        lambda spec, config, direction: []
    )


def delta_of(out: jax.Array, dout: jax.Array, dlse: jax.Array) -> jax.Array:
    """``rowsum(out * dout) - dlse`` [B, Hq, Tq] (FlashAttention-2, section 3.1.2).

    out, dout: [B, Tq, Hq, Dv]. With ``P = exp(S - lse)`` the gradient of the logits is
    ``P * (dP - delta)``; the term ``- dlse`` is all that a differentiable lse takes.
    """
    return jnp.einsum("bthd,bthd->bht", out, dout, preferred_element_type=dlse.dtype) - dlse
