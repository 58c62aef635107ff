"""GPU kernel time of a compiled program."""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Within it no other search of this user and machine measures or writes."""
    path = pathlib.Path(tempfile.gettempdir()) / f"pallas_flash_tuning_{os.getuid()}.lock"
    with path.open("w") as lock:
        # Given back when the file is closed.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kernel_ms(compiled: Any, *arrays: Any, iterations: int) -> tuple[Any, list[float]]:
    """A call's results, and for each of several calls the ms of all kernels that it launches.

    By CUPTI, after one call to warm up.

    Raises:
      RuntimeError: if a call launches no kernel.
    """
    # Late: this reaches into Mosaic GPU, which a CPU does without.
    from jax.experimental.mosaic.gpu import profiler

    # One iteration would come back as a bare list.
    assert iterations > 1
    results, calls = profiler.measure(compiled, iterations=iterations, aggregate=False)(*arrays)
    if calls is None:
        raise RuntimeError("the call launched no kernel")
    return results, [sum(ms for _, ms in kernels) for kernels in calls]
