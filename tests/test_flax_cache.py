"""Caches in `Attention` of linen and nnx: outputs are those of the whole sequence at once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flax_layers.linen
import flax_layers.nnx
from flax_layers import Rope, cached
from pallas_flash import (
    Causal,
    ChunkedCausal,
    KVCache,
    PagedKVCache,
    PrefixLM,
    SlidingWindow,
    Softcap,
)
from test_flax_attention import assert_identical, assert_same, linen_layer, nnx_layer, normal

KEY = jax.random.key(0)
FEATURES, LENGTH = 16, 14
X = normal(0, 3, LENGTH, FEATURES)
# Tokens of each row that are fed at a time: a prompt, one each, none to some rows, a few at once.
PARTS = np.array([[7, 3, 6], [1, 1, 1], [1, 0, 1], [3, 2, 0], [2, 3, 3]])

OPTIONS = {
    "gqa-rope": {"mask": Causal(), "num_kv_heads": 2, "rope": Rope()},
    "window-mqa-norm": {
        "mask": SlidingWindow(3, 0),
        "num_kv_heads": 1,
        "rope": Rope(),
        "qk_norm": True,
    },
    "chunks-softcap-sinks": {
        "mask": ChunkedCausal(4),
        "score_mod": Softcap(0.5),
        "sinks": nn.initializers.ones,
        "scale": 0.7,
    },
}


def feed(step, cache, x):
    """The outputs of feeding x [B, T, ...] by PARTS, each row's own behind one another, and 0."""
    out, done = np.zeros(x.shape, np.float32), np.zeros(len(x), int)
    for counts in PARTS:
        part = np.full((len(x), counts.max(), FEATURES), np.nan, np.float32)
        for row, count in enumerate(counts):
            part[row, :count] = x[row, done[row] : done[row] + count]
        result, cache = step(jnp.asarray(part, x.dtype), cache, jnp.asarray(counts))
        for row, count in enumerate(counts):
            out[row, done[row] : done[row] + count] = result[row, :count]
        done += counts
    np.testing.assert_array_equal(cache.lengths, done)
    return out, done


def paged(batch, max_len, num_kv_heads, head_dim):
    sizes = (batch, max_len, num_kv_heads, head_dim, jnp.float32)
    return PagedKVCache.create(*sizes, num_pages=12, page_size=4).reserve(max_len)


@pytest.mark.parametrize(
    ("name", "dtype", "is_paged"),
    [
        ("gqa-rope", "float32", False),
        ("gqa-rope", "float32", True),
        ("window-mqa-norm", "float32", False),
        ("window-mqa-norm", "bfloat16", False),
        ("chunks-softcap-sinks", "float32", False),
    ],
)
def test_cached_outputs_are_those_of_the_whole_sequence(name, dtype, is_paged):
    options = OPTIONS[name] | {"dtype": jnp.dtype(dtype), "head_dim": 4}
    layer, params = linen_layer(options, X)
    expected = jax.jit(layer)(params, X)
    cache = flax_layers.linen.Attention(4, **options).make_cache(3, LENGTH, max_queries=4)
    assert cache.k.dtype == dtype
    if is_paged:
        cache = paged(3, LENGTH, 2, 4)
    step = jax.jit(lambda x, cache, lengths: layer(params, x, cache=cache, lengths=lengths))
    out, done = feed(step, cache, X)
    for row, length in enumerate(done):
        tolerance = 1e-5 if dtype == "float32" else 3e-2
        assert_same(out[row, :length], expected[row, :length], tolerance)


def test_a_window_keeps_the_cache_small():
    layer = flax_layers.linen.Attention(4, head_dim=4, mask=Causal() & SlidingWindow(3, 0))
    assert layer.make_cache(2, 1000, max_queries=5).k.shape == (2, 8, 4, 4)
    assert layer.make_cache(2, 1000, max_queries=5).window == 4
    assert flax_layers.linen.Attention(4, head_dim=4).make_cache(2, 16).k.shape == (2, 16, 4, 4)


