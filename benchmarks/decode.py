"""Measures attention of one query, or a few, over a cache on this machine's GPU.

    python -m benchmarks.decode

Ours over a contiguous and a paged cache, beside cuDNN and XLA through ``jax.nn``. Such a call is
bound by memory: what counts is the share of the bandwidth that a copy has in the same run. Writes
``benchmarks/results/<device>/decode.json``; `--dry` lowers ours for CUDA without a GPU.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

# Before jax is imported. Kernels of attention are measured, not XLA's choice of tiles.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import pallas_flash as pf
from benchmarks import record, timing
from benchmarks.building import Builder
from pallas_flash.tuning.table import device_name

PAGE_SIZE = 64
KEY = ("case", "impl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; its fields open every row of the result file.

    kv_len: of the longest row. shortest: None if all rows are as long; else the lengths rise from
    it to kv_len by equal factors.
    """

    batch: int
    kv_len: int
    q_len: int = 1
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    shortest: int | None = None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        queries = f"-{self.q_len}q" if self.q_len > 1 else ""
        ragged = "" if self.shortest is None else f"-from-{self.shortest}"
        heads = f"{self.num_q_heads}/{self.num_kv_heads}x{self.head_dim}"
        return f"{self.batch}x{self.kv_len}{ragged}{queries}x{heads}-{self.dtype}"

    @property
    def lengths(self) -> np.ndarray:
        """[B] int32, tokens of each row."""
        shortest = self.kv_len if self.shortest is None else self.shortest
        return np.geomspace(shortest, self.kv_len, self.batch).round().astype(np.int32)

    @property
    def bytes(self) -> int:
        """Keys and values of the tokens that are there, queries and results."""
        keys = 2 * int(self.lengths.sum()) * self.num_kv_heads
        queries = 2 * self.batch * self.q_len * self.num_q_heads
        return (keys + queries) * self.head_dim * jnp.dtype(self.dtype).itemsize

    def cache(self) -> pf.KVCache:
        """Full of random numbers."""
        empty = pf.KVCache.create(
            self.batch, self.kv_len, self.num_kv_heads, self.head_dim, self.dtype
        )
        k, v = (jax.random.normal(jax.random.key(i), empty.k.shape, empty.k.dtype) for i in (0, 1))
        return dataclasses.replace(empty, k=k, v=v, lengths=jnp.asarray(self.lengths))

    def queries(self) -> jax.Array:
        shape = (self.batch, self.q_len, self.num_q_heads, self.head_dim)
        return jax.random.normal(jax.random.key(2), shape, jnp.dtype(self.dtype))


CASES = [
    *(Case(batch=b, kv_len=t) for b, t in ((64, 8192), (8, 32768), (1, 131072), (16, 2048))),
    Case(batch=64, kv_len=32768, shortest=128),
    Case(batch=8, kv_len=32768, q_len=4),
    Case(batch=8, kv_len=32768, num_q_heads=8),
    Case(batch=64, kv_len=8192, num_q_heads=16, num_kv_heads=1),
    Case(batch=64, kv_len=8192, num_q_heads=16, num_kv_heads=8, head_dim=64),
    Case(batch=64, kv_len=8192, num_q_heads=16, num_kv_heads=4, head_dim=256),
]


def paged(cache: pf.KVCache) -> pf.PagedKVCache:
    """The same tokens in pages that lie in any order."""
    batch, slots, *head = cache.k.shape
    per_row = slots // PAGE_SIZE
    order = np.random.default_rng(0).permutation(batch * per_row).astype(np.int32)
    where = jnp.asarray(np.argsort(order))
    k, v = (x.reshape(-1, PAGE_SIZE, *head)[where] for x in (cache.k, cache.v))
    return pf.PagedKVCache(k, v, jnp.asarray(order.reshape(batch, per_row)), cache.lengths)


Attention = Callable[[jax.Array, Any], jax.Array]


def _jax_nn(implementation: str, q: jax.Array, cache: pf.KVCache) -> jax.Array:
    # One query: no mask but the lengths. More have no name there, as rows end at different places.
    function: Any = jax.nn.dot_product_attention
    return function(
        q, cache.k, cache.v, key_value_seq_lengths=cache.lengths, implementation=implementation
    )


# Name -> the attention, and what makes its cache of the case's.
IMPLS: dict[str, tuple[Attention, Callable[[pf.KVCache], Any]]] = {
    "ours": (pf.decode_attention, lambda cache: cache),
    "ours-paged": (pf.decode_attention, paged),
    "cudnn": (partial(_jax_nn, "cudnn"), lambda cache: cache),
    "xla": (partial(_jax_nn, "xla"), lambda cache: cache),
}


@jax.jit
def _reference(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array) -> jax.Array:
    """[Tq, Hq, D] float32 from q [Tq, Hq, D] and k, v [S, Hkv, D] of one row."""
    q_len, num_q_heads, head_dim = q.shape
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = q.reshape(q_len, k.shape[1], -1, head_dim)
    with jax.default_matmul_precision("highest"):
        s = jnp.einsum("tkgd,skd->tkgs", q, k) * head_dim**-0.5
        seen = jnp.arange(len(k)) <= (length - q_len + jnp.arange(q_len))[:, None]
        p = jax.nn.softmax(jnp.where(seen[:, None, None], s, -jnp.inf))
        return jnp.einsum("tkgs,skd->tkgd", p, v).reshape(q_len, num_q_heads, head_dim)


