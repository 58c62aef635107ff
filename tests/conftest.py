"""Set-up of every test, and the lists that every property is run for."""

import functools
import gc
import math
import os

# Before jax is imported: sharding tests need devices, interpret mode needs threads.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_session
import pallas_flash as pf
from pallas_flash.backends.blockwise import BlockwiseConfig

# XLA's optimizations are not what is tested on a CPU, and they are a third of the time.
if os.environ.get("JAX_PLATFORMS") == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)
# Traces are large and live for long: looking through them for garbage is 5% of the time.
gc.set_threshold(20_000, 10, 10)

# name -> keywords of a call. Odd tiles leave a remainder at every length below.
BACKENDS = {
    "reference": {"backend": "reference"},
    "blockwise": {"backend": "blockwise"},
    "blockwise-tiles-of-16-by-24": {
        "backend": "blockwise",
        "config": BlockwiseConfig(block_q=16, block_kv=24),
    },
}


def pytest_addoption(parser):
    parser.addoption(
        "--gpu-summary", metavar="DIR", help="write DIR/<device>/correctness.json, with every error"
    )


def pytest_configure(config):
    gpu_session.register(config, config.getoption("--gpu-summary"))


@pytest.fixture
def shim():
    """Pallas' interpret mode with what it lacks, and clean afterwards."""
    # Late: it reaches into Pallas' own modules, which tests of other things do not need.
    import interp_shim

    interp_shim.install()
    yield
    interp_shim.gpu_callbacks.reset_gpu_interpret_mode_state()


def with_quick(values, quick):
    """`values` as parameters of a test, which is quick for those in `quick` alone."""
    assert set(quick) <= set(values)
    return [pytest.param(x, marks=pytest.mark.quick) if x in quick else x for x in values]


class Sizes(NamedTuple):
    """Of one problem; the tests' names."""

    batch: int = 2
    q_len: int = 63
    kv_len: int = 50
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 24


SIZES = {
    "gqa": Sizes(),
    "mqa-one-query": Sizes(q_len=1, kv_len=65, num_kv_heads=1, value_dim=16),
    "mha-more-keys": Sizes(batch=1, q_len=33, kv_len=129, num_kv_heads=4, head_dim=40, value_dim=8),
    "one-key": Sizes(batch=3, q_len=7, kv_len=1),
}


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    """``jax.random.normal``, whose numbers depend on their index alone: compiled for few sizes."""
    size = math.prod(shape)
    padded = max(4096, 1 << (size - 1).bit_length())
    numbers = _normal_numbers(seed, padded, jnp.dtype(dtype))
    return jnp.asarray(numbers[:size].reshape(shape))


@functools.cache
def _normal_numbers(seed: int, size: int, dtype: np.dtype) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.random.normal(jax.random.key(seed), size, dtype))


