"""Masks: the algebra, the classification of blocks, the schedule, all against brute force."""

import tracemalloc

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")
from matplotlib import pyplot

import pallas_flash as pf
from conftest import MASKS, Sizes
from pallas_flash.masks import BlockKind, schedule
from pallas_flash.masks.mask import conjuncts
from pallas_flash.terms import Tile, map_operands

SIZES = Sizes(batch=3, q_len=37, kv_len=45)
BLOCKS = [(8, 16), (16, 8), (5, 7), (37, 45), (1, 1)]


def cut(block_q, block_kv) -> schedule.Blocks:
    return schedule.Blocks(SIZES.q_len, SIZES.kv_len, block_q, block_kv, SIZES.batch)


def dense(mask, sizes) -> np.ndarray:
    """bool [B, Hq, Tq, Tkv] from the mask's own `allowed`."""
    whole = Tile(sizes.batch, 0, sizes.q_len, 0, sizes.kv_len, sizes.q_len)
    shape = (sizes.batch, sizes.num_q_heads, sizes.q_len, sizes.kv_len)
    if mask is None:
        return np.ones(shape, bool)
    mask = mask.bind(sizes.q_len, sizes.kv_len)

    def align(array, axes):
        array = jnp.asarray(array)
        return whole.align(array.reshape((1,) * (len(axes) - array.ndim) + array.shape), axes)

    allowed = map_operands(align, mask).allowed(*whole.positions())
    return np.array(np.broadcast_to(allowed, shape))


@pytest.mark.quick
@pytest.mark.parametrize("name", MASKS)
def test_allowed_is_what_the_name_says(name):
    mask, allowed = MASKS[name](SIZES)
    np.testing.assert_array_equal(
        dense(mask, SIZES), np.broadcast_to(True if allowed is None else allowed, (3, 4, 37, 45))
    )


