"""Programs that are built while others run."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Builder:
    """Lowers in a thread of its own, one after the other, and compiles side by side.

    Neither is to use the GPU: kernels are timed meanwhile (`--xla_gpu_autotune_level=0`). As a
    context manager, what is not built when it ends is given up.
    """

    def __init__(self) -> None:
        # Tracing holds Python's lock, so that more threads would not help.
        self._lowering = ThreadPoolExecutor(1)
        self._compiling = ThreadPoolExecutor(os.cpu_count())

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *_: Any) -> None:
        self._lowering.shutdown(cancel_futures=True)
        self._compiling.shutdown(cancel_futures=True)

    def submit(
        self, lower: Callable[[], Any], options: dict[str, Any] | None = None
    ) -> Callable[[], Any]:
        """What waits for the compiled program, or raises what lowering or compiling it raised.

        lower: gives a lowered program. options: XLA's, where they are not as usual.
        """
        started: Future[Future[Any]] = self._lowering.submit(
            lambda: self._compiling.submit(lower().compile, options or {})
        )
        return lambda: started.result().result()
