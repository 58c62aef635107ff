"""The README's table of decode speed, from the result files; a part of `make report`."""

import pathlib
from typing import Any

from benchmarks import record

MARKER = "decode"
# The table stands before this section.
BEFORE = "## What runs where"
TITLES = {"ours": "pallas_flash", "ours-paged": "paged", "cudnn": "cuDNN", "xla": "XLA"}


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "error" in row:
        return "-"
    return f"{row['ms']:.3f} ms, {row['gb_s']:.0f} GB/s, **{100 * row['share_of_copy']:.0f}%**"


def device_part(path: pathlib.Path) -> str:
    """One device's words and table."""
    result = record.load(path)
    cases: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], {})[row["impl"]] = row
    commits = sorted({(row["commit"] or "unknown")[:10] for row in result["rows"]})
    lines = [
        f"`decode_attention` on one {result['device']}, JAX {result['jax']}, {result['date']}, "
        f"commit {', '.join(commits)}: GPU kernel time by CUPTI, median, every kernel of a call; "
        "the keys and values that are there, queries and results over that time, as a share of the "
        f"{result['copy_gb_s']:.0f} GB/s of a copy in the same run. `python -m benchmarks.decode` "
        "measures anew.",
        "",
        "| rows x keys x query/key heads x head_dim | " + " | ".join(TITLES.values()) + " |",
        "|---" * (len(TITLES) + 1) + "|",
    ]
    for case, rows in cases.items():
        cells = (_cell(rows.get(impl)) for impl in TITLES)
        lines.append(f"| `{case.removesuffix('-bfloat16')}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(results: pathlib.Path = record.RESULTS) -> str | None:
    """The README's part, or None where nothing was measured."""
    parts = [device_part(path) for path in sorted(results.glob("*/decode.json"))]
    return "\n\n".join(parts) or None
