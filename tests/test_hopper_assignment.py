"""How the Hopper forward shares tiles out among thread blocks."""

import numpy as np
import pytest

from pallas_flash.backends.hopper import assignment
from pallas_flash.backends.hopper.assignment import BATCH, EDGES, HEAD, TILE


def causal_edges(batch: int, heads: int, tiles: int) -> np.ndarray:
    """Tile i visits key blocks 0 to i, the last of them masked."""
    i = np.arange(tiles)
    edges = np.stack([0 * i, 0 * i, i, i + 1], axis=1)
    return np.broadcast_to(edges, (batch, heads, tiles, 4))


def own_tiles(table: np.ndarray) -> np.ndarray:
    return table[table[..., BATCH] >= 0]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5), (4, 16, 32)])
def test_every_tile_is_given_out_once_with_its_edges(sizes, known):
    edges = causal_edges(*sizes)
    tiles = own_tiles(assignment.table(edges, 4, known))
    where = tiles[:, BATCH], tiles[:, HEAD], tiles[:, TILE]
    assert len(tiles) == np.prod(sizes) == len(set(zip(*where, strict=True)))
    np.testing.assert_array_equal(tiles[:, EDGES], edges[where])


def test_every_list_of_tiles_ends():
    assert (assignment.table(causal_edges(2, 3, 5), 4, True)[:, -1] == -1).all()


def test_tiles_of_unknown_length_have_a_block_each():
    table = assignment.table(causal_edges(4, 16, 32), 4, False)
    assert table.shape[:2] == (4 * 16 * 32, 2)
    # Group by group of heads, in each the last queries first.
    assert table[:5, 0, TILE].tolist() == [31, 31, 31, 31, 30]
    assert table[:5, 0, HEAD].tolist() == [0, 1, 2, 3, 0]


def test_blocks_are_busy_for_about_equally_long():
    table = assignment.table(causal_edges(16, 16, 8), 32, True)
    assert len(table) == assignment.NUM_BLOCKS
    steps = np.where(table[..., BATCH] >= 0, table[..., 6] - table[..., 3] + 0.5, 0).sum(1)
    assert steps.max() < 1.05 * steps.mean()


def test_no_block_is_idle(monkeypatch):
    monkeypatch.setattr(assignment, "NUM_BLOCKS", 7)
    assert len(assignment.table(causal_edges(1, 1, 3), 1, True)) == 3
    assert len(assignment.table(causal_edges(1, 1, 30), 1, True)) == 7
