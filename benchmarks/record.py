"""Result files: rows that are written as they come, and merged over runs."""

import datetime
import json
import os
import pathlib
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Which rows say the same thing: a new one replaces the old.
KEY = (
    *("case", "batch", "q_len", "kv_len", "num_q_heads", "num_kv_heads", "head_dim", "value_dim"),
    *("causal", "dtype", "impl"),
)


def commit() -> str | None:
    """The environment's GIT_COMMIT, for copies without a .git folder, or what git says."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()


def today() -> str:
    return datetime.date.today().isoformat()


def load(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def write(
    path: pathlib.Path,
    header: dict[str, Any],
    rows: Iterable[dict[str, Any]],
    key: Sequence[str] = KEY,
) -> None:
    """Merges rows into the file: those of other cases and implementations stay.

    key: the fields that tell one case and implementation from another, where a row has them.
    """
    merged = {tuple(row.get(name) for name in key): row for row in (*load(path)["rows"], *rows)}
    head = json.dumps(header, indent=1).rstrip("\n}")
    # One row a line: a file that is read in a diff.
    lines = ",\n".join("  " + json.dumps(row) for row in merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that is killed while it writes leaves the old file.
    part = path.with_suffix(".part")
    part.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    part.replace(path)
