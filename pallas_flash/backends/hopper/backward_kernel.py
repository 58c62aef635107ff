"""One launch of a backward kernel: what is static, what it reads and writes, its block."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.backends.hopper import array_gradients
from pallas_flash.backends.hopper.backward_storage import Copied, Storage, tiling
from pallas_flash.backends.hopper.config import BackwardConfig
from pallas_flash.backends.hopper.leaves import Terms, near_of
from pallas_flash.backends.hopper.tile_arrays import Place
from pallas_flash.backends.hopper.tiling import Tiling
from pallas_flash.masks import Bounds
from pallas_flash.spec import AttentionSpec


class GlobalRefs(NamedTuple):
    """What a kernel reads and writes in GMEM.

    k, v: as they are copied; q, dout: sources of the same. lse_log2, delta: [B, Hq, Tq rounded up
    to block_q] float32; None where S (`s_starts_from_rows`) and dP (`dp_starts_from_rows`) begin as
    starts say, [B, Hq, Tq rounded up, 8], with its selectors (`row_starts`). schedule: [B or 1, Hq
    or 1, num_kv_tiles, 4] int32 or None. terms: the arrays of mask, score mod and dropout. ids: of
    `masking.id_bounds`. dq_factors: of `dq_fixed_point.factors`, over whole tiles, or None. dq_sum:
    added to, in fixed point or float32, or None. gradients: of the score mod's arrays.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    lse_log2: Any
    starts: Any
    selectors: Any
    delta: Any
    schedule: Any
    terms: Terms
    ids: list[Bounds]
    dq_factors: Any
    dq_sum: Any
    gradients: array_gradients.Refs


class Block(NamedTuple):
    """Which keys a thread block owns."""

    batch: Any
    kv_head: Any
    kv_tile: Any


class Runs(NamedTuple):
    """Which of the three successive loops over query tiles can have anything to do.

    Masked, unmasked, masked; or where tiles beyond `ScoreMod.near` are simpler the near ones, those
    whose keys come after it, and those whose keys come before.
    """

    first: bool
    second: bool
    third: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: what is static, the refs, and the block.

    of_rows: of a warpgroup's keys what `read_rows` gives, where it is the same for all query heads.
    is_wide: of `masking.read_wide`. There is a body for each, where both may be: a branch in its
    loops would take 0.941 ms for 0.755, packed 8 x 2048 x 16 x 128, H100, JAX 0.11.2.
    """

    spec: AttentionSpec
    config: BackwardConfig
    runs: Runs
    gmem: GlobalRefs
    smem: Storage
    copied: Copied
    block: Block
    of_rows: Terms | None = None
    is_wide: bool = False

    @property
    def near(self) -> tuple[int, int] | None:
        return near_of(self.spec.score_mod)

    @property
    def kv_start(self) -> Any:
        return self.block.kv_tile * self.config.block_kv

    @property
    def tiling(self) -> Tiling:
        return tiling(self.spec, self.config)

    def place(self, q_head: Any, q_tile: Any) -> Place:
        """Of a whole tile of scores."""
        return Place(self.block.batch, q_head, self.kv_start, q_tile * self.config.block_q)

    @property
    def num_q_tiles(self) -> int:
        return pl.cdiv(self.spec.q_len, self.config.block_q)

    def q_head(self, index: Any) -> Any:
        return self.block.kv_head * self.spec.group + index


def may_hold_padding(spec: AttentionSpec) -> bool:
    """Whether there may be queries or keys that the mask leaves unused: they may hold anything."""
    if spec.mask is None:
        return False
    if jax.tree.leaves(spec.mask) or spec.q_len != spec.kv_len:
        return True
    # Certain that there are none only if every query attends to the key at its own position.
    position = np.arange(spec.q_len, dtype=np.int32)
    with jax.ensure_compile_time_eval():
        return not spec.mask.allowed(position, position).all()


def stage(step: Any, count: int) -> Any:
    return lax.rem(step, jnp.int32(count))
