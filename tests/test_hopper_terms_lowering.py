"""Masks, score mods and dropout in the Hopper kernels: what can be told of a GPU without one."""

import jax
import jax.experimental.mosaic.gpu.core as mosaic_gpu
import jax.numpy as jnp
import pytest

import pallas_flash as pf
from conftest import MASKS, Sizes, qkv
from pallas_flash.backends import hopper
from pallas_flash.spec import AttentionSpec, make_request
from term_cases import KEY, ON_A_DEVICE, SCORES, TERM_SIZES, inputs


def request(qkv, mask=None, score_mod=None, dropout=None):
    """Spec and operands."""
    terms = {"mask": mask, "score_mod": score_mod, "dropout": dropout}
    operands = make_request(*qkv, scale=None, **terms).operands
    return AttentionSpec.of(operands, operands.q.shape[-1] ** -0.5), operands


def problem(name, sizes):
    """Spec, operands and the cotangent of out."""
    case = ON_A_DEVICE[name]._replace(sizes=TERM_SIZES[sizes])
    score = SCORES[case.score](case.sizes)
    arrays, cotangents = inputs(case.sizes, score)
    mask = MASKS[case.mask](case.sizes)[0]
    dropout = pf.Dropout(case.rate, KEY) if case.rate else None
    terms = {"mask": mask, "score_mod": score.make(arrays[3]), "dropout": dropout}
    return *request(arrays[:3], **terms), cotangents[0]


@pytest.fixture
def without_layouts(monkeypatch):
    """Lowers kernels to Mosaic GPU's dialect only: what follows takes ten times as long."""

    def lower(module, launch_context, *_, **__):
        launch_context.scratch.finalize_size()

    monkeypatch.setattr(mosaic_gpu, "lower_mgpu_module", lower)


def lowers(spec, operands, dout) -> bool:
    assert hopper.unsupported(spec) is None
    config = hopper.default_config(spec)

    @jax.jit
    def both(operands, dout):
        out, lse = hopper.BACKEND.forward(spec, config, operands)
        return out, hopper.BACKEND.backward(spec, config, operands, out, lse, dout, lse)

    text = both.trace(operands, dout).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("@mosaic_gpu_v2") >= 2


# Every case in the kernels of small head dimensions. What the terms compute is the same in those of
# large ones: there, the cases with functions of one's own.
LOWERED = [(name, "d64") for name in ON_A_DEVICE]
LOWERED += [(name, "d256") for name in ("function", "function-of-queries", "mask-mod")]
LOWERED += [("wide-arrays-of-every-kind", "d128")]


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_alone_lowers_where_keys_end_inside_of_a_tile(name):
    """With layouts: those of lengths alone were once not found."""
    sizes = Sizes(2, 300, 500, 4, 2, 64, 64)
    spec, operands = request(qkv(sizes, jnp.bfloat16), MASKS[name](sizes)[0])
    assert lowers(spec, operands, operands.q)


@pytest.mark.parametrize(("name", "sizes"), LOWERED, ids=map("-".join, LOWERED))
def test_forward_and_backward_of_every_case_lower_for_cuda(name, sizes, without_layouts):
    assert lowers(*problem(name, sizes))


def _of_heads(q_pos, kv_pos, is_open):
    return is_open > 0


OPEN = jnp.ones((1, 4, 1, 1), jnp.int32)
# One number for all scores of a tile: no matrix comes of it by itself.
OF_NUMBERS = {
    "mask-mod": (100, {"mask": pf.MaskMod(_of_heads, OPEN)}),
    "dense": (100, {"mask": pf.DenseMask(OPEN > 0)}),
    "dense-whole-tiles": (128, {"mask": pf.DenseMask(OPEN > 0)}),
    "dropout-of-one-score": (1, {"dropout": pf.Dropout(0.1, KEY)}),
}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_terms_of_one_number_lower_for_cuda(name, without_layouts):
    length, terms = OF_NUMBERS[name]
    q, k, v = qkv(Sizes(2, length, length, 4, 2, 64, 64), jnp.bfloat16)
    assert lowers(*request((q, k, v), **terms), q)
