"""Additions to Pallas' GPU interpret mode, so that it runs Hopper kernels as they are on hardware.

They follow jax 0.11.2 to 0.12.0.1, whose interpret mode lacks

* ``pl.run_state`` over ``plgpu.ACC.init(...)`` and stores to an accumulator,
* products with the left operand in registers,
* ``copy_smem_to_gmem`` with a reduction or a predicate, and atomics,
* members of a ``plgpu.RefUnion`` that share their memory: see `interp_unions`,

and looks for no race in what wgmma reads. Here an operand in SMEM is checked on the clock of the
async proxy when the product is issued and again when it is awaited. That catches an operand that
has not arrived, one stored without ``commit_smem``, and a stage released too early.

Reductions and atomics never count as races; blocks run one after another.
"""

import collections
import functools
import threading
import types
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import callback
from jax._src import core as jax_core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.state import discharge
from jax._src.state import types as state_types

import interp_unions

KEY_TYPE = gpu_callbacks.HostAllocationKey.shape_and_dtype()
SMEM = shared_memory.get_memory_space_idx(gpu_core.MemorySpace.SMEM)
REGISTERS = shared_memory.get_memory_space_idx(gpu_core.MemorySpace.REGS)
UFUNCS = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}

original_reset = gpu_callbacks.reset_gpu_interpret_mode_state
original_accumulator_deref = gpu_callbacks.wgmma_accumulator_deref
original_copy_smem_to_gmem = gpu_callbacks.copy_smem_to_gmem
original_to_int = shared_memory._to_int
original_interpret = jaxpr_interpret.JaxprInterpreter.interpret


class Read(NamedTuple):
    """A part of SMEM that a product reads."""

    key: Any
    access: Any
    source_info: Any


# For every thread the reads of each product that it has issued and not awaited, oldest first.
products_in_flight: dict[Any, list[list[Read]]] = collections.defaultdict(list)
read_modify_write = threading.Lock()
compiling = threading.Lock()


def access_of(memory: Any, key: Any, transforms: Any) -> Any:
    transforms = gpu_callbacks._remove_noop_transforms(transforms)
    return memory.access(key, jax.tree.map(int, transforms))


def log(mesh_location: Any, thread: Any, source_info: Any) -> Any:
    return shared_memory.GPULoggingInfo(mesh_location, thread, source_info)


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
def multiply_add(*, token, thread, key, transforms, acc, a, source_info):
    memory = gpu_callbacks._get_shared_memory()
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    access = access_of(memory, key, transforms)
    b = memory.get_buffer_content(key, access, None)[0].astype(np.float32)
    reads = [Read(key, access, source_info)]
    check_reads(memory, thread, reads)
    products_in_flight[thread].append(reads)
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
# Reductions and atomics


class ReduceTask(gpu_callbacks.AsyncCopySmemToGmemTask):
    """SMEM -> GMEM reduction: atomic element by element, so its writes never race."""

    reduction_op = None

    def __call__(self, tma_thread_id):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        value = memory.get_buffer_content(
            self.src_allocation_key, self.src_access, self.thread, logging_info=self.logging_info
        )[0]
        if memory.detect_races:
            self.clock.inc(tma_thread_id)
            self.write_clock = self.clock.copy()
        key = self.dst_allocation_key
        shape = tuple(memory.buffer_shape_and_dtype(key).shape)
        clipped = gpu_callbacks._clip_store_to_shape(self.dst_access, value, shape)
        if clipped is not None:
            update(memory, self.thread, key, *clipped, self.reduction_op)
        self.post_write(tma_thread_id, memory)


def update(memory, thread, key, access, value, op) -> None:
    """Combines `value` with what a buffer holds, in one step."""
    with read_modify_write:
        old = memory.get_buffer_content(key, access, None)[0]
        new = UFUNCS[op](old, value).astype(old.dtype)
        memory.store_buffer_content(key, access, new, thread, increment_clock=False)


