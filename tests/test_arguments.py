"""Every argument of every mask, score mod and function changes the result."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_flash as pf
from conftest import Sizes, normal, qkv
from test_masks import dense

Z = Sizes(2, 6, 8, 4, 2, 8, 6)
KEYS = jax.random.split(jax.random.key(0))


def _odd(q_pos, kv_pos, n):
    return (q_pos + kv_pos) % n == 1


def _even(q_pos, kv_pos, n):
    return (q_pos + kv_pos) % n == 0


def _times(s, q_pos, kv_pos, x):
    return s * x


def _plus(s, q_pos, kv_pos, x):
    return s + x * kv_pos.astype(s.dtype)


def ids(*numbers):
    return jnp.array(numbers)


TABLE = normal(3, 4, 8)
TWO = jnp.full((1, 1, 1, 1), 2)
# class -> its arguments, and for each another value.
MASKS = {
    pf.Causal: ({}, {"align": "bottom_right", "offset": 1}),
    pf.ChunkedCausal: ({"chunk": 3}, {"chunk": 2}),
    pf.DenseMask: ({"array": jnp.eye(6, 8) > 0}, {"array": jnp.eye(6, 8) == 0}),
    pf.KvLengths: ({"lengths": ids(3, 8)}, {"lengths": ids(4, 8)}),
    pf.MaskMod: ({"fn": _odd, "arrays": TWO}, {"fn": _even, "arrays": TWO + 1}),
    pf.PrefixLM: ({"prefix_lengths": ids(3, 8)}, {"prefix_lengths": ids(4, 8)}),
    pf.QLengths: ({"lengths": ids(3, 6)}, {"lengths": ids(4, 6)}),
    pf.SegmentIds: (
        {"q": ids(0, 0, 0, 1, 1, 1), "kv": ids(0, 0, 0, 0, 1, 1, 1, 1)},
        {"q": ids(0, 0, 1, 1, 1, 1), "kv": ids(0, 0, 0, 1, 1, 1, 1, 1)},
    ),
    pf.SlidingWindow: ({"left": 2, "right": 1}, {"left": None, "right": 2}),
}
SCORE_MODS = {
    pf.Alibi: (
        {"slopes": jnp.array([0.5, 0.1, 1.0, 0.2])},
        {"slopes": jnp.ones(4), "align": "bottom_right", "offset": 1},
    ),
    pf.Bias: ({"array": normal(4, 6, 8)}, {"array": normal(5, 6, 8)}),
    pf.Chain: (
        {"mods": (pf.Softcap(0.5), pf.Bias(normal(4, 6, 8)))},
        {"mods": (pf.Bias(normal(4, 6, 8)), pf.Softcap(0.5))},
    ),
    pf.DistanceBias: ({"values": normal(4, 4, 13)}, {"values": normal(5, 4, 13)}),
    pf.RelativeBias: (
        {"table": TABLE, "max_distance": 8},
        {"table": -TABLE, "bidirectional": False, "max_distance": 4, "offset": 2},
    ),
    pf.ScoreFunction: (
        {"fn": _times, "arrays": normal(4, 4, 1, 1)},
        {"fn": _plus, "arrays": normal(5, 4, 1, 1)},
    ),
    pf.Sink: ({"logits": jnp.zeros(4)}, {"logits": jnp.ones(4)}),
    pf.Softcap: ({"cap": 0.5}, {"cap": 0.7}),
}
DROPOUT = ({"rate": 0.5, "key": KEYS[0]}, {"rate": 0.4, "key": KEYS[1], "shared": True})


def made(cls, arguments):
    """With what a signature has behind a star as an argument of that name."""
    more = [arguments[name] for name in ("fn", "arrays") if name in arguments]
    return cls(*more) if more and cls in (pf.MaskMod, pf.ScoreFunction) else cls(**arguments)


def out(**terms):
    q, k, v = qkv(Z)
    return pf.flash_attention(q, k, v, backend="reference", **terms)


def seen(cls, arguments):
    """What a class does to all scores: where it allows, or the output of attention."""
    term = made(cls, arguments)
    if issubclass(cls, pf.Mask):
        return dense(term, Z)
    return np.asarray(out(dropout=term) if cls is pf.Dropout else out(score_mod=term))


@pytest.mark.parametrize("cls", [*MASKS, *SCORE_MODS, pf.Dropout])
def test_every_argument_of_a_class_counts(cls):
    arguments, others = (MASKS | SCORE_MODS | {pf.Dropout: DROPOUT})[cls]
    assert set(others) == set(inspect.signature(cls).parameters)
    usual = seen(cls, arguments)
    for name, value in others.items():
        assert not np.array_equal(seen(cls, arguments | {name: value}), usual), name


def test_every_class_is_listed():
    classes = {x for x in map(pf.__dict__.get, pf.__all__) if inspect.isclass(x)}
    terms = {x for x in classes if issubclass(x, pf.Mask | pf.ScoreMod)}
    assert terms - {pf.Mask, pf.ScoreMod} == {*MASKS, *SCORE_MODS}


def test_every_argument_of_attention_counts():
    usual = out()
    others = {
        "mask": pf.Causal(),
        "score_mod": pf.Softcap(0.5),
        "scale": 0.5,
        "dropout": pf.Dropout(0.5, KEYS[0]),
    }
    # What names a backend and its tiles changes no result, nor does the order of sums: tests of
    # their own.
    named = {"q", "k", "v", "deterministic", "backend", "config"}
    assert named | set(others) == set(inspect.signature(pf.flash_attention).parameters)
    for name, value in others.items():
        assert not jnp.allclose(out(**{name: value}), usual), name
