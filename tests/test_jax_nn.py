"""dot_product_attention means what jax.nn.dot_product_attention means, argument by argument."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import pallas_flash as pf
from conftest import SIZES, normal, qkv

SIZE = SIZES["gqa"]._replace(value_dim=16)
B, T, S, N = SIZE.batch, SIZE.q_len, SIZE.kv_len, SIZE.num_q_heads
KEEP = jax.random.bernoulli(jax.random.key(8), 0.7, (B, N, T, S)).at[..., 0].set(True)

CASES = {
    "defaults": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bias": {"bias": normal(4, B, N, T, S)},
    "bias-broadcast": {"bias": normal(4, 1, N, 1, S)},
    "bias-3d": {"bias": normal(4, N, T, S)},
    "bias-low-precision": {"bias": normal(4, 1, 1, T, S).astype(jnp.bfloat16)},
    "mask": {"mask": KEEP},
    "mask-broadcast": {"mask": KEEP[:1, :1], "is_causal": True},
    "mask-3d": {"mask": KEEP[0]},
    "lengths": {
        "query_seq_lengths": jnp.array([9, T], jnp.int32),
        "key_value_seq_lengths": jnp.array([S, 11], jnp.int32),
    },
    "window": {"local_window_size": 20},
    "window-pair": {"local_window_size": (17, 2), "is_causal": True},
}


def test_signature_is_jax_nn_s_and_extras_are_keywords():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(pf.dot_product_attention).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default
    for name in list(ours)[len(theirs) :]:
        assert ours[name].kind == inspect.Parameter.KEYWORD_ONLY
        assert ours[name].default is (False if name == "deterministic" else None)


@pytest.mark.quick
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_agree_with_jax_nn(name):
    case = dict(CASES[name])
    bias = case.pop("bias", None)
    q, k, v = qkv(SIZE)
    # Rows that may attend to nothing differ on purpose: their cotangent is zero.
    live = KEEP.any(-1) if "mask" in case else jnp.ones((B, N, T), bool)
    weight = normal(5, *q.shape)
    if "local_window_size" in case:
        live = live & (jnp.arange(T) < S + 17)
    weight = weight * live.any(1)[..., None, None]

    def loss(attention):
        def f(q, k, v, bias):
            out, lse = attention(q, k, v, bias, return_residual=True, **case)
            return (out * weight).sum(), (out * live.any(1)[..., None, None], lse)

        return jax.grad(f, argnums=(0, 1, 2) if bias is None else (0, 1, 2, 3), has_aux=True)

    ours, (our_out, our_lse) = loss(pf.dot_product_attention)(q, k, v, bias)
    theirs, (their_out, their_lse) = loss(jax.nn.dot_product_attention)(q, k, v, bias)
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype and a.shape == b.shape
        tolerance = 1e-4 if a.dtype == jnp.float32 else 1e-2
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.allclose(a, b, rtol=tolerance, atol=tolerance)
    assert our_out.dtype == their_out.dtype and jnp.allclose(our_out, their_out, atol=1e-5)
    assert our_lse.shape == their_lse.shape and our_lse.dtype == their_lse.dtype
    real = our_lse != -jnp.inf
    assert jnp.allclose(jnp.where(real, our_lse, 0), jnp.where(real, their_lse, 0), atol=1e-5)


def test_three_dimensional_arrays():
    q, k, v = (x[0] for x in qkv(SIZE))
    ours = pf.dot_product_attention(q, k, v, is_causal=True, return_residual=True)
    theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True, return_residual=True)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and jnp.allclose(a, b, atol=1e-5)


def test_residual_has_its_true_gradient():
    q, k, v = qkv(SIZE)
    lse = lambda q: pf.dot_product_attention(q, k, v, return_residual=True)[1].sum()  # noqa: E731
    gradient = jax.grad(lse)(q)
    slope = (lse(q + 0.01 * gradient) - lse(q - 0.01 * gradient)) / 0.02
    assert jnp.abs(gradient).max() > 0.1
    assert jnp.allclose((gradient**2).sum(), slope, rtol=1e-2)


def test_extras_change_the_result():
    q, k, v = qkv(SIZE)
    plain = pf.dot_product_attention(q, k, v)
    assert not jnp.allclose(plain, pf.dot_product_attention(q, k, v, mask=pf.Causal()))
    assert not jnp.allclose(plain, pf.dot_product_attention(q, k, v, score_mod=pf.Softcap(0.1)))
    assert jnp.allclose(plain, pf.dot_product_attention(q, k, v, backend="reference"), atol=1e-5)


def test_implementation_xla_is_plain_jax():
    q, k, v = qkv(SIZE)
    ours = pf.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    assert jnp.allclose(ours, theirs, atol=1e-5)
    shape = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.bfloat16)
    attention = lambda q: pf.dot_product_attention(q, q, q, implementation="xla")  # noqa: E731
    lowered = jax.jit(attention).trace(shape).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" not in lowered.as_text()
    with pytest.raises(ValueError, match="implementation='xla' is backend='blockwise', got"):
        pf.dot_product_attention(q, k, v, implementation="xla", backend="reference")


def test_implementation_cudnn_hands_over_to_jax_nn(monkeypatch):
    q, k, v = qkv(SIZE)
    calls = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **b: calls.append((a, b)))
    pf.dot_product_attention(q, k, v, is_causal=True, scale=0.5, implementation="cudnn")
    ((arrays, keywords),) = calls
    assert arrays == (q, k, v, None, None)
    assert keywords["implementation"] == "cudnn" and keywords["is_causal"]
    assert keywords["scale"] == 0.5
    with pytest.raises(ValueError, match="implementation='triton' must be 'xla', 'cudnn' or None"):
        pf.dot_product_attention(q, k, v, implementation="triton")
    with pytest.raises(ValueError, match="does not take backend; leave implementation=None"):
        pf.dot_product_attention(q, k, v, implementation="cudnn", backend="blockwise")
    with pytest.raises(ValueError, match="does not take Causal; leave implementation=None"):
        pf.dot_product_attention(q, k, v, mask=pf.Causal(), implementation="cudnn")