def qkv(sizes: Sizes, dtype=jnp.float32) -> list[jax.Array]:
    b, t, s, n, k, d, dv = sizes
    shapes = ((b, t, n, d), (b, s, k, d), (b, s, k, dv))
    return [normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def positions(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(sizes.q_len)[:, None], np.arange(sizes.kv_len)[None, :]


def _dense(sizes: Sizes, *shape_of: str) -> np.ndarray:
    full = {"b": sizes.batch, "h": sizes.num_q_heads, "q": sizes.q_len, "k": sizes.kv_len}
    shape = [full[a] if a in shape_of else 1 for a in "bhqk"]
    return np.random.default_rng(3).random(shape) < 0.6


def _lengths(n: int, batch: int) -> np.ndarray:
    """Of every batch row: from 0 up to the whole length."""
    return np.linspace(0, n, batch).astype(np.int32)


def _causal(z):
    q, k = positions(z)
    return pf.Causal(), k <= q


def _causal_bottom_right(z):
    q, k = positions(z)
    return pf.Causal("bottom_right"), k <= q + z.kv_len - z.q_len


def _window(z):
    q, k = positions(z)
    return pf.SlidingWindow(20, 3), (k >= q - 20) & (k <= q + 3)


def _left_window(z):
    q, k = positions(z)
    return pf.SlidingWindow(left=9) & pf.Causal(), (k >= q - 9) & (k <= q)


def _kv_lengths(z):
    n = _lengths(z.kv_len, z.batch)
    return pf.KvLengths(jnp.asarray(n)), positions(z)[1] < n[:, None, None, None]


def _q_lengths(z):
    n = _lengths(z.q_len, z.batch)
    return pf.QLengths(jnp.asarray(n)), positions(z)[0] < n[:, None, None, None]


def _causal_lengths(z):
    a, b, c = _causal(z), _kv_lengths(z), _q_lengths(z)
    return a[0] & b[0] & c[0], a[1] & b[1] & c[1]


def _dense_full(z):
    m = _dense(z, *"bhqk")
    return pf.DenseMask(jnp.asarray(m)), m


def _dense_keys(z):
    m = _dense(z, *"bk")
    return pf.DenseMask(jnp.asarray(m)) & pf.Causal(), m & _causal(z)[1]


def _not_or(z):
    m = _dense(z, *"hq")
    return ~(pf.Causal() | pf.DenseMask(jnp.asarray(m))), ~(_causal(z)[1] | m)


def _documents(n: int, batch: int, *, is_sorted: bool) -> np.ndarray:
    """Ids [batch, n] of documents of every length, with some padding (-1)."""
    rng = np.random.default_rng(n)
    ids = rng.integers(-1, 4, (batch, n))
    # Padding last, as packed rows have it.
    return np.sort(ids)[:, ::-1].astype(np.int32) if is_sorted else ids.astype(np.int32)


def _segments(is_sorted):
    def make(z):
        q, k = (_documents(n, z.batch, is_sorted=is_sorted) for n in (z.q_len, z.kv_len))
        allowed = (q[:, :, None] == k[:, None, :]) & (q >= 0)[:, :, None]
        return pf.SegmentIds(jnp.asarray(q), jnp.asarray(k)), allowed[:, None]

    return make


def _wide_segments(z):
    """Ids that are the same in their lower 24 bits."""
    mask, allowed = _segments(False)(z)
    ids = (jnp.where(x < 0, x, x * 2**24) for x in (mask.q, mask.kv))
    return pf.Causal() & pf.SegmentIds(*ids), _causal(z)[1] & allowed


def _causal_segments(z):
    mask, allowed = _segments(True)(z)
    return pf.Causal() & mask, _causal(z)[1] & allowed


def _prefix_lm(z):
    n, (q, k) = _lengths(z.kv_len, z.batch), positions(z)
    return pf.PrefixLM(jnp.asarray(n)), (k <= q) | (k < n[:, None, None, None])


def _chunked_causal(z):
    q, k = positions(z)
    return pf.ChunkedCausal(13), (k <= q) & (k // 13 == q // 13)


def _every_nth(q_pos, kv_pos, nth, shift):
    return (2 * q_pos + kv_pos + shift) % nth == 0


def _mask_mod(z):
    nth = np.arange(2, 2 + z.num_q_heads).reshape(1, -1, 1, 1)
    shift = np.arange(z.batch * z.q_len).reshape(z.batch, 1, z.q_len, 1)
    allowed = _every_nth(*positions(z), nth, shift)
    return pf.MaskMod(_every_nth, jnp.asarray(nth), jnp.asarray(shift)), allowed


# name -> sizes -> (mask, the same as a plain boolean array)
MASKS = {
    "none": lambda z: (None, None),
    "causal": _causal,
    "causal-bottom-right": _causal_bottom_right,
    "window": _window,
    "causal-left-window": _left_window,
    "kv-lengths": _kv_lengths,
    "q-lengths": _q_lengths,
    "causal-and-lengths": _causal_lengths,
    "dense": _dense_full,
    "dense-keys-and-causal": _dense_keys,
    "not-causal-or-dense": _not_or,
    "segments": _segments(True),
    "segments-in-any-order": _segments(False),
    "causal-segments": _causal_segments,
    "causal-segments-of-wide-ids": _wide_segments,
    "prefix-lm": _prefix_lm,
    "chunked-causal": _chunked_causal,
    "mask-mod": _mask_mod,
}


class Score(NamedTuple):
    """A score mod to test: its array, how to make it and what it must do.

    sink: array -> the logits [Hq] or [B, Hq] of a sink.
    """

    array: jax.Array
    make: object
    change: object
    sink: object = None


def _bias(*axes):
    def make(z):
        full = {"b": z.batch, "h": z.num_q_heads, "q": z.q_len, "k": z.kv_len}
        shape = [full[a] if a in axes else 1 for a in "bhqk"]
        return Score(normal(4, *shape), pf.Bias, lambda s, a: s + a)

    return make


def _softcap_bias(z):
    array = normal(4, 1, z.num_q_heads, 1, z.kv_len)
    return Score(
        array,
        lambda a: pf.Chain((pf.Softcap(2.0), pf.Bias(a))),
        lambda s, a: 2.0 * jnp.tanh(s / 2.0) + a,
    )


def _alibi(z):
    q, k = positions(z)
    return Score(
        jnp.asarray(pf.alibi_slopes(z.num_q_heads)),
        lambda a: pf.Alibi(a, "bottom_right"),
        lambda s, a: s - a[:, None, None] * np.abs(q + z.kv_len - z.q_len - k),
    )


def _relative_bias(bidirectional):
    def make(z):
        distance = np.subtract(*positions(z)[::-1])
        buckets = t5_buckets(distance, 12, bidirectional)
        return Score(
            normal(4, z.num_q_heads, 12),
            lambda a: pf.RelativeBias(a, bidirectional=bidirectional, max_distance=40),
            lambda s, a: s + a[:, buckets],
        )

    return make


def t5_buckets(distance, num_buckets, bidirectional, max_distance=40):
    """T5's formula for `distance` = key position - query position, in float64."""
    side = num_buckets // 2 if bidirectional else num_buckets
    away = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    near = side // 2
    power = np.log(np.maximum(away, 1) / near + 1e-9) / np.log(max_distance / near)
    far = np.minimum(near + (power * (side - near)).astype(int), side - 1)
    later = side * (distance > 0) if bidirectional else 0
    return np.where(away < near, away, far) + later


def _bias_then_sinks(z):
    return Score(
        normal(4, z.batch, z.num_q_heads),
        lambda a: pf.Chain((pf.Sink(a), pf.Softcap(2.0), pf.Bias(a[..., None, None]), pf.Sink(a))),
        lambda s, a: 2.0 * jnp.tanh(s / 2.0) + a[..., None, None],
        lambda a: a + jnp.log(2.0),
    )


def _gated(s, q_pos, kv_pos, gain, shift, is_gated):
    """Uses the score three times, and integers beside floats."""
    gated = jnp.where(s > 0, jax.nn.silu(s), 0.1 * s * s)
    return jnp.where(is_gated > 0, gated, s) * gain + shift * (q_pos - kv_pos).astype(s.dtype)


def _function(z):
    is_gated = jnp.arange(z.batch).reshape(-1, 1, 1, 1) % 2
    array = normal(4, z.batch, 1, z.q_len, 1)
    gain = jnp.linspace(0.5, 1.5, z.num_q_heads).reshape(-1, 1, 1)
    return Score(
        array,
        lambda a: pf.Chain((pf.Softcap(5.0), pf.ScoreFunction(_gated, gain, a * 0.1, is_gated))),
        lambda s, a: _gated(5.0 * jnp.tanh(s / 5.0), *positions(z), gain, a * 0.1, is_gated),
    )


# name -> sizes -> Score
SCORE_MODS = {
    "none": lambda z: Score(jnp.zeros(()), lambda a: None, lambda s, a: s),
    "softcap": lambda z: Score(
        jnp.zeros(()), lambda a: pf.Softcap(2.0), lambda s, a: 2.0 * jnp.tanh(s / 2.0)
    ),
    "bias": _bias(*"bhqk"),
    "bias-of-heads": _bias(*"h"),
    "bias-of-keys": _bias(*"bk"),
    "softcap-then-bias": _softcap_bias,
    "alibi": _alibi,
    "relative-bias": _relative_bias(True),
    "relative-bias-causal": _relative_bias(False),
    "function": _function,
    "sink": lambda z: Score(normal(4, z.num_q_heads), pf.Sink, lambda s, a: s, lambda a: a),
    "bias-then-sinks": _bias_then_sinks,
}
