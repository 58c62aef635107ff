"""Bad input: an error before anything runs that shows the value and the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_flash as pf
from pallas_flash.backends import hopper
from pallas_flash.backends.blockwise import BlockwiseConfig
from pallas_flash.backends.reference import ReferenceConfig

Q = jnp.ones((2, 8, 4, 16))
K = V = jnp.ones((2, 6, 2, 16))

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "q, k, v, message",
    [
        (Q[0, 0], K, V, r"all be \[batch, length, heads, head_dim\].*got q \(4, 16\)"),
        (Q, K[0], V, r"all be \[batch, length, heads, head_dim\].*k \(6, 2, 16\)"),
        (Q, K.astype(jnp.bfloat16), V, "one dtype, got q float32, k bfloat16, v float32"),
        (*[x.astype(jnp.int32) for x in (Q, K, V)], "dtype=int32 must be bfloat16, float16"),
        (*[x.astype(jnp.float8_e4m3fn) for x in (Q, K, V)], "dtype=float8_e4m3fn must be"),
        (Q, K, V[:, :5], r"k and v must agree.*v \(2, 5, 2, 16\)"),
        (Q[:1], K, V, r"same batch, got q \(1, 8, 4, 16\)"),
        (Q[..., :8], K, V, r"same head_dim, got q \(2, 8, 4, 8\)"),
        (Q[:, :, :3], K, V, "num_q_heads=3 must be a multiple of num_kv_heads=2"),
        (Q[:, :0], K, V, r"every dimension must be at least 1, got q \(2, 0, 4, 16\)"),
    ],
)
def test_wrong_arrays(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        pf.flash_attention(q, k, v)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), np.float32("nan")])
def test_scale_must_be_finite(scale):
    with pytest.raises(ValueError, match=r"scale=(nan|inf) must be finite"):
        pf.flash_attention(Q, K, V, scale=scale)


def test_scale_must_be_a_static_number():
    with pytest.raises(TypeError, match="scale must be a real number or None, got str"):
        pf.flash_attention(Q, K, V, scale="1")
    with pytest.raises(TypeError, match="multiply q by a traced one"):
        jax.jit(lambda s: pf.flash_attention(Q, K, V, scale=s))(0.5)


@pytest.mark.parametrize(
    "mask, message",
    [
        (pf.KvLengths(jnp.ones((3,), jnp.int32)), r"KvLengths.lengths: shape=\(3,\).*= \[2\]"),
        (pf.KvLengths(jnp.ones((2,))), "KvLengths.lengths: dtype=float32 must be an integer"),
        (pf.QLengths(jnp.ones((2, 1), jnp.int32)), r"QLengths.lengths: shape=\(2, 1\)"),
        (pf.DenseMask(jnp.ones((8, 6))), "DenseMask.array: dtype=float32 must be bool"),
        (
            pf.Causal() & pf.DenseMask(jnp.ones((8, 5), bool)),
            r"DenseMask.array: shape=\(8, 5\) must broadcast to .* = \[2, 4, 8, 6\]",
        ),
        (pf.DenseMask(jnp.ones((1, 2, 4, 8, 6), bool)), r"shape=\(1, 2, 4, 8, 6\) must broadcast"),
    ],
)
def test_wrong_mask_arrays(mask, message):
    with pytest.raises(ValueError, match=message):
        pf.flash_attention(Q, K, V, mask=mask)


IDS = jnp.zeros((2, 8), jnp.int32)


@pytest.mark.parametrize(
    "mask, message",
    [
        (pf.SegmentIds(IDS), "SegmentIds.kv must be given where q_len=8 and kv_len=6 differ"),
        (pf.SegmentIds(IDS, IDS), r"SegmentIds.kv: shape=\(2, 8\) must broadcast .* = \[2, 6\]"),
        (pf.SegmentIds(IDS * 1.0, IDS), "SegmentIds.q: dtype=float32 must be an integer"),
        (pf.PrefixLM(jnp.ones((2, 1), jnp.int32)), r"PrefixLM.prefix_lengths: shape=\(2, 1\)"),
        (
            pf.MaskMod(lambda q, k, a: q < a, IDS),
            r"MaskMod.arrays\[0\]: shape=\(2, 8\) must broadcast to .* = \[2, 4, 8, 6\]",
        ),
    ],
)
def test_wrong_arrays_of_new_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        pf.flash_attention(Q, K, V, mask=mask)


@pytest.mark.parametrize(
    "fn, error, message",
    [
        (lambda q, k: q + k, TypeError, "function of MaskMod must return bool, got int32"),
        (lambda q, k: k < IDS[:1, :6], TypeError, r"captures an array of shape \(2, 8\)"),
        (lambda q, k: k < k.max(), TypeError, "must be elementwise, but it uses reduce_max"),
        (
            lambda q, k: (q < k)[..., :3],
            ValueError,
            r"broadcasts to \(2, 4, 8, 6\), got \(1, 1, 8,",
        ),
    ],
)
def test_mask_functions_that_no_tile_can_use(fn, error, message):
    with pytest.raises(error, match=message):
        pf.flash_attention(Q, K, V, mask=pf.MaskMod(fn))


def test_a_captured_tracer_is_refused():
    def attention(n):
        return pf.flash_attention(Q, K, V, mask=pf.MaskMod(lambda q, k: k < n))

    with pytest.raises(TypeError, match="function of MaskMod captures an array of shape"):
        jax.jit(attention)(3)


def test_wrong_kinds_of_argument():
    with pytest.raises(TypeError, match=r"mask must be a Mask .* got ArrayImpl of shape \(8, 6\)"):
        pf.flash_attention(Q, K, V, mask=jnp.ones((8, 6), bool))
    with pytest.raises(TypeError, match="score_mod must be a ScoreMod .* got function"):
        pf.flash_attention(Q, K, V, score_mod=lambda s: s)
    with pytest.raises(TypeError, match="every part of a Chain must be a ScoreMod, got 2.0"):
        pf.flash_attention(Q, K, V, score_mod=pf.Chain((pf.Softcap(1.0), 2.0)))
    with pytest.raises(ValueError, match="cap=0.0 must be positive and finite"):
        pf.Softcap(0.0)
    with pytest.raises(ValueError, match="Bias.array: dtype=bool must be floating point"):
        pf.flash_attention(Q, K, V, score_mod=pf.Bias(jnp.ones((8, 6), bool)))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend='triton' must be one of \['blockwise', 'hopp"):
        pf.flash_attention(Q, K, V, backend="triton")


def test_config_must_belong_to_the_backend():
    with pytest.raises(TypeError, match="a BlockwiseConfig for backend='blockwise', got Reference"):
        pf.flash_attention(Q, K, V, backend="blockwise", config=ReferenceConfig())
    with pytest.raises(
        ValueError, match=r"config=ReferenceConfig\(\) needs the name of the backend"
    ):
        pf.flash_attention(Q, K, V, config=ReferenceConfig())
    with pytest.raises(ValueError, match="block_q=0 must be at least 1"):
        BlockwiseConfig(block_q=0, block_kv=8)


def test_named_backend_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="backend='hopper' cannot serve .*float32"):
        pf.flash_attention(Q, K, V, backend="hopper")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the device is there")
def test_named_backend_without_its_device():
    q, k, v = (x.astype(jnp.bfloat16) for x in (Q, K, V))
    with pytest.raises(ValueError, match="backend='hopper' needs an NVIDIA GPU.*compiled for cpu"):
        pf.flash_attention(q, k, v, backend="hopper")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the device is there")
def test_explain_backends_gives_one_reason_each():
    q, k, v = (x.astype(jnp.bfloat16) for x in (Q, K, V))
    reasons = pf.explain_backends(q, k, v)
    assert list(reasons) == ["hopper", "blockwise", "reference"]
    assert "needs an NVIDIA GPU" in reasons["hopper"] and "cpu" in reasons["hopper"]
    assert reasons["blockwise"] is None and reasons["reference"] is None
    assert "float32" in pf.explain_backends(Q, K, V)["hopper"]


class _Gpu:
    def __init__(self, kind, compute_capability):
        self.device_kind, self.compute_capability = kind, compute_capability


@pytest.mark.parametrize(
    ("gpu", "cuda", "reason"),
    [
        (_Gpu("NVIDIA A100", "8.0"), 13000, r"capability 9.0, this one \(NVIDIA A100\) has 8.0"),
        (_Gpu("NVIDIA H100", "9.0"), 12090, "CUDA 12.8.0 to 12.9.0 .* this is 12090"),
        (_Gpu("NVIDIA H100", "9.0"), 12091, None),
        (_Gpu("NVIDIA H100", "9.0"), 12060, None),
    ],
)
def test_gpus_that_the_hopper_kernels_do_not_run_on(gpu, cuda, reason, monkeypatch):
    """Refused by name, or passed over with a warning: on a machine that has such a GPU."""
    q, k, v = (x.astype(jnp.bfloat16) for x in (Q, K, V))
    monkeypatch.setattr(hopper, "_cuda_version", lambda: cuda)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [gpu])
    if reason is None:
        assert pf.explain_backends(q, k, v)["hopper"] is None
        return
    with pytest.raises(ValueError, match=f"backend='hopper' cannot serve this request: .*{reason}"):
        pf.flash_attention(q, k, v, backend="hopper")
    with pytest.warns(UserWarning, match=f"'blockwise', which is slower than 'hopper': .*{reason}"):
        pf.flash_attention(q, k, v)
