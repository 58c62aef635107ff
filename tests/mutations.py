"""Kernels that lack one wait or fence, to show that the tests would notice."""

import inspect
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu


class WithoutCall:
    """``plgpu``, but for one call of one of its functions.

    Put in place of ``plgpu`` in a kernel's module before the kernel is traced: there the
    `skipped`-th call of `name` does nothing. `callers` lists the functions that make the calls.
    """

    def __init__(self, name: str, skipped: int | None = None):
        self.name, self.skipped = name, skipped
        self.callers: list[str] = []

    def __getattr__(self, name: str) -> Any:
        original = getattr(plgpu, name)
        if name != self.name:
            return original

        def call(*args, **keywords):
            index = len(self.callers)
            self.callers.append(inspect.currentframe().f_back.f_code.co_qualname)
            return None if index == self.skipped else original(*args, **keywords)

        return call
