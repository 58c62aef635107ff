"""Builds implementations of a case and times them: rows of a result file."""

import concurrent.futures
import functools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks import feature_timing, peers, record, timing
from benchmarks.cases import Case
from benchmarks.features import Feature

DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
# After one of these every later call of the process fails.
FATAL = re.compile("ILLEGAL_ADDRESS|ILLEGAL_INSTRUCTION|MISALIGNED|LAUNCH_FAILED|LAUNCH_TIMEOUT")
# Not an implementation: what the others' errors are measured against.
REFERENCE = "reference"

Row = dict[str, Any]
# Implementation -> its programs, a tuple with names, or the error that it raised.
Builds = dict[str, Any]


class Program(NamedTuple):
    """An implementation that is to be built."""

    lower: Callable[[], Any]
    # Its matrix products are XLA's, who may search for the fastest.
    by_xla: bool


def programs(case: Case, names: list[str]) -> dict[str, Program]:
    def lower(name: str) -> timing.Calls:
        return timing.lower(peers.PEERS[name].make(case), case)

    return {
        name: Program(functools.partial(lower, name), name == "xla")
        for name in names
        if peers.takes(name, case)
    }


def feature_programs(feature: Feature, names: list[str]) -> dict[str, Program]:
    plain = feature.backend() == "blockwise"
    made = {
        name: Program(
            functools.partial(feature_timing.lower, feature, call),
            name == "xla" or (name == "ours" and plain),
        )
        for name, call in feature.calls.items()
        if name.split(",")[0] in names
    }
    lower = functools.partial(feature_timing.lower_reference, feature)
    return made | {REFERENCE: Program(lower, False)}


def build(cases: list[Any], describe: Callable[[Any], dict[str, Program]]) -> list[Builds]:
    """The programs of every case, each compiled, or the error that it raised."""
    # Lowered one after the other, as not every peer allows threads there; compiled side by side.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [
            {name: _start(pool, program) for name, program in describe(case).items()}
            for case in cases
        ]
    return [{name: _finish(build) for name, build in builds.items()} for builds in started]


def _start(pool: concurrent.futures.Executor, program: Program) -> Any:
    try:
        steps = program.lower()
    # Anything: a peer refuses in its own way, the others are measured all the same.
    except Exception as error:
        return error
    options = timing.SEARCH if program.by_xla and jax.default_backend() == "gpu" else None
    return steps._make(step and pool.submit(step.compile, options) for step in steps)


def _finish(build: Any) -> Any:
    if isinstance(build, Exception):
        return build
    error = next((e for future in build if future and (e := future.exception())), None)
    # An interrupt is no Exception and is not kept.
    assert error is None or isinstance(error, Exception)
    return error or build._make(future and future.result() for future in build)


def new_row(fields: Row, name: str) -> Row:
    return {**fields, "impl": name, "commit": record.commit(), "date": record.today()}


def refuse(row: Row, error: Exception) -> None:
    """Notes the first lines of an error."""
    row["error"] = f"{type(error).__name__}: {error}"[:300]


def is_fatal(row: Row) -> bool:
    return bool(FATAL.search(row.get("error", "")))


def _note_time(row: Row, direction: str, spread: timing.Spread) -> None:
    row[f"{direction}_ms"] = round(spread.median, 5)
    row[f"{direction}_ms_range"] = [round(spread.low, 5), round(spread.high, 5)]


def measure(case: Case, builds: Builds, iterations: int) -> list[Row]:
    """One row for each implementation: the same direction of all of them, one after the other."""
    rows = {name: new_row(vars(case), name) for name in builds}
    if "ours" in rows:
        rows["ours"]["backend"] = peers.backend(case, lambda _: peers.plain(case))
    data = timing.arrays(case)
    truth = timing.reference(case, data)
    for direction in DIRECTIONS:
        for name, row in rows.items():
            if "error" in row:
                continue
            try:
                out, spread = _time_one(builds[name], direction, data, iterations)
                _note_time(row, direction, spread)
                row[f"{direction}_tflops"] = round(case.flops[direction] / spread.median / 1e9, 1)
                if direction == "fwd_bwd":
                    row["rel_err"] = timing.relative_errors(case, out, truth)
            except Exception as error:
                refuse(row, error)
                if is_fatal(row):
                    # What the others would say now is not their fault.
                    return [row]
    return list(rows.values())


def _time_one(
    build: Any, direction: str, data: list[jax.Array], iterations: int
) -> tuple[Any, timing.Spread]:
    if isinstance(build, Exception):
        raise build
    *qkv, dout = data
    args: list[Any] = data if direction == "fwd_bwd" else qkv
    if direction == "bwd":
        args = [build.residuals(*qkv), dout]
    return timing.gpu_ms(getattr(build, direction), *args, iterations=iterations)


def measure_feature(feature: Feature, builds: Builds, iterations: int) -> list[Row]:
    """One row for each implementation, with its errors and its memory beside its times."""
    programs = {name: build for name, build in builds.items() if name != REFERENCE}
    fields = {"case": feature.name, **vars(feature.shape)}
    rows = {name: new_row(fields, name) for name in programs}
    if "ours" in rows:
        rows["ours"]["backend"] = feature.backend()
    qkv, dout, arrays = feature.inputs()
    truth = _truth(builds[REFERENCE], *qkv, arrays, dout)
    for direction, args in (("fwd", (*qkv, arrays)), ("fwd_bwd", (*qkv, arrays, dout))):
        for name, row in rows.items():
            if "error" in row:
                continue
            try:
                if isinstance(programs[name], Exception):
                    raise programs[name]
                program = getattr(programs[name], direction)
                results, spread = timing.gpu_ms(program, *args, iterations=iterations)
                _note_time(row, direction, spread)
                if direction == "fwd_bwd":
                    row["peak_temp_bytes"] = program.memory_analysis().temp_size_in_bytes
                    if truth and "," not in name:
                        row["rel_err"] = feature_timing.relative_errors(feature, results, truth)
            except Exception as error:
                refuse(row, error)
                if is_fatal(row):
                    return [row]
    return list(rows.values())


def _truth(build: Any, *args: Any) -> dict[str, jax.Array] | None:
    """The reference's results; without them times are measured all the same."""
    try:
        if isinstance(build, Exception):
            raise build
        return jax.block_until_ready(build.fwd_bwd(*args))
    except Exception as error:
        print(f"no errors are measured: {type(error).__name__}: {error}"[:300])
        return None


def measure_startup(case: Case, names: list[str]) -> list[Row]:
    """One row for each implementation, with the seconds that a first call takes."""
    rows = [new_row(vars(case), name) for name in names]
    for row in rows:
        try:
            seconds = timing.build_seconds(peers.PEERS[row["impl"]].make(case), case)
            row |= {name: round(s, 3) for name, s in seconds.items()}
        except Exception as error:
            refuse(row, error)
    return rows
