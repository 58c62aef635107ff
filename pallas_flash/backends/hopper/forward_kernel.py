"""The forward kernel of one launch: what it reads, what is static, and its refs."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_flash.backends.hopper.forward_walk import Assigned
from pallas_flash.backends.hopper.leaves import Terms
from pallas_flash.backends.hopper.query_kernel import QueryKernel
from pallas_flash.backends.hopper.storage import LOG2_E
from pallas_flash.masks import Bounds

# How large the exponent of a probability may be that was not divided by the largest one of its row:
# bfloat16 and float32 go up to 127, and there are keys to sum over and values to multiply with.
WIDEST_EXPONENT = 80


class Inputs(NamedTuple):
    """What the kernel reads from GMEM.

    q: [B, T, H, D], padded where TMA needs it; k, v: sources of the same. assigned: the tiles of
    each block. terms: the arrays of mask, score mod and dropout. ids: of `masking.id_bounds`.
    """

    q: Any
    k: Any
    v: Any
    assigned: Assigned
    terms: Terms
    ids: list[Bounds]


@dataclasses.dataclass(frozen=True)
class Kernel(QueryKernel):
    """One launch; gmem: `Inputs`, smem: `forward_storage.Storage`, copied: its `Copied`."""

    out_gmem: Any
    lse_gmem: Any

    @property
    def needs_maximum(self) -> bool:
        """Whether scores must be taken less their maximum: not where exp2 of all of them fits."""
        mod = self.spec.score_mod
        bound = None if mod is None else mod.bound
        return bound is None or self.spec.dtype != jnp.bfloat16 or bound * LOG2_E > WIDEST_EXPONENT

    @property
    def rescales_rarely(self) -> bool:
        """Whether the accumulator is rescaled only where a maximum has grown by much.

        It need not be exact: P and its sums are taken less the same number, so that the factor
        between them is 1 (FlashAttention-4 on the next generation of GPUs). The branch costs as
        much as it saves with two warpgroups at head_dim 128, 0.777 ms for 0.768, 4 x 4096 full; but
        0.979 for 1.004 with three at 64, 0.687 for 0.722 at 256. H100, JAX 0.11.2.
        """
        return self.spec.value_dim > 128 or self.config.num_warpgroups == 3

    @property
    def sums_late(self) -> bool:
        """Whether the sums of rows are completed at the end of a tile only.

        676 to 683 TFLOP/s at head_dim 128, 525 to 532 at 64, but 724 to 686 at 256: 4 x 4096 full,
        H100, JAX 0.11.2. With a causal mask nothing was gained.
        """
        if not self.needs_maximum:
            return True
        return self.spec.mask is None and max(self.spec.head_dim, self.spec.value_dim) <= 128
