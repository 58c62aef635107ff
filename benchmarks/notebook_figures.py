"""Measures on this machine's GPU what the notebooks tell, but for the paper's figure.

    python -m benchmarks.notebook_figures [steps] [masks] [lengths]

steps: the Hopper forward grown step by step (`notebooks/kernels/hopper_steps.py`). masks: time
against the share of scores that a mask allows. lengths: time and memory against the length, up to
what fits, and a video. Writes ``benchmarks/results/<device>/notebook_figures.json``; the parts that
are not asked for stay as they were.
"""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

import pallas_flash as pf
from benchmarks import cases, peers, record, timing
from benchmarks.building import Builder
from benchmarks.paper_figure import CUBLAS, Built
from notebooks.kernels import hopper_steps, textbook
from pallas_flash.tuning.table import device_name

ITERATIONS = 5
Row = dict[str, Any]


def case(batch: int, length: int, heads: int, head_dim: int, causal: bool = False) -> cases.Case:
    return cases.Case(
        batch=batch,
        q_len=length,
        kv_len=length,
        num_q_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        value_dim=head_dim,
        causal=causal,
    )


class Call(NamedTuple):
    """What is timed: a function of arrays that look like `args`."""

    function: Callable
    args: Sequence[Any]
    # XLA's, where they are not as usual.
    options: dict[str, Any] | None = None


def build(builder: Builder, calls: dict[Any, Call]) -> dict[Any, Built]:
    return {
        key: builder.submit(
            partial(jax.jit(lambda *x, f=call.function: f(*x)).lower, *call.args), call.options
        )
        for key, call in calls.items()
    }


def both(attention: peers.Attention) -> Callable:
    def fwd_bwd(q, k, v, dout):
        out, vjp = jax.vjp(attention, q, k, v)
        return out, *vjp(dout)

    return fwd_bwd


def error_of(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:200]


# ---------------------------------------------------------------------------------------------


def steps(builder: Builder) -> Iterator[Row]:
    """The kernel's forms, ours and cuDNN: forward, no mask, 16384 tokens x 2048 channels."""
    for problem in (case(4, 4096, 16, 128), case(4, 4096, 32, 64)):
        data = timing.arrays(problem)
        truth = timing.reference(problem, data)
        forms = hopper_steps.STEPS | {
            name: peers.PEERS[name].make(problem) for name in ("ours", "cudnn")
        }
        builds = build(builder, {name: Call(form, data[:3]) for name, form in forms.items()})
        for name, built in builds.items():
            row = {"case": str(problem), "head_dim": problem.head_dim, "impl": name}
            try:
                out, spread = timing.gpu_ms(built(), *data[:3], iterations=2 * ITERATIONS)
            except Exception as error:
                yield row | {"error": error_of(error)}
                continue
            # Only out is of interest: the gradients' places hold the inputs.
            errors = timing.relative_errors(problem, (out, *data[:3]), truth)
            yield row | {
                "fwd_ms": round(spread.median, 5),
                "fwd_tflops": round(problem.flops["fwd"] / spread.median / 1e9, 1),
                "rel_err": errors["out"],
            }


