"""Additions to Pallas' GPU interpret mode, so that it runs Hopper kernels as they are on hardware.

They follow jax 0.11.2 to 0.12.0.1, whose interpret mode lacks

* ``pl.run_state`` over ``plgpu.ACC.init(...)`` and stores to an accumulator,
* products with the left operand in registers, and inlined functions: see `interp_products`,
* ``copy_smem_to_gmem`` with a reduction or a predicate, and atomics,
* members of a ``plgpu.RefUnion`` that share their memory: see `interp_unions`,

and looks for no race in what wgmma reads, as `interp_products` does.

Reductions and atomics never count as races; blocks run one after another.
"""

import functools
import threading
import types

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
from interp_products import (
    access_of,
    accumulator_store,
    interpret_inline_mgpu,
    products_in_flight,
    update,
    wgmma,
    wgmma_accumulator_deref,
    wgmma_wait,
)

REGISTERS = shared_memory.get_memory_space_idx(gpu_core.MemorySpace.REGS)
original_reset = gpu_callbacks.reset_gpu_interpret_mode_state
original_copy_smem_to_gmem = gpu_callbacks.copy_smem_to_gmem
original_to_int = shared_memory._to_int
original_interpret = jaxpr_interpret.JaxprInterpreter.interpret
compiling = threading.Lock()


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
