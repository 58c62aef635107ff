"""The ways to attend over a cache, in order of preference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from pallas_flash.backends import hopper
from pallas_flash.backends.hopper import decode_storage
from pallas_flash.decoding import plain
from pallas_flash.decoding.request import DecodeOperands, DecodeSpec


@dataclass(frozen=True)
class DecodeBackend:
    """One way to attend over a cache; the fields are those of `backends.backend.Backend`."""

    name: str
    platform: str | None
    unsuited: Callable[[Any], str | None]
    unsupported: Callable[[DecodeSpec], str | None]
    forward: Callable[[DecodeSpec, DecodeOperands], tuple[jax.Array, jax.Array]]


def _hopper_forward(spec: DecodeSpec, operands: DecodeOperands) -> tuple[jax.Array, jax.Array]:
    # Imported when it is traced: a CPU never does.
    from pallas_flash.backends.hopper import decode

    return decode.forward(spec, decode_storage.default_decode_config(spec), operands)


HOPPER = DecodeBackend(
    name="hopper",
    platform="cuda",
    unsuited=hopper.unsuited,
    unsupported=decode_storage.unsupported,
    forward=_hopper_forward,
)
BLOCKWISE = DecodeBackend(
    name="blockwise",
    platform=None,
    unsuited=lambda device: None,
    unsupported=lambda spec: None,
    forward=plain.forward,
)
BACKENDS = (HOPPER, BLOCKWISE)