def masks_of(problem: cases.Case) -> dict[str, pf.Mask | None]:
    """What is compared, by the name that the notebook shows."""
    length = problem.q_len
    windows = {f"window of {n}": pf.SlidingWindow(n - 1, 0) for n in (256, 1024, 2048, 4096)}
    chunks = {f"chunks of {n}": pf.ChunkedCausal(n) for n in (512, 2048, 4096)}
    prefix = pf.PrefixLM(jnp.full((problem.batch,), length // 4, jnp.int32))
    ids = pf.segment_ids_from_cu_seqlens(jnp.arange(0, length + 1, length // 8), length)
    return {
        "none": None,
        "causal": pf.Causal(),
        **windows,
        **chunks,
        "prefix of a quarter": prefix,
        "8 packed documents": pf.Causal() & pf.SegmentIds(ids),
    }


def masks(builder: Builder) -> Iterator[Row]:
    """One case under many masks, with the share of 128 x 128 blocks that each visits."""
    problem = case(2, 8192, 16, 128)
    length, data = problem.q_len, timing.arrays(problem)
    chosen, calls = masks_of(problem), {}
    for name, mask in chosen.items():

        def attention(q, k, v, mask=mask):
            return pf.flash_attention(q, k, v, mask=mask)

        calls[name, "fwd"] = Call(attention, data[:3])
        calls[name, "fwd_bwd"] = Call(both(attention), data)
    builds = build(builder, calls)
    for name, mask in chosen.items():
        blocks = {"block_q": 128, "block_kv": 128}
        picture = "#" if mask is None else mask.show(length, length, **blocks)
        visited = sum(x in "/#" for x in picture) / sum(x in "./#" for x in picture)
        row: Row = {"case": str(problem), "mask": name, "visited_blocks": round(visited, 4)}
        reasons = pf.explain_backends(*data[:3], mask=mask)
        row["backend"] = next(x for x, reason in reasons.items() if reason is None)
        for direction in ("fwd", "fwd_bwd"):
            args = calls[name, direction].args
            call = builds[name, direction]()
            _, spread = timing.gpu_ms(call, *args, iterations=ITERATIONS)
            row[f"{direction}_ms"] = round(spread.median, 5)
        yield row


# 8 heads of 128 channels, one row of the batch.
LENGTHS = [2**n for n in range(10, 21)]
# Standard attention of twice the length does not fit into 80 GB.
LONGEST_STANDARD = 2**16
# One minute at 24 images a second, 256 tokens an image.
VIDEO = 60 * 24 * 256
# Forward and backward take 3.5 times as long as the forward alone.
LONGEST_WITH_GRADIENT = VIDEO


def lengths(builder: Builder) -> Iterator[Row]:
    """Causal attention of one long row, and a video without a mask; memory as XLA plans it."""
    rows = [(name, case(1, n, 8, 128, causal=True)) for n in LENGTHS for name in LONG_FORMS]
    rows = [(name, p) for name, p in rows if name == "ours" or p.q_len <= LONGEST_STANDARD]
    rows.append(("ours", case(1, VIDEO, 8, 128)))
    calls = {}
    for name, problem in rows:
        attention, options = LONG_FORMS[name](problem), None if name == "ours" else CUBLAS
        calls[name, problem, "fwd"] = Call(attention, problem.structs[:3], options)
        if problem.q_len <= LONGEST_WITH_GRADIENT:
            calls[name, problem, "fwd_bwd"] = Call(both(attention), problem.structs, options)
    builds = build(builder, calls)
    for name, problem in rows:
        row: Row = {"case": str(problem), "length": problem.q_len, "impl": name}
        data = timing.arrays(problem)
        for direction in ("fwd", "fwd_bwd"):
            if built := builds.get((name, problem, direction)):
                args = data if direction == "fwd_bwd" else data[:3]
                row |= {f"{direction}_{key}": x for key, x in long_call(built, args).items()}
            if f"{direction}_ms" in row:
                flops = problem.flops[direction] / row[f"{direction}_ms"]
                row[f"{direction}_tflops"] = round(flops / 1e9, 1)
        yield row


LONG_FORMS: dict[str, Callable[[cases.Case], peers.Attention]] = {
    "ours": peers.PEERS["ours"].make,
    "standard": lambda problem: partial(textbook.standard, causal=problem.causal),
}


def long_call(built: Built, args: list[jax.Array]) -> Row:
    """Time and planned memory of one call, or its error."""
    row: Row = {}
    try:
        call = built()
        plan = call.memory_analysis()
        # What is held beside the arguments and the results.
        row["temp_bytes"] = plan.temp_size_in_bytes
        others = plan.argument_size_in_bytes + plan.output_size_in_bytes
        row["total_bytes"] = plan.temp_size_in_bytes + others
        _, spread = timing.gpu_ms(call, *args, iterations=2)
    except Exception as error:
        return row | {"error": error_of(error)}
    return row | {"ms": round(spread.median, 5)}


PARTS = {"steps": steps, "masks": masks, "lengths": lengths}


def main(words: list[str] | None = None) -> int:
    asked = (sys.argv[1:] if words is None else words) or list(PARTS)
    device = jax.devices()[0].device_kind
    path: pathlib.Path = record.RESULTS / device_name(device) / "notebook_figures.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    with Builder() as builder:
        for name in asked:
            rows = []
            for row in PARTS[name](builder):
                rows.append(row | {"commit": record.commit(), "date": record.today()})
                print(json.dumps(row), flush=True)
                result |= {"device": device, "jax": jax.__version__, name: rows}
                path.parent.mkdir(parents=True, exist_ok=True)
                # A row a line: a file that is read in a diff.
                text = json.dumps(result).replace("[{", "[\n  {").replace("}, {", "},\n  {")
                path.write_text(text + "\n")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
