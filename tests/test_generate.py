"""The examples' models write the same bytes with a cache as without one, in linen and in nnx."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import generate
from transformer import Sizes, Transformer

# Grouped heads, rotary embeddings, and a window that is shorter than what is written.
SIZES = Sizes(layers=2, width=32, heads=4, kv_heads=2, window=6)
PROMPTS = [b"The import statement", b"A", b"class Foo:"]
COUNT = 12


@functools.cache
def parameters():
    shapes = jax.eval_shape(
        Transformer(SIZES).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
    )["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)


@pytest.mark.parametrize(
    ("api", "temperature"), [("linen", 0.0), ("nnx", 0.0), ("linen", 0.8)], ids=str
)
def test_cached_writing_is_that_without_a_cache(api, temperature):
    apply, params = generate.APIS[api](SIZES, parameters())
    write = functools.partial(generate.write, apply, params, SIZES, PROMPTS, COUNT)
    cached = write(temperature=temperature)
    plain = write(temperature=temperature, use_cache=False)
    assert cached.tokens.shape == (3, COUNT)
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    assert cached.tokens_per_second > 0
    # More than one byte again and again.
    assert len(set(cached.tokens.ravel().tolist())) > 6
    if temperature:
        assert (write(temperature=temperature, seed=1).tokens != cached.tokens).any()


@pytest.mark.parametrize("api", generate.APIS)
def test_small_rings_and_bfloat16_give_the_logits_of_the_whole_text(api):
    """A prompt longer than the ring, then one byte at a time, rows of different lengths."""
    lengths, steps = jnp.array([14, 5, 9]), 6
    tokens = jax.random.randint(jax.random.key(1), (3, 20), 0, 256)
    for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.1)):
        sizes = Sizes(**(vars(SIZES) | {"dtype": dtype}))
        apply, params = generate.APIS[api](sizes, parameters())
        model = jax.jit(functools.partial(apply, params))
        expected = model(tokens)
        caches = sizes.make_caches(3, 20, max_queries=2)
        assert caches[0].num_slots < 14
        logits, caches = model(tokens[:, :14], caches, lengths)
        for row, length in enumerate(lengths.tolist()):
            np.testing.assert_allclose(
                logits[row, :length], expected[row, :length], atol=tolerance, rtol=tolerance
            )
        for step in range(steps):
            at = lengths + step
            rows = jnp.arange(3)
            logits, caches = model(tokens[rows, at][:, None], caches)
            np.testing.assert_allclose(
                logits[:, 0], expected[rows, at], atol=tolerance, rtol=tolerance
            )


def test_command_loads_a_checkpoint_and_compares(tmp_path, capsys):
    path = tmp_path / "model"
    generate.save(path, SIZES, parameters())
    sizes, params = generate.load(path)
    assert sizes == SIZES
    jax.tree.map(np.testing.assert_array_equal, params, parameters())
    generate.main(["ab", "c", "--api=nnx", "--count=5", "--compare", f"--checkpoint={path}"])
    printed = capsys.readouterr().out
    assert "--- 'ab' goes on ---" in printed and "--- 'c' goes on ---" in printed
    assert "nnx, 2 rows, with a cache: " in printed and "100% of the bytes are the same" in printed


def test_command_without_a_checkpoint_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        generate.main([f"--checkpoint={tmp_path / 'none'}"])
    assert "run `make demo` first" in capsys.readouterr().err
