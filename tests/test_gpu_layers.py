"""`Attention` of linen and nnx on a Hopper GPU: a cache gives what the whole sequence gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import generate
import oracle
from flax_layers import Rope
from flax_layers.linen import Attention
from pallas_flash import Causal, PagedKVCache, SlidingWindow, Softcap
from test_flax_attention import linen_layer, nnx_layer, normal
from tolerance import assert_as_good_as_plain
from transformer import Sizes, Transformer

# No call may leave the kernels.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:.*slower than")]

FEATURES, LENGTH = 128, 420
# Tokens of each row that are fed at a time: a prompt, one each, none to some rows, a few at once.
PARTS = np.array([[300, 65, 0], [1, 1, 1], [1, 0, 1], [2, 3, 64], [1, 1, 1]])

LAYERS = {
    "gqa-rope": {"mask": Causal(), "num_kv_heads": 2, "rope": Rope()},
    "window-mqa-norm": {
        "mask": Causal() & SlidingWindow(99, 0),
        "num_kv_heads": 1,
        "rope": Rope(),
        "qk_norm": True,
    },
    "softcap-sinks": {
        "mask": Causal(),
        "score_mod": Softcap(5.0),
        "sinks": nn.initializers.ones,
    },
}


def feed(step, cache, x):
    """The outputs of feeding x [B, T, features] by PARTS, each row's own behind one another."""
    out, done = [[] for _ in x], np.zeros(len(x), int)
    for counts in PARTS:
        part = np.full((len(x), counts.max(), x.shape[-1]), np.nan, np.float32)
        for row, count in enumerate(counts):
            part[row, :count] = x[row, done[row] : done[row] + count]
        result, cache = step(jnp.asarray(part, x.dtype), cache, jnp.asarray(counts))
        for row, count in enumerate(counts):
            out[row].append(result[row, :count])
        done += counts
    return [np.concatenate(parts) for parts in out]


def paged(cache):
    batch, _, *head = cache.k.shape
    sizes = (batch, LENGTH, *head, cache.k.dtype)
    return PagedKVCache.create(*sizes, num_pages=24, page_size=64).reserve(LENGTH)


@pytest.mark.parametrize(
    ("name", "is_paged", "api"),
    [
        ("gqa-rope", False, "linen"),
        ("gqa-rope", True, "linen"),
        ("window-mqa-norm", False, "linen"),
        ("window-mqa-norm", False, "nnx"),
        ("softcap-sinks", False, "linen"),
    ],
)
def test_cached_outputs_are_as_good_as_plain_attention(name, is_paged, api, record_property):
    x = normal(0, 3, LENGTH, FEATURES)
    options = LAYERS[name] | {"head_dim": 64}
    exact, params = linen_layer(options | {"backend": "reference"}, x)
    with oracle.on_host():
        truth = jax.jit(exact)(*jax.tree.map(np.asarray, (params, x)))
    options["dtype"] = jnp.bfloat16
    plain, _ = linen_layer(options | {"backend": "reference"}, x)
    # Not on the host, where XLA need not round what one layer hands to the next.
    plain = jax.jit(plain)(params, x)
    cache = Attention(4, **options).make_cache(3, LENGTH, max_queries=64)
    if is_paged:
        cache = paged(cache)
    if api == "linen":
        layer, _ = linen_layer(options, x)
        step = jax.jit(lambda x, cache, n: layer(params, x, cache=cache, lengths=n))
    else:
        module = nnx_layer(options, params)
        step = jax.jit(lambda x, cache, n: module(x, cache=cache, lengths=n))
    for row, out in enumerate(feed(step, cache, x)):
        expected = np.asarray(truth[row, : len(out)])
        record_property(f"error_out_{row}", float(np.abs(out - expected).max()))
        assert_as_good_as_plain(out, plain[row, : len(out)], expected, f"row {row}", 2.0)


@pytest.mark.parametrize("api", generate.APIS)
def test_a_bfloat16_model_writes_with_a_cache_what_it_writes_without(api):
    """The logits of the text that was written with a cache, and its bytes where they are clear."""
    sizes = Sizes(layers=2, width=256, heads=4, kv_heads=2, window=40, dtype=jnp.bfloat16)
    prompts, count = [b"The import statement " * 5, b"A", b"class Foo:"], 64
    shapes = jax.eval_shape(
        Transformer(sizes).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(s.shape[0] ** -0.5 * rng.normal(size=s.shape), s.dtype),
        shapes["params"],
    )
    apply, params = generate.APIS[api](sizes, params)
    written = generate.write(apply, params, sizes, prompts, count).tokens
    model = jax.jit(functools.partial(apply, params))
    for prompt, row in zip(prompts, written, strict=True):
        text = np.concatenate((np.frombuffer(prompt, np.uint8), row))[None].astype(np.int32)
        logits = np.asarray(model(text)[0, len(prompt) - 1 : -1])
        # What was written is the likeliest byte, but for the rounding of bfloat16.
        chosen = logits[np.arange(count), row]
        assert (logits.max(-1) - chosen <= 0.05 * np.abs(logits).max()).all()
        assert (logits.argmax(-1) == row).mean() > 0.9
