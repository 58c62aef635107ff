"""Measures the figure of the FlashAttention-2 paper on this machine's GPU.

    python -m benchmarks.paper_figure

Standard attention, the two papers' algorithms in textbook form (`notebooks/kernels/textbook.py`),
ours and cuDNN: forward, and forward+backward, at head_dim 64 and 128, causal and not, from 512 to
16384 tokens of 16384 in all. Writes ``benchmarks/results/<device>/paper_figure.json`` row by row.
`--only` measures a part, which is merged into the file.
"""

import argparse
import functools
import gc
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

# Before jax is imported: as in `benchmarks.run`.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks import peers, record, timing
from benchmarks.building import Builder
from benchmarks.cases import SUITES, Case
from notebooks.kernels import textbook
from pallas_flash.tuning.table import device_name

FORMS = textbook.FORMS
IMPLEMENTATIONS = (*FORMS, "ours", "cudnn")
# The matrix products of standard attention are XLA's. Without a search for tiles its own are slow;
# cuBLAS needs none.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


def cases() -> list[Case]:
    return [case for case in SUITES["grid"]() if case.head_dim in (64, 128)]


def attention(name: str, case: Case) -> peers.Attention:
    if name in FORMS:
        return functools.partial(FORMS[name], causal=case.causal)
    return peers.PEERS[name].make(case)


def lower(name: str, case: Case, direction: str) -> Any:
    """A call that is timed, lowered: "fwd" of q, k, v or "fwd_bwd" of q, k, v, dout."""
    function = attention(name, case)

    def fwd(q, k, v):
        return function(q, k, v)

    def fwd_bwd(q, k, v, dout):
        out, vjp = jax.vjp(function, q, k, v)
        return out, *vjp(dout)

    if direction == "fwd":
        return jax.jit(fwd).lower(*case.structs[:3])
    return jax.jit(fwd_bwd).lower(*case.structs)


# Waits for a compiled program.
Built = Callable[[], Any]


def build(case: Case, builder: Builder) -> dict[str, Any]:
    """The programs of a case: "arrays", "reference" and by implementation its two calls."""
    reference = jax.jit(lambda *data: timing.reference(case, list(data)))
    programs: dict[str, Any] = {
        "arrays": builder.submit(lambda: timing.arrays.lower(case)),
        "reference": builder.submit(lambda: reference.lower(*case.structs)),
    }
    for name in IMPLEMENTATIONS:
        options = CUBLAS if name == "standard" else None
        programs[name] = {
            direction: builder.submit(functools.partial(lower, name, case, direction), options)
            for direction in ("fwd", "fwd_bwd")
        }
    return programs


def measure_case(case: Case, programs: dict[str, Any], iterations: int) -> Iterable[dict[str, Any]]:
    """A row for each implementation."""
    data = programs["arrays"]()()
    truth = programs["reference"]()(*data)
    for name in IMPLEMENTATIONS:
        row: dict[str, Any] = {**vars(case), "impl": name}
        row |= {"commit": record.commit(), "date": record.today()}
        yield row | measure(case, programs[name], data, truth, iterations)
        gc.collect()


def measure(
    case: Case, calls: dict[str, Built], data: list[jax.Array], truth: Any, iterations: int
) -> dict[str, Any]:
    """Times and errors; a call that fails (out of memory, say) leaves its error in them."""
    row: dict[str, Any] = {}
    for direction, call in calls.items():
        args = data if direction == "fwd_bwd" else data[:3]
        try:
            out, spread = timing.gpu_ms(call(), *args, iterations=iterations)
        except Exception as error:
            row[f"{direction}_error"] = f"{type(error).__name__}: {error}"[:300]
            continue
        row[f"{direction}_ms"] = round(spread.median, 5)
        row[f"{direction}_ms_range"] = [round(spread.low, 5), round(spread.high, 5)]
        row[f"{direction}_tflops"] = round(case.flops[direction] / spread.median / 1e9, 1)
        if direction == "fwd_bwd":
            row["rel_err"] = timing.relative_errors(case, out, truth)
        del out
    return row


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="cases whose name has this regular expression"
    )
    parser.add_argument("--iterations", type=int, default=5, help="timed calls")
    parser.add_argument("--output", type=pathlib.Path, default=record.RESULTS, metavar="DIR")
    options = parser.parse_args(words)
    device = jax.devices()[0].device_kind
    path = options.output / device_name(device) / "paper_figure.json"
    header = {
        "device": device,
        "jax": jax.__version__,
        "commit": record.commit(),
        "date": record.today(),
        "versions": {"cudnn": peers.version("cudnn")},
        "iterations": options.iterations,
    }
    chosen = [case for case in cases() if re.search(options.only, str(case))]
    with Builder() as builder:
        # Later cases are built while earlier ones are measured.
        for case, programs in [(case, build(case, builder)) for case in chosen]:
            for row in measure_case(case, programs, options.iterations):
                record.write(path, header, [row])
                directions = ("fwd", "fwd_bwd")
                shown = [row.get(f"{d}_tflops", row.get(f"{d}_error", "")) for d in directions]
                words = [str(x)[:60] for x in (*shown, row.get("rel_err", ""))]
                print(f"{case!s:42} {row['impl']:9}", *words, flush=True)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
