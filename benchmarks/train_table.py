"""The README's table of `train_step`'s results: ``python -m benchmarks.train_table``."""

import pathlib
from typing import Any

from benchmarks import record
from tools import readme

MARKER = "training step"
# The section stands before this one.
BEFORE = "## What errors look like"
TITLES = {
    "ours": "pallas_flash",
    "cudnn": "`jax.nn` with cuDNN",
    "tokamax": "tokamax",
    "fa4": "fa4-jax",
    "flax": "Flax's own",
}

Row = dict[str, Any]


def cell(row: Row | None) -> str:
    """Tokens per second and peak memory of one case, or why there is no speed."""
    if row is None:
        return "not measured"
    if "tokens_per_s" in row:
        return f"{row['tokens_per_s']:,}, {row['peak_gb']:.1f} GB"
    if "peak_gb" in row:
        return f"needs {row['peak_gb']:.0f} GB"
    return "fails"


def beside_the_best(rows: dict[tuple, Row], shapes: list[tuple[int, int]]) -> str:
    """Ours as a share of the fastest other in tokens per second, for each shape that has both."""
    shares = []
    for batch, length in shapes:
        speeds = {
            impl: rows.get(("step", impl, batch, length), {}).get("tokens_per_s", 0)
            for impl in TITLES
        }
        ours = speeds.pop("ours")
        speed, best = max((speed, impl) for impl, speed in speeds.items())
        if ours and speed:
            shares.append(f"**{ours / speed:.2f}** at {batch} x {length} ({TITLES[best]})")
    return f"pallas_flash : the fastest other is {', '.join(shares)}.\n\n" if shares else ""


def device_part(result: Row) -> str:
    """One device's words and table."""
    rows = {(row["kind"], row["impl"], row["batch"], row["length"]): row for row in result["rows"]}
    shapes = sorted({(b, t) for kind, _, b, t in rows if kind == "step"})
    heads = ["attention", *(f"{b} x {t}" for b, t in shapes), "longest context"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for impl, title in TITLES.items():
        cells = [cell(rows.get(("step", impl, *shape))) for shape in shapes]
        longest = rows.get(("longest", impl, None, None), {}).get("longest")
        if any(name == impl for _, name, _, _ in rows):
            words = [title, *cells, f"{longest:,}" if longest else "not measured"]
            lines.append("| " + " | ".join(words) + " |")
    model = result["model"]
    commits = sorted({(row["commit"] or "unknown")[:10] for row in result["rows"]})
    return (
        f"One {result['device']}, JAX {result['jax']}, {result['date']}, commit "
        f"{', '.join(commits)}. A GPT of {model['parameters'] / 1e6:.0f} M parameters in Flax "
        f"({model['layers']} layers of {model['width']}, {model['heads']} heads, vocabulary "
        f"{model['vocabulary']}), AdamW, bf16 with float32 parameters, layers in `nn.scan`, "
        "batch x length as in the heading; only the attention differs. Tokens per second (median "
        f"of {result['steps']} steps), and the memory of the compiled step; the longest context "
        f"of batch 1 that fits in {result['budget_gb']:.0f} GB, by the same measure.\n\n"
        + beside_the_best(rows, shapes)
        + "\n".join(lines)
        + "\n\n`python -m benchmarks.train_step` measures anew."
    )


def section(results: pathlib.Path = record.RESULTS) -> str | None:
    """The README's section, or None where nothing was measured."""
    paths = sorted(results.glob("*/train_step.json"))
    if not paths:
        return None
    return "\n\n".join(["## A training step", *(device_part(record.load(path)) for path in paths)])


def main() -> None:
    text = readme.PATH.read_text()
    readme.PATH.write_text(readme.replace(text, MARKER, section(), BEFORE))


if __name__ == "__main__":
    main()
