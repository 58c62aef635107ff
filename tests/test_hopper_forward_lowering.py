"""The Hopper forward: its lowering for CUDA without a GPU, and what the backend refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import pallas_flash as pf
from pallas_flash.backends import hopper
from pallas_flash.backends.hopper import forward as module
from pallas_flash.backends.hopper.config import ForwardConfig, default_forward_config, misfit
from pallas_flash.backends.hopper.storage import SHARED_MEMORY_LIMIT
from pallas_flash.spec import AttentionSpec, Operands

DIMS = (16, 40, 64, 80, 96, 128, 192, 256)


def described(head_dim, value_dim, mask=None, dtype=jnp.bfloat16, q_len=200, kv_len=200):
    """Shapes of a small problem, for lowering."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    mask = None if mask is None else mask.bind(q_len, kv_len)
    return Operands(
        array(2, q_len, 4, head_dim), array(2, kv_len, 2, head_dim), array(2, kv_len, 2, value_dim),
        mask,
    )  # fmt: skip


def lowers(operands, **changes) -> bool:
    spec = AttentionSpec.of(operands, 0.1)
    config = hopper.default_config(spec)
    config = dataclasses.replace(config, forward=dataclasses.replace(config.forward, **changes))
    run = jax.jit(lambda operands: module.forward(spec, config, operands))
    text = run.trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    return "mosaic_gpu" in text


@pytest.mark.quick
@pytest.mark.parametrize(
    ("mask", "dtype"),
    [(None, jnp.bfloat16), (pf.Causal(), jnp.float16)],
    ids=["full-bf16", "causal-f16"],
)
@pytest.mark.parametrize("head_dim", DIMS)
def test_default_config_lowers_for_cuda(head_dim, mask, dtype):
    assert lowers(described(head_dim, head_dim, mask, dtype))


@pytest.mark.quick
def test_xla_cannot_run_the_kernels_of_a_scan_twice():
    def layer(x, _):
        return x + pf.dot_product_attention(x, x, x, mask=pf.Causal()), None

    gradient = jax.jit(jax.grad(lambda x: jax.lax.scan(layer, x, length=3)[0].sum()))
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    text = gradient.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"(%\w+):\d+ = stablehlo.custom_call @mosaic_gpu_v2", text)
    barriers = re.findall(r"optimization_barrier (.*) :", text)
    # Forward and backward; with few keys this has one kernel for dQ and one for the rest.
    assert (len(kernels), len(barriers)) == (3, 2)
    for kernel in kernels:
        assert any(f"{kernel}#0" in barrier for barrier in barriers)


@pytest.mark.parametrize("head_dim", [d for d in range(16, 257, 8) if d not in DIMS])
def test_every_head_dim_lowers_for_cuda(head_dim):
    assert lowers(described(head_dim, head_dim))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(16, 256), (256, 16), (64, 128), (192, 128), (72, 200)]
)
def test_unequal_dimensions_lower_for_cuda(head_dim, value_dim):
    assert lowers(described(head_dim, value_dim, pf.Causal("bottom_right")))


LENGTHS = jax.ShapeDtypeStruct((2,), jnp.int32)
MASKS = {
    "window": pf.SlidingWindow(30, 5),
    "lengths": pf.KvLengths(LENGTHS) & pf.QLengths(jax.ShapeDtypeStruct((1,), jnp.int32)),
    "not-lengths-or-causal": ~(pf.KvLengths(LENGTHS) & ~pf.QLengths(LENGTHS)) | pf.Causal(),
}


@pytest.mark.quick
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_lower_for_cuda(head_dim, mask):
    assert lowers(described(head_dim, head_dim, mask, q_len=7, kv_len=1001))


@pytest.mark.quick
@pytest.mark.parametrize("head_dim", [64, 256])
def test_arrays_of_odd_lengths_are_copied_as_they_are(head_dim):
    operands = described(head_dim, head_dim, q_len=4095, kv_len=1001)
    spec = AttentionSpec.of(operands, 0.1)
    run = jax.jit(lambda operands: module.forward(spec, hopper.default_config(spec), operands))
    text = run.trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "stablehlo.pad" not in text


def test_more_than_2_to_31_elements_lower_for_cuda():
    operands = described(128, 128, q_len=2**22, kv_len=2**22)
    assert operands.q.size > 2**31
    assert lowers(operands)


