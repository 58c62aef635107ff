"""Measures the figure of the FlashAttention-2 paper on this machine's GPU.

    python -m benchmarks.paper_figure

Standard attention, the two papers' algorithms in textbook form (`notebooks/kernels/textbook.py`),
ours and cuDNN: forward, and forward+backward, at head_dim 64 and 128, causal and not, from 512 to
16384 tokens of 16384 in all. Writes ``benchmarks/results/<device>/paper_figure.json`` row by row.
`--only` measures a part, which is merged into the file.
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
from typing import Any

# Before jax is imported: as in `benchmarks.run`.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks import peers, record, timing
from benchmarks.cases import SUITES, Case
from notebooks.kernels import textbook
from pallas_flash.tuning.table import device_name

FORMS = textbook.FORMS
IMPLEMENTATIONS = (*FORMS, "ours", "cudnn")
# Cases that are compiled together.
TOGETHER = 6
# The matrix products of standard attention are XLA's. Without a search for tiles its own are slow;
# cuBLAS needs none.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


def cases() -> list[Case]:
    return [case for case in SUITES["grid"]() if case.head_dim in (64, 128)]


def attention(name: str, case: Case) -> peers.Attention:
    if name in FORMS:
        return functools.partial(FORMS[name], causal=case.causal)
    return peers.PEERS[name].make(case)


def lower(name: str, case: Case) -> dict[str, Any]:
    """The two calls that are timed, lowered."""
    function = attention(name, case)

    def fwd(q, k, v):
        return function(q, k, v)

    def fwd_bwd(q, k, v, dout):
        out, vjp = jax.vjp(function, q, k, v)
        return out, *vjp(dout)

    *qkv, _ = case.structs
    return {"fwd": jax.jit(fwd).lower(*qkv), "fwd_bwd": jax.jit(fwd_bwd).lower(*case.structs)}


def build(batch: tuple[Case, ...]) -> dict[tuple[Case, str], dict[str, Any]]:
    """Lowered one after the other, compiled side by side: futures of the compiled calls."""
    builds = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for case, name in itertools.product(batch, IMPLEMENTATIONS):
            options = CUBLAS if name == "standard" else {}
            try:
                calls = lower(name, case)
            # Each refuses in its own way; the others are measured all the same.
            except Exception as error:
                refused: concurrent.futures.Future = concurrent.futures.Future()
                refused.set_exception(error)
                builds[case, name] = {"fwd": refused, "fwd_bwd": refused}
                continue
            builds[case, name] = {d: pool.submit(x.compile, options) for d, x in calls.items()}
    return builds


def measure(name: str, case: Case, calls: dict[str, Any], iterations: int) -> dict[str, Any]:
    """One row; a call that fails (out of memory, say) leaves its error in it."""
    row: dict[str, Any] = {**vars(case), "impl": name}
    row |= {"commit": record.commit(), "date": record.today()}
    data = timing.arrays(case)
    for direction, call in calls.items():
        args = data if direction == "fwd_bwd" else data[:3]
        try:
            out, spread = timing.gpu_ms(call.result(), *args, iterations=iterations)
        except Exception as error:
            row[f"{direction}_error"] = f"{type(error).__name__}: {error}"[:300]
            continue
        row[f"{direction}_ms"] = round(spread.median, 5)
        row[f"{direction}_ms_range"] = [round(spread.low, 5), round(spread.high, 5)]
        row[f"{direction}_tflops"] = round(case.flops[direction] / spread.median / 1e9, 1)
        if direction == "fwd_bwd":
            row["rel_err"] = timing.relative_errors(case, out, timing.reference(case, data))
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
    for batch in itertools.batched(chosen, TOGETHER):
        for (case, name), calls in build(batch).items():
            row = measure(name, case, calls, options.iterations)
            record.write(path, header, [row])
            shown = [row.get(f"{d}_tflops", row.get(f"{d}_error", "")) for d in calls]
            print(f"{case!s:42} {name:9}", *(str(x)[:60] for x in shown), row.get("rel_err", ""))
            gc.collect()
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
