"""Which tiles of queries each thread block works on, and in which order."""

import heapq

import numpy as np

# Thread blocks that share out the tiles: one for every multiprocessor of an H100.
NUM_BLOCKS = 132
# What a tile costs besides its steps, in steps.
TILE_OVERHEAD = 0.5
# What the table holds of a tile.
BATCH, HEAD, TILE = range(3)
EDGES = slice(3, 7)
NUM_FIELDS = 7


def table(edges: np.ndarray, heads_per_group: int, known: bool) -> np.ndarray:
    """The tiles of every block: [blocks, rounds, NUM_FIELDS] int32; a batch of -1 is no tile.

    Group by group of heads, whose tiles run side by side and share the L2 cache; in each group the
    last queries first: under a causal mask they have the most keys, and short tiles even out the
    end. Each tile in turn goes to the block that is free first. Such a block stays on its
    multiprocessor and loads the next tile while it finishes one. Where it is not `known` how long
    tiles take, every tile has a block of its own and the hardware gives them out.

    edges: [batch, heads, tiles, 4] first, full_first, full_last, last key block of each tile.
    """
    batch, num_heads, num_tiles, _ = edges.shape
    head, rank = np.divmod(np.arange(batch * num_heads * num_tiles), num_tiles)
    order = np.lexsort((head, rank, head // heads_per_group))
    head, tile = head[order], num_tiles - 1 - rank[order]
    row, head = np.divmod(head, num_heads)
    fields = np.stack([row, head, tile, *edges[row, head, tile].T], axis=1)
    fields = fields.astype(np.int32)
    if not known:
        return _closed(fields[:, None])
    steps = np.maximum(fields[:, 6] - fields[:, 3], 1)
    own = _shared_out(steps)
    result = np.full((len(own), max(map(len, own)), NUM_FIELDS), -1, np.int32)
    for block, tiles in enumerate(own):
        result[block, : len(tiles)] = fields[tiles]
    return _closed(result)


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


def _closed(tiles: np.ndarray) -> np.ndarray:
    """With one more round that nobody has: every list of tiles ends."""
    return np.pad(tiles, ((0, 0), (0, 1), (0, 0)), constant_values=-1)
