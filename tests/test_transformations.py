"""jit, remat, scan, eval_shape, lowering for another platform: the call behaves as any JAX op."""

import jax
import jax.numpy as jnp
import pytest

import pallas_flash as pf
from conftest import BACKENDS, SIZES, Sizes, normal, qkv
from pallas_flash.backends.blockwise import BlockwiseConfig

NAMES = ("flash_attention_out", "flash_attention_lse")


def layer(q, k, v):
    return jnp.sin(pf.flash_attention(jnp.sin(q), k, v, mask=pf.Causal()))


def count_forwards(function, *arrays) -> int:
    """How often a jaxpr runs the forward: it is what computes a lse."""
    text = str(jax.make_jaxpr(function)(*arrays))
    return text.count("custom_vmap_call")


@pytest.mark.quick
def test_remat_policy_keeps_the_named_residuals():
    q, k, v = qkv(SIZES["gqa"])
    keep = jax.checkpoint_policies.save_only_these_names(*NAMES)

    def calls(**keywords):
        loss = lambda q: jax.checkpoint(layer, **keywords)(q, k, v).sum()  # noqa: E731
        return count_forwards(jax.grad(loss), q), jax.grad(loss)(q)

    kept, with_policy = calls(policy=keep)
    recomputed, without = calls()
    assert (kept, recomputed) == (2, 3)  # forward and backward; one forward more without names
    assert jnp.allclose(with_policy, without, atol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat):
    q, k, v = qkv(SIZES["gqa"])
    depth = 3
    weights = normal(7, depth, q.shape[-1], q.shape[-1]) * 0.3

    def block(x, w):
        return x + layer(x @ w, k, v)[..., : x.shape[-1]]

    def looped(x, weights):
        for w in weights:
            x = block(x, w)
        return (x**2).sum()

    def scanned(x, weights):
        body = jax.checkpoint(block) if remat else block
        return (jax.lax.scan(lambda x, w: (body(x, w), None), x, weights)[0] ** 2).sum()

    want = jax.grad(looped, argnums=(0, 1))(q, weights)
    for a, b in zip(jax.jit(jax.grad(scanned, argnums=(0, 1)))(q, weights), want):
        assert jnp.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eval_shape(backend):
    sizes = SIZES["gqa"]
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in qkv(sizes)]
    attention = lambda q, k, v: pf.flash_attention_with_lse(q, k, v, **BACKENDS[backend])  # noqa: E731
    out, lse = jax.eval_shape(attention, *arrays)
    assert out.shape == (sizes.batch, sizes.q_len, sizes.num_q_heads, sizes.value_dim)
    assert lse.shape == (sizes.batch, sizes.num_q_heads, sizes.q_len)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_changing_lengths_do_not_recompile():
    q, k, v = qkv(SIZES["gqa"])
    attention = jax.jit(lambda n: pf.flash_attention(q, k, v, mask=pf.KvLengths(n)))
    results = [attention(jnp.asarray(n)) for n in ([3, 9], [50, 1])]
    assert attention._cache_size() == 1
    assert not jnp.allclose(*results)


def lowered_for_cuda(function, *arrays) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.quick
def test_default_lowers_to_the_hopper_kernels_without_a_gpu():
    arrays = [jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)] * 3
    attention = lambda q, k, v: pf.flash_attention(q, k, v, mask=pf.Causal())  # noqa: E731
    assert "mosaic_gpu" in lowered_for_cuda(attention, *arrays)
    loss = lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum()  # noqa: E731
    text = lowered_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), *arrays)
    assert text.count("mosaic_gpu") >= 2
    wide = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in arrays]
    assert "mosaic_gpu" not in lowered_for_cuda(attention, *wide)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint32, jnp.int64])
def test_lengths_of_any_integer_type_lower_for_cuda(dtype):
    with jax.enable_x64(dtype == jnp.int64):
        arrays = [jax.ShapeDtypeStruct((2, 100, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
        lengths = jax.ShapeDtypeStruct((2,), dtype)

        def loss(q, k, v, lengths):
            mask = pf.KvLengths(lengths) & pf.QLengths(lengths)
            return pf.flash_attention(q, k, v, mask=mask).astype(jnp.float32).sum()

        text = lowered_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), *arrays, lengths)
    assert text.count("mosaic_gpu") >= 2


@pytest.mark.quick
@pytest.mark.parametrize("remat", [False, True])
def test_training_step_of_scanned_layers_lowers_for_cuda(remat):
    q, k, v = (jax.ShapeDtypeStruct((2, 192, h, 64), jnp.bfloat16) for h in (4, 2, 2))
    body = jax.checkpoint(layer) if remat else layer

    def loss(q, k, v):
        x, _ = jax.lax.scan(lambda x, _: (x + body(x, k, v), None), q, length=3)
        return x.astype(jnp.float32).sum()

    assert "mosaic_gpu" in lowered_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), q, k, v)


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
def test_strict_promotion_of_ranks_and_dtypes(backend):
    sizes = SIZES["gqa"]
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(sizes))
    mask = pf.KvLengths(jnp.array([3, 50], jnp.int32)) & ~pf.SlidingWindow(3, 3) | pf.Causal()
    mod = pf.Chain((pf.Softcap(3.0), pf.Bias(normal(4, sizes.num_q_heads, 1, sizes.kv_len))))
    loss = lambda q, mod: pf.flash_attention(  # noqa: E731
        q, k, v, mask=mask, score_mod=mod, **BACKENDS[backend]
    ).sum()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        gradients = jax.grad(loss, argnums=(0, 1))(q, mod)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_everything_together_under_vmap_jit_and_remat():
    """Masks with arrays, scores with gradients, a sink, dropout, and a loss of out and lse."""
    sizes = Sizes(2, 13, 11, 4, 2, 8, 6)
    q, k, v = qkv(sizes)
    config = BlockwiseConfig(block_q=5, block_kv=4)

    def loss(q, bias, logits, q_ids):
        mask = (
            pf.Causal() & pf.SegmentIds(q_ids, jnp.zeros(11, int)) & pf.KvLengths(jnp.array([9, 0]))
        )
        mods = pf.Chain((pf.Softcap(3.0), pf.Bias(bias), pf.Sink(logits)))
        out, lse = pf.flash_attention_with_lse(
            q,
            k,
            v,
            mask=mask,
            score_mod=mods,
            dropout=pf.Dropout(0.3, jax.random.key(2)),
            backend="blockwise",
            config=config,
        )
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    arrays = normal(1, 2, *q.shape), normal(2, 4, 13, 1), normal(3, 4)
    ids = jnp.where(jnp.arange(13) < jnp.array([[9], [12]]), 0, -1)
    gradients = jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2))
    got = jax.jit(jax.vmap(gradients, in_axes=(0, None, None, 0)))(*arrays, ids)
    one = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    for i in range(2):
        for a, b in zip(got, one(arrays[0][i], *arrays[1:], ids[i])):
            assert jnp.allclose(a[i], b, rtol=2e-5, atol=2e-5) and jnp.abs(b).max() > 1e-2