@pytest.mark.parametrize("block_q, block_kv", BLOCKS)
@pytest.mark.parametrize("name", MASKS)
def test_block_kinds_are_safe(name, block_q, block_kv):
    mask, _ = MASKS[name](SIZES)
    bound = None if mask is None else mask.bind(SIZES.q_len, SIZES.kv_len)
    blocks = cut(block_q, block_kv)
    kinds = schedule.block_kinds(bound, blocks, np.arange(blocks.num_q), np.arange(blocks.num_kv))
    assert isinstance(kinds, np.ndarray) == (not jax.tree.leaves(mask))
    truth = dense(mask, SIZES)
    kinds = np.broadcast_to(kinds, (*truth.shape[:2], *kinds.shape[2:]))
    for b, h, i, j in np.ndindex(*kinds.shape):
        block = truth[b, h, i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
        if kinds[b, h, i, j] == BlockKind.SKIP:
            assert not block.any()
        if kinds[b, h, i, j] == BlockKind.FULL:
            assert block.all() and block.shape[1] == block_kv


EXACT = ("causal", "causal-bottom-right", "window", "kv-lengths", "prefix-lm", "chunked-causal")


@pytest.mark.parametrize("name", EXACT)
def test_block_kinds_are_exact_for_structured_masks(name):
    mask, _ = MASKS[name](SIZES)
    bound = mask.bind(SIZES.q_len, SIZES.kv_len)
    blocks = cut(8, 5)
    numbers = np.arange(blocks.num_q), np.arange(blocks.num_kv)
    kinds = np.asarray(schedule.block_kinds(bound, blocks, *numbers))
    truth = dense(mask, SIZES)
    for b, i, j in np.ndindex(3, *kinds.shape[2:]):
        block = truth[b, 0, i * 8 : (i + 1) * 8, j * 5 : (j + 1) * 5]
        kind = BlockKind.FULL if block.all() else BlockKind.PARTIAL
        kind = kind if block.any() else BlockKind.SKIP
        assert kinds[b if kinds.shape[0] > 1 else 0, 0, i, j] == kind


@pytest.mark.parametrize("by_queries", [True, False], ids=["keys", "queries"])
@pytest.mark.parametrize("name", MASKS)
def test_ranges_are_what_is_allowed(name, by_queries):
    """Joined by ``&`` those that have one allow what the mask allows, if all of them have one."""
    mask, _ = MASKS[name](SIZES)
    bound = None if mask is None else mask.bind(SIZES.q_len, SIZES.kv_len)
    own, other = (SIZES.q_len, SIZES.kv_len) if by_queries else (SIZES.kv_len, SIZES.q_len)
    own, other = np.arange(own)[:, None], np.arange(other)[None, :]
    inside = np.ones((SIZES.batch, own.size, other.size), bool)
    for part in conjuncts(bound):
        part = jax.tree.map(lambda x: x.reshape(-1, 1, 1) if x.size == SIZES.batch else x, part)
        found = part.kv_range(own) if by_queries else part.q_range(own)
        if found is None:
            return
        first, end = found
        inside &= np.asarray((first is None) | (other >= (0 if first is None else first)))
        inside &= np.asarray((end is None) | (other < (0 if end is None else end)))
    truth = dense(mask, SIZES)
    want = truth if by_queries else truth.swapaxes(2, 3)
    np.testing.assert_array_equal(np.broadcast_to(inside[:, None], want.shape), want)


@pytest.mark.parametrize("seed", range(20))
def test_runs_visit_every_block_and_mask_every_partial_one(seed):
    kinds = np.random.default_rng(seed).choice(3, p=[0.5, 0.2, 0.3], size=(2, 1, 6, 9))
    kinds[0, 0, 0], kinds[0, 0, 1], kinds[0, 0, 2] = 0, 2, 1
    for runs in (schedule.runs(kinds), np.asarray(schedule.runs(jnp.asarray(kinds)))):
        assert runs.shape == (2, 1, 6, 4)
        for at in np.ndindex(2, 1, 6):
            row, (first, full_first, full_last, last) = kinds[at], runs[at]
            assert 0 <= first <= full_first <= full_last <= last <= 9
            visited = np.flatnonzero(row)
            assert (first, last) == (
                (visited[0], visited[-1] + 1) if visited.size else (last, last)
            )
            assert (row[full_first:full_last] == BlockKind.FULL).all()
            assert (full_last > full_first) == (row == BlockKind.FULL).any()


def test_causal_schedule_skips_half_and_masks_only_the_diagonal():
    blocks = schedule.Blocks(1024, 1024, 128, 128, 1)
    runs = schedule.kv_schedule(pf.Causal(), blocks)[0, 0]
    np.testing.assert_array_equal(runs[:, schedule.LAST], np.arange(1, 9))
    np.testing.assert_array_equal(runs[1:, schedule.FULL_FIRST], np.zeros(7))
    np.testing.assert_array_equal(runs[1:, schedule.FULL_LAST], np.arange(1, 8))
    runs = schedule.q_schedule(pf.Causal(), blocks)[0, 0]
    np.testing.assert_array_equal(runs[:, schedule.FIRST], np.arange(8))
    np.testing.assert_array_equal(runs[:, schedule.LAST], np.full(8, 8))


@pytest.mark.parametrize("name", MASKS)
def test_schedule_made_in_parts_is_the_same(name, monkeypatch):
    mask, _ = MASKS[name](SIZES)
    bound = None if mask is None else mask.bind(SIZES.q_len, SIZES.kv_len)
    make = (schedule.kv_schedule, schedule.q_schedule)
    whole = [np.asarray(f(bound, cut(4, 7))) for f in make]
    monkeypatch.setattr(schedule, "BLOCKS_AT_A_TIME", 40)
    for a, f in zip(whole, make, strict=True):
        np.testing.assert_array_equal(a, f(bound, cut(4, 7)))


def test_schedule_of_a_million_tokens_takes_little_memory():
    """All 2^26 blocks at once would be 256 MiB for each number that is kept of them."""
    tracemalloc.start()
    runs = schedule.kv_schedule(pf.Causal(), schedule.Blocks(2**20, 2**20, 128, 128, 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert runs.shape == (1, 1, 2**13, 4)
    assert peak < 64 * 2**20


@pytest.mark.parametrize("combine", [lambda a, b: a and b, lambda a, b: a or b, lambda a, b: not a])
def test_boolean_operators_raise(combine):
    with pytest.raises(TypeError, match="combine masks with &, | and ~"):
        combine(pf.Causal(), pf.SlidingWindow(3))


def test_bad_masks_raise():
    with pytest.raises(ValueError, match="align='left' must be 'top_left' or 'bottom_right'"):
        pf.Causal("left")
    with pytest.raises(ValueError, match="left=-1 must be 0 or more"):
        pf.SlidingWindow(-1)
    with pytest.raises(ValueError, match="right=-2 must be 0 or more"):
        pf.SlidingWindow(None, -2)
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        pf.ChunkedCausal(0)
    with pytest.raises(TypeError, match="chunk=1.5 must be an integer"):
        pf.ChunkedCausal(1.5)
    with pytest.raises(TypeError, match="unsupported operand"):
        pf.Causal() & True


def test_segments_skip_and_fill_blocks():
    """Sorted ids: exact but for padding. A permutation of ids: by the bounds of each block."""
    lengths, block = [10, 0, 30, 8], 8
    ids = pf.segment_ids_from_cu_seqlens(np.cumsum([0, *lengths]), 56)
    mask = pf.SegmentIds(ids[None], ids[None])
    blocks = schedule.Blocks(56, 56, block, block, 1)
    numbers = np.arange(7), np.arange(7)
    kinds = np.asarray(schedule.block_kinds(mask, blocks, *numbers))[0, 0]
    truth = dense(mask, Sizes(batch=1, q_len=56, kv_len=56))[0, 0].reshape(7, block, 7, block)
    want = truth.any((1, 3)) * 1 + truth.all((1, 3))
    np.testing.assert_array_equal(kinds, want)
    assert (kinds == BlockKind.FULL).sum() == 1 + 9 + 1
    mixed = pf.SegmentIds(jnp.array([[5, 3, 1, 1, 9, 7]]), jnp.array([[4, 2, 1, 1, 8, 8]]))
    kinds = np.asarray(
        schedule.block_kinds(mixed, schedule.Blocks(6, 6, 2, 2, 1), np.arange(3), np.arange(3))
    )
    np.testing.assert_array_equal(kinds[0, 0], [[1, 0, 0], [0, 2, 0], [0, 0, 1]])


def test_segment_ids_from_cumulative_lengths():
    ids = pf.segment_ids_from_cu_seqlens([0, 2, 2, 5], 7)
    np.testing.assert_array_equal(ids, [0, 0, 2, 2, 2, -1, -1])
    under_jit = jax.jit(lambda cu: pf.segment_ids_from_cu_seqlens(cu, 7))
    np.testing.assert_array_equal(under_jit(jnp.array([0, 2, 2, 5])), ids)
    for wrong in ([1, 2], [0, 3, 2], [0, 8], []):
        with pytest.raises(ValueError, match=r"cu_seqlens"):
            pf.segment_ids_from_cu_seqlens(np.array(wrong, np.int32), 7)
    with pytest.raises(ValueError, match=r"must be \[n \+ 1\] integers, got float32\[2\]"):
        pf.segment_ids_from_cu_seqlens(jnp.ones(2), 7)


PICTURES = {
    "causal": (
        pf.Causal(),
        (4, 5),
        {},
        ["#....", "##...", "###..", "####."],
    ),
    "causal-blocks": (
        pf.Causal(),
        (6, 6),
        {"block_q": 2, "block_kv": 2},
        ["/..", "#/.", "##/"],
    ),
    "segments-of-a-row": (
        pf.SegmentIds(jnp.array([[0, 0, 0], [0, 1, 1]])),
        (3, 3),
        {"batch": 1},
        ["#..", ".##", ".##"],
    ),
    "dense-of-a-head": (
        pf.DenseMask(jnp.array([[[True]], [[False]]])),
        (1, 2),
        {"head": 1},
        [".."],
    ),
    "default-blocks": (pf.ChunkedCausal(128), (256, 300), {}, ["/..", "./."]),
}


@pytest.mark.parametrize("mask, lengths, options, want", PICTURES.values(), ids=PICTURES.keys())
def test_pictures(mask, lengths, options, want):
    assert mask.show(*lengths, **options).split("\n") == want
    shown = mask.plot(*lengths, ax=pyplot.figure().add_subplot(), **options).images[0].get_array()
    assert ["".join("./#"[kind] for kind in row) for row in shown] == want
    pyplot.close("all")


def test_pictures_that_do_not_exist():
    with pytest.raises(ValueError, match="300 x 300 blocks must have at most 256"):
        pf.Causal().show(300, 300, block_q=1, block_kv=1)
    with pytest.raises(ValueError, match="batch index 2 must be below 2"):
        pf.KvLengths(jnp.array([1, 2])).show(3, 3, batch=2)


# A function of positions, and whether its blocks' kinds are known exactly.
FUNCTIONS = {
    "causal": (lambda q, k: q >= k, True),
    "window": (lambda q, k: (q >= k) & (q - k <= 11), True),
    "either": (lambda q, k: (k < 7) | ~(k - 5 <= q), True),
    "chunks": (lambda q, k: q // 16 == k // 16, False),
    "dilated": (lambda q, k: (q - k) % 4 == 0, False),
    "far": (lambda q, k: jnp.abs(q - k) * 2 > 30, True),
    "selected": (lambda q, k: jnp.where(q < 16, k < 16, k >= q), False),
    "clipped": (lambda q, k: jnp.minimum(q, 20) >= jnp.maximum(k, 9), True),
    "wraps-around": (lambda q, k: q * 2**30 < k, False),
    "everything": (lambda q, k: True, True),
    "by-floats": (lambda q, k: q * 0.5 < k, False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_blocks_of_a_users_function_are_classified_safely(name):
    function, is_exact = FUNCTIONS[name]
    blocks = schedule.Blocks(64, 80, 8, 16, 1)
    kinds = schedule.block_kinds(pf.MaskMod(function), blocks, np.arange(8), np.arange(5))[0, 0]
    q, k = jnp.arange(64, dtype=jnp.int32)[:, None], jnp.arange(80, dtype=jnp.int32)[None, :]
    allowed = np.broadcast_to(function(q, k), (64, 80)).reshape(8, 8, 5, 16)
    full, some = allowed.all((1, 3)), allowed.any((1, 3))
    assert full[kinds == BlockKind.FULL].all() and not some[kinds == BlockKind.SKIP].any()
    if is_exact:
        np.testing.assert_array_equal(kinds, full.astype(int) + some)
    # What is not exact is not wholly unknown either, unless nothing can be known.
    assert (kinds != BlockKind.PARTIAL).any() == (
        name not in ("dilated", "wraps-around", "by-floats")
    )
