"""The README's tables of speed, and plots, from the result files: `make report`."""

import pathlib
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks import decode_report, record, tables
from benchmarks.tables import DIRECTIONS, TITLES, Group, by_case
from tools import readme

# Files only, on any machine.
mpl.use("agg")

MARKER = "benchmarks"
# The section stands before this one.
BEFORE = "## What errors look like"
COLORS = {"ours": "tab:red", "cudnn": "tab:green", "fa4": "tab:blue", "tokamax": "tab:orange"}


def grid_order(item: Group) -> tuple[Any, ...]:
    case = item[0]
    return case.head_dim, not case.causal, case.q_len


def chip_rates(grid: dict) -> str:
    """What the chip itself did in the same run, as far as it was measured."""
    product = grid["matmul_tflops"]
    text = f"An 8192^3 bf16 matrix product ran at {product:.0f} TFLOP/s. " if product else ""
    return f"{text}Memory was read and written at {grid['copy_gb_s']:.0f} GB/s. "


def device_part(folder: pathlib.Path) -> str:
    """One device's words and tables."""
    grid = record.load(folder / "grid.json")
    groups = sorted(by_case(grid["rows"]), key=grid_order)
    commits = sorted({(row["commit"] or "unknown")[:10] for _, g in groups for row in g.values()})
    text = [
        f"One {grid['device']}, JAX {grid['jax']}, {grid['date']}, commit {', '.join(commits)}. "
        f"{chip_rates(grid)}bf16, 16384 tokens x 2048 channels, GPU kernel "
        "time by CUPTI, median; every kernel of a call counts. Each cell: ours : best peer in "
        "TFLOP/s, and their ratio.",
        tables.summary(groups),
        tables.table(
            groups,
            {
                "head_dim": lambda c: c.head_dim,
                "mask": lambda c: "causal" if c.causal else "full",
                "T": lambda c: c.q_len,
            },
        ),
        *beyond_part(folder, groups),
        *features_part(folder),
    ]
    if startup := by_case(record.load(folder / "startup.json")["rows"]):
        text.append(tables.startup(startup))
    where = f"benchmarks/results/{folder.name}"
    text += [f"![{title}]({where}/{name}.png)" for name, title in DIRECTIONS.items()]
    text.append(
        f"All rows, with the spread of each time and the error of each result: [{where}]({where}); "
        '`make bench` measures anew, with `BENCH_ARGS="--suite features"` (or `beyond`, `startup`) '
        "the other tables."
    )
    return "\n\n".join(text)


def beyond_part(folder: pathlib.Path, grid: list[Group]) -> list[str]:
    """Other head counts, head dims, lengths and dtypes, beside their neighbours on the grid."""
    beyond = by_case(record.load(folder / "beyond.json")["rows"])
    if not beyond:
        return []
    found = tables.kept(grid, beyond)
    return [
        "Beyond the grid (batch x length x heads x head_dim; a slash where queries and keys, or "
        "values, differ). The last column is what ours keeps of a neighbour's throughput forward, "
        "backward and both, padding to the next multiple of 16 counted as work:",
        tables.cliffs(found),
        tables.table(
            beyond, {"case": lambda c: f"`{c}`"}, {"of its neighbour": lambda c: found.get(c, "")}
        ),
    ]


def features_part(folder: pathlib.Path) -> list[str]:
    """Masks, scores and dropout."""
    result = record.load(folder / "features.json")
    if not result["rows"]:
        return []
    commits = sorted({(row.get("commit") or "unknown")[:10] for row in result["rows"]})
    return [
        f"Masks, scores and dropout, bf16, ms ({result['date']}, commit {', '.join(commits)}). "
        "Each cell: ours : best peer that can do the case, and how many times as fast ours is. "
        "Beside it ours without the feature, or with the built-in one; and what forward and "
        "backward take besides inputs and outputs:",
        tables.features_table(result["rows"]),
    ]


def section(results: pathlib.Path = record.RESULTS) -> str | None:
    """The README's section, or None where nothing was measured."""
    folders = sorted(path.parent for path in results.glob("*/grid.json"))
    if not folders:
        return None
    return "\n\n".join(["## Speed", *map(device_part, folders)])


def plot(folder: pathlib.Path) -> None:
    """A PNG for each direction: a panel for each head_dim and mask, a line for each peer."""
    grid = record.load(folder / "grid.json")
    groups = sorted(by_case(grid["rows"]), key=grid_order)
    dims = sorted({case.head_dim for case, _ in groups})
    for direction, title in DIRECTIONS.items():
        figure, axes = plt.subplots(
            2, len(dims), figsize=(4 * len(dims), 6), sharey=True, squeeze=False
        )
        for (i, causal), (j, dim) in (
            (row, column) for row in enumerate((True, False)) for column in enumerate(dims)
        ):
            ax = axes[i, j]
            here = [g for g in groups if (g[0].causal, g[0].head_dim) == (causal, dim)]
            for name, color in COLORS.items():
                points = [
                    (case.q_len, group[name][f"{direction}_tflops"])
                    for case, group in here
                    if name in group
                ]
                if points:
                    width = 2.5 if name == "ours" else 1.5
                    ax.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        color=color,
                        label=TITLES[name],
                        linewidth=width,
                    )
            if grid["matmul_tflops"]:
                ax.axhline(
                    grid["matmul_tflops"], color="gray", linestyle=":", label="matrix product"
                )
            ax.set_xscale("log", base=2)
            ax.set_xticks(lengths := sorted({case.q_len for case, _ in here}), map(str, lengths))
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            ax.set_title(f"head_dim {dim}, {'causal' if causal else 'full'}")
            if i:
                ax.set_xlabel("sequence length")
            if not j:
                ax.set_ylabel("TFLOP/s")
        axes[0, 0].legend()
        figure.suptitle(f"{title}, bf16, {grid['device']}, JAX {grid['jax']}, {grid['date']}")
        figure.tight_layout()
        figure.savefig(folder / f"{direction}.png", dpi=100)
        plt.close(figure)


def main() -> None:
    for path in sorted(record.RESULTS.glob("*/grid.json")):
        plot(path.parent)
    text = readme.PATH.read_text()
    text = readme.replace(text, MARKER, section(), BEFORE)
    decode = decode_report.section()
    readme.PATH.write_text(readme.replace(text, decode_report.MARKER, decode, decode_report.BEFORE))


if __name__ == "__main__":
    main()
