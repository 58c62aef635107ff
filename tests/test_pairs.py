"""Every mask with every score mod, and dropout: values and all gradients against the oracle.

One program for all pairs: it holds all masks and all score mods, and flags choose among them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import pallas_flash as pf
from conftest import MASKS, SCORE_MODS, Sizes, normal, qkv
from pallas_flash.backends.blockwise import BlockwiseConfig
from pallas_flash.scores import ScoreMod
from pallas_flash.terms import operand, subterm, term
from tolerance import assert_close_to_oracle

Z = Sizes(2, 13, 11, 4, 2, 8, 6)
RATE, KEY = 0.2, jax.random.key(7)
KEEP = np.asarray(pf.Dropout(RATE, KEY).keep_mask(Z.batch, Z.num_q_heads, Z.q_len, Z.kv_len))
SCORES = {name: make(Z) for name, make in SCORE_MODS.items()}
SINKS = [name for name, score in SCORES.items() if score.sink is not None]
BACKENDS = {
    "reference": {"backend": "reference"},
    "blockwise-tiles-of-5-by-4": {"backend": "blockwise", "config": BlockwiseConfig(5, 4)},
}


@term
class Chosen(ScoreMod):
    """The score mod whose flag is up."""

    mods: tuple[ScoreMod, ...] = subterm()
    flags: tuple[jax.Array, ...] = operand("batch", dtype=jnp.bool_)

    def apply(self, s, q_pos, kv_pos):
        for mod, flag in zip(self.mods, self.flags, strict=True):
            s = jnp.where(flag, mod.apply(s, q_pos, kv_pos), s)
        return s

    def bind(self, q_len, kv_len):
        return Chosen(tuple(mod.bind(q_len, kv_len) for mod in self.mods), self.flags)


def without_sinks(mod):
    mods = mod.mods if isinstance(mod, pf.Chain) else (mod,)
    return pf.Chain(tuple(m for m in mods if m is not None and not isinstance(m, pf.Sink)))


def sink_of(arrays, is_score):
    """The logits [B, Hq] of the chosen score, -inf if it has none."""
    logits = jnp.full((Z.batch, Z.num_q_heads), -jnp.inf)
    for name in SINKS:
        logits = jnp.where(is_score[name], SCORES[name].sink(arrays[name]), logits)
    return logits


def ours(backend, q, k, v, arrays, is_mask, is_score):
    chosen = []
    for name, make in MASKS.items():
        mask, flag = make(Z)[0], pf.DenseMask(is_mask[name])
        chosen.append(flag if mask is None else mask & flag)
    mods = tuple(without_sinks(score.make(arrays[name])) for name, score in SCORES.items())
    flags = tuple(is_score[name] for name in SCORES)
    return pf.flash_attention_with_lse(
        q,
        k,
        v,
        mask=functools.reduce(lambda a, b: a | b, chosen),
        score_mod=pf.Chain((Chosen(mods, flags), pf.Sink(sink_of(arrays, is_score)))),
        dropout=pf.Dropout(RATE, KEY),
        **BACKENDS[backend],
    )


def dense(q, k, v, arrays, allowed, is_score):
    def change(s):
        for name, score in SCORES.items():
            s = jnp.where(is_score[name], score.change(s, arrays[name]), s)
        return s

    terms = {"allowed": allowed, "change": change, "sink": sink_of(arrays, is_score)}
    return oracle.attention(q, k, v, keep=KEEP / (1 - RATE), **terms)


def with_gradients(function):
    """Of q, k, v and every score's array; lse = -inf of an empty row is cut off."""

    @jax.jit
    def both(inputs, cotangents, mask, is_score):
        def finite(*inputs):
            out, lse = function(*inputs, mask, is_score)
            return out, jnp.where(lse == -jnp.inf, 0.0, lse)

        results, vjp = jax.vjp(finite, *inputs)
        return *results, *vjp(cotangents)

    return both


def flags(names, chosen):
    return {name: jnp.asarray(name == chosen) for name in names}


@pytest.fixture(scope="module")
def problem():
    inputs = (*qkv(Z), {name: score.array for name, score in SCORES.items()})
    cotangents = (
        normal(5, Z.batch, Z.q_len, Z.num_q_heads, Z.value_dim),
        normal(6, Z.batch, Z.num_q_heads, Z.q_len),
    )
    return inputs, cotangents


@pytest.fixture(scope="module")
def truth(problem):
    """What the oracle says of every pair."""
    function, shape = with_gradients(dense), (Z.batch, Z.num_q_heads, Z.q_len, Z.kv_len)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), problem)
        found = {}
        for mask, make in MASKS.items():
            allowed = make(Z)[1]
            allowed = jnp.broadcast_to(True if allowed is None else allowed, shape)
            for score in SCORES:
                found[mask, score] = function(*wide, allowed, flags(SCORES, score))
    return jax.device_get(found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mask_with_every_score_and_dropout(backend, problem, truth):
    function = with_gradients(functools.partial(ours, backend))
    for (mask, score), want in truth.items():
        got = function(*problem, flags(MASKS, mask), flags(SCORES, score))
        for i, (a, b) in enumerate(zip(*map(jax.tree.leaves, (got, want)), strict=True)):
            assert_close_to_oracle(a, b, f"result {i} of {mask} with {score}")
