"""Searches configurations on the GPU at hand and writes the best into `tuning/data`.

    python -m pallas_flash.tuning 4x4096x16x128 4x4096x32/8x128

Commands for other shapes may run at the same time: they compile side by side and take turns with
the GPU, if XLA_PYTHON_CLIENT_PREALLOCATE=false leaves memory for all.

A shape is batch x length x heads x head_dim; "a/b" stands for query and key length, for query and
key heads, or for the head_dim of keys and of values. The search goes downhill: it times every
configuration one step away and moves to the best, as long as that pays.
"""

import argparse
import dataclasses
import datetime
import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_flash import dispatch
from pallas_flash.backends.backend import Backend
from pallas_flash.masks import Causal, Mask
from pallas_flash.spec import AttentionSpec, Operands, make_request
from pallas_flash.tuning import table, timing

MASKS: dict[str, Mask | None] = {"full": None, "causal": Causal()}
DIRECTIONS = ("forward", "backward")
# Less than that is noise.
WORTH = 0.99
# A call's results may differ by this much, relative to the largest value, through rounding alone.
ROUNDING = 0.03

# (config, direction) -> ms, infinite where it does not compile.
Timer = Callable[[Any, str], float]


def parse_shape(text: str) -> list[tuple[int, ...]]:
    """Shapes of q, k and v from e.g. "4x1024/4096x32/8x192/128"."""
    pairs = [[int(n) for n in part.split("/")] for part in text.split("x")]
    if len(pairs) != 4 or any(len(pair) > 2 for pair in pairs) or len(pairs[0]) != 1:
        raise ValueError(f"shape={text!r} must be batch x length x heads x head_dim")
    (batch, _), (q_len, kv_len), (q_heads, kv_heads), (head_dim, value_dim) = (
        (pair[0], pair[-1]) for pair in pairs
    )
    keys = (batch, kv_len, kv_heads)
    return [(batch, q_len, q_heads, head_dim), (*keys, head_dim), (*keys, value_dim)]


def measured(backend: Backend, spec: AttentionSpec, operands: Operands, iterations: int) -> Timer:
    """Times configurations by CUPTI, and raises if one changes the results."""
    default = backend.default_config(spec)
    out, lse = jax.jit(functools.partial(backend.forward, spec, default))(operands)
    dout = jax.random.normal(jax.random.key(3), out.shape, out.dtype)
    rows = out, lse, dout, jnp.zeros_like(lse)
    arrays = {"forward": (operands,), "backward": (operands, *rows)}
    expected: dict[str, list[Any]] = {}

    def time(config, direction):
        function = functools.partial(getattr(backend, direction), spec, config)
        try:
            program = jax.jit(function).lower(*arrays[direction]).compile()
            with timing.turn():
                results = jax.tree.leaves(program(*arrays[direction]))
                _, times = timing.kernel_ms(program, *arrays[direction], iterations=iterations)
        except jax.errors.JaxRuntimeError:
            return math.inf
        for a, b in zip(results, expected.setdefault(direction, results), strict=True):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            if not jnp.abs(a - b).max() <= ROUNDING * jnp.abs(b).max():
                raise RuntimeError(f"{config} changes the results of {direction}")
        return statistics.median(times)

    return time


def search(
    backend: Backend,
    spec: AttentionSpec,
    time: Timer,
    steps: int,
    directions: Sequence[str] = DIRECTIONS,
    progress: Any = iter,
) -> tuple[Any, dict[str, float]]:
    """The fastest configuration found, and the ms of each direction with it and by default.

    Args:
      steps: of the way downhill, at most, for each direction.
      directions: "forward" and "backward", or one of them.
      progress: wraps the configurations of a step, e.g. ``tqdm``.

    Raises:
      RuntimeError: if the default does not compile.
    """
    best, ms = backend.default_config(spec), {}
    for direction in directions:
        ms[f"default_{direction}"] = ms[direction] = time(best, direction)
        if ms[direction] == math.inf:
            raise RuntimeError(f"the default does not compile: {best}")
        seen = {getattr(best, direction)}
        for _ in range(steps):
            candidates = backend.candidate_configs(spec, best, direction)
            candidates = [c for c in candidates if getattr(c, direction) not in seen]
            seen.update(getattr(c, direction) for c in candidates)
            times = [(time(c, direction), c) for c in progress(candidates)]
            fastest, config = min(times, key=lambda pair: pair[0], default=(math.inf, best))
            if fastest > WORTH * ms[direction]:
                break
            ms[direction], best = fastest, config
    return best, ms


def _progress_bar() -> Any:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return iter
    return functools.partial(tqdm, leave=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="+", help="e.g. 4x4096x16x128 or 4x4096x32/8x192/128")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--backend", choices=("hopper",), default="hopper")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--iterations", type=int, default=7, help="calls timed for each choice")
    parser.add_argument("--steps", type=int, default=3, help="downhill, at most")
    parser.add_argument("--data", type=pathlib.Path, default=table.DATA, help="folder to write to")
    args = parser.parse_args(argv)
    device, backend = jax.devices()[0].device_kind, dispatch.BACKENDS[args.backend]
    path = args.data / f"{table.device_name(device)}.json"
    for shape in args.shapes:
        shapes = enumerate(parse_shape(shape))
        q, k, v = (jax.random.normal(jax.random.key(i), s, args.dtype) for i, s in shapes)
        for name in args.masks:
            mask = MASKS[name]
            request = make_request(q, k, v, mask=mask, score_mod=None, scale=None)
            operands = request.operands
            spec = AttentionSpec.of(operands, request.scale)
            time = measured(backend, spec, operands, args.iterations)
            config, ms = search(backend, spec, time, args.steps, args.directions, _progress_bar())
            parts = {d: getattr(config, d) for d in args.directions}
            print(shape, name, {key: round(x, 3) for key, x in ms.items()}, *parts.values())
            with timing.turn():
                table.write(path, device, {
                    "backend": args.backend,
                    "key": dataclasses.asdict(table.Key.of(spec)),
                    "config": {d: dataclasses.asdict(part) for d, part in parts.items()},
                    "shape": shape,
                    "ms": {key: round(x, 4) for key, x in ms.items()},
                    "jax": jax.__version__,
                    "date": datetime.date.today().isoformat(),
                })  # fmt: skip


if __name__ == "__main__":
    main()
