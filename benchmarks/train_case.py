"""One row of `train_step`, in a process of its own: ``python -m benchmarks.train_case JOB``."""

import fcntl
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from benchmarks import gpt, peers, record

Row = dict[str, Any]

# Bytes in which a context must fit.
BUDGET = 80e9
# What a searched context's length is a multiple of.
GRAIN = 1024
# XLA does not look for the fastest product: memory does not depend on it, compile time does.
UNTUNED = {"xla_gpu_autotune_level": 0}


def lower(impl: str, sizes: gpt.Sizes, batch: int, length: int) -> Any:
    state = jax.eval_shape(functools.partial(gpt.initial_state, sizes))
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    model = gpt.GPT(sizes, gpt.attention(impl, sizes.case(batch, length)))
    return gpt.train_step(model).lower(state, tokens)


def untuned(lowered: Any) -> Any:
    return lowered.compile(UNTUNED if jax.default_backend() == "gpu" else None)


def peak_bytes(compiled: Any) -> int:
    """What the program holds at once at most: state, tokens, results and all temporaries."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def measure(
    impl: str, sizes: gpt.Sizes, batch: int, length: int, steps: int, lock: str = os.devnull
) -> Row:
    """Tokens per second and memory of the compiled step.

    lock: a file that one process holds at a time, while it uses the GPU.
    """
    row: Row = {}
    lowered = lower(impl, sizes, batch, length)
    if impl in gpt.QUADRATIC:
        # Before XLA tries products that do not fit.
        row["peak_gb"] = round(peak_bytes(untuned(lowered)) / 1e9, 2)
        if row["peak_gb"] > BUDGET / 1e9:
            return row | {"error": f"needs {row['peak_gb']} GB"}
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return row | time_steps(lowered, sizes, batch, length, steps)


def time_steps(lowered: Any, sizes: gpt.Sizes, batch: int, length: int, steps: int) -> Row:
    step = lowered.compile()
    state = gpt.initial_state(sizes)
    tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, sizes.vocabulary)
    seconds, losses = [], []
    # The first steps load the program and warm the chip.
    for _ in range(2 + steps):
        start = time.perf_counter()
        state, loss = step(state, tokens)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[2:])
    return {
        "tokens_per_s": round(batch * length / middle),
        "step_ms": round(1e3 * middle, 3),
        "step_ms_range": [round(1e3 * f(seconds[2:]), 3) for f in (min, max)],
        "peak_gb": round(peak_bytes(step) / 1e9, 2),
        "temporaries_gb": round(step.memory_analysis().temp_size_in_bytes / 1e9, 2),
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
    }


def longest(impl: str, sizes: gpt.Sizes) -> Row:
    """The longest context that fits, by the memory analysis of compiled steps of batch 1."""

    def needs(length: int) -> int:
        return peak_bytes(untuned(lower(impl, sizes, 1, length)))

    tried = search(needs, BUDGET, GRAIN)
    fits = max((length for length, size in tried.items() if size <= BUDGET), default=0)
    sizes_gb = {str(length): round(size / 1e9, 2) for length, size in sorted(tried.items())}
    return {"longest": fits, "peak_gb": sizes_gb}


def search(needs: Callable[[int], float], budget: float, grain: int) -> dict[int, float]:
    """Sizes by length, multiples of `grain`: some fit, some do not, the two within 3%.

    Each guess lies on the line through the two sizes next to the budget.
    """
    tried = {length: needs(length) for length in (8 * grain, 16 * grain)}
    while True:
        fit = max((t for t, size in tried.items() if size <= budget), default=0)
        over = min((t for t, size in tried.items() if size > budget), default=None)
        if over is not None and over - fit <= max(grain, 0.03 * fit):
            return tried
        (t0, s0), (t1, s1) = sorted(tried.items(), key=lambda item: abs(item[1] - budget))[:2]
        guess = t0 + (budget - s0) * (t1 - t0) / (s1 - s0)
        # Below a size that fits nothing is learnt; a guess beyond all of them may be far off.
        low = fit + max(grain, 0.02 * fit)
        high = 8 * fit if over is None else over - grain
        tried_next = int(min(max(guess, low), max(high, fit + grain))) // grain * grain
        tried[tried_next] = needs(tried_next)


def header(sizes: gpt.Sizes, steps: int) -> Row:
    params, _ = jax.eval_shape(functools.partial(gpt.initial_state, sizes))
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "commit": record.commit(),
        "date": record.today(),
        "model": vars(sizes) | {"parameters": sum(x.size for x in jax.tree.leaves(params))},
        "steps": steps,
        "budget_gb": BUDGET / 1e9,
    }


def row_of(job: Row) -> Row:
    sizes = gpt.Sizes(**job["sizes"])
    row: Row = {name: job.get(name) for name in ("kind", "impl", "batch", "length")}
    try:
        if job["kind"] == "longest":
            row |= longest(job["impl"], sizes)
        else:
            row |= measure(
                job["impl"], sizes, job["batch"], job["length"], job["steps"], job["lock"]
            )
    # Anything: a peer refuses in its own way, the others are measured all the same.
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    version = peers.version(job["impl"]) if job["impl"] in peers.PEERS else flax.__version__
    return row | {"commit": record.commit(), "date": record.today(), "version": version}


def main(words: list[str]) -> None:
    """Prints the file's header and the row as one line of JSON, or why there is none."""
    job = json.loads(words[0])
    if job["impl"] in peers.PEERS and (reason := peers.missing(job["impl"])):
        print(json.dumps({"missing": reason}))
    else:
        row = row_of(job)
        print(json.dumps({"header": header(gpt.Sizes(**job["sizes"]), job["steps"]), "row": row}))


if __name__ == "__main__":
    main(sys.argv[1:])