@pytest.mark.quick
def test_lowers_with_64_bit_types():
    with jax.enable_x64(True):
        mask = pf.Causal() & pf.KvLengths(jax.ShapeDtypeStruct((2,), jnp.int64))
        assert lowers(described(64, 64, mask))
        assert lowers(described(64, 64))
        assert lowers(described(128, 128, q_len=201, kv_len=201))


@pytest.mark.quick
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("length", [200, 201])
def test_lowers_for_cuda_inside_shard_map(length, check_vma):
    mask = pf.Causal() & pf.KvLengths(LENGTHS)
    operands = described(128, 128, mask, q_len=length, kv_len=length)

    def local(operands):
        spec = AttentionSpec.of(operands, 0.1)
        return hopper.BACKEND.forward(spec, hopper.default_config(spec), operands)

    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = PartitionSpec("batch")
    run = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=over_batch, out_specs=over_batch, check_vma=check_vma
        )
    )
    assert "mosaic_gpu" in run.trace(operands).lower(lowering_platforms=("cuda",)).as_text()


def test_default_configs_fit_shared_memory_and_are_served():
    for head_dim in range(16, 257, 8):
        for value_dim in range(16, 257, 8):
            spec = AttentionSpec.of(described(head_dim, value_dim), 0.1)
            size = default_forward_config(spec).shared_memory_bytes(spec)
            assert size <= SHARED_MEMORY_LIMIT, (head_dim, value_dim)
            assert hopper.unsupported(spec) is None


@pytest.mark.quick
@pytest.mark.parametrize("mask", [None, pf.Causal()], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("block_kv", "head_dim", "value_dim"),
    [(80, 256, 256), (80, 256, 32), (112, 192, 96), (48, 40, 40), (48, 96, 64)],
)
def test_blocks_that_are_no_whole_tiles_lower_for_cuda(block_kv, head_dim, value_dim, mask):
    assert lowers(described(head_dim, value_dim, mask), block_kv=block_kv)


def test_a_search_finds_80_keys_from_64():
    spec = AttentionSpec.of(described(256, 256, kv_len=4096), 0.1)
    candidates = hopper.candidate_configs(spec, hopper.default_config(spec), "forward")
    assert {c.forward.block_kv for c in candidates} == {32, 48, 64, 80}


@pytest.mark.quick
def test_shared_memory_is_what_pallas_requests():
    operands = described(128, 64)
    spec = AttentionSpec.of(operands, 0.1)
    config = dataclasses.replace(default_forward_config(spec), num_stages=9)
    with pytest.raises(ValueError, match=f"smem_bytes={config.shared_memory_bytes(spec)} "):
        lowers(operands, num_stages=9)


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.quick
@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        (described(64, 64, dtype=jnp.float32), "dtype=float32 must be bfloat16 or float16"),
        (described(8, 64), "head_dim=8 must be a multiple of 8 from 16 to 256"),
        (described(64, 264), "value_dim=264 must be a multiple of 8 from 16 to 256"),
        (described(68, 64), "head_dim=68 must be a multiple of 8 from 16 to 256"),
        (
            dataclasses.replace(
                described(64, 64), score_mod=pf.ScoreFunction(lambda s, *_: jax.lax.erf_inv(s))
            ),
            "functions that use erf_inv are not in the Hopper kernels",
        ),
    ],
    ids=[
        "float32",
        "head-dim-8",
        "value-dim-264",
        "head-dim-68",
        "erf-inv",
    ],
)
def test_what_the_kernels_cannot_serve_is_refused_by_name(operands, reason):
    assert hopper.unsupported(AttentionSpec.of(operands, 0.1)) == reason


def test_a_config_with_too_many_registers_is_refused():
    spec = AttentionSpec.of(described(128, 128), 0.1)
    default = default_forward_config(spec)
    crowded = dataclasses.replace(default, num_warpgroups=3, num_stages=1)
    assert misfit(spec, crowded) == "needs about 192 registers a thread, it has 160"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_warpgroups": 4}, "num_warpgroups=4 must be 1, 2 or 3"),
        ({"block_kv": 72}, "block_kv=72 must be a multiple of 16 from 16 to 256"),
        ({"num_stages": 0}, "num_stages=0 must be at least 1"),
        ({"num_q_stages": 3}, "num_q_stages=3 must be 1 or 2"),
        ({"num_warpgroups": 1}, "takes_turns=True needs num_warpgroups=1 to be 2 or 3"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ForwardConfig(2, 128, 2, 1, True, 1), **changes)
