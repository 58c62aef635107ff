"""Hopper kernels in interpret mode: problems to run them on, and the races that they run into."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call

# Copies in flight have clocks of their own. A copy in pieces would reuse the five of the default,
# and a read that waited for one piece look as if it had waited for another.
PARAMETERS = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=256)
# A kernel that misses a wait may hang.
interpreted = pytest.mark.timeout(120)


def with_races(run: Any, *arrays: Any) -> tuple[Any, bool]:
    """``run(*arrays)`` in interpret mode, and whether a race was found."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(PARAMETERS):
        results = jax.block_until_ready(run(*arrays))
    return results, interpret_pallas_call.get_races().races_found


def is_caught(run: Any, *arrays: Any) -> bool:
    """Whether interpret mode notices a fault: as a race, or in its accounting of barriers."""
    try:
        return with_races(run, *arrays)[1]
    except Exception:
        return True


class Case(NamedTuple):
    """One problem: its sizes, what makes it special, and what its configuration changes."""

    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    batch: int = 1
    dtype: Any = jnp.bfloat16
    mask: Any = None
    # What the mask must do: (q_pos, kv_pos) -> bool.
    allowed: Any = None
    scale: float | None = None
    config: Any = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        queries, keys = (self.batch, self.q_len), (self.batch, self.kv_len)
        return {
            "q": (*queries, self.num_q_heads, self.head_dim),
            "k": (*keys, self.num_kv_heads, self.head_dim),
            "v": (*keys, self.num_kv_heads, self.value_dim),
            "dout": (*queries, self.num_q_heads, self.value_dim),
        }

    def bound_mask(self) -> Any:
        return None if self.mask is None else self.mask.bind(self.q_len, self.kv_len)

    def allows(self) -> np.ndarray:
        """Where attention is allowed: [B, 1, Tq, Tkv]."""
        allowed = True
        if self.allowed is not None:
            allowed = self.allowed(np.arange(self.q_len)[:, None], np.arange(self.kv_len)[None, :])
        return np.broadcast_to(allowed, (self.batch, 1, self.q_len, self.kv_len))


def lengths(*numbers: int) -> jax.Array:
    return jnp.asarray(numbers, jnp.int32)


def below(*numbers: int) -> np.ndarray:
    """The same, to compare positions with."""
    return np.asarray(numbers)[:, None, None, None]


def causal(q_pos: Any, kv_pos: Any) -> Any:
    return kv_pos <= q_pos
