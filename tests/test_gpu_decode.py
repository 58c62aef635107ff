"""Attention over a cache on a Hopper GPU, through the public API: `make test-gpu`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import normal
from tolerance import assert_as_good_as_plain

pytestmark = pytest.mark.gpu

# Tokens of each row: none, one, around the size of a block, many.
LENGTHS = np.array([0, 1, 63, 64, 65, 1000, 4097], np.int32)
MAX_LEN = 4100


def caches(k, v, page_size, window):
    """A cache, poisoned where it holds nothing, of sequences k, v."""
    batch, _, heads, dim = k.shape
    sizes = (batch, MAX_LEN, heads, dim, k.dtype)
    if page_size is None:
        cache = pf.KVCache.create(*sizes, value_dim=v.shape[-1], window=window, max_queries=16)
        fields = ("k", "v")
    else:
        num_pages = sum(-(-n // page_size) for n in LENGTHS) + 3
        cache = pf.PagedKVCache.create(
            *sizes, value_dim=v.shape[-1], num_pages=num_pages, page_size=page_size
        )
        for part in (7, 3, 1):
            cache = cache.reserve(LENGTHS // part)
        fields = ("k_pages", "v_pages")
    nan = {name: jnp.full_like(getattr(cache, name), jnp.nan) for name in fields}
    return jax.jit(lambda cache, k, v: cache.append(k, v, LENGTHS))(
        dataclasses.replace(cache, **nan), k, v
    )


def check(record, *, q_len=1, heads=(8, 2), dims=(128, 128), dtype=jnp.bfloat16, page_size=None,
          window=None):  # fmt: skip
    batch, longest = len(LENGTHS), int(LENGTHS.max())
    counts = np.minimum(LENGTHS, q_len)
    q = normal(0, batch, q_len, heads[0], dims[0], dtype=dtype)
    k = normal(1, batch, longest, heads[1], dims[0], dtype=dtype)
    v = normal(2, batch, longest, heads[1], dims[1], dtype=dtype)
    cache = caches(k, v, page_size, window)
    decode = jax.jit(
        lambda q, cache: pf.decode_attention(q, cache, lengths=counts, backend="hopper")
    )
    out = decode(q, cache)
    assert out.dtype == dtype
    i = np.arange(q_len)
    q_pos = ((LENGTHS - counts)[:, None] + i)[:, None, :, None]
    kv_pos = np.arange(longest)
    allowed = (kv_pos <= q_pos) & (kv_pos > q_pos - (window or longest + 1))
    allowed &= (i < counts[:, None])[:, None, :, None]
    qkv = [np.asarray(x) for x in (q, k, v)]
    with oracle.on_host():
        plain = jax.jit(oracle.plain_attention_with_lse)(*qkv, allowed)[0]
        with jax.enable_x64(True):
            truth = np.asarray(jax.jit(oracle.attention)(*qkv, allowed=allowed)[0])
    record("error_out", float(np.abs(np.asarray(out, np.float64) - truth).max()))
    assert_as_good_as_plain(out, plain, truth, "out", 2.0)
    for _ in range(20):
        assert (decode(q, cache) == out).all()


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *((d, jnp.bfloat16) for d in (16, 24, 40, 64, 80, 96, 128, 192, 256)),
        *((d, jnp.float16) for d in (16, 64, 256)),
    ],
)
def test_any_head_dim(head_dim, dtype, record_property):
    check(record_property, dims=(head_dim, head_dim), dtype=dtype)


@pytest.mark.parametrize("dims", [(192, 128), (64, 256), (40, 80)])
def test_value_dim_of_its_own(dims, record_property):
    check(record_property, dims=dims, q_len=2)


@pytest.mark.parametrize(
    ("heads", "q_len"),
    [((4, 4), 1), ((4, 4), 16), ((8, 2), 8), ((3, 1), 3), ((3, 1), 16), ((40, 5), 1), ((40, 5), 8)],
    ids=str,
)
def test_several_queries_and_any_group(heads, q_len, record_property):
    check(record_property, heads=heads, q_len=q_len)


@pytest.mark.parametrize("page_size", [8, 16, 64, 128, 192])
def test_pages(page_size, record_property):
    check(record_property, page_size=page_size, q_len=3)


@pytest.mark.parametrize("window", [1, 64, 100, 1000, 4099])
def test_windows(window, record_property):
    check(record_property, window=window, q_len=3)


def test_more_kv_heads_than_multiprocessors(record_property):
    check(record_property, heads=(160, 160), dims=(32, 32))


def test_steps_of_generation_write_what_they_read():
    """Append and attend in one program, over and over, beside the plain path."""
    batch, steps = 5, 70
    q, k, v = (
        normal(i, steps, batch, 1, n, 64, dtype=jnp.bfloat16) for i, n in ((0, 8), (1, 2), (2, 2))
    )

    def run(backend):
        cache = pf.KVCache.create(batch, steps, 2, 64, jnp.bfloat16)

        def body(cache, qkv):
            q, k, v = qkv
            cache = cache.append(k, v)
            return cache, pf.decode_attention(q, cache, backend=backend)

        return jax.jit(lambda: jax.lax.scan(body, cache, (q, k, v))[1])().astype(jnp.float32)

    ours, plain = run("hopper"), run("blockwise")
    assert jnp.abs(ours - plain).max() < 0.02


def test_a_lost_row_is_nan_and_a_prompt_takes_the_dense_kernel():
    cache = pf.KVCache.create(2, 200, 2, 64, jnp.bfloat16)
    k = v = normal(0, 2, 150, 2, 64, dtype=jnp.bfloat16)
    q = normal(1, 2, 150, 8, 64, dtype=jnp.bfloat16)
    step = jax.jit(
        lambda cache, q, k, v, n: (
            (cache := cache.append(k, v, n)), pf.decode_attention(q, cache, lengths=n)
        )
    )  # fmt: skip
    cache, out = step(cache, q, k, v, np.array([150, 90]))
    want = pf.flash_attention(q, k, v, mask=pf.Causal(), backend="blockwise")
    difference = jnp.abs((out - want).astype(jnp.float32))
    assert difference[0].max() < 0.02 and difference[1, :90].max() < 0.02
    cache, out = step(cache, q[:, :60], k[:, :60], v[:, :60], np.array([60, 60]))
    assert jnp.isnan(out[0]).all() and jnp.isfinite(out[1]).all()