@gpu_callbacks.fail_on_exception
def copy_smem_to_gmem(*, predicate, reduction_op, **keywords):
    if predicate is not None and not bool(predicate):
        return keywords["token"]
    if reduction_op is None:
        return original_copy_smem_to_gmem(predicate=None, reduction_op=None, **keywords)
    memory = gpu_callbacks._get_shared_memory()
    thread = keywords["thread"]
    clock = memory.incr_clock(thread) if memory.detect_races else None
    ends = []
    for end in ("src", "dst"):
        key = keywords[f"{end}_allocation_key_as_array"]
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        ends += [key, access_of(memory, key, keywords[f"{end}_transforms"])]
    task = ReduceTask(keywords["mesh_location"], thread, *ends, keywords["source_info"], clock)
    task.reduction_op = reduction_op
    memory.execute_async_task(task)
    return keywords["token"]


@gpu_callbacks.fail_on_exception
def atomic(*, token, thread, key, transforms, value, op):
    memory = gpu_callbacks._get_shared_memory()
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    update(memory, thread, key, access_of(memory, key, transforms), np.asarray(value), op)
    return token


# ---------------------------------------------------------------------------------------------
# Equations: each takes the interpreter, an equation, the token and the arguments, and returns the
# token and the results.


def interpret_run_state(self, eqn, token, args):
    inner, accumulators = [], []
    for i, (arg, var) in enumerate(zip(args, eqn.params["jaxpr"].invars, strict=True)):
        is_ref = isinstance(var.aval, state_types.AbstractRef)
        was_ref = isinstance(eqn.invars[i].aval, state_types.AbstractRef)
        if not is_ref or was_ref:
            inner.append(arg)
            continue
        # An accumulator or a value that was closed over becomes a buffer of this thread alone.
        token, request = gpu_callbacks.call_make_allocation_request_array(
            token=token,
            compute_unit=self.thread,
            memory_space_id=REGISTERS,
            initial_ref_count=1,
        )
        token, key = gpu_callbacks.call_allocate_buffer(
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_request_as_array=request,
            value=arg,
            source_info=eqn.source_info,
        )
        inner.append(key)
        accumulators.append((i, key, var.aval))
    token, _ = self.interpret(eqn.params["jaxpr"], token, *inner)
    results = list(args)
    for i, key, aval in accumulators:
        shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        token, results[i] = callback.io_callback(
            functools.partial(gpu_callbacks.wgmma_accumulator_deref, source_info=eqn.source_info),
            (gpu_callbacks.TOKEN_SHAPE_DTYPE, shape),
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            acc_allocation_key_as_array=key,
            wait_n=0,
        )
        token = gpu_callbacks.call_deallocate_buffer(
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_key_as_array=key,
            source_info=eqn.source_info,
        )
    return token, results


def interpret_atomic(self, eqn, token, args):
    ref, transforms, value = jax.tree.unflatten(eqn.params["args_tree"], args)
    ref, transforms = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, ref, transforms or ())
    token = callback.io_callback(
        functools.partial(atomic, op=eqn.params["atomic_type"].value),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        thread=self.thread,
        key=ref,
        transforms=transforms,
        value=value,
    )
    return token, []


def interpret_accumulator_store(self, eqn, token, args):
    key, value = args
    token = callback.io_callback(
        accumulator_store,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        thread=self.thread,
        key=key,
        value=value,
    )
    return token, [value]


def interpret_wgmma_wait(self, eqn, token, args):
    token = callback.io_callback(
        functools.partial(wgmma_wait, n=eqn.params["n"]),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        thread=self.thread,
    )
    return token, []


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
    ref, *values = args[: len(flat_types)]
    transforms = eqn.params["pytree_ref_transforms"].unflatten(args[len(flat_types) :])[0]
    ref, transforms = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, ref, transforms)
    common = {"token": token, "thread": self.thread, "key": ref, "transforms": transforms}
    if name == "add_fragments":
        token = callback.io_callback(
            add_fragments, gpu_callbacks.TOKEN_SHAPE_DTYPE, **common, value=values[0]
        )
        return token, []
    if name == "store_numbers":
        value = values[0].T
        token, _ = gpu_callbacks.call_swap(
            token=token,
            result_shape_and_dtype=jax.ShapeDtypeStruct(value.shape, value.dtype),
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_key_as_array=ref,
            transforms=transforms,
            val=value,
            mask=None,
            source_info=eqn.source_info,
        )
        return token, []
    (aval,) = (var.aval for var in eqn.outvars)
    if name == "multiply_add":
        emulation = functools.partial(multiply_add, source_info=eqn.source_info)
        common |= {"acc": values[0], "a": values[1]}
    else:
        assert name == "load_fragments", f"no emulation of {name}"
        emulation = functools.partial(load_fragments, shape=aval.shape)
    token, matrix = callback.io_callback(
        emulation,
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(aval.shape, aval.dtype)),
        **common,
    )
    return token, [matrix]


