"""What interpret mode needs for products: Pallas' own, and those of inlined functions.

An operand in SMEM is checked for races on the clock of the async proxy when the product is issued
and again when it is awaited. That catches an operand that has not arrived, one stored without
``commit_smem``, and a stage released too early.
"""

import collections
import functools
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory

KEY_TYPE = gpu_callbacks.HostAllocationKey.shape_and_dtype()
SMEM = shared_memory.get_memory_space_idx(gpu_core.MemorySpace.SMEM)
UFUNCS = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}

original_accumulator_deref = gpu_callbacks.wgmma_accumulator_deref
read_modify_write = threading.Lock()


class Read(NamedTuple):
    """A part of SMEM that a product reads."""

    key: Any
    access: Any
    source_info: Any


# For every thread the reads of each product that it has issued and not awaited, oldest first.
products_in_flight: dict[Any, list[list[Read]]] = collections.defaultdict(list)


def access_of(memory: Any, key: Any, transforms: Any) -> Any:
    transforms = gpu_callbacks._remove_noop_transforms(transforms)
    return memory.access(key, jax.tree.map(int, transforms))


def log(mesh_location: Any, thread: Any, source_info: Any) -> Any:
    return shared_memory.GPULoggingInfo(mesh_location, thread, source_info)


def update(memory, thread, key, access, value, op) -> None:
    """Combines `value` with what a buffer holds, in one step."""
    with read_modify_write:
        old = memory.get_buffer_content(key, access, None)[0]
        new = UFUNCS[op](old, value).astype(old.dtype)
        memory.store_buffer_content(key, access, new, thread, increment_clock=False)


# ---------------------------------------------------------------------------------------------
# Products


def check_reads(memory: Any, thread: Any, reads: list[Read]) -> None:
    """Looks for races of reads that the async proxy makes now."""
    if not memory.detect_races or not reads:
        return
    with memory.lock:
        memory.clocks[thread].inc(memory.thread_to_vc_position(thread))
        clock = memory.clocks[thread].copy()
    for read in reads:
        gpu_callbacks.get_races().check_read(
            thread, clock.async_smem_clock, read.key, read.access, source_info=read.source_info
        )


def await_products(memory: Any, thread: Any, leave: int) -> None:
    """Ends all products of a thread but the `leave` youngest."""
    products = products_in_flight[thread]
    while len(products) > leave:
        check_reads(memory, thread, products.pop(0))


@gpu_callbacks.fail_on_exception
def wgmma(
    *,
    token,
    mesh_location,
    thread,
    acc_allocation_key_as_array,
    acc_transforms,
    a_allocation_key_as_array,
    a_transforms,
    b_allocation_key_as_array,
    b_transforms,
    source_info=None,
):
    memory = gpu_callbacks._get_shared_memory()
    logging_info = log(mesh_location, thread, source_info)
    reads = []

    def load(operand, transforms):
        is_key = tuple(operand.shape) == tuple(KEY_TYPE.shape) and operand.dtype == KEY_TYPE.dtype
        if not is_key:
            return np.asarray(operand)
        key = gpu_callbacks.HostAllocationKey.from_array(operand)
        access = access_of(memory, key, transforms)
        if key.memory_space_id == SMEM:
            reads.append(Read(key, access, source_info))
        return memory.get_buffer_content(key, access, None, logging_info=logging_info)[0]

    a = load(a_allocation_key_as_array, a_transforms).astype(np.float32)
    b = load(b_allocation_key_as_array, b_transforms).astype(np.float32)
    check_reads(memory, thread, reads)
    products_in_flight[thread].append(reads)
    key = gpu_callbacks.HostAllocationKey.from_array(acc_allocation_key_as_array)
    access = access_of(memory, key, acc_transforms)
    acc = memory.get_buffer_content(key, access, None, logging_info=logging_info)[0]
    result = (acc + np.matmul(a, b)).astype(acc.dtype)
    memory.store_buffer_content(
        key, access, result, thread, increment_clock=False, logging_info=logging_info
    )
    return token


