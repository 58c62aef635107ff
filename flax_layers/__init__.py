"""Flax layers on flash attention: `flax_layers.linen`, `flax_layers.nnx`, loaded when used."""

import importlib

from flax_layers.rope import Rope

__all__ = ["Rope", "linen", "nnx"]


def __getattr__(name):
    if name in ("linen", "nnx"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