HANDLERS = {
    primitives.inline_mgpu_p: interpret_inline_mgpu,
    discharge.run_state_p: interpret_run_state,
    primitives.atomic_store_p: interpret_atomic,
    primitives.wgmma_accumulator_store_p: interpret_accumulator_store,
    primitives.wgmma_wait_p: interpret_wgmma_wait,
}


def interpret(self, jaxpr, token, *args):
    """Runs the equations of `HANDLERS` here and hands everything between them to Pallas."""
    if not any(eqn.primitive in HANDLERS for eqn in jaxpr.eqns):
        return original_interpret(self, jaxpr, token, *args)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

    def read(var):
        return var.val if isinstance(var, jax_core.Literal) else env[var]

    for segment in segments(jaxpr.eqns):
        if segment[0].primitive in HANDLERS:
            (eqn,) = segment
            inputs = [read(var) for var in eqn.invars]
            token, results = HANDLERS[eqn.primitive](self, eqn, token, inputs)
            env.update(zip(eqn.outvars, results, strict=True))
        else:
            part = as_jaxpr(segment)
            token, results = original_interpret(self, part, token, *map(read, part.invars))
            env.update(zip(part.outvars, results, strict=True))
    return token, [read(var) for var in jaxpr.outvars]


def segments(eqns):
    """Lists of equations: each that `HANDLERS` knows alone, the ones between them together."""
    between = []
    for eqn in eqns:
        if eqn.primitive not in HANDLERS:
            between.append(eqn)
            continue
        if between:
            yield between
        yield [eqn]
        between = []
    if between:
        yield between


def as_jaxpr(eqns):
    """What the interpreter reads of a jaxpr: the equations, what they take and what they make."""
    made, taken = {}, {}
    for eqn in eqns:
        for var in eqn.invars:
            if not isinstance(var, jax_core.Literal) and var not in made:
                taken[var] = None
        made.update((var, None) for var in eqn.outvars if not isinstance(var, jax_core.DropVar))
    return types.SimpleNamespace(constvars=[], invars=list(taken), eqns=eqns, outvars=list(made))


def reset():
    """Forgets what an interrupted kernel has left behind."""
    products_in_flight.clear()
    original_reset()


# ---------------------------------------------------------------------------------------------
# Speed: the same in two thirds of the time.


def io_callback_impl(*args, callback, **_):
    """Calls back with NumPy's arrays: JAX's, which take longer to make and to read than all that
    a callback does, are turned back into these anyway."""
    # Copies, for they lie in memory that XLA uses again.
    return [np.asarray(x) for x in callback(*map(np.array, args))]


def to_int(x):
    return int(x) if isinstance(x, np.ndarray) else original_to_int(x)


def run_jaxpr(jaxpr, consts, *args):
    """Runs one thread of a block. The first thread compiles for all of them."""
    with compiling:
        traced = jax.jit(thread_map._run, static_argnums=(0,)).trace(jaxpr, consts, *args)
        compiled = traced.lower().compile()
    compiled(consts, *args)


def install() -> None:
    """Puts the additions in place, for the rest of the process."""
    callback.io_callback_impl = io_callback_impl
    shared_memory._to_int = to_int
    thread_map._run_jaxpr = run_jaxpr
    gpu_callbacks.reset_gpu_interpret_mode_state = reset
    gpu_callbacks.wgmma = wgmma
    gpu_callbacks.wgmma_accumulator_deref = wgmma_accumulator_deref
    gpu_callbacks.copy_smem_to_gmem = copy_smem_to_gmem
    jaxpr_interpret.JaxprInterpreter.interpret = interpret
    interp_unions.install()
