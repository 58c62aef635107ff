"""Attention over a cache: the same as attention over whole sequences, row by row."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import oracle
import pallas_flash as pf
from conftest import MASKS, SCORE_MODS, Sizes, qkv
from tolerance import assert_as_good_as_plain, assert_close_to_oracle

BATCH, HEADS, DIM, VALUE_DIM = 3, 2, 16, 24
MAX_LEN = 40
# Of tokens that rows end up with.
LENGTHS = np.array([40, 23, 1], np.int32)


def sequences(length=MAX_LEN, dtype=jnp.float32):
    """q, k, v of whole sequences."""
    return qkv(Sizes(BATCH, length, length, 4, HEADS, DIM, VALUE_DIM), dtype)


def contiguous(dtype=jnp.float32, max_len=MAX_LEN, **options):
    return pf.KVCache.create(BATCH, max_len, HEADS, DIM, dtype, value_dim=VALUE_DIM, **options)


def paged(dtype=jnp.float32, reserve=MAX_LEN):
    cache = pf.PagedKVCache.create(
        BATCH, MAX_LEN, HEADS, DIM, dtype, value_dim=VALUE_DIM, num_pages=20, page_size=8
    )
    # Not in order: the last row takes the first pages.
    return cache.reserve(np.array([0, 0, reserve])).reserve(reserve)


CACHES = {"contiguous": contiguous, "paged": paged}


def causal(window=None):
    i = np.arange(MAX_LEN)
    seen = i[:, None] - i
    return (seen >= 0) & (seen < (window or MAX_LEN))


@functools.cache
def whole(window=None):
    """The oracle's out for every position of `sequences`."""
    return truth(sequences(), causal(window))


