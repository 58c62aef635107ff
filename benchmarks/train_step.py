"""Measures a training step as users have it: a GPT of 124 M parameters in Flax, AdamW, bfloat16.

    python -m benchmarks.train_step

Only the attention differs: Flax's own, jax.nn with cuDNN, other packages that are installed, ours.
Writes ``benchmarks/results/<device>/train_step.json`` after each case: tokens per second, the
memory that the compiled step needs, and the longest context that fits in 80 GB, found by compiling.
Each case has a process of its own; what XLA learns in one (its choice of matrix products, the same
for all implementations) is kept for the next in a cache of the run.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import record
from pallas_flash.tuning.table import device_name

# Batch x length, 32768 tokens a step. The first count most if a run is cut off.
SHAPES = ("1x32768", "8x4096", "2x16384", "32x1024")
# Flax's own comes last: where its T x S scores do not fit, only its memory is known.
IMPLS = ("ours", "cudnn", "tokamax", "fa4", "flax")
# GPT-2's smallest model; its vocabulary is rounded up to a multiple of 128.
SIZES = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50304}

# Seconds that a process may take, its turn for the GPU included.
LIMIT = 200
# Which rows say the same thing.
KEY = ("kind", "impl", "batch", "length")

Job = dict[str, Any]


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--impl", metavar="NAMES", default=",".join(IMPLS))
    parser.add_argument("--shapes", metavar="BxT,...", default=",".join(SHAPES))
    parser.add_argument("--steps", type=int, default=7, help="timed steps")
    parser.add_argument("--output", type=pathlib.Path, default=record.RESULTS, metavar="DIR")
    parser.add_argument("--skip-longest", action="store_true", help="no search of contexts")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.impl = options.impl.split(",")
    for name in options.impl:
        if name not in IMPLS:
            parser.error(f"--impl: {name!r} must be one of {', '.join(IMPLS)}")
    return options


def jobs(options: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """The steps to measure, the most telling ones first; and what is compiled without being run.

    The second: Flax's own where its T x S scores do not fit, and the searches of contexts.
    """
    common = {"sizes": {name: getattr(options, name) for name in SIZES}, "steps": options.steps}
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]

    pairs = [(impl, shape) for shape in shapes for impl in options.impl]
    shortest = min(length for _, length in shapes)
    # Sorting keeps the order of what ranks alike.
    rank = {"ours": 0, "cudnn": 0, "flax": 1}
    pairs.sort(key=lambda pair: rank.get(pair[0], 2))
    steps = [
        common | {"kind": "step", "impl": impl, "batch": batch, "length": length}
        for impl, (batch, length) in pairs
    ]
    measured: list[Job] = []
    compiled: list[Job] = []
    for job in steps:
        fits = job["impl"] != "flax" or job["length"] == shortest
        (measured if fits else compiled).append(job)
    longest = [common | {"kind": "longest", "impl": impl} for impl in options.impl]
    return measured, compiled + ([] if options.skip_longest else longest)


def start(job: Job, cache: str) -> subprocess.Popen:
    """A process that measures one job; those of one cache use the GPU one after another."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    } | os.environ
    job = job | {"lock": f"{cache}/lock"}
    command = [sys.executable, "-m", "benchmarks.train_case", json.dumps(job)]
    return subprocess.Popen(
        command, env=environment, cwd=record.ROOT, stdout=subprocess.PIPE, text=True
    )


def finish(job: Job, process: subprocess.Popen, output: pathlib.Path) -> bool:
    """Writes the row that a process has measured; whether ours was measured if it was asked for."""
    name = " ".join(str(job[x]) for x in KEY if x in job)
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
    if process.returncode:
        print(f"{name}: the process ended with {process.returncode}", flush=True)
        return job["impl"] != "ours"
    result = json.loads(printed.splitlines()[-1])
    if "missing" in result:
        print(f"{name} is not measured: {result['missing']}", flush=True)
        return True
    row = result["row"]
    print(name, {key: row[key] for key in row if key not in KEY}, flush=True)
    device = device_name(result["header"]["device"])
    record.write(output / device / "train_step.json", result["header"], [row], KEY)
    return job["impl"] != "ours" or "error" not in row


def run(some: list[Job], at_once: int, cache: str, output: pathlib.Path) -> bool:
    """Measures jobs in their order, `at_once` processes side by side; whether all went well."""
    good, running = True, []
    for job in some:
        running.append((job, start(job, cache)))
        if len(running) == at_once:
            good &= finish(*running.pop(0), output)
    for job, process in running:
        good &= finish(job, process, output)
    return good


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    measured, compiled = jobs(options)
    with tempfile.TemporaryDirectory() as cache:
        # While one has the GPU, the next is ready and the one after it starts up.
        good = run(measured, 3, cache, options.output)
        good &= run(compiled, len(compiled), cache, options.output)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