@gpu_callbacks.fail_on_exception
def multiply_add(*, token, thread, refs, source_info, acc=None, a=None, over_rows=False):
    """``acc + a @ b`` of one ref, b, or the sum of ``a @ b.T`` of pairs, or ``a.T @ b``."""
    memory = gpu_callbacks._get_shared_memory()
    operands, reads = [], []
    for key, transforms in refs:
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        reads.append(Read(key, access_of(memory, key, transforms), source_info))
        operands.append(memory.get_buffer_content(key, reads[-1].access, None)[0])
    check_reads(memory, thread, reads)
    products_in_flight[thread].append(reads)
    operands = [np.asarray(x).astype(np.float32) for x in operands]
    if a is None:
        pairs = zip(operands[::2], operands[1::2], strict=True)
        products = [np.matmul(a.T, b) if over_rows else np.matmul(a, b.T) for a, b in pairs]
        return token, sum(products)
    (b,) = operands
    return token, np.asarray(acc) + np.matmul(np.asarray(a).astype(np.float32), b)


@gpu_callbacks.fail_on_exception
def accumulator_store(*, token, thread, key, value):
    memory = gpu_callbacks._get_shared_memory()
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    access = access_of(memory, key, ())
    memory.store_buffer_content(key, access, np.asarray(value), thread, increment_clock=False)
    return token


@gpu_callbacks.fail_on_exception
def wgmma_accumulator_deref(*, thread, wait_n, **keywords):
    if wait_n is not None:
        await_products(gpu_callbacks._get_shared_memory(), thread, leave=wait_n)
    return original_accumulator_deref(thread=thread, wait_n=wait_n, **keywords)


@gpu_callbacks.fail_on_exception
def wgmma_wait(*, token, thread, n):
    await_products(gpu_callbacks._get_shared_memory(), thread, leave=n)
    return token


# ---------------------------------------------------------------------------------------------
# Inlined functions


def fragments(matrix_shape, of_floats):
    """Where a matrix's numbers lie in a part of `dq_fragments`: an index for each place."""
    rows, columns = matrix_shape
    index = np.arange(rows * columns).reshape(rows // 64, 4, 2, 8, columns // 8, 4, 2)
    # 64 rows: four warps, two halves, eight rows; eight columns: four threads, two numbers. Four
    # numbers of a thread lie side by side, or one of each thread.
    axes = (0, 4, 1, 3, 5, 2, 6) if of_floats else (0, 4, 2, 6, 1, 3, 5)
    return index.transpose(axes).ravel()


@gpu_callbacks.fail_on_exception
def add_fragments(*, token, thread, key, transforms, value):
    memory = gpu_callbacks._get_shared_memory()
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    value = np.asarray(value)
    of_floats = np.issubdtype(value.dtype, np.floating)
    part = value.ravel()[fragments(value.shape, of_floats)]
    update(memory, thread, key, access_of(memory, key, transforms), part, "add")
    return token


@gpu_callbacks.fail_on_exception
def load_fragments(*, token, thread, key, transforms, shape):
    memory = gpu_callbacks._get_shared_memory()
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    part = memory.get_buffer_content(key, access_of(memory, key, transforms), None)[0]
    matrix = np.empty(shape, part.dtype)
    matrix.reshape(-1)[fragments(shape, np.issubdtype(part.dtype, np.floating))] = part
    return token, matrix


def interpret_inline_mgpu(self, eqn, token, args):
    name, flat_types = eqn.params["mgpu_fn"].__name__, eqn.params["flat_arg_types"]
    if name == "to_integers":
        return token, [jax.numpy.round(args[0]).astype(np.int32)]
    if name == "scale_where_needed":
        return token, [args[0] * args[1][:, None]]
    transforms = eqn.params["pytree_ref_transforms"].unflatten(args[len(flat_types) :])
    refs, values = [], []
    for var, arg, own in zip(eqn.invars, args, transforms, strict=False):
        if own is None:
            values.append(arg)
        else:
            refs.append(jaxpr_interpret.resolve_ref(var.aval, arg, own))
    ref, transforms = refs[0]
    common = {"token": token, "thread": self.thread}
    of_ref = {"key": ref, "transforms": transforms}
    if name == "add_fragments":
        token = callback.io_callback(
            add_fragments, gpu_callbacks.TOKEN_SHAPE_DTYPE, **common, **of_ref, value=values[0]
        )
        return token, []
    (aval,) = (var.aval for var in eqn.outvars)
    if name in ("multiply", "multiply_add", "multiply_over_rows"):
        emulation = functools.partial(
            multiply_add, source_info=eqn.source_info, over_rows=name == "multiply_over_rows"
        )
        common |= {"refs": refs, **dict(zip(("acc", "a"), values, strict=False))}
    else:
        assert name == "load_fragments", f"no emulation of {name}"
        emulation = functools.partial(load_fragments, shape=aval.shape)
        common |= of_ref
    token, matrix = callback.io_callback(
        emulation,
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(aval.shape, aval.dtype)),
        **common,
    )
    return token, [matrix]
