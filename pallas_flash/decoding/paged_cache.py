"""PagedKVCache: the keys and values of many rows in pages of one pool."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.decoding import rows

MISSING = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """A cache whose rows take pages of a common pool as they grow; by `PagedKVCache.create`.

    A page is in use while a block table names it: there is no other account of pages that could
    disagree. `reserve` gives rows the pages that they lack, `release` takes all of a row's. Rows
    may share the pages of a common prefix (write their block tables yourself); a page is free when
    the last of them is released. A pytree, as `KVCache` is; methods return a new cache.

    A row that a token did not fit (no page, or beyond max_len) is lost: its length becomes
    ``max_len + 1``, and attention gives NaN for it until `release`. Where the numbers are known
    (outside of `jit`) this raises instead.

    Fields:
      k_pages: [num_pages, page_size, Hkv, D].
      v_pages: [num_pages, page_size, Hkv, Dv].
      block_tables: [B, pages_per_row] int32: position p of row b is in slot ``p % page_size`` of
        page ``block_tables[b, p // page_size]``; -1 is no page.
      lengths: [B] int32, number of tokens of each row.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    block_tables: jax.Array
    lengths: jax.Array

    @classmethod
    def create(
        cls,
        batch: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        *,
        num_pages: int,
        page_size: int = 64,
        value_dim: int | None = None,
    ) -> "PagedKVCache":
        """A cache without tokens, all its pages free. max_len is rounded up to whole pages.

        Raises:
          ValueError: if a size is not positive.
        """
        value_dim = head_dim if value_dim is None else value_dim
        rows.check_sizes(batch=batch, max_len=max_len, num_kv_heads=num_kv_heads)
        rows.check_sizes(head_dim=head_dim, value_dim=value_dim)
        rows.check_sizes(num_pages=num_pages, page_size=page_size)
        return cls(
            jnp.zeros((num_pages, page_size, num_kv_heads, head_dim), dtype),
            jnp.zeros((num_pages, page_size, num_kv_heads, value_dim), dtype),
            jnp.full((batch, -(-max_len // page_size)), MISSING, jnp.int32),
            jnp.zeros(batch, jnp.int32),
        )

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[1]

    @property
    def num_slots(self) -> int:
        """Of a row with all its pages."""
        return self.block_tables.shape[1] * self.page_size

    max_len = num_slots
    max_queries = num_slots
    window = None

    @property
    def is_valid(self) -> jax.Array:
        """[B] bool: whether a row has lost nothing and names a page for each of its tokens."""
        start = jnp.arange(self.block_tables.shape[1]) * self.page_size
        is_missing = self._names_no_page(self.block_tables) & (start < self.lengths[:, None])
        return (self.lengths <= self.max_len) & ~is_missing.any(1)

    @property
    def is_used(self) -> jax.Array:
        """[num_pages] bool: which pages a block table names."""
        pages = jnp.where(
            self._names_no_page(self.block_tables), len(self.k_pages), self.block_tables
        )
        return jnp.zeros(len(self.k_pages), bool).at[pages.ravel()].set(True, mode="drop")

    @property
    def num_free_pages(self) -> jax.Array:
        return (~self.is_used).sum(dtype=jnp.int32)

    def _names_no_page(self, pages: jax.Array) -> jax.Array:
        return (pages < 0) | (pages >= len(self.k_pages))

    def reserve(self, lengths: Any) -> "PagedKVCache":
        """The cache with pages for rows of `lengths` ([B] or one integer) tokens in all.

        Rows keep the pages that they have. In `jit`, where pages run out the last rows get none.

        Raises:
          ValueError: outside of `jit`, if lengths are not in 0..max_len, or too few pages are free.
        """
        batch, per_row = self.block_tables.shape
        lengths = rows.check_counts(lengths, "lengths", batch, self.max_len)
        first_slot = jnp.arange(per_row) * self.page_size
        lacks = self._names_no_page(self.block_tables) & (first_slot < lengths[:, None])
        if numbers := rows.known(lacks, self.num_free_pages):
            needed, free = int(numbers[0].sum()), int(numbers[1])
            if needed > free:
                raise ValueError(
                    f"the rows need {needed} more pages, {free} of num_pages={len(self.k_pages)} "
                    "are free: release rows first"
                )
        (free_pages,) = jnp.nonzero(~self.is_used, size=lacks.size, fill_value=MISSING)
        rank = jnp.cumsum(lacks.ravel()).reshape(lacks.shape) - 1
        new = free_pages.astype(jnp.int32)[rank]
        return dataclasses.replace(self, block_tables=jnp.where(lacks, new, self.block_tables))

    def release(self, which: Any) -> "PagedKVCache":
        """The cache with some rows (their numbers, or [B] bool) empty and without pages."""
        is_released = rows.selected(which, len(self.lengths))
        return dataclasses.replace(
            self,
            block_tables=jnp.where(is_released[:, None], MISSING, self.block_tables),
            lengths=jnp.where(is_released, 0, self.lengths),
        )

    def append(self, k: jax.Array, v: jax.Array, lengths: Any = None) -> "PagedKVCache":
        """The cache with new tokens behind those of each row, on pages that are reserved.

        A page that several rows share must not be written to: let new tokens begin on a page of the
        row's own. In `jit`, where tables are not known, nobody checks that.

        Args:
          k: [B, T, Hkv, D] of the cache's dtype.
          v: [B, T, Hkv, Dv].
          lengths: [B] integer, how many of the T tokens of each row are real, the first ones; None
            for all of them. Traced numbers outside of 0..T are clipped.

        Raises:
          ValueError: if shapes or dtypes do not fit the cache, or, outside of `jit`, if lengths are
            not in 0..T, a row would grow beyond max_len, or a token has no page, or one that other
            rows name too.
        """
        rows.check_new_tokens(k, v, self.k_pages, self.v_pages)
        count = rows.check_counts(lengths, "lengths", *k.shape[:2])
        rows.check_room(self.lengths, count, self.max_len)
        if numbers := rows.known(self.block_tables, self.lengths, count):
            _check_own_pages(self.page_size, *numbers)
        cache, is_lost = _append(self, k, v, count)
        if (numbers := rows.known(is_lost)) and numbers[0].any():
            row = int(numbers[0].argmax())
            raise ValueError(
                f"row {row} lacks a page for its new tokens: call "
                f"reserve(cache.lengths + {int(count[row])}) before"
            )
        return cache

    def rewind(self, counts: Any) -> "PagedKVCache":
        """The cache without the last `counts` ([B] or one integer) tokens; rows keep their pages.

        Raises:
          ValueError: outside of `jit`, if counts are negative or more than a row has.
        """
        return dataclasses.replace(self, lengths=rows.rewound(self, counts, self.lengths))

    def read(self, start: Any, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """k, v and positions [1, size] of the slots from `start` on, through the block tables."""
        slot = start + jnp.arange(size, dtype=jnp.int32)
        # A missing page reads another: only lost rows do.
        page = jnp.clip(self.block_tables[:, slot // self.page_size], 0, len(self.k_pages) - 1)
        k, v = (x[page, slot % self.page_size] for x in (self.k_pages, self.v_pages))
        return k, v, slot[None]

    def in_order(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """k, v [B, slots, ...] copied together, and the position of the first slot, 0: [B]."""
        k, v, _ = self.read(0, self.num_slots)
        return k, v, jnp.zeros_like(self.lengths)


def _check_own_pages(
    page_size: int, tables: np.ndarray, lengths: np.ndarray, counts: np.ndarray
) -> None:
    """Refuses new tokens on a page that is named twice."""
    pages, times = np.unique(tables[tables >= 0], return_counts=True)
    shared = pages[times > 1]
    first = np.arange(tables.shape[1]) * page_size
    is_written = (first < (lengths + counts)[:, None]) & (first + page_size > lengths[:, None])
    is_bad = is_written & (counts > 0)[:, None] & np.isin(tables, shared)
    if is_bad.any():
        row, index = np.argwhere(is_bad)[0]
        raise ValueError(
            f"row {row} would write to page {tables[row, index]}, which other rows name too: give "
            "it a page of its own before"
        )


@jax.jit
def _append(
    cache: PagedKVCache, k: jax.Array, v: jax.Array, count: jax.Array
) -> tuple[PagedKVCache, jax.Array]:
    """The cache with count[b] tokens more in row b, and which rows lost one: [B] bool."""
    num_pages, page_size = cache.k_pages.shape[:2]
    pos, is_real = rows.new_positions(cache.lengths, count, k.shape[1])
    index = jnp.minimum(pos // page_size, cache.block_tables.shape[1] - 1)
    page = jnp.take_along_axis(cache.block_tables, index, 1)
    fits = is_real & (pos < cache.max_len) & (page >= 0) & (page < num_pages)
    is_lost = (is_real & ~fits).any(1)
    page = jnp.where(fits, page, num_pages)

    def put(pages, new):
        return pages.at[page, pos % page_size].set(new, mode="drop", unique_indices=True)

    new = dataclasses.replace(
        cache,
        k_pages=put(cache.k_pages, k),
        v_pages=put(cache.v_pages, v),
        lengths=rows.grown(cache.lengths, count, is_lost, cache.max_len),
    )
    return new, is_lost
