"""Unions of refs in Pallas' GPU interpret mode: their members are one memory, as on hardware.

Interpret mode gives every member a buffer of its own, and refuses to read one what was written to
another. Here the other members are views of the first one's bytes, in the order in which its tiles
lie in SMEM, and the race detector sees every access where it falls in the first.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState

original_allocate_ref_union = jaxpr_interpret.allocate_ref_union
original_check_read = GPURaceDetectionState.check_read
original_check_write = GPURaceDetectionState.check_write


def allocate_ref_union(token: jax.Array, aval: Any, allocate_buffer: Any) -> Any:
    token, keys = original_allocate_ref_union(token, aval, allocate_buffer)
    members = [member.transforms for member in jaxpr_interpret.union_members(aval)]
    # A swizzle permutes bytes by their address alone: it is no matter if all members have the same.
    swizzles = {t for ts in members for t in ts if isinstance(t, gpu_core.UnswizzleRef)}
    assert len(swizzles) == 1 and all(extract.offset == 0 for extract, *_ in members), members
    tiling, *others = [
        [t.tiling for t in ts if isinstance(t, gpu_core.UntilingTransform)] for ts in members
    ]
    assert len(tiling) == 1 and not any(others), (tiling, others)
    alias = functools.partial(make_views, tiling=tiling[0])
    return callback.io_callback(alias, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, keys), keys


@gpu_callbacks.fail_on_exception
def make_views(token: Any, keys: np.ndarray, tiling: tuple[int, int]) -> Any:
    """Puts the other members where the first one lies; every thread of a block does so."""
    memory = gpu_callbacks._get_shared_memory()
    first, *others = (gpu_callbacks.HostAllocationKey.from_array(key) for key in keys)
    with memory.lock:
        content = memory.mem[first].content
        *outer, rows, columns = content.shape
        height, width = tiling
        tiles = content.reshape(*outer, rows // height, height, columns // width, width)
        in_smem = tiles.swapaxes(-3, -2)
        for other in others:
            buffer = memory.mem[other]
            buffer._content = in_smem.reshape(buffer.shape)
            assert np.shares_memory(buffer.content, content)
    return token


def in_first_member(races: Any, key: Any, access: Any) -> tuple[Any, Any]:
    """An access to any buffer, or where an access to a member falls in the first one."""
    first, _ = races.ref_union_members.get(key, (key, 0))
    if first == key:
        return key, access
    memory = gpu_callbacks._get_shared_memory()
    with memory.lock:
        content, view = (memory.mem[k].content for k in (first, key))
    index = np.arange(content.size)
    strides = [n // content.itemsize * index.itemsize for n in view.strides]
    places = np.lib.stride_tricks.as_strided(index, view.shape, strides)[access.range]
    touched = np.unravel_index(places, content.shape)
    box = tuple(slice(int(axis.min()), int(axis.max()) + 1, 1) for axis in touched)
    assert math.prod(side.stop - side.start for side in box) == places.size, (access, box)
    return first, utils.Access(box)


def check_read(races: Any, thread: Any, clock: Any, key: Any, access: Any, source_info=None):
    original_check_read(races, thread, clock, *in_first_member(races, key, access), source_info)


def check_write(races: Any, thread: Any, clock: Any, key: Any, access: Any, source_info=None):
    original_check_write(races, thread, clock, *in_first_member(races, key, access), source_info)


def install() -> None:
    """Puts the additions in place, for the rest of the process."""
    jaxpr_interpret.allocate_ref_union = allocate_ref_union
    GPURaceDetectionState.check_read = check_read
    GPURaceDetectionState.check_write = check_write
