"""Measuring a feature: its programs, and their errors against float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.features import Arrays, Call, Feature, ours

Results = dict[str, jax.Array]


class Steps(NamedTuple):
    """What is timed of one implementation, lowered or compiled."""

    # q, k, v, arrays -> out
    fwd: Any
    # q, k, v, arrays, dout -> out, dq, dk, dv and the gradients of arrays, by name
    fwd_bwd: Any


def with_gradients(feature: Feature, call: Call) -> Any:
    def fwd_bwd(q, k, v, arrays: Arrays, dout) -> Results:
        learned = {name: arrays[name] for name in feature.wrt}
        out, vjp = jax.vjp(lambda q, k, v, own: call(q, k, v, arrays | own), q, k, v, learned)
        dq, dk, dv, d_learned = vjp(dout)
        gradients = {f"d{name}": x for name, x in d_learned.items()}
        return {"out": out, "dq": dq, "dk": dk, "dv": dv, **gradients}

    return fwd_bwd


def structs(feature: Feature) -> tuple[list[Any], Any]:
    """Of q, k, v and the further arrays, and of dout."""
    *qkv, dout = feature.shape.structs
    return [*qkv, jax.eval_shape(feature.arrays)], dout


def lower(feature: Feature, call: Call) -> Steps:
    """For the device at hand; an implementation that refuses the feature raises its own error."""
    inputs, dout = structs(feature)
    return Steps(
        fwd=jax.jit(lambda q, k, v, arrays: call(q, k, v, arrays)).lower(*inputs),
        fwd_bwd=jax.jit(with_gradients(feature, call)).lower(*inputs, dout),
    )


def lower_for_cuda(feature: Feature) -> str:
    """Ours, forward and backward, for an NVIDIA GPU, on a machine that may have none."""
    inputs, dout = structs(feature)
    traced = jax.jit(with_gradients(feature, ours(feature.terms))).trace(*inputs, dout)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def lower_reference(feature: Feature) -> Steps:
    """Plain JAX in float32, of the first `heads_checked` heads."""
    call = with_gradients(feature, ours(feature.terms, backend="blockwise"))

    def wide(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def reference(q, k, v, arrays, dout):
        q, k, v, dout = (wide(x[:, :, : feature.heads_checked]) for x in (q, k, v, dout))
        return call(q, k, v, jax.tree.map(wide, arrays), dout)

    inputs, dout = structs(feature)
    with jax.default_matmul_precision("highest"):
        return Steps(fwd=None, fwd_bwd=jax.jit(reference).lower(*inputs, dout))


def relative_errors(feature: Feature, results: Results, truth: Results) -> dict[str, float]:
    """L2 norm of each result's error over that of the truth, in the heads where it is known."""

    def checked(name: str) -> jax.Array:
        x = results[name]
        return x[:, :, : feature.heads_checked] if name in ("out", "dq", "dk", "dv") else x

    errors = {name: _relative_error(checked(name), b) for name, b in truth.items()}
    return {name: float(f"{error:.3g}") for name, error in errors.items()}


@jax.jit
def _relative_error(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
