"""Measures attention on this machine's GPU, ours beside every peer that is installed.

    python -m benchmarks.run --suite grid

Writes ``benchmarks/results/<device>/<suite>.json`` row by row. Runs of a part (`--only`, `--impl`)
merge into the same file. `--dry` lowers ours for CUDA without a GPU and writes nothing.
"""

import argparse
import gc
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Before jax is imported. Kernels of attention are measured, not XLA's choice of tiles; and a peer
# that allocates its own memory finds some.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from tqdm import tqdm

from benchmarks import cases, feature_timing, measure, peers, record, timing
from benchmarks.features import Feature, features
from benchmarks.measure import DIRECTIONS, Row
from pallas_flash.tuning.table import device_name

# Cases that are compiled together.
TOGETHER = 4

SUITES: dict[str, Callable[[], list[Any]]] = {**cases.SUITES, "features": features}


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
        "without it all that are installed (xla and tokamax_triton: in the suite features alone)",
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


def present(options: argparse.Namespace) -> list[str]:
    """Names of the implementations to measure; says which are missing."""
    of_features = options.suite == "features"
    wanted = options.impl or [
        name for name, peer in peers.PEERS.items() if peer.by_default or of_features
    ]
    missing = {name: peers.missing(name) for name in wanted}
    for name, reason in missing.items():
        if reason:
            print(f"{name} is not measured: {reason}")
    return [name for name in wanted if not missing[name]]


def dry(chosen: list[Any], names: list[str]) -> None:
    """Lowers ours for CUDA; makes the calls of the others, without running them."""
    for case in tqdm(chosen, unit="case"):
        if isinstance(case, Feature):
            text = feature_timing.lower_for_cuda(case)
        else:
            text = timing.lower_for_cuda(peers.PEERS["ours"].make(case), case)
            for name in names:
                peers.PEERS[name].make(case)
        assert "mosaic_gpu" in text, f"no kernel of ours in {case}"


def startup_rows(chosen: list[Any], names: list[str]) -> Iterator[tuple[Any, list[Row]]]:
    for case in chosen:
        yield case, measure.measure_startup(case, names)


def speed_rows(options: argparse.Namespace, names: list[str]) -> Iterator[tuple[Any, list[Row]]]:
    of_features = options.suite == "features"
    describe = measure.feature_programs if of_features else measure.programs
    time_rows: Callable[..., list[Row]] = (
        measure.measure_feature if of_features else measure.measure
    )
    for some in itertools.batched(options.cases, TOGETHER):
        builds = measure.build(list(some), lambda case: describe(case, names))
        for case, programs in zip(some, builds, strict=True):
            yield case, time_rows(case, programs, options.iterations)
            # The case's arrays, before those of the next one are made.
            gc.collect()


def line(case: Any, row: Row) -> str:
    """Of the printed table: TFLOP/s or ms of each direction with its error, or seconds to build."""
    text = f"{case!s:42} {row['impl']:16}"
    if "error" in row:
        return f"{text} {row['error'].splitlines()[0][:80]}"
    if "build_s" in row:
        return f"{text} {row['build_s']:6.2f} s to build, {row['first_call_s']:6.2f} s first call"
    errors = " ".join(f"{name} {e:.1e}" for name, e in row.get("rel_err", {}).items())
    if "peak_temp_bytes" in row:
        memory = f"{row['peak_temp_bytes'] / 2**20:6.0f} MiB"
        served = row.get("backend", "")
        return f"{text} {row['fwd_ms']:8.3f} {row['fwd_bwd_ms']:8.3f} ms {memory} {served} {errors}"
    speeds = " ".join(f"{row[f'{direction}_tflops']:7.1f}" for direction in DIRECTIONS)
    return f"{text} {speeds} TFLOP/s {errors}"


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    names = present(options)
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
        if dead := next(filter(measure.is_fatal, rows), None):
            print(f"{dead['impl']} stopped the GPU at {case}; run the rest with --only")
            failed = True
            break
    print("forward, backward and both, or forward and both", *lines, sep="\n")
    print(f"written to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
