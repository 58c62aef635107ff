"""Shared memory of the Hopper kernels: where the parts of a buffer begin."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from pallas_flash.backends.hopper import backward_storage, forward_storage
from pallas_flash.backends.hopper.config import BackwardConfig, ForwardConfig
from pallas_flash.backends.hopper.leaves import spelled_out
from pallas_flash.backends.hopper.storage import TMA_SMEM_ALIGNMENT
from test_hopper_terms_lowering import problem


def distances(storage):
    """Bytes from one stage, or row, to the next in every buffer that TMA fills or reads."""
    for buffer in jax.tree.leaves(storage):
        if len(getattr(buffer, "shape", ())) > 1:
            yield math.prod(buffer.shape[1:]) * jnp.dtype(buffer.dtype).itemsize


FORWARD = [
    ForwardConfig(2, block_kv, stages, 1, takes_turns=False, heads_per_group=1)
    for block_kv, stages in itertools.product(range(32, 257, 16), (2, 3))
]
BACKWARD = [
    BackwardConfig(*sizes, 2, 2, 1, False) for sizes in itertools.product((64, 128), (64, 128))
]


@pytest.mark.parametrize("name", ["wide-arrays-of-every-kind", "dense-keys-and-causal"])
def test_stages_begin_where_tma_can_write(name):
    spec = spelled_out(problem(name, "d64")[0])
    for module, configs in ((forward_storage, FORWARD), (backward_storage, BACKWARD)):
        for config in configs:
            storage = module.storage(spec, config)
            assert all(n % TMA_SMEM_ALIGNMENT == 0 for n in distances(storage)), config
