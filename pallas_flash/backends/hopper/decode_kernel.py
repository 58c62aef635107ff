"""The decoding kernel of one launch: what it reads, its refs, and the segments of its blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_flash.backends.hopper.decode_share import (
    Share,
    blocks_of_work,
    key_blocks,
    row_work,
    share_begin,
)
from pallas_flash.backends.hopper.decode_storage import DecodeConfig, Storage
from pallas_flash.backends.hopper.storage import read_scalar


class Inputs(NamedTuple):
    """What the kernel reads from GMEM.

    q: [B, Hkv, rows, D], row t * G + g for query t of head g of a group. k, v: [B or pages, slots,
    Hkv, D]. pages: [B, pages_per_row] int32, or None where row b is "page" b.
    """

    q: Any
    k: Any
    v: Any
    pages: Any
    share: Share


class Row(NamedTuple):
    """One row of the batch: its number, tokens, first query's position, first key block, and where
    its work begins and ends in that of all."""

    index: Any
    length: Any
    start: Any
    first_block: Any
    begin: Any
    end: Any


class Segment(NamedTuple):
    """The key blocks first..last of a row that one team visits, none perhaps.

    part: where the result goes; is_first: of the team's; next_row: the number of the team's next
    row, or -1.
    """

    row: Row
    first: Any
    last: Any
    part: Any
    is_first: Any
    next_row: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: what is static, and the refs."""

    spec: Any
    config: DecodeConfig
    gmem: Inputs
    out_gmem: Any
    lse_gmem: Any
    smem: Storage
    team: Any
    head: Any

    def stage(self, step: Any) -> Any:
        """Where in SMEM the keys and values of a step lie, counted over all segments."""
        return lax.rem(step, jnp.int32(self.config.num_stages))


def for_each_segment(kernel: Kernel, body: Callable[[Segment, Any], Any]) -> Any:
    """``step = body(segment, step)`` for the rows that this team has a part of, from step 0 on."""
    share, num_teams = kernel.gmem.share, kernel.config.num_teams
    last_row = jnp.int32(kernel.spec.batch - 1)
    total = read_scalar(share.ends, last_row)
    low, high = (share_begin(kernel.team + i, total, num_teams) for i in range(2))
    first_row, end_row = (read_scalar(share.first_rows, kernel.team + i) for i in range(2))
    # The share ends inside of `end_row`, if that has begun before.
    has_part = (low < high) & (end_row <= last_row)
    has_part &= _row(kernel, jnp.minimum(end_row, last_row)).begin < high
    end_row = jnp.where(low < high, end_row + has_part.astype(jnp.int32), first_row)

    def visit(index, carry):
        row, step = carry
        # Read a row ahead: the memory's latency passes meanwhile.
        following = _row(kernel, jnp.minimum(index + 1, last_row))
        segment = Segment(
            row,
            first=row.first_block + blocks_of_work(jnp.maximum(low, row.begin) - row.begin),
            last=row.first_block + blocks_of_work(jnp.minimum(high, row.end) - row.begin),
            part=kernel.team + index,
            is_first=index == first_row,
            next_row=jnp.where(index + 1 < end_row, index + 1, -1),
        )
        return following, body(segment, step)

    first = _row(kernel, jnp.minimum(first_row, last_row)), jnp.int32(0)
    return lax.fori_loop(first_row, end_row, visit, first)[1]


def _row(kernel: Kernel, index: Any) -> Row:
    share = kernel.gmem.share
    length, count, end = (
        read_scalar(array, index) for array in (share.lengths, share.counts, share.ends)
    )
    start = length - count
    blocks = key_blocks(kernel.spec, length, start)
    return Row(index, length, start, blocks[0], end - row_work(*blocks), end)
