"""Which tiles of queries each thread block works on, and in which order."""

import heapq
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.backends.hopper.storage import NUM_SMS

# Thread blocks that share out the tiles: one for every multiprocessor.
NUM_BLOCKS = NUM_SMS
# What a tile costs besides its steps, in steps.
TILE_OVERHEAD = 0.5
# How many times every block gets a tile before the next heads come, where tiles are dealt out.
FEWEST_ROUNDS = 2
# Its multiples, modulo 1, lie far apart.
GOLDEN_RATIO = 0.618
# What the table holds of a tile.
BATCH, HEAD, TILE = range(3)
EDGES = slice(3, 7)
NUM_FIELDS = 7


class Order(NamedTuple):
    """In which order the heads of the batch come.

    heads_per_group: that are worked on side by side and share the L2 cache. rows_first: whether all
    rows of the batch come before the next head, because they share an array of its scores.
    """

    batch: int
    num_heads: int
    heads_per_group: int
    rows_first: bool

    def split(self, index: Any) -> tuple[Any, Any]:
        """Row of the batch and head of the index-th head."""
        if self.rows_first:
            return index % self.batch, index // self.batch
        return index // self.num_heads, index % self.num_heads


def table(edges: np.ndarray, order: Order) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of every block, and how many it has.

    [blocks, rounds, NUM_FIELDS] int32, where a batch of -1 is no tile, and [blocks] int32.

    Group by group of heads; in each group the last queries first: under a causal mask they have the
    most keys, and short tiles even out the end. Each tile in turn goes to the block that is free
    first. Such a block stays on its multiprocessor and loads the next tile while it finishes one.

    edges: [batch, heads, tiles, 4] first, full_first, full_last, last key block of each tile.
    """
    row, head, rank = _in_sequence(edges.shape[2], order)
    tile = edges.shape[2] - 1 - rank
    fields = np.stack([row, head, tile, *edges[row, head, tile].T], axis=1)
    fields = fields.astype(np.int32)
    own = _shared_out(np.maximum(fields[:, 6] - fields[:, 3], 1))
    place, count = _side_by_side(own)
    return np.where((place >= 0)[..., None], fields[place], -1), count


def _in_sequence(num_tiles: int, order: Order) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row of the batch, head and rank among its tiles of every tile, in the order of work."""
    count = order.batch * order.num_heads * num_tiles
    head, rank = np.divmod(np.arange(count, dtype=np.int32), num_tiles)
    sequence = np.lexsort((head, rank, head // order.heads_per_group))
    return *order.split(head[sequence]), rank[sequence]


def table_at_run_time(edges: jax.Array, order: Order) -> tuple[jax.Array, np.ndarray]:
    """The same from edges that are known at run time only: [B or 1, Hq or 1, tiles, 4].

    Group by group of heads, in each every head's longest tiles first; dealt out to and fro, so that
    every block gets about as much.
    """
    # In groups of few rounds, or in a small last one, some blocks would get more than others.
    all_heads = order.batch * order.num_heads
    fewest = max(2, order.heads_per_group, FEWEST_ROUNDS * NUM_BLOCKS // edges.shape[2])
    sizes = (n for n in range(fewest, all_heads) if all_heads % n == 0)
    order = order._replace(heads_per_group=next(sizes, all_heads))
    steps = jnp.maximum(edges[..., 3] - edges[..., 0], 1)
    longest_first = jnp.argsort(-steps, axis=-1).astype(jnp.int32)
    row, head, rank = _in_sequence(edges.shape[2], order)
    of = row if edges.shape[0] > 1 else 0 * row, head if edges.shape[1] > 1 else 0 * head
    tile = longest_first[*of, rank]
    fields = jnp.concatenate([jnp.stack([row, head, tile], axis=1), edges[*of, tile]], axis=1)
    place, count = _side_by_side(_dealt_out(edges.shape[2], order))
    return jnp.where((place >= 0)[..., None], fields[place], -1), count


def _dealt_out(num_tiles: int, order: Order) -> list[list[int]]:
    """Which tiles of the sequence each block gets.

    Each group of heads in rounds of its own, to and fro: who gets a long tile in one round gets a
    short one in the next. The next group begins at another block.
    """
    total = order.batch * order.num_heads * num_tiles
    num_blocks = min(NUM_BLOCKS, total)
    per_group = order.heads_per_group * num_tiles
    own: list[list[int]] = [[] for _ in range(num_blocks)]
    for group, first in enumerate(range(0, total, per_group)):
        blocks = np.roll(np.arange(num_blocks), round(group * num_blocks * GOLDEN_RATIO))
        for start in range(first, min(first + per_group, total), num_blocks):
            tiles = range(start, min(start + num_blocks, first + per_group, total))
            for block, tile in zip(blocks, tiles, strict=False):
                own[block].append(tile)
            blocks = blocks[::-1]
    return own


def _side_by_side(own: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of numbers as rows [blocks, rounds] int32 with -1 behind their ends; their lengths.

    There is a round that nobody has: every list ends.
    """
    lengths = np.array(list(map(len, own)), np.int32)
    rows = np.full((len(own), lengths.max() + 1), -1, np.int32)
    for row, numbers in zip(rows, own, strict=True):
        row[: len(numbers)] = numbers
    return rows, lengths


def _shared_out(steps: np.ndarray) -> list[list[int]]:
    """Which tiles each block gets, from how long they take."""
    num_blocks = min(NUM_BLOCKS, len(steps))
    own: list[list[int]] = [[] for _ in range(num_blocks)]
    free_at = [(0.0, block) for block in range(num_blocks)]
    for tile, cost in enumerate(steps.tolist()):
        time, block = free_at[0]
        own[block].append(tile)
        heapq.heapreplace(free_at, (time + cost + TILE_OVERHEAD, block))
    return own
