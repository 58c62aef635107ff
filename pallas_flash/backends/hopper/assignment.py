"""Which tiles of queries each thread block works on, and in which order."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np

# Thread blocks that share out the tiles: one for every multiprocessor of an H100.
NUM_BLOCKS = 132
# What a tile costs besides its steps, in steps.
TILE_OVERHEAD = 0.5
# What the table holds of a tile.
BATCH, HEAD, TILE = range(3)
EDGES = slice(3, 7)
NUM_FIELDS = 7


def table(edges: np.ndarray, heads_per_group: int) -> np.ndarray:
    """The tiles of every block: [blocks, rounds, NUM_FIELDS] int32; a batch of -1 is no tile.

    Group by group of heads, whose tiles run side by side and share the L2 cache; in each group the
    last queries first: under a causal mask they have the most keys, and short tiles even out the
    end. Each tile in turn goes to the block that is free first. Such a block stays on its
    multiprocessor and loads the next tile while it finishes one.

    edges: [batch, heads, tiles, 4] first, full_first, full_last, last key block of each tile.
    """
    batch, num_heads, num_tiles, _ = edges.shape
    head, rank = np.divmod(np.arange(batch * num_heads * num_tiles), num_tiles)
    order = np.lexsort((head, rank, head // heads_per_group))
    head, tile = head[order], num_tiles - 1 - rank[order]
    row, head = np.divmod(head, num_heads)
    fields = np.stack([row, head, tile, *edges[row, head, tile].T], axis=1)
    fields = fields.astype(np.int32)
    steps = np.maximum(fields[:, 6] - fields[:, 3], 1)
    own = _shared_out(steps)
    result = np.full((len(own), max(map(len, own)), NUM_FIELDS), -1, np.int32)
    for block, tiles in enumerate(own):
        result[block, : len(tiles)] = fields[tiles]
    return np.pad(result, CLOSED, constant_values=-1)


# One more round that nobody has: every list of tiles ends.
CLOSED = ((0, 0), (0, 1), (0, 0))


def table_at_run_time(edges: jax.Array, batch: int, num_heads: int) -> jax.Array:
    """The same from edges that are known at run time only: [b, h, tiles, 4], b and h may be 1.

    The longest tiles first, dealt out to and fro, so that every block gets about as much.
    """
    b, h, num_tiles, _ = edges.shape
    steps = jnp.maximum(edges[..., 3] - edges[..., 0], 1).reshape(-1)
    order = jnp.argsort(-steps).astype(jnp.int32)
    # The rows of the batch and the heads that have the same edges, next to each other.
    rows, heads = np.divmod(
        np.arange(batch // b * (num_heads // h), dtype=np.int32), num_heads // h
    )
    row = order[:, None] // (h * num_tiles) + rows
    head = order[:, None] // num_tiles % h + heads
    tile = jnp.broadcast_to(order[:, None] % num_tiles, row.shape)
    own = jnp.broadcast_to(edges.reshape(-1, 1, 4)[order], (*row.shape, 4))
    fields = jnp.concatenate([jnp.stack([row, head, tile], axis=-1), own], axis=-1)
    total = row.size
    num_blocks = min(NUM_BLOCKS, total)
    block, turn = np.ogrid[:num_blocks, : -(-total // num_blocks)]
    place = turn * num_blocks + np.where(turn % 2, num_blocks - 1 - block, block)
    dealt = fields.reshape(total, NUM_FIELDS)[np.minimum(place, total - 1)]
    dealt = jnp.where((place < total)[..., None], dealt, -1)
    return jnp.pad(dealt, CLOSED, constant_values=-1)


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
