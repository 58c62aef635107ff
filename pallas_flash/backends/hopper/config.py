"""Config: how the Hopper kernels cut their work. It changes speed, never results."""

import dataclasses
import itertools
from typing import Any

import jax.experimental.pallas as pl

from pallas_flash.backends.hopper import backward_storage, dq_storage, forward_storage
from pallas_flash.backends.hopper.leaves import reads_matrices, rows_share_matrices
from pallas_flash.backends.hopper.storage import (
    L2_BYTES_PER_GROUP,
    NUM_SMS,
    SHARED_MEMORY_LIMIT,
    shared_memory_bytes,
)
from pallas_flash.backends.hopper.tiling import Tiling, fits_swizzle
from pallas_flash.spec import AttentionSpec

# Up to so many keys, and head dimensions of 128, the backward has a kernel for dQ: what that takes
# grows with the keys, what it saves does not. The whole backward, ms, with and without: 16 x 1024 x
# 32 x 64 0.852 and 0.872, 8 x 2048 1.547 and 1.418, causal 0.896 and 0.900; 16 x 1024 x 16 x 128
# 0.735 and 0.742, causal 0.487 and 0.553, 8 x 2048 causal 0.791 and 0.758. H100, JAX 0.11.2.
MOST_KEYS_OF_DQ_KERNEL = 1024
__all__ = [
    "BackwardConfig",
    "Config",
    "DqConfig",
    "ForwardConfig",
    "default_backward_config",
    "default_dq_config",
    "default_forward_config",
    "misfit",
    "one_step_from",
]


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How the forward kernel cuts its work.

    Fields:
      num_warpgroups: math warpgroups of a block, each with 64 queries: 1, 2 or 3.
      block_kv: keys of a block, a multiple of 16 up to 256.
      num_stages: blocks of K and V in flight.
      num_q_stages: tiles of Q in flight, 1 or 2.
      takes_turns: whether the warpgroups take turns with the matrix units, so that one computes its
        softmax while another multiplies (FlashAttention-3, section 3.1).
      heads_per_group: query heads whose tiles run next to each other, longest first; their keys
        and values should fit into the L2 cache.

    Raises:
      ValueError: if a number is outside its range.
    """

    num_warpgroups: int
    block_kv: int
    num_stages: int
    num_q_stages: int
    takes_turns: bool
    heads_per_group: int

    def __post_init__(self):
        if self.num_warpgroups not in (1, 2, 3):
            raise ValueError(f"num_warpgroups={self.num_warpgroups} must be 1, 2 or 3")
        if self.num_q_stages not in (1, 2):
            raise ValueError(f"num_q_stages={self.num_q_stages} must be 1 or 2")
        if self.block_kv not in range(16, 257, 16):
            raise ValueError(f"block_kv={self.block_kv} must be a multiple of 16 from 16 to 256")
        for name in ("num_stages", "heads_per_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.takes_turns and self.num_warpgroups == 1:
            raise ValueError("takes_turns=True needs num_warpgroups=1 to be 2 or 3")

    @property
    def block_q(self) -> int:
        """Queries of a block."""
        return self.num_warpgroups * forward_storage.WG_ROWS

    def tiling(self, spec: AttentionSpec) -> Tiling:
        """How the scores are cut into tiles."""
        return forward_storage.tiling(spec, self)

    def shared_memory_bytes(self, spec: AttentionSpec) -> int:
        """SMEM of a block, from what the kernel allocates."""
        scratch = forward_storage.REDUCTION_SCRATCH_BYTES
        return shared_memory_bytes(forward_storage.storage(spec, self)) + scratch

    def registers(self, spec: AttentionSpec) -> int:
        """How many a thread of a math warpgroup needs, about."""
        return forward_storage.registers(spec, self)

    @property
    def most_registers(self) -> int:
        """How many a thread of a math warpgroup may have."""
        return forward_storage.REGISTERS[self.num_warpgroups][1]


def default_forward_config(spec: AttentionSpec) -> ForwardConfig:
    """A sound configuration for any head_dim and value_dim of 16 to 256.

    Scores of 64 x block_kv and an accumulator of 64 x value_dim live in the registers of a
    warpgroup, 240 a thread with two of them and 160 with three; K and V wait in SMEM.
    """
    widest = max(spec.head_dim, spec.value_dim)
    # Short masked tiles waste less if they are smaller: 310 TFLOP/s for 249 at head_dim 64,
    # 16 x 1024 causal, H100, JAX 0.11.2.
    is_short = spec.mask is not None and spec.kv_len <= 2048
    # But with a bias, which tiles of more queries share: 0.192 ms for 0.206, 384 x 384 x 4 x 32.
    is_short &= widest > 32 or not reads_matrices(spec)
    # Three with 96 keys a block beyond head_dim 64: 0.613 ms for 0.725 at 80 full, 0.370 for 0.398
    # causal, 0.656 for 0.671 at 96 full, but 0.403 for 0.377 causal; 4 x 4096 x 16, H100.
    widest_of_three = 96 if spec.mask is None else 80
    num_warpgroups = 3 if widest <= widest_of_three and not is_short else 2
    # A tile of more queries than there are has idle warpgroups.
    num_warpgroups = min(num_warpgroups, -(-spec.q_len // forward_storage.WG_ROWS))
    bytes_per_kv_head = spec.kv_len * (spec.head_dim + spec.value_dim) * spec.dtype.itemsize
    # Without a mask all tiles are equally long, and the tiles of one head share its keys best:
    # +2% at 4 x 4096 x 16 x 128, H100, JAX 0.11.2.
    by_group = spec.mask is not None or rows_share_matrices(spec)
    kv_heads = L2_BYTES_PER_GROUP // bytes_per_kv_head if by_group else 0
    # Two warpgroups with equal work find their own rhythm: 683 to 704 TFLOP/s at head_dim 128,
    # 4 x 4096 full; a causal mask wants turns, 661 for 629, and so do three, 532 for 515 at 64.
    # Beyond 128 none are best: 1.059 ms for 1.107 at 192 full, 0.587 for 0.604 causal. H100, JAX
    # 0.11.2.
    # Dropout, with more to do for each score, does without: 0.529 ms for 0.537, 4 x 4096 causal.
    is_even = spec.mask is None or spec.dropout is not None
    finds_rhythm = is_even and num_warpgroups == 2 and widest > 64
    takes_turns = num_warpgroups > 1 and widest <= 128 and not finds_rhythm
    most_keys = 128 if widest <= 128 else 96 if widest <= 192 else 64
    # The next queries on their way for a whole tile: +5% and +4% at 32 x 512 x 32 x 64 full and
    # causal, +3% at 32 x 512 x 16 x 128, but -2% at 8 x 2048 x 16 x 128 full. H100, JAX 0.11.2.
    few_steps = 1024 if widest <= 64 and spec.mask is not None else 512
    q_stages = (2, 1) if spec.kv_len <= few_steps and widest <= 128 else (1,)
    configs = [
        ForwardConfig(
            num_warpgroups=num_warpgroups,
            block_kv=block_kv,
            num_stages=2,
            num_q_stages=num_q_stages,
            takes_turns=takes_turns,
            heads_per_group=max(1, kv_heads * spec.group),
        )
        for block_kv in (128, 96, 64, 48, 32)
        for num_q_stages in q_stages
        if block_kv <= most_keys
    ]
    return _first_that_fits(spec, configs)


class DqConfig(ForwardConfig):
    """How the kernel for dQ alone cuts its work: as the forward does.

    Raises:
      ValueError: where `ForwardConfig` does, and if takes_turns: this kernel has none.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.takes_turns:
            raise ValueError(f"takes_turns={self.takes_turns} must be False in the kernel for dQ")

    def shared_memory_bytes(self, spec: AttentionSpec) -> int:
        """SMEM of a block, from what the kernel allocates."""
        scratch = forward_storage.REDUCTION_SCRATCH_BYTES
        return shared_memory_bytes(dq_storage.storage(spec, self)) + scratch

    def registers(self, spec: AttentionSpec) -> int:
        """How many a thread of a math warpgroup needs, about."""
        return dq_storage.registers(spec, self)