@pytest.mark.parametrize("name", ["window-mqa-norm", "chunks-softcap-sinks"])
def test_nnx_is_linen(name):
    options = OPTIONS[name]
    layer, params = linen_layer(options, X)
    other = nnx_layer(options, params)
    cache = other.make_cache(3, LENGTH, max_queries=4)
    call = {"cache": cache, "lengths": jnp.array([7, 3, 6])}
    result = nnx.jit(lambda layer, x, call: layer(x, **call))(other, X[:, :7], call)
    expected = jax.jit(lambda x, call: layer(params, x, **call))(X[:, :7], call)
    assert_identical(jax.tree.leaves(result), jax.tree.leaves(expected))


def test_positions_and_batch_axes_go_through_a_cache():
    """Two batch axes, an array as mask over positions, and positions of one's own."""
    layer, params = linen_layer({"rope": Rope(), "mask": Causal()}, X)
    x = X[:2, :6].reshape(2, 1, 6, FEATURES)
    mask = jnp.asarray(np.random.default_rng(0).random((6, 6)) < 0.7).at[:, 0].set(True)
    positions = jnp.arange(6) * 3 + 5
    expected = layer(params, x, mask=mask, positions=positions)
    cache = KVCache.create(2, 6, 4, 4, jnp.float32)
    first, cache = layer(params, x[..., :4, :], mask=mask, positions=positions[:4], cache=cache)
    second, cache = layer(params, x[..., 4:, :], mask=mask, positions=positions[4:], cache=cache)
    assert_same(jnp.concatenate((first, second), -2), expected)


# What a cache implies, and what is refused


def test_what_the_cache_implies_is_dropped():
    other = ChunkedCausal(4)
    for mask, window, rest in (
        (Causal(), None, None),
        (Causal() & SlidingWindow(3, 0), 4, None),
        (Causal() & SlidingWindow(3, 0), None, SlidingWindow(3, 0)),
        (other & Causal("bottom_right") & SlidingWindow(None, 2), None, other),
        (Causal(offset=-1), None, Causal(offset=-1)),
    ):
        assert cached.besides(mask, window) == rest


REFUSED = {
    "a cache needs a causal mask": ({}, {}),
    "got PrefixLM": ({"mask": PrefixLM(jnp.array([2, 2]))}, {}),
    "segment_ids does not go with a cache": (
        {"mask": Causal()},
        {"segment_ids": jnp.zeros((2, 3), jnp.int32)},
    ),
    "dropout does not go with a cache": (
        {"mask": Causal(), "dropout_rate": 0.5, "deterministic": False},
        {"rngs": {"dropout": KEY}},
    ),
    "a cache of window=4 does not serve a layer whose mask has a window of None": (
        {"mask": Causal()},
        {"cache": KVCache.create(2, 32, 4, 4, jnp.float32, window=4)},
    ),
    "the cache is full: row 0 has 0 tokens, 3 more do not fit max_len=2": (
        {"mask": Causal()},
        {"cache": KVCache.create(2, 2, 4, 4, jnp.float32)},
    ),
    "the cache is full: row 0 has 0 tokens, 5 more do not fit max_len=4": (
        {"mask": SlidingWindow(1, 0)},
        {"cache": KVCache.create(2, 4, 4, 4, jnp.float32), "inputs": jnp.ones((2, 5, 16))},
    ),
    "cache does not go with inputs_kv": ({"mask": Causal()}, {"inputs_kv": jnp.ones((2, 3, 16))}),
    "backend='reference' must be one of": ({"mask": Causal(), "backend": "reference"}, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_with_a_cache_is_refused(message):
    options, call = REFUSED[message]
    layer = flax_layers.linen.Attention(4, **options)
    inputs = jnp.ones((2, 3, FEATURES))
    params = jax.eval_shape(functools.partial(layer.clone(deterministic=True).init, KEY), inputs)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    call = {"cache": KVCache.create(2, 4, 4, 4, jnp.float32), "inputs": inputs} | call
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.apply(params, call.pop("inputs"), **call)


def test_a_cache_needs_the_size_of_a_head():
    with pytest.raises(ValueError, match="head_dim=None follows from the input's features"):
        flax_layers.linen.Attention(4).make_cache(2, 8)
    assert flax_layers.nnx.Attention(4, 16, rngs=nnx.Rngs(0)).make_cache(2, 8).k.shape[-1] == 4
