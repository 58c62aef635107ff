"""Measuring: GPU kernel time of a call, its error, and what the chip can do."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.cases import Case
from benchmarks.peers import Attention
from pallas_flash.tuning.timing import kernel_ms

# The process does without XLA's search for the fastest matrix products; where they count, it is on.
SEARCH = {"xla_gpu_autotune_level": 4}
# Rows of queries whose scores the reference holds at a time.
CHUNK = 1024


class Spread(NamedTuple):
    """Milliseconds."""

    median: float
    low: float
    high: float


def gpu_ms(f: Callable[..., Any], *args: Any, iterations: int) -> tuple[Any, Spread]:
    """f's result and the time of all kernels that a call launches, by CUPTI."""
    out, times = kernel_ms(f, *args, iterations=iterations)
    return out, Spread(statistics.median(times), min(times), max(times))


class Calls(NamedTuple):
    """What is timed of one implementation, as jitted, lowered or compiled functions."""

    # q, k, v -> out
    fwd: Any
    # q, k, v -> its vjp, the argument of bwd
    residuals: Any
    # vjp, dout -> dq, dk, dv
    bwd: Any
    # q, k, v, dout -> out, dq, dk, dv
    fwd_bwd: Any


def _fwd_bwd(attention: Attention) -> Any:
    def fwd_bwd(q, k, v, dout):
        out, vjp = jax.vjp(attention, q, k, v)
        return out, *vjp(dout)

    return jax.jit(fwd_bwd)


def lower(attention: Attention, case: Case) -> Calls:
    """For the device at hand; an implementation that refuses a case raises its own error."""
    *qkv, dout = case.structs
    residuals = jax.jit(lambda q, k, v: jax.vjp(attention, q, k, v)[1]).trace(*qkv)
    bwd = jax.jit(lambda vjp, dout: vjp(dout)).trace(residuals.out_info, dout)
    return Calls(
        fwd=jax.jit(lambda q, k, v: attention(q, k, v)).lower(*qkv),
        residuals=residuals.lower(),
        bwd=bwd.lower(),
        fwd_bwd=_fwd_bwd(attention).lower(*qkv, dout),
    )


@functools.partial(jax.jit, static_argnums=0)
def arrays(case: Case) -> list[jax.Array]:
    """Random q, k, v and dout."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, shape, jnp.dtype(case.dtype))
        for key, shape in zip(keys, case.shapes, strict=True)
    ]


def lower_for_cuda(attention: Attention, case: Case) -> str:
    """The program of forward and backward for an NVIDIA GPU, on a machine that may have none."""
    traced = _fwd_bwd(attention).trace(*case.structs)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def build_seconds(attention: Attention, case: Case) -> dict[str, float]:
    """What a user waits for before forward and backward of a new shape run."""
    jitted = _fwd_bwd(attention)
    data = jax.block_until_ready(arrays(case))
    marks = [time.perf_counter()]

    def mark(x):
        marks.append(time.perf_counter())
        return x

    compiled = mark(mark(mark(jitted.trace(*data)).lower()).compile())
    mark(jax.block_until_ready(compiled(*data)))
    names = ("trace_s", "lower_s", "compile_s", "first_call_s")
    parts = {name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False)}
    return parts | {"build_s": marks[3] - marks[0]}


def _queries(case: Case, x: jax.Array) -> jax.Array:
    """[G, T, D] float32: the first batch row's query heads of the first key head."""
    group = case.num_q_heads // case.num_kv_heads
    return jnp.swapaxes(x[0, :, :group], 0, 1).astype(jnp.float32)


def _keys(x: jax.Array) -> jax.Array:
    """[S, D] float32: the first batch row's first key head."""
    return x[0, :, 0].astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _first_group(case: Case, q, k, v, dout):
    return _queries(case, q), _keys(k), _keys(v), _queries(case, dout)


@jax.jit
def _attention_and_gradients(q, k, v, dout, causal):
    """out, dq, dk, dv of softmax(q k' / sqrt(D)) v in float32, a chunk of query rows at a time."""
    group, q_len, head_dim = q.shape
    scale = head_dim**-0.5
    # Heads of a group are more query rows of the same keys. Padding has dout = 0: no gradient.
    rows = group * q_len
    padding = -rows % CHUNK
    position = jnp.pad(jnp.tile(jnp.arange(q_len), group), (0, padding)).reshape(-1, CHUNK)
    q, dout = (
        jnp.pad(x.reshape(rows, -1), ((0, padding), (0, 0))).reshape(-1, CHUNK, x.shape[-1])
        for x in (q, dout)
    )

    def body(sums, chunk):
        q, dout, position = chunk
        allowed = ~causal | (jnp.arange(k.shape[0])[None] <= position[:, None])
        p = jax.nn.softmax(jnp.where(allowed, scale * q @ k.T, -jnp.inf))
        out = p @ v
        ds = scale * p * (dout @ v.T - (dout * out).sum(-1, keepdims=True))
        return (sums[0] + ds.T @ q, sums[1] + p.T @ dout), (out, ds @ k)

    with jax.default_matmul_precision("highest"):
        (dk, dv), chunks = lax.scan(
            body, (jnp.zeros_like(k), jnp.zeros_like(v)), (q, dout, position)
        )
    out, dq = (x.reshape(-1, x.shape[-1])[:rows].reshape(group, q_len, -1) for x in chunks)
    return out, dq, dk, dv


def reference(case: Case, data: list[jax.Array]) -> tuple[jax.Array, ...]:
    """out, dq, dk, dv of the first batch row and key head in float32."""
    return _attention_and_gradients(*_first_group(case, *data), case.causal)


@functools.partial(jax.jit, static_argnums=0)
def _relative_errors(case: Case, results, truth):
    out, dq, dk, dv = results
    ours = _queries(case, out), _queries(case, dq), _keys(dk), _keys(dv)
    return [jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(ours, truth, strict=True)]


def relative_errors(case: Case, results, truth) -> dict[str, float]:
    """L2 norm of the error of out, dq, dk and dv over that of the truth, where it is known."""
    errors = _relative_errors(case, results, truth)
    names = ("out", "dq", "dk", "dv")
    return {name: float(f"{error:.3g}") for name, error in zip(names, errors, strict=True)}


def chip_rates(iterations: int, n: int = 8192) -> dict[str, float]:
    """What the device can do today: a matrix product of bfloat16, and reading and writing."""
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
    options = SEARCH if jax.default_backend() == "gpu" else {}
    multiply = jax.jit(jnp.matmul, compiler_options=options)
    _, product = gpu_ms(multiply, a, b, iterations=iterations)
    return {
        "matmul_tflops": round(2 * n**3 / product.median / 1e9, 1),
        "copy_gb_s": copy_gb_s(iterations),
    }


def copy_gb_s(iterations: int) -> float:
    """GB a second, read and written, of a kernel that adds one to every number of 1 GiB."""
    x = jnp.zeros(2**28, jnp.float32)
    _, copy = gpu_ms(jax.jit(lambda x: x + 1), x, iterations=iterations)
    return round(2 * x.nbytes / copy.median / 1e6, 1)
