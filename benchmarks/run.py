"""Measures attention on this machine's GPU, ours beside every peer that is installed.

    python -m benchmarks.run --suite grid

Writes ``benchmarks/results/<device>/<suite>.json`` row by row. Runs of a part (`--only`, `--impl`)
merge into the same file. `--dry` lowers ours for CUDA without a GPU and writes nothing.
"""

import argparse
import concurrent.futures
import functools
import gc
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

# Before jax is imported. Kernels of attention are measured, not XLA's choice of tiles; and a peer
# that allocates its own memory finds some.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from tqdm import tqdm

from benchmarks import peers, record, timing
from benchmarks.cases import SUITES, Case
from pallas_flash.tuning.table import device_name

DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
# After one of these every later call of the process fails.
FATAL = re.compile("ILLEGAL_ADDRESS|ILLEGAL_INSTRUCTION|MISALIGNED|LAUNCH_FAILED|LAUNCH_TIMEOUT")

# Cases that are compiled together.
TOGETHER = 6

Row = dict[str, Any]
Builds = dict[str, Exception | timing.Calls]


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="grid")
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="cases whose name has this regular expression"
    )
    parser.add_argument(
        "--impl",
        metavar="NAMES",
        type=lambda names: names.split(","),
        help=f"implementations, separated by commas, of {', '.join(peers.PEERS)}; "
        "without it all that are installed, but xla",
    )
    parser.add_argument("--iterations", type=int, default=5, help="timed calls, at least 5")
    parser.add_argument("--output", type=pathlib.Path, default=record.RESULTS, metavar="DIR")
    parser.add_argument("--dry", action="store_true", help="no GPU: lower ours, measure nothing")
    chosen = parser.parse_args(words)
    if chosen.iterations < 5:
        parser.error(f"--iterations={chosen.iterations} must be at least 5")
    for name in chosen.impl or ():
        if name not in peers.PEERS:
            parser.error(f"--impl: {name!r} must be one of {', '.join(peers.PEERS)}")
    chosen.cases = [case for case in SUITES[chosen.suite]() if re.search(chosen.only, str(case))]
    if not chosen.cases:
        parser.error(f"--only={chosen.only!r} leaves no case of the suite {chosen.suite!r}")
    return chosen


def present(asked: list[str] | None) -> list[str]:
    """Names of the implementations to measure; says which are missing."""
    wanted = asked or [name for name, peer in peers.PEERS.items() if peer.by_default]
    missing = {name: peers.missing(name) for name in wanted}
    for name, reason in missing.items():
        if reason:
            print(f"{name} is not measured: {reason}")
    return [name for name in wanted if not missing[name]]


def dry(cases: list[Case], names: list[str]) -> None:
    """Lowers ours for CUDA; makes the calls of the others, without running them."""
    for case in tqdm(cases, unit="case"):
        text = timing.lower_for_cuda(peers.PEERS["ours"].make(case), case)
        assert "mosaic_gpu" in text, f"no kernel of ours in {case}"
        for name in names:
            peers.PEERS[name].make(case)


def new_row(case: Case, name: str) -> Row:
    row = {**vars(case), "impl": name, "commit": record.commit(), "date": record.today()}
    if name == "ours":
        row["backend"] = peers.backend(case)
    return row


def refuse(row: Row, error: Exception) -> None:
    """Notes the first lines of an error."""
    row["error"] = f"{type(error).__name__}: {error}"[:300]


def build(cases: list[Case], names: list[str]) -> list[tuple[Case, Builds]]:
    """Every case with its implementations, each compiled, or with the error that it raised."""
    # Lowered one after the other, as not every peer allows threads there; compiled side by side.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        lowered: list[tuple[Case, dict[str, Any]]] = []
        for case in cases:
            builds: dict[str, Any] = {}
            for name in filter(functools.partial(peers.takes, case=case), names):
                try:
                    steps = timing.lower(peers.PEERS[name].make(case), case)
                    builds[name] = [pool.submit(step.compile) for step in steps]
                # Anything: a peer refuses in its own way, the others are measured all the same.
                except Exception as error:
                    builds[name] = error
            lowered.append((case, builds))
    return [
        (case, {name: compiled(build) for name, build in builds.items()})
        for case, builds in lowered
    ]


def compiled(build: Exception | list[concurrent.futures.Future]) -> Exception | timing.Calls:
    if isinstance(build, Exception):
        return build
    error = next((e for future in build if (e := future.exception())), None)
    # An interrupt is no Exception and is not kept.
    assert error is None or isinstance(error, Exception)
    return error or timing.Calls(*(future.result() for future in build))


