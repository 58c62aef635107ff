"""Pictures of masks: which scores are allowed, and which blocks a kernel skips."""

from typing import Any

import jax
import numpy as np

from pallas_flash.masks.mask import BlockKind, Mask
from pallas_flash.masks.schedule import Blocks, block_kinds
from pallas_flash.terms import Tile, canonical, leaf_fields, map_operands

# What a mask is drawn with: a skipped, a partly masked and a full block (or element).
SYMBOLS = {BlockKind.SKIP: ".", BlockKind.PARTIAL: "/", BlockKind.FULL: "#"}
MAX_CELLS = 256
# From this length on a picture is of blocks, if nothing else is asked for.
MAX_ELEMENTS = 64
BLOCK = 128


def show(mask: Mask, q_len: int, kv_len: int, **options: Any) -> str:
    """The mask as text: a row for each query (or query block), a column for each key (block).

    ``.`` is skipped, ``/`` a block that needs the mask's arithmetic, ``#`` all allowed.

    Args:
      block_q, block_kv: sizes of a block. Without them lengths up to 64 are drawn by element and
        longer ones in blocks of 128.
      batch, head: the row of the batch and the query head to draw.

    Raises:
      ValueError: if the picture would have more than 256 rows or columns, or such a row of the
        batch or head does not exist.
    """
    cells = _cells(mask, q_len, kv_len, **options)
    return "\n".join("".join(SYMBOLS[BlockKind(kind)] for kind in row) for row in cells)


def plot(mask: Mask, q_len: int, kv_len: int, *, ax: Any = None, **options: Any) -> Any:
    """The matplotlib axes with the picture that `show` gives as text; same options, or own `ax`."""
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    cells = _cells(mask, q_len, kv_len, **options)
    if ax is None:
        ax = pyplot.figure().add_subplot()
    colors = ListedColormap(["#eeeeee", "#9ecae1", "#2171b5"])
    ax.imshow(cells, cmap=colors, vmin=0, vmax=2, extent=(0, kv_len, q_len, 0), aspect="auto")
    ax.set_xlabel("key position")
    ax.set_ylabel("query position")
    return ax


def _cells(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    batch: int = 0,
    head: int = 0,
) -> np.ndarray:
    """`BlockKind` of every cell of the picture, [rows, columns]."""
    by_element = block_q is None and block_kv is None and max(q_len, kv_len) <= MAX_ELEMENTS
    block_q, block_kv = block_q or BLOCK, block_kv or BLOCK
    blocks = Blocks(q_len, kv_len, block_q, block_kv, batch=1)
    rows, columns = (q_len, kv_len) if by_element else (blocks.num_q, blocks.num_kv)
    if max(rows, columns) > MAX_CELLS:
        raise ValueError(
            f"a picture of {rows} x {columns} blocks must have at most {MAX_CELLS} of each: take "
            f"more than block_q={block_q}, block_kv={block_kv}"
        )
    mask = _one_head(mask.bind(q_len, kv_len), q_len, kv_len, batch, head)
    if not by_element:
        numbers = np.arange(blocks.num_q), np.arange(blocks.num_kv)
        return np.asarray(block_kinds(mask, blocks, *numbers))[0, 0]
    tile = Tile(1, 0, q_len, 0, kv_len, q_len)
    allowed = map_operands(tile.align, mask).allowed(*tile.positions())
    allowed = np.broadcast_to(np.asarray(allowed), (1, 1, q_len, kv_len))
    return np.where(allowed[0, 0], BlockKind.FULL, BlockKind.SKIP)


def _one_head(mask: Mask, q_len: int, kv_len: int, batch: int, head: int) -> Mask:
    """The mask with every array cut to one row of the batch and one head."""
    sizes = {"batch": 1, "heads": 1, "q": q_len, "kv": kv_len}
    chosen = {"batch": batch, "heads": head}
    for array, field in zip(jax.tree.leaves(mask), leaf_fields(mask), strict=True):
        axes = field.axes[len(field.axes) - np.ndim(array) :]
        for axis, size in zip(axes, np.shape(array), strict=True):
            if axis in chosen:
                sizes[axis] = max(sizes[axis], size)
    for axis, index in chosen.items():
        if sizes[axis] > 1 and not 0 <= index < sizes[axis]:
            raise ValueError(f"{axis} index {index} must be below {sizes[axis]}")

    def cut(array, axes):
        for at, axis in enumerate(axes):
            if axis in chosen and array.shape[at] > 1:
                index = slice(chosen[axis], chosen[axis] + 1)
                array = array[(slice(None),) * at + (index,)]
        return array

    return map_operands(cut, canonical(mask, sizes))