def truth(arrays, allowed, **options):
    """The oracle's out for every position, in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(functools.partial(oracle.attention, **options))(
            *arrays, allowed=allowed
        )[0])  # fmt: skip


def at(x, starts, size):
    """x [B, T, ...] at the positions starts[b] and the size - 1 after; zeros behind the end."""
    x = np.pad(np.asarray(x), ((0, 0), (0, size), *((0, 0),) * (x.ndim - 2)))
    return jnp.asarray(np.stack([row[s : s + size] for row, s in zip(x, starts)]))


@jax.jit
def step(cache, q, k, v, lengths=None):
    cache = cache.append(k, v, lengths)
    return pf.decode_attention(q, cache, lengths=lengths), cache


def assert_equal(out, want):
    assert_close_to_oracle(out, want, "out")


@pytest.mark.quick
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_prompt_then_single_tokens_equal_the_whole_sequence(make):
    q, k, v = sequences()
    want = whole()
    prompts = np.array([30, 13, 0], np.int32)
    out, cache = step(make(), *(x[:, :30] for x in (q, k, v)), prompts)
    for row, prompt in enumerate(prompts):
        assert_equal(out[row, :prompt], want[row, :prompt])
        assert (out[row, prompt:] == 0).all()
    for _ in range(3):
        now = np.asarray(cache.lengths)
        out, cache = step(cache, *(at(x, now, 1) for x in (q, k, v)))
        assert_equal(out, at(want, now, 1))
    np.testing.assert_array_equal(cache.lengths, prompts + 3)


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_several_queries_with_rows_of_any_number(make):
    q, k, v = sequences()
    want = whole()
    cache = make().append(k[:, :20], v[:, :20], np.array([20, 3, 0]))
    count = np.array([4, 0, 2], np.int32)
    new = [at(x, np.asarray(cache.lengths), 4) for x in (q, k, v)]
    out, cache = step(cache, *new, count)
    np.testing.assert_array_equal(cache.lengths, [24, 3, 2])
    for row, (start, n) in enumerate(zip([20, 3, 0], count)):
        assert_equal(out[row, :n], want[row, start : start + n])
        assert (out[row, n:] == 0).all()


def test_low_precision_is_as_good_as_plain_attention():
    q, k, v = sequences(dtype=jnp.bfloat16)
    cache = paged(jnp.bfloat16).append(k, v)
    out = jax.jit(pf.decode_attention)(q[:, -1:], cache)
    assert out.dtype == jnp.bfloat16
    plain = jax.jit(oracle.plain_attention_with_lse)(q, k, v, causal())[0]
    want = truth((q, k, v), causal())
    assert_as_good_as_plain(out, plain[:, -1:], want[:, -1:], "out", 2.0)


def test_float64():
    with jax.enable_x64(True):
        q, k, v = sequences(dtype=jnp.float64)
        cache = contiguous(jnp.float64).append(k, v)
        out = pf.decode_attention(q[:, -2:], cache)
        assert out.dtype == jnp.float64
        want = truth((q, k, v), causal())
        assert_close_to_oracle(out, want[:, -2:], "out", rtol=1e-13)


def ask_about_the_last_two(cache, arrays, **options):
    """out of the last two tokens of each row (the last row has one), and where they stand."""
    q, k, v = arrays
    cache = cache.append(k, v, LENGTHS)
    count = np.minimum(LENGTHS, 2)
    starts = LENGTHS - count
    out = pf.decode_attention(at(q, starts, 2), cache, lengths=count, **options)
    real = np.arange(2) < count[:, None]
    return out[real], lambda whole: np.asarray(at(whole, starts, 2))[real]


def sizes():
    return Sizes(BATCH, MAX_LEN, MAX_LEN, 4, HEADS, DIM, VALUE_DIM)


# Each reads its arrays, if it has any, along other axes.
POSITIONS = ["kv-lengths", "dense", "segments-in-any-order", "mask-mod"]
SCORES = ["softcap-then-bias", "relative-bias", "function", "bias-then-sinks"]


@pytest.mark.parametrize(
    ("name", "make"), [*((name, contiguous) for name in POSITIONS), ("dense", paged)]
)
def test_masks_see_positions_of_the_sequence(name, make):
    mask, allowed = MASKS[name](sizes())
    out, at_queries = ask_about_the_last_two(make(), sequences(), mask=mask)
    allowed = causal() if allowed is None else allowed & causal()
    assert_equal(out, at_queries(truth(sequences(), allowed)))


@pytest.mark.parametrize(
    ("name", "make"), [*((name, contiguous) for name in SCORES), ("bias", paged)]
)
def test_score_mods_see_positions_of_the_sequence(name, make):
    score = SCORE_MODS[name](sizes())
    out, at_queries = ask_about_the_last_two(make(), sequences(), score_mod=score.make(score.array))
    want = truth(
        sequences(),
        causal(),
        change=lambda s: score.change(s, score.array),
        sink=None if score.sink is None else score.sink(score.array),
    )
    assert_equal(out, at_queries(want))


LONG = Sizes(1, 140, 140, 2, 1, 8, 8)


def prompt(**options):
    """out of 130 queries at once behind ten tokens that were there, and what it should be."""
    q, k, v = qkv(LONG)
    cache = pf.KVCache.create(1, 140, 1, 8, jnp.float32).append(k[:, :10], v[:, :10])
    new = (x[:, 10:] for x in (q, k, v))
    out = jax.jit(
        lambda cache, q, k, v: pf.decode_attention(q, cache.append(k, v), **options)
    )(cache, *new)  # fmt: skip
    options["mask"] = pf.Causal() & options["mask"] if "mask" in options else pf.Causal()
    return out, pf.flash_attention(q, k, v, **options)[:, 10:]


def test_a_prompt_sees_positions_of_the_sequence():
    slopes = jnp.asarray(pf.alibi_slopes(2))
    out, want = prompt(
        mask=pf.SlidingWindow(30, 0) & pf.KvLengths(jnp.array([120])),
        score_mod=pf.Chain((pf.Alibi(slopes), pf.Sink(jnp.ones(2)), pf.Softcap(3.0))),
    )
    assert_close_to_oracle(out, want, "out")


def test_a_prompt_with_arrays_over_positions_goes_through_the_cache_in_parts():
    mask = pf.DenseMask(jax.random.bernoulli(jax.random.key(0), 0.5, (140, 140)))
    out, want = prompt(mask=mask)
    assert_close_to_oracle(out, want, "out")


# ---------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("window", [1, 7, 100])
def test_a_window_that_slides_over_a_ring(window):
    """The ring goes round several times; some steps add more tokens than others."""
    q, k, v = sequences()
    want = whole(window)
    cache = contiguous(window=window, max_queries=3)
    assert cache.num_slots <= max(8, window + 9)
    now = 0
    for size in (3, 1, 2, 3, 3, 1) * 2:
        new = (at(x, [now] * BATCH, 3) for x in (q, k, v))
        out, cache = step(cache, *new, np.full(BATCH, size))
        assert_equal(out[:, :size], want[:, now : now + size])
        now += size


def test_a_prompt_longer_than_the_ring():
    """It is dense attention; the ring keeps the end of each row."""
    q, k, v = sequences()
    prompts = np.array([38, 17, 2])
    cache = contiguous(window=7, max_queries=2).append(k, v, prompts)
    with pytest.raises(ValueError, match="38 queries .* SlidingWindow\\(6, 0\\)"):
        pf.decode_attention(q[:, :38], cache, lengths=prompts)
    want = whole(7)
    out, _ = step(cache, *(at(x, prompts, 2) for x in (q, k, v)))
    assert_equal(out, at(want, prompts, 2))


def test_a_prompt_over_a_ring():
    """More than one tile of queries: dense attention over the ring, in the order of positions."""
    q, k, v = qkv(Sizes(1, 120, 120, 4, 1, 8, 8))
    cache = pf.KVCache.create(1, 120, 1, 8, jnp.float32, window=20, max_queries=20)
    mask = pf.ChunkedCausal(33)
    want = pf.flash_attention(q, k, v, mask=mask & pf.SlidingWindow(19, 0))
    assert cache.is_ring
    run = jax.jit(
        lambda cache, q, k, v: (
            (cache := cache.append(k, v)), pf.decode_attention(q, cache, mask=mask)
        )
    )  # fmt: skip
    for now in range(0, 120, 20):
        here = slice(now, now + 20)
        cache, out = run(cache, q[:, here], k[:, here], v[:, here])
        assert_close_to_oracle(out, want[:, here], "out")


# ---------------------------------------------------------------------------------------------
# Going back, and rows that are used again


@pytest.mark.parametrize(
    "make", [contiguous, paged, functools.partial(contiguous, window=5, max_queries=4)],
    ids=["contiguous", "paged", "ring"],
)  # fmt: skip
def test_rejected_drafts_leave_no_trace(make):
    q, k, v = sequences()
    window = 5 if make not in (contiguous, paged) else None
    want = whole(window)
    cache = make()
    for now in range(0, 30, 2):
        right = [x[:, now : now + 4] for x in (q, k, v)]
        # The last two are wrong, and taken back.
        wrong = [x.at[:, 2:].set(99.0) for x in right]
        out, cache = step(cache, *wrong)
        assert_equal(out[:, :2], want[:, now : now + 2])
        cache = cache.rewind(2)


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_released_row_starts_anew_and_never_sees_what_was_there(make):
    q, k, v = sequences()
    cache = make().append(jnp.full_like(k, jnp.nan), jnp.full_like(v, jnp.nan))
    cache = cache.release(np.array([False, True, True]))
    np.testing.assert_array_equal(cache.lengths, [MAX_LEN, 0, 0])
    if make is paged:
        cache = cache.reserve(np.array([MAX_LEN, 9, 9]))
    count = np.array([0, 9, 9])
    out, cache = step(cache, q[:, :9], k[:, :9], v[:, :9], count)
    assert_equal(out[1:], whole()[1:, :9])


# ---------------------------------------------------------------------------------------------
# Pages


def named_pages(cache):
    table = np.asarray(cache.block_tables)
    return table[table >= 0]


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["known", "traced"])
def test_pages_are_neither_leaked_nor_given_twice(transform):
    rng = np.random.default_rng(0)
    cache = pf.PagedKVCache.create(6, 64, 1, 8, jnp.float32, num_pages=30, page_size=8)
    reserve = transform(lambda cache, lengths: cache.reserve(lengths))
    release = transform(lambda cache, which: cache.release(which))
    held = np.zeros(6, int)
    for _ in range(25):
        which = rng.random(6) < 0.3
        cache, held = release(cache, which), np.where(which, 0, held)
        wanted = np.maximum(held, rng.integers(0, 65, 6) * (rng.random(6) < 0.5))
        if (-(-wanted // 8)).sum() <= 30:
            cache, held = reserve(cache, wanted), -(-wanted // 8) * 8
        pages = named_pages(cache)
        assert len(set(pages)) == len(pages) == held.sum() // 8
        assert cache.num_free_pages == 30 - len(pages)
        np.testing.assert_array_equal((np.asarray(cache.block_tables) >= 0).sum(1) * 8, held)


def test_rows_keep_their_pages_when_others_grow():
    cache = paged(reserve=9)
    before = np.asarray(cache.block_tables)
    after = np.asarray(cache.reserve(np.array([9, 30, 9])).block_tables)
    had = before >= 0
    np.testing.assert_array_equal(after[had], before[had])


def test_a_shared_page_is_free_when_the_last_row_lets_it_go():
    cache = pf.PagedKVCache.create(2, 16, 1, 8, jnp.float32, num_pages=4, page_size=8)
    cache = cache.reserve(np.array([8, 0]))
    cache = dataclasses.replace(
        cache, block_tables=cache.block_tables.at[1, 0].set(cache.block_tables[0, 0])
    )
    assert cache.num_free_pages == 3
    # Released twice it is still the other row's.
    assert cache.release(0).release(0).num_free_pages == 3
    assert cache.release(0).release(1).num_free_pages == 4


def test_a_shared_page_is_not_written_to():
    cache = pf.PagedKVCache.create(2, 16, 1, 8, jnp.float32, num_pages=4, page_size=4)
    cache = cache.reserve(np.array([8, 0]))
    prefix = jnp.ones((2, 4, 1, 8))
    cache = cache.append(prefix, prefix, np.array([4, 0]))
    tables = cache.block_tables.at[1, 0].set(cache.block_tables[0, 0])
    shared = dataclasses.replace(cache, block_tables=tables, lengths=jnp.array([4, 4]))
    token = jnp.ones((2, 1, 1, 8))
    # Behind the common prefix each row writes to its own page.
    grown = shared.reserve(np.array([8, 8])).append(token, token)
    np.testing.assert_array_equal(grown.lengths, [5, 5])
    within = dataclasses.replace(shared, lengths=jnp.array([4, 3]))
    with pytest.raises(ValueError, match="row 1 would write to page 0, which other rows name too"):
        within.append(token, token, np.array([0, 1]))
    np.testing.assert_array_equal(within.append(token, token, np.array([1, 0])).lengths, [5, 3])


# ---------------------------------------------------------------------------------------------
# What goes wrong


def test_a_full_cache_is_an_error_where_lengths_are_known():
    _, k, v = sequences()
    for cache in (contiguous(), paged(), contiguous(window=3, max_queries=1)):
        cache = cache.append(k[:, :30], v[:, :30])
        with pytest.raises(ValueError, match=r"row 0 has 30 tokens, 11 more do not fit max_len=40"):
            cache.append(k[:, :11], v[:, :11], np.array([11, 10, 0]))


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_row_that_lost_a_token_gives_nan_until_it_is_released(make):
    q, k, v = sequences()
    cache = make().append(k, v, np.array([38, 38, 5]))
    out, cache = step(cache, q[:, :3], k[:, :3], v[:, :3], np.array([3, 2, 3]))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1:]).all()
    # Nothing was written over what is there, and later steps do not forget.
    out, cache = step(cache, q[:, :1], k[:, :1], v[:, :1], np.array([1, 0, 1]))
    assert np.isnan(out[0]).all() and np.isfinite(out[1:]).all()
    with pytest.raises(ValueError, match="row 0 of the cache is lost"):
        pf.decode_attention(q[:, :1], cache)
    rewound = jax.jit(lambda cache: cache.rewind(4))(cache)
    assert not rewound.is_valid[0]
    cache = cache.release(0)
    if make is paged:
        cache = cache.reserve(np.array([8, 40, 16]))
    out, cache = step(cache, q[:, :1], k[:, :1], v[:, :1], np.array([1, 0, 1]))
    assert np.isfinite(out).all()


def test_a_missing_page_is_an_error_or_nan():
    q, k, v = sequences()
    cache = paged(reserve=8).append(k[:, :8], v[:, :8])
    with pytest.raises(ValueError, match=r"row 1 lacks a page .* reserve\(cache.lengths \+ 1\)"):
        cache.append(k[:, :1], v[:, :1], np.array([0, 1, 0]))
    out, cache = step(cache, q[:, :1], k[:, :1], v[:, :1], np.array([0, 1, 0]))
    assert np.isnan(out[1]).all()
    assert (out[::2] == 0).all()
    # A page that comes too late does not bring the token back.
    cache = jax.jit(lambda cache: cache.reserve(16))(cache)
    assert not cache.is_valid[1]


def test_too_few_pages_are_an_error_or_no_page():
    cache = pf.PagedKVCache.create(3, 64, 1, 8, jnp.float32, num_pages=9, page_size=8)
    with pytest.raises(ValueError, match="need 11 more pages, 9 of num_pages=9 are free"):
        cache.reserve(np.array([64, 16, 8]))
    cache = jax.jit(lambda cache: cache.reserve(np.array([64, 16, 8])))(cache)
    np.testing.assert_array_equal((np.asarray(cache.block_tables) >= 0).sum(1), [8, 1, 0])


BAD_CALLS = {
    r"q must be .* \[3, 1 or more, a multiple of 2, 16\].*\(3, 1, 4, 15\)": (
        lambda cache, q: pf.decode_attention(q[..., :15], cache)
    ),
    "dtype=float32, got bfloat16": (
        lambda cache, q: pf.decode_attention(q.astype(jnp.bfloat16), cache)
    ),
    "num_q_heads=3 must be a multiple of num_kv_heads=2": (
        lambda cache, q: pf.decode_attention(q[:, :, :3], cache)
    ),
    "row 2 of the cache has 1 tokens, fewer than 2 queries": (
        lambda cache, q: pf.decode_attention(jnp.repeat(q, 2, 1), cache)
    ),
    "lengths=.* must be from 0 to 1": (
        lambda cache, q: pf.decode_attention(q, cache, lengths=np.array([2, 0, 0]))
    ),
    r"lengths must be an integer or \[batch\] = \[3\] integers": (
        lambda cache, q: pf.decode_attention(q, cache, lengths=np.ones(2, int))
    ),
    "DenseMask.array: .* must broadcast to .* 40, 40": (
        lambda cache, q: pf.decode_attention(q, cache, mask=pf.DenseMask(jnp.ones((1, 39), bool)))
    ),
    "backend='triton' must be one of": (
        lambda cache, q: pf.decode_attention(q, cache, backend="triton")
    ),
    "'hopper' cannot serve this request: dtype=float32": (
        lambda cache, q: pf.decode_attention(q, cache, backend="hopper")
    ),
    "k must have the cache's dtype=float32": (
        lambda cache, q: cache.append(*(x.astype(jnp.bfloat16) for x in sequences()[1:]))
    ),
    r"k must be \[batch, new tokens, 2, 16\] as in the cache": (
        lambda cache, q: cache.append(sequences()[1][:, 0], sequences()[2][:, 0])
    ),
    r"counts=.* must be from 0 to \[40 23  1\]": lambda cache, q: cache.rewind(2),
    r"rows=\[1 3\] must be from 0 to 2": lambda cache, q: cache.release(np.array([1, 3])),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_what_does_not_fit_is_an_error(message):
    q, k, v = sequences()
    cache = contiguous().append(k, v, LENGTHS)
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message](cache, q[:, :1])


def test_other_errors():
    q, k, v = sequences()
    with pytest.raises(TypeError, match="KVCache or PagedKVCache, got tuple"):
        pf.decode_attention(q, (k, v))
    with pytest.raises(ValueError, match="window=0 must be an integer of at least 1"):
        contiguous(window=0)
    sizes = np.array([2, 40, 2, 16])
    assert pf.KVCache.create(*sizes, jnp.float32).k.shape == (2, 40, 2, 16)
    with pytest.raises(ValueError, match="lengths=41 must be from 0 to 40"):
        paged().reserve(41)


# ---------------------------------------------------------------------------------------------
# Transformations


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_scan_that_generates_and_the_steps_one_by_one_agree(make):
    q, k, v = sequences()
    first = make().append(k[:, :8], v[:, :8])

    def body(cache, now):
        return step(cache, *(jax.lax.dynamic_slice_in_dim(x, now, 1, 1) for x in (q, k, v)))[::-1]

    _, out = jax.jit(lambda cache: jax.lax.scan(body, cache, jnp.arange(8, 20)))(first)
    assert_equal(jnp.moveaxis(out[:, :, 0], 0, 1), whole()[:, 8:20])


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_donated_cache_is_not_copied(make):
    q, k, v = (x[:, :1] for x in sequences())
    compiled = jax.jit(step, donate_argnums=0).lower(make(), q, k, v).compile()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(make()))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.9 * cache_bytes


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_gradients_are_refused(make):
    q, k, v = sequences()
    cache = make().append(k, v)
    with pytest.raises(NotImplementedError, match="decode_attention is not differentiable"):
        jax.grad(lambda q: pf.decode_attention(q, cache).sum())(q[:, -1:])


@pytest.mark.parametrize("make", [contiguous, functools.partial(contiguous, window=5)])
def test_vmap_over_caches(make):
    q, k, v = sequences()
    rows = [jax.tree.map(lambda x: x[i : i + 1], (q, k, v)) for i in range(BATCH)]
    one = dataclasses.replace(make(), **{n: getattr(make(), n)[:1] for n in ("k", "v", "lengths")})
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    caches = stack(*(one.append(k, v, int(n)) for (_, k, v), n in zip(rows, LENGTHS)))
    ends = stack(*(q[:, n - 1 : n] for (q, _, _), n in zip(rows, LENGTHS)))
    out = jax.vmap(pf.decode_attention)(ends, caches)
    want = whole(make().window)
    assert_equal(out[:, 0], at(want, LENGTHS - 1, 1))


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_batch_and_heads_may_be_split_over_devices(make):
    q, k, v = (jnp.concatenate([x, x[:1]]) for x in sequences())
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    lengths = np.append(LENGTHS, 7)
    cache = jax.tree.map(lambda x: x, make())
    cache = type(cache).create(
        4, MAX_LEN, HEADS, DIM, jnp.float32, value_dim=VALUE_DIM,
        **({"num_pages": 30, "page_size": 8} if make is paged else {}),
    )  # fmt: skip
    cache = (cache.reserve(MAX_LEN) if make is paged else cache).append(k, v, lengths)
    want = pf.decode_attention(at(q, lengths - 1, 1), cache)
    # Pages belong to all rows: only their heads are split.
    tokens = PartitionSpec(None if make is paged else "data", None, "model")
    split = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, tokens if x.ndim == 4 else PartitionSpec("data"))
        ),
        cache,
    )
    queries = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = jax.jit(pf.decode_attention).lower(
            jax.device_put(at(q, lengths - 1, 1), queries), split
        ).compile()  # fmt: skip
    assert "all-gather" not in compiled.as_text()
    out = compiled(jax.device_put(at(q, lengths - 1, 1), queries), split)
    assert_equal(out, np.asarray(want, np.float64))
    assert out.sharding.is_equivalent_to(queries, 4)


def test_memory_of_the_plain_path_does_not_grow_with_the_cache():
    def temporaries(length):
        cache = jax.eval_shape(lambda: pf.KVCache.create(1, length, 1, 16, jnp.float32))
        q = jax.ShapeDtypeStruct((1, 1, 4, 16), jnp.float32)
        compiled = jax.jit(pf.decode_attention).lower(q, cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2**16) <= temporaries(2**12) + 2**12


# ---------------------------------------------------------------------------------------------
# Backends


def low_precision_call(**options):
    q, k, v = sequences(dtype=jnp.bfloat16)
    cache = contiguous(jnp.bfloat16, **options)
    return q[:, :1], cache.append(k[:, :1], v[:, :1])


def test_a_named_backend_never_falls_back():
    run = jax.jit(functools.partial(pf.decode_attention, backend="hopper"))
    with pytest.raises(ValueError, match="'hopper' needs an NVIDIA GPU"):
        run(*low_precision_call())


@pytest.mark.parametrize("options", [{}, {"window": 5}], ids=["whole", "window"])
def test_the_default_lowers_to_the_kernel_for_cuda_and_to_plain_jax_elsewhere(options):
    traced = jax.jit(pf.decode_attention).trace(*low_precision_call(**options))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_prompt_lowers_to_the_dense_kernel_for_cuda():
    q, k, v = sequences(dtype=jnp.bfloat16)
    cache = contiguous(jnp.bfloat16, window=30, max_queries=33)
    run = functools.partial(pf.decode_attention, mask=pf.ChunkedCausal(8))
    traced = jax.jit(run).trace(q[:, :33], cache.append(k[:, :33], v[:, :33]))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "flash_attention_forward" in text and "flash_decode" not in text


def test_reasons_are_explained():
    q, cache = low_precision_call()
    reasons = pf.explain_decode(q, cache)
    assert "needs an NVIDIA GPU" in reasons["hopper"] and reasons["blockwise"] is None
    reasons = pf.explain_decode(q, cache, mask=pf.SlidingWindow(3, 0))
    assert reasons["hopper"] == "masks are not in the Hopper decode kernel: SlidingWindow"
    small = pf.PagedKVCache.create(3, 40, 2, 16, jnp.bfloat16, num_pages=9, page_size=12)
    # It need not hold anything yet.
    assert "page_size=12" in pf.explain_decode(q, small)["hopper"]
