"""Score mods: what their names promise beyond the agreement with the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_flash as pf
from conftest import BACKENDS, SIZES, Sizes, normal, positions, qkv, t5_buckets
from pallas_flash.scores.distance_bias import FlatEndedBias
from pallas_flash.scores.score_mod import AFTER
from pallas_flash.terms import DISTANCE_AXES, Tile, term

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("start", [(0, 0), (3, 2), (7, 1), (4, 9)])
def test_a_tile_reads_its_slice_of_the_distances(start):
    q_len, kv_len, q_size, kv_size = 11, 15, 4, 6
    tile = Tile(1, start[0], q_size, start[1], kv_size, q_len)
    values = normal(0, 1, 3, q_len + kv_len - 1)
    q, kv = (np.arange(n)[s] for n, s in zip((11, 15), (np.s_[start[0] :], np.s_[start[1] :])))
    index = kv[None, :kv_size] - q[:q_size, None] + q_len - 1
    np.testing.assert_array_equal(tile.align(values, DISTANCE_AXES), values[:, :, index])
    part = normal(1, 1, 3, q_size, kv_size)
    want = jnp.zeros_like(values).at[:, :, index].add(part)
    got = tile.add(jnp.zeros_like(values), DISTANCE_AXES, part)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_has_the_buckets_of_t5(bidirectional):
    buckets = jnp.arange(32.0)[None]
    mod = pf.RelativeBias(buckets, bidirectional=bidirectional).bind(300, 200)
    want = t5_buckets(np.arange(-299, 200), 32, bidirectional, max_distance=128)
    np.testing.assert_array_equal(mod.values[0, 0], want)


def test_relative_bias_with_an_offset_is_a_part_of_the_whole():
    """Queries 40..62 of 63 alone, as in decoding."""
    q, k, v = qkv(Sizes(q_len=63, kv_len=63))
    table = normal(3, 4, 8)
    whole = pf.flash_attention(q, k, v, score_mod=pf.RelativeBias(table), mask=pf.Causal())
    mod = pf.RelativeBias(table, offset=40)
    part = pf.flash_attention(q[:, 40:], k, v, score_mod=mod, mask=pf.Causal(offset=40))
    np.testing.assert_allclose(part, whole[:, 40:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "heads, first, last", [(8, 0.5, 2.0**-8), (1, 2.0**-8, 2.0**-8), (12, 0.5, 2.0**-3.5)]
)
def test_slopes_of_alibi(heads, first, last):
    slopes = pf.alibi_slopes(heads)
    assert (slopes[0], slopes[-1]) == (np.float32(first), np.float32(last))
    assert len(set(slopes)) == heads


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_low_precision_table_is_summed_in_float32(backend):
    sizes = Sizes(q_len=130, kv_len=120)
    q, k, v = qkv(sizes)

    def gradient(table):
        def loss(table):
            mod = pf.RelativeBias(table)
            return pf.flash_attention(q, k, v, score_mod=mod, **BACKENDS[backend])[..., 0].sum()

        return jax.grad(loss)(table)

    table = normal(4, 4, 8, dtype=jnp.bfloat16)
    got, want = gradient(table), gradient(table.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    assert (jnp.abs(got - want) <= 2**-8 * jnp.abs(want) + 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [1.5, -np.inf])
def test_sink_of_rows_that_attend_to_nothing(backend, logit):
    sizes = SIZES["gqa"]
    q, k, v = qkv(sizes)
    mask = pf.QLengths(jnp.array([0, 20]))
    empty = positions(sizes)[0][:, 0] >= np.array([0, 20])[:, None, None]

    def attention(q, logits):
        return pf.flash_attention_with_lse(
            q, k, v, mask=mask, score_mod=pf.Sink(logits), **BACKENDS[backend]
        )

    logits = jnp.full(sizes.num_q_heads, logit)
    (out, lse), vjp = jax.vjp(attention, q, logits)
    assert (jnp.swapaxes(out, 1, 2)[np.broadcast_to(empty, lse.shape)] == 0).all()
    assert (lse[np.broadcast_to(empty, lse.shape)] == logit).all()
    dq, d_logits = vjp((jnp.ones_like(out), jnp.zeros_like(lse)))
    assert jnp.isfinite(dq).all() and jnp.isfinite(d_logits).all()
    assert (dq[0] == 0).all()
    if logit == -np.inf:
        plain = pf.flash_attention(q, k, v, mask=mask, **BACKENDS[backend])
        np.testing.assert_allclose(out, plain, rtol=1e-6)
        assert (d_logits == 0).all()


def test_addend_is_all_that_a_score_mod_does():
    a, b = jnp.asarray([[[[0.5]], [[-2.0]]]]), jnp.asarray(3.0)
    s = jnp.arange(12.0).reshape(1, 2, 2, 3)
    for mod in (pf.Bias(a), pf.Chain((pf.Bias(a), pf.Bias(b)))):
        np.testing.assert_array_equal(mod.apply(s, 0, 0), s + mod.addend)
    ends = FlatEndedBias(jnp.ones((1, 1, 5)), before=a[..., 0, 0], after=b, near=(-1, 1))
    assert ends.at(AFTER).addend is b

    @term
    class Doubled(pf.Bias):
        def apply(self, s, q_pos, kv_pos):
            return 2 * super().apply(s, q_pos, kv_pos)

    others = (
        Doubled(a),
        pf.Chain(()),
        pf.Chain((pf.Bias(a), pf.Softcap(2.0))),
        pf.Alibi(jnp.ones(2)),
        ends,
    )
    assert [mod.addend for mod in others] == [None] * 5


def test_score_mods_that_cannot_be():
    q, k, v = qkv(SIZES["gqa"])

    def attend(mod):
        return pf.flash_attention(q, k, v, score_mod=mod)

    array = jnp.ones((63, 50))
    with pytest.raises(ValueError, match="align='top' must be 'top_left' or 'bottom_right'"):
        pf.Alibi(jnp.ones(4), "top")
    with pytest.raises(ValueError, match="num_heads=0 must be at least 1"):
        pf.alibi_slopes(0)
    with pytest.raises(ValueError, match=r"Alibi.slopes: shape=\(3,\) must .* = \[2, 4\]"):
        attend(pf.Alibi(jnp.ones(3)))
    with pytest.raises(ValueError, match=r"Sink.logits: shape=\(3,\) must .* = \[2, 4\]"):
        attend(pf.Chain((pf.Softcap(1.0), pf.Sink(jnp.ones(3)))))
    with pytest.raises(ValueError, match=r"RelativeBias.table must be .* got float32\[8\]"):
        attend(pf.RelativeBias(jnp.ones(8)))
    with pytest.raises(ValueError, match="has 3 buckets, it must have at least 4"):
        attend(pf.RelativeBias(jnp.ones((4, 3))))
    with pytest.raises(ValueError, match="max_distance=8 must be above 8"):
        attend(pf.RelativeBias(jnp.ones((4, 32)), max_distance=8))
    with pytest.raises(ValueError, match=r"FlatEndedBias.values: shape=\(1, 3, 112\) must"):
        attend(pf.RelativeBias(jnp.ones((3, 32))))
    with pytest.raises(TypeError, match="function of ScoreFunction captures an array of shape"):
        attend(pf.ScoreFunction(lambda s, q, k: s + array))
    with pytest.raises(TypeError, match="must be elementwise, but it uses reduce_sum"):
        attend(pf.ScoreFunction(lambda s, q, k: s / s.sum(-1, keepdims=True)))
    with pytest.raises(TypeError, match="ScoreFunction must return float32, got bool"):
        attend(pf.ScoreFunction(lambda s, q, k: s > 0))


def test_gradient_of_a_captured_array_is_refused():
    """It would be zero without a word."""
    q, k, v = qkv(SIZES["gqa"])

    def loss(gain):
        return pf.flash_attention(q, k, v, score_mod=pf.ScoreFunction(lambda s, *_: s * gain)).sum()

    with pytest.raises(TypeError, match="function of ScoreFunction captures an array"):
        jax.grad(loss)(2.0)
