"""Peak memory grows linearly in the sequence length, by the compiler's own account."""

import jax
import jax.numpy as jnp
import pytest

import pallas_flash as pf


def step_temporaries(length: int, make_mask, score_mod, dropout) -> int:
    """Bytes of temporaries of a training step: the gradients of q, k, v and the score mod."""
    q = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def loss(q, k, v, score_mod, lengths):
        out = pf.flash_attention(
            q,
            k,
            v,
            mask=make_mask(lengths),
            score_mod=score_mod,
            dropout=dropout,
            backend="blockwise",
        )
        return out.astype(jnp.float32).sum()

    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(q, k, k, score_mod, lengths).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def _not_equal(q_pos, kv_pos, n):
    return q_pos + kv_pos != n


def _gated(s, q_pos, kv_pos, gain):
    return jax.nn.silu(s) * gain


def _mods() -> pf.Chain:
    return pf.Chain(
        (
            pf.Alibi(jnp.ones(4)),
            pf.RelativeBias(jnp.ones((4, 32))),
            pf.ScoreFunction(_gated, jnp.ones((4, 1, 1))),
        )
    )


@pytest.mark.parametrize(
    "make_mask, score_mod, dropout",
    [
        (lambda n: None, None, None),
        (lambda n: pf.Causal(), pf.Softcap(30.0), None),
        (lambda n: pf.Causal("bottom_right") & pf.KvLengths(n), None, None),
        (lambda n: pf.SlidingWindow(1024, 0) | ~pf.QLengths(n), None, None),
        (lambda n: pf.Causal() & pf.SegmentIds(n[:, None]), pf.Sink(jnp.zeros(4)), None),
        (lambda n: pf.PrefixLM(n) & pf.MaskMod(_not_equal, n[:, None, None, None]), _mods(), None),
        (lambda n: pf.Causal(), None, pf.Dropout(0.1, jax.random.key(0))),
    ],
    ids=[
        "full",
        "causal-softcap",
        "causal-lengths",
        "window-or-not-lengths",
        "segments-sink",
        "functions-alibi-relative",
        "dropout",
    ],
)
def test_training_step_is_linear_in_length(make_mask, score_mod, dropout):
    short, long = (step_temporaries(n, make_mask, score_mod, dropout) for n in (8192, 32768))
    assert long < 4.5 * short
    # One head's float32 scores alone would take 4 GiB at 32768.
    assert long < 0.5 * 2**30