def default_dq_config(spec: AttentionSpec) -> DqConfig:
    """A sound configuration for any head_dim and value_dim of 16 to 128."""
    # Heads side by side as the forward has them.
    forward = default_forward_config(spec)
    num_warpgroups = min(2, -(-spec.q_len // forward_storage.WG_ROWS))
    # The whole backward at 32 x 512, ms, without a mask and causal: head_dim 64 0.506 and 0.439,
    # with two stages 0.538 and 0.443, with 96 keys 0.576 and 0.453; 128 0.459 and 0.383, with two
    # stages 0.476 and 0.384, with 128 keys 0.463 and 0.504. H100, JAX 0.11.2.
    most_keys = 128 if max(spec.head_dim, spec.value_dim) <= 64 else 64
    configs = [
        DqConfig(
            num_warpgroups=num_warpgroups,
            block_kv=block_kv,
            num_stages=num_stages,
            num_q_stages=num_q_stages,
            takes_turns=False,
            heads_per_group=forward.heads_per_group,
        )
        for block_kv in (128, 64, 32)
        for num_stages, num_q_stages in ((3, 2), (3, 1), (2, 1))
        if block_kv <= most_keys
    ]
    return _first_that_fits(spec, configs)


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How the backward kernel cuts its work; never changes a result.

    Fields:
      block_q: queries of a tile, 64 or 128.
      block_kv: keys of a block. 128: each of two warpgroups owns 64 keys and dK, dV for them. 64:
        the two share the keys, one owns dK and one dV, for head dimensions at which both do not fit
        a warpgroup's registers, and for arrays whose larger tiles do not fit shared memory.
      num_q_stages: tiles of Q in flight.
      num_dout_stages: tiles of dO in flight.
      heads_per_group: kv heads whose blocks run next to each other, first keys first; what they
        stream and add to should fit into the L2 cache.
      has_dq_kernel: whether dQ is computed by a kernel of its own (`backward_by_queries`), and not
        added to in memory by this one; for block_kv 128.

    Raises:
      ValueError: if a number is outside its range.
    """

    block_q: int
    block_kv: int
    num_q_stages: int
    num_dout_stages: int
    heads_per_group: int
    has_dq_kernel: bool

    def __post_init__(self):
        if self.block_kv not in (64, 128):
            raise ValueError(f"block_kv={self.block_kv} must be 64 or 128")
        if self.block_q not in (64, 128):
            raise ValueError(f"block_q={self.block_q} must be 64 or 128")
        if self.shares_keys and self.has_dq_kernel:
            raise ValueError(f"has_dq_kernel=True needs block_kv={self.block_kv} to be 128")
        for name in ("num_q_stages", "num_dout_stages", "heads_per_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def shares_keys(self) -> bool:
        """Whether the warpgroups share their keys: one owns dV, the other dK."""
        return self.block_kv == 64

    def tiling(self, spec: AttentionSpec) -> Tiling:
        """How the scores are cut into tiles."""
        return backward_storage.tiling(backward_storage.seen(spec, self), self)

    def shared_memory_bytes(self, spec: AttentionSpec) -> int:
        """SMEM of a block, from what the kernel allocates."""
        spec = backward_storage.seen(spec, self)
        return shared_memory_bytes(backward_storage.storage(spec, self))


def default_backward_config(spec: AttentionSpec) -> BackwardConfig:
    """A sound configuration for any head_dim and value_dim of 16 to 256."""
    widest = max(spec.head_dim, spec.value_dim)
    # Q, dO and the float32 dQ of the queries that read one kv head.
    bytes_per_query = (
        spec.head_dim * (spec.dtype.itemsize + 4) + spec.value_dim * spec.dtype.itemsize
    )
    bytes_per_kv_head = spec.group * spec.q_len * bytes_per_query
    block_kv = 128 if widest <= 128 else 64
    # At least as many as run at a time: else the last one's longest blocks end alone, 558 TFLOP/s
    # for 608 at 4 x 4096 x 32/8 x 128 causal, H100, JAX 0.11.2.
    heads_at_a_time = NUM_SMS // pl.cdiv(spec.kv_len, block_kv)
    heads = max(1, heads_at_a_time, L2_BYTES_PER_GROUP // bytes_per_kv_head)
    if rows_share_matrices(spec):
        heads = min(heads, spec.batch)
    tiles = [(64, block_kv, 2, 2), (64, block_kv, 2, 1), (64, block_kv, 1, 1)]
    one_pass, with_dq_kernel = list(tiles), list(tiles)
    if block_kv == 128:
        # The loading warpgroup adds dQ of the step before while it loads for the next: 2.20 ms for
        # 2.27 with two stages, 4 x 4096 x 16 x 128 full, 1.24 for 1.27 causal. H100, JAX 0.11.2.
        one_pass.insert(0, (64, 128, 3, 3 if widest <= 64 else 2))
        # Many arrays over queries and keys: smaller tiles of them.
        one_pass.append((64, 64, 1, 1))
    if widest <= 64:
        with_dq_kernel.insert(0, (128, 128, 2, 2))
    configs = [BackwardConfig(*sizes, heads, False) for sizes in one_pass]
    if spec.kv_len <= MOST_KEYS_OF_DQ_KERNEL:
        alone = [BackwardConfig(*sizes, heads, True) for sizes in with_dq_kernel if block_kv == 128]
        configs = alone + configs
    return _first_that_fits(spec, configs)


def _first_that_fits(spec: AttentionSpec, configs: list[Any]) -> Any:
    """The first configuration without misfit, or the last one: it needs least."""
    return next((c for c in configs if misfit(spec, c) is None), configs[-1])


def misfit(spec: AttentionSpec, config: Any) -> str | None:
    """The reason why tiles of a forward or backward configuration cannot serve a spec, or None."""
    if not fits_swizzle(config.tiling(spec)):
        return f"arrays over queries and keys need tiles wider than {config.block_kv} keys"
    has_dq_kernel = isinstance(config, BackwardConfig) and config.has_dq_kernel
    if has_dq_kernel and (reason := misfit(spec, default_dq_config(spec))):
        return f"has beside it a kernel for dQ, which {reason}"
    size = config.shared_memory_bytes(spec)
    if size > SHARED_MEMORY_LIMIT:
        return f"needs {size} bytes of shared memory, the device has {SHARED_MEMORY_LIMIT}"
    if isinstance(config, ForwardConfig):
        registers = config.registers(spec)
        if registers > config.most_registers:
            return f"needs about {registers} registers a thread, it has {config.most_registers}"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """How both kernels cut their work."""

    forward: ForwardConfig
    backward: BackwardConfig


def one_step_from(part: Any) -> list[Any]:
    """The valid configurations that differ from `part` in one field.

    A switch may hold only for one value of a number: where a number's change alone is not valid,
    the switches give way.
    """
    fields = dataclasses.asdict(part)
    switches = [name for name, x in fields.items() if isinstance(x, bool)]
    settings = [
        dict(zip(switches, values, strict=True))
        for values in itertools.product((False, True), repeat=len(switches))
    ]
    changes: list[list[dict[str, Any]]] = [[{name: not fields[name]}] for name in switches]
    for name in (name for name in fields if name not in switches):
        near = _near(name, fields[name])
        changes += [[{name: x}, *({name: x} | s for s in settings)] for x in near]
    found = [next(filter(None, (_changed(part, c) for c in choices)), None) for choices in changes]
    return [c for c in found if c is not None]


def _near(name: str, x: int) -> set[int]:
    """Values next to a tile size, to a number of heads, or to a small number."""
    if name.startswith("block_"):
        near = {x // 2, x - 32, x + 32, 2 * x}
        # Of a large one 16 more or less is little: at 128 keys 144 were slower wherever measured.
        if x <= 80:
            near |= {x - 16, x + 16}
    elif name == "heads_per_group":
        near = {x // 2, 2 * x}
    else:
        near = {x - 1, x + 1}
    return {y for y in near if y > 0}


def _changed(part: Any, change: dict[str, Any]) -> Any:
    """`part` with other values, or None where they are not valid."""
    try:
        return dataclasses.replace(part, **change)
    except ValueError:
        return None