def measure(case: Case, builds: Builds, iterations: int) -> list[Row]:
    """One row for each implementation: the same direction of all of them, one after the other."""
    rows = {name: new_row(case, name) for name in builds}
    data = timing.arrays(case)
    truth = timing.reference(case, data)
    for direction in DIRECTIONS:
        for name, row in rows.items():
            if "error" in row:
                continue
            try:
                out, spread = time_one(builds[name], direction, data, iterations)
                row[f"{direction}_ms"] = round(spread.median, 5)
                row[f"{direction}_ms_range"] = [round(spread.low, 5), round(spread.high, 5)]
                row[f"{direction}_tflops"] = round(case.flops[direction] / spread.median / 1e9, 1)
                if direction == "fwd_bwd":
                    row["rel_err"] = timing.relative_errors(case, out, truth)
            except Exception as error:
                refuse(row, error)
                if FATAL.search(row["error"]):
                    # What the others would say now is not their fault.
                    return [row]
    return list(rows.values())


def time_one(
    build: Exception | timing.Calls, direction: str, data: list[jax.Array], iterations: int
) -> tuple[Any, timing.Spread]:
    if isinstance(build, Exception):
        raise build
    *qkv, dout = data
    args: list[Any] = data if direction == "fwd_bwd" else qkv
    if direction == "bwd":
        args = [build.residuals(*qkv), dout]
    return timing.gpu_ms(getattr(build, direction), *args, iterations=iterations)


def measure_startup(case: Case, names: list[str]) -> list[Row]:
    """One row for each implementation, with the seconds that a first call takes."""
    rows = [new_row(case, name) for name in names]
    for row in rows:
        try:
            seconds = timing.build_seconds(peers.PEERS[row["impl"]].make(case), case)
            row |= {name: round(s, 3) for name, s in seconds.items()}
        except Exception as error:
            refuse(row, error)
    return rows


def startup_rows(cases: list[Case], names: list[str]) -> Iterator[tuple[Case, list[Row]]]:
    for case in cases:
        yield case, measure_startup(case, names)


def speed_rows(options: argparse.Namespace, names: list[str]) -> Iterator[tuple[Case, list[Row]]]:
    for cases in itertools.batched(options.cases, TOGETHER):
        for case, builds in build(list(cases), names):
            yield case, measure(case, builds, options.iterations)
            # The case's arrays, before those of the next one are made.
            gc.collect()


def line(case: Case, row: Row) -> str:
    """Of the printed table: TFLOP/s of each direction with its error, or seconds to build."""
    text = f"{case!s:42} {row['impl']:8}"
    if "error" in row:
        return f"{text} {row['error'].splitlines()[0][:80]}"
    if "build_s" in row:
        return f"{text} {row['build_s']:6.2f} s to build, {row['first_call_s']:6.2f} s first call"
    speeds = " ".join(f"{row[f'{direction}_tflops']:7.1f}" for direction in DIRECTIONS)
    return f"{text} {speeds}   " + " ".join(f"{e:.1e}" for e in row["rel_err"].values())


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    names = present(options.impl)
    if options.dry:
        dry(options.cases, names)
        print(f"{len(options.cases)} cases of ours lower for CUDA")
        return 0
    device = jax.devices()[0].device_kind
    path = options.output / device_name(device) / f"{options.suite}.json"
    header = {
        "device": device,
        "jax": jax.__version__,
        "commit": record.commit(),
        "date": record.today(),
        # Those of earlier runs stay, like their rows.
        "versions": record.load(path).get("versions", {})
        | {name: peers.version(name) for name in names if name != "ours"},
        "iterations": options.iterations,
        **timing.chip_rates(options.iterations),
    }
    print(f"{device}: {header['matmul_tflops']} TFLOP/s, {header['copy_gb_s']} GB/s")
    if options.suite == "startup":
        measured = startup_rows(options.cases, names)
    else:
        measured = speed_rows(options, names)
    lines, failed = [], False
    for case, rows in tqdm(measured, total=len(options.cases), unit="case", mininterval=2):
        record.write(path, header, rows)
        lines += [line(case, row) for row in rows]
        failed |= any("error" in row for row in rows if row["impl"] == "ours")
        if dead := next((row for row in rows if FATAL.search(row.get("error", ""))), None):
            print(f"{dead['impl']} stopped the GPU at {case}; run the rest with --only")
            failed = True
            break
    print(f"{'TFLOP/s':51} {'forward':>7} {'back':>7} {'both':>7}   errors of out, dq, dk, dv")
    print(*lines, f"written to {path}", sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
