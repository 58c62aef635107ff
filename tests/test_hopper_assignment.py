"""How the Hopper forward shares tiles out among thread blocks."""

import jax
import numpy as np
import pytest

from pallas_flash.backends.hopper import assignment
from pallas_flash.backends.hopper.assignment import BATCH, EDGES, HEAD, TILE, Order


def causal_edges(batch: int, heads: int, tiles: int) -> np.ndarray:
    """Tile i visits key blocks 0 to i, the last of them masked."""
    i = np.arange(tiles)
    edges = np.stack([0 * i, 0 * i, i, i + 1], axis=1)
    return np.broadcast_to(edges, (batch, heads, tiles, 4))


def own_tiles(table: np.ndarray) -> np.ndarray:
    return table[table[..., BATCH] >= 0]


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5), (4, 16, 32)])
def test_every_tile_is_given_out_once_with_its_edges(sizes, rows_first):
    edges, order = causal_edges(*sizes), Order(*sizes[:2], 4, rows_first)
    assert_given_out_once(*assignment.table(edges, order), edges)


@pytest.mark.parametrize("of", [(1, 1), (4, 1), (1, 16), (4, 16)], ids=str)
@pytest.mark.parametrize("rows_first", [False, True])
def test_tiles_that_are_known_at_run_time_are_given_out_once(rows_first, of):
    rng = np.random.default_rng(0)
    edges = np.sort(rng.integers(0, 40, (*of, 33, 4)), axis=-1).astype(np.int32)
    order = Order(4, 16, 8, rows_first)
    table, count = jax.jit(assignment.table_at_run_time, static_argnums=1)(edges, order)
    table = np.asarray(table)
    assert_given_out_once(table, count, np.broadcast_to(edges, (4, 16, 33, 4)))
    used = table[..., BATCH] >= 0
    steps = np.where(used, np.maximum(table[..., 6] - table[..., 3], 1), 0)
    assert len(table) == assignment.NUM_BLOCKS
    assert steps.sum(1).max() < 1.1 * steps.sum(1).mean()
    # Every block goes from group to group of heads, of which 16 have four tiles for each block.
    row, head = table[..., BATCH], table[..., HEAD]
    group = (head * 4 + row if rows_first else row * 16 + head) // 16
    assert (np.diff(group, axis=1)[used[:, 1:]] >= 0).all()


@pytest.mark.parametrize("heads_per_group", [1, 2, 16])
@pytest.mark.parametrize("documents", [1, 8, 32])
def test_packed_documents_keep_all_blocks_busy(documents, heads_per_group):
    """Causal attention within documents of equal lengths, 128 tiles of queries."""
    tile = np.arange(128)
    first = tile - tile % (128 // documents)
    edges = np.stack([first, first, tile, tile + 1], axis=1)[None, None].astype(np.int32)
    table, _ = assignment.table_at_run_time(edges, Order(2, 16, heads_per_group, False))
    steps = np.where(table[..., BATCH] >= 0, table[..., 6] - table[..., 3] + 0.5, 0).sum(1)
    assert steps.max() < 1.05 * steps.mean()


def assert_given_out_once(table, count, edges):
    tiles = own_tiles(table)
    np.testing.assert_array_equal(count, (table[..., BATCH] >= 0).sum(1))
    where = tiles[:, BATCH], tiles[:, HEAD], tiles[:, TILE]
    assert len(tiles) == np.prod(edges.shape[:3]) == len(set(zip(*where, strict=True)))
    np.testing.assert_array_equal(tiles[:, EDGES], edges[where])
    # Every list of tiles ends.
    assert (table[:, -1] == -1).all()


def test_blocks_are_busy_for_about_equally_long():
    table, _ = assignment.table(causal_edges(16, 16, 8), Order(16, 16, 32, False))
    assert len(table) == assignment.NUM_BLOCKS
    steps = np.where(table[..., BATCH] >= 0, table[..., 6] - table[..., 3] + 0.5, 0).sum(1)
    assert steps.max() < 1.05 * steps.mean()


def test_no_block_is_idle(monkeypatch):
    monkeypatch.setattr(assignment, "NUM_BLOCKS", 7)
    assert len(assignment.table(causal_edges(1, 1, 3), Order(1, 1, 1, False))[0]) == 3
    assert len(assignment.table(causal_edges(1, 1, 30), Order(1, 1, 1, False))[0]) == 7
