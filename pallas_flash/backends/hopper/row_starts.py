"""S of the backward begins as -lse, and dP as -delta: numbers of the queries, added by products.

The accumulators of S^T and dP^T have queries along columns: every warp would have to read the
numbers of all of them from SMEM into registers ahead of the product, a sixth of all that leaves
SMEM at head_dim 64, and a fifth of a step's time (ncu, H100). In place of that each product has one
more step along its sum. Its left operand selects, by ones and zeros, columns of a matrix with a row
for each query, in which a float32 number is the sum of three bfloat16 ones: exactly.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.backends.hopper.products import INSTRUCTION_ROWS, STEP, Pair

# Which of the selectors.
S, DP = 0, 1
# bfloat16 numbers of a float32 one, and the numbers of its significand that each has.
NUM_PARTS, PART_BITS = 3, 7
# In GMEM: TMA wants rows of at least 16 bytes.
NUM_COLUMNS = 8
DTYPE = jnp.bfloat16


def columns_of(s_start: Any, dp_start: Any) -> Any:
    """[..., 8] bfloat16 for each query: the parts of what S begins as, and of what dP begins as.

    A product takes 16; TMA fills up with zeros.

    s_start, dp_start: [...] float32, or one of them None: it begins as 0. An infinite number
    becomes the largest: it must not meet the other selector's zeros.
    """
    (shape,) = {x.shape for x in (s_start, dp_start) if x is not None}
    column = lax.broadcasted_iota(jnp.int32, (*shape, NUM_COLUMNS), len(shape))
    found = jnp.zeros(column.shape, jnp.float32)
    for which, start in ((S, s_start), (DP, dp_start)):
        for i, part in enumerate([] if start is None else _parts(start)):
            found = jnp.where(column == which * NUM_PARTS + i, part[..., None], found)
    return found.astype(DTYPE)


def _parts(x: Any) -> list[Any]:
    largest = float(jnp.finfo(DTYPE).max)
    rest, parts = jnp.clip(x, -largest, largest), []
    for _ in range(NUM_PARTS):
        # A conversion to bfloat16 and back XLA may leave out.
        parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=PART_BITS))
        rest = rest - parts[-1]
    return parts


def selectors() -> Any:
    """[2, 64, 16] bfloat16: left operands that add up the parts of S, and those of dP."""
    owner = np.arange(STEP) // NUM_PARTS
    rows = np.stack([owner == S, owner == DP])[:, None]
    return jnp.asarray(np.broadcast_to(rows, (2, INSTRUCTION_ROWS, STEP)), DTYPE)


def pair(smem: Any, which: int, slot: Any) -> Pair:
    """Operands of the step that adds what S or dP of the queries in a stage begins as."""
    return Pair(smem.selectors.at[which], smem.starts.at[slot], STEP)