def reference(q: jax.Array, cache: pf.KVCache) -> dict[int, jax.Array]:
    """out [Tq, Hq, D] in float32 of the first and the last row."""
    return {
        row: _reference(q[row], cache.k[row], cache.v[row], cache.lengths[row])
        for row in (0, len(q) - 1)
    }


def relative_error(out: jax.Array, truth: dict[int, jax.Array]) -> float:
    """The largest of the rows' errors: L2 norm of the error over that of the truth."""
    errors = [
        float(jnp.linalg.norm(out[row].astype(jnp.float32) - x) / jnp.linalg.norm(x))
        for row, x in truth.items()
    ]
    return float(f"{max(errors):.3g}")


def lower(case: Case, impl: str) -> Any:
    """The call of an implementation, lowered for the device at hand."""
    if case.q_len > 1 and impl in ("cudnn", "xla"):
        raise NotImplementedError("it has no mask for several queries at the end of each row")
    attention, make_cache = IMPLS[impl]
    cache = jax.eval_shape(lambda: make_cache(case.cache()))
    return jax.jit(lambda q, cache: attention(q, cache)).lower(jax.eval_shape(case.queries), cache)


def measure(
    case: Case, builds: dict[str, Callable[[], Any]], copy_gb_s: float, iterations: int
) -> Iterator[dict[str, Any]]:
    """A row for each implementation; what does not build or run leaves its error there."""
    contiguous, q = case.cache(), case.queries()
    truth = reference(q, contiguous)
    for impl, build in builds.items():
        row = {"case": str(case), **vars(case), "impl": impl, "commit": record.commit()}
        row |= {"date": record.today(), "bytes": case.bytes}
        try:
            call, cache = build(), IMPLS[impl][1](contiguous)
            out, spread = timing.gpu_ms(call, q, cache, iterations=iterations)
            gb_s = case.bytes / spread.median / 1e6
            row |= {
                "ms": round(spread.median, 5),
                "ms_range": [round(spread.low, 5), round(spread.high, 5)],
                "gb_s": round(gb_s, 1),
                "share_of_copy": round(gb_s / copy_gb_s, 4),
                "rel_err": relative_error(out, truth),
            }
        # Anything: each refuses in its own way, the others are measured all the same.
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        yield row


def dry(cases: list[Case]) -> None:
    """Lowers ours for CUDA."""
    for case in cases:
        for impl in ("ours", "ours-paged"):
            attention, make_cache = IMPLS[impl]
            cache = jax.eval_shape(lambda: make_cache(case.cache()))
            traced = jax.jit(attention).trace(jax.eval_shape(case.queries), cache)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert "mosaic_gpu" in text, f"no kernel of ours in {case}"


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="cases whose name has this regular expression"
    )
    parser.add_argument(
        "--impl",
        metavar="NAMES",
        type=lambda names: names.split(","),
        default=list(IMPLS),
        help=f"implementations, separated by commas, of {', '.join(IMPLS)}",
    )
    parser.add_argument("--iterations", type=int, default=7, help="timed calls, at least 5")
    parser.add_argument("--output", type=pathlib.Path, default=record.RESULTS, metavar="DIR")
    parser.add_argument("--dry", action="store_true", help="no GPU: lower ours, measure nothing")
    chosen = parser.parse_args(words)
    if chosen.iterations < 5:
        parser.error(f"--iterations={chosen.iterations} must be at least 5")
    if unknown := set(chosen.impl) - set(IMPLS):
        parser.error(f"--impl: {', '.join(unknown)} must be of {', '.join(IMPLS)}")
    chosen.cases = [case for case in CASES if re.search(chosen.only, str(case))]
    if not chosen.cases:
        parser.error(f"--only={chosen.only!r} leaves no case")
    return chosen


def _words(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"].split("\n")[0][:90]
    return (
        f"{row['ms']:9.4f} ms {row['gb_s']:7.1f} GB/s {row['share_of_copy']:6.3f} of a copy, "
        f"error {row['rel_err']:.1e}"
    )


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    if options.dry:
        dry(options.cases)
        print(f"{len(options.cases)} cases of ours lower for CUDA")
        return 0
    device = jax.devices()[0].device_kind
    path = options.output / device_name(device) / "decode.json"
    header = {
        "device": device,
        "jax": jax.__version__,
        "commit": record.commit(),
        "date": record.today(),
        "iterations": options.iterations,
        "copy_gb_s": timing.copy_gb_s(options.iterations),
    }
    print(f"{device}: a copy reads and writes {header['copy_gb_s']} GB/s")
    failed = False
    with Builder() as builder:
        # Later cases are built while earlier ones are measured.
        builds = {
            case: {impl: builder.submit(partial(lower, case, impl)) for impl in options.impl}
            for case in options.cases
        }
        for case, programs in builds.items():
            for row in measure(case, programs, header["copy_gb_s"], options.iterations):
                record.write(path, header, [row], KEY)
                failed |= "error" in row and row["impl"].startswith("ours")
                print(f"{case!s:42} {row['impl']:10} {_words(row)}", flush=True)
    print(f"written to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
