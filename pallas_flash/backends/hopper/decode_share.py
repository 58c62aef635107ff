"""How the key blocks of a batch are shared out among teams of thread blocks.

All key blocks of all rows, one row after the other, are cut into equal shares, one for each team
(stream-K: Osama et al. 2023, arXiv:2301.03598). Work is counted in key blocks, and to begin a row
counts as some, before its first. What a team has of one row is a part, be it no block; the parts
of a row follow each other, and a team's parts too, so ``team + row`` numbers them.

These functions take arrays and numbers alike: the kernels call them as well.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_flash.backends.hopper.decode_storage import BLOCK_KV

# What beginning a row costs, in key blocks: without it a team with many short rows ends last.
ROW_WORK = 1


class Share(NamedTuple):
    """What the kernels need to know of the rows.

    lengths: [B] int32, tokens in the cache; counts: [B] int32, queries; ends: [B] int32, where a
    row's work ends in that of all; first_rows: [teams + 1] int32, the row in which a team's share
    begins.
    """

    lengths: Any
    counts: Any
    ends: Any
    first_rows: Any


def share_out(spec: Any, num_teams: int, lengths: Any, counts: Any) -> Share:
    """The shares of all teams."""
    work = row_work(*key_blocks(spec, lengths, lengths - counts))
    row = jnp.arange(spec.batch, dtype=jnp.int32)
    # A sum over a triangle: XLA's cumulative sum would be several kernels.
    ends = jnp.where(row <= row[:, None], work, 0).sum(1, dtype=jnp.int32)
    begin = share_begin(jnp.arange(num_teams + 1, dtype=jnp.int32), ends[-1], num_teams)
    first_rows = (ends <= begin[:, None]).sum(1, dtype=jnp.int32)
    return Share(lengths, counts, ends, first_rows)


def key_blocks(spec: Any, length: Any, start: Any) -> tuple[Any, Any]:
    """The first and the last of a row's key blocks that hold what a query sees.

    length: tokens in the cache, max_len + 1 in a row that is lost; start: position of the first
    query.
    """
    last = (jnp.minimum(length, spec.cache.num_slots) + BLOCK_KV - 1) // BLOCK_KV
    if spec.cache.window is None or is_ring(spec):
        return last * 0, last
    first = jnp.maximum(start - spec.cache.window + 1, 0) // BLOCK_KV
    return jnp.minimum(first, last), last


def row_work(first_block: Any, last_block: Any) -> Any:
    """What a row's key blocks cost in all."""
    return jnp.where(first_block < last_block, last_block - first_block + ROW_WORK, 0)


def blocks_of_work(work: Any) -> Any:
    """How many of a row's key blocks are within its first `work`."""
    return jnp.maximum(work - ROW_WORK, 0)


def is_ring(spec: Any) -> bool:
    """Whether slots and positions differ."""
    return getattr(spec.cache, "is_ring", False)


def share_begin(team: Any, total: Any, num_teams: int) -> Any:
    """Where a team's share of all work begins."""
    busy = _busy(total, num_teams)
    return jnp.minimum(team, busy) * total // busy


def team_of(work: Any, total: Any, num_teams: int) -> Any:
    """The team that does a piece of all work."""
    return ((work + 1) * _busy(total, num_teams) - 1) // jnp.maximum(total, 1)


def _busy(total: Any, num_teams: int) -> Any:
    """Number of teams that have work."""
    return jnp.minimum(jnp.maximum(total, 1), num_teams)
