"""The README's tables of speed, and plots, from the result files: `make report`."""

import math
import pathlib
from collections import defaultdict
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks import record
from benchmarks.cases import Case
from tools import readme

# Files only, on any machine.
mpl.use("agg")

MARKER = "benchmarks"
# The section stands before this one.
BEFORE = "## What errors look like"
DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward+backward"}
TITLES = {"ours": "pallas_flash", "cudnn": "cuDNN", "fa4": "fa4-jax", "tokamax": "tokamax"}
COLORS = {"ours": "tab:red", "cudnn": "tab:green", "fa4": "tab:blue", "tokamax": "tab:orange"}

Row = dict[str, Any]
Group = tuple[Case, dict[str, Row]]


class Cell(NamedTuple):
    """Of one case and direction, TFLOP/s."""

    ours: float
    best: float
    peer: str

    @property
    def ratio(self) -> float:
        return self.ours / self.best


def by_case(rows: list[Row]) -> list[Group]:
    """Rows without errors, grouped by case: implementation -> row; only where ours is there."""
    groups: dict[Case, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if "error" not in row:
            groups[Case(**{name: row[name] for name in record.KEY[:-1]})][row["impl"]] = row
    return [(case, group) for case, group in groups.items() if "ours" in group]


def cell(group: dict[str, Row], direction: str) -> Cell | None:
    """Ours and the fastest peer, or None where no peer was measured."""
    speeds = {name: row[f"{direction}_tflops"] for name, row in group.items() if name != "ours"}
    if not speeds:
        return None
    best = max(speeds, key=lambda name: speeds[name])
    return Cell(group["ours"][f"{direction}_tflops"], speeds[best], TITLES.get(best, best))


def table(groups: list[Group], first: dict[str, Any]) -> str:
    """A line for each case; `first`: heading -> what stands there, from the case."""
    heads = [*first, *DIRECTIONS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case, group in groups:
        words = [str(get(case)) for get in first.values()]
        for direction in DIRECTIONS:
            c = cell(group, direction)
            words.append(
                f"{c.ours:.0f} : {c.best:.0f} {c.peer}, **{c.ratio:.2f}**"
                if c
                else f"{group['ours'][f'{direction}_tflops']:.0f} : none"
            )
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def summary(groups: list[Group]) -> str:
    """Geometric mean and worst case of each direction's ratio."""
    lines = []
    for direction, title in DIRECTIONS.items():
        cells = [(c, case) for case, group in groups if (c := cell(group, direction))]
        if not cells:
            continue
        mean = math.exp(sum(math.log(c.ratio) for c, _ in cells) / len(cells))
        worst, case = min(cells, key=lambda item: item[0].ratio)
        lines.append(
            f"- {title}: {mean:.2f} of the best peer in the geometric mean of {len(cells)} cases, "
            f"at worst {worst.ratio:.2f} (`{case}`, {worst.peer})"
        )
    return "\n".join(lines)


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
        summary(groups),
        table(
            groups,
            {
                "head_dim": lambda c: c.head_dim,
                "mask": lambda c: "causal" if c.causal else "full",
                "T": lambda c: c.q_len,
            },
        ),
    ]
    beyond = by_case(record.load(folder / "beyond.json")["rows"])
    if beyond:
        text += [
            "Beyond the grid (batch x length x heads x head_dim; a slash where queries and keys, "
            "or values, differ):",
            table(beyond, {"case": lambda c: f"`{c}`"}),
        ]
    startup = by_case(record.load(folder / "startup.json")["rows"])
    if startup:
        seconds = [group["ours"]["build_s"] for _, group in startup]
        text.append(
            f"Tracing, lowering and compiling forward and backward of a new shape took "
            f"{min(seconds):.1f} to {max(seconds):.1f} s."
        )
    where = f"benchmarks/results/{folder.name}"
    text += [f"![{title}]({where}/{name}.png)" for name, title in DIRECTIONS.items()]
    text.append(
        f"All rows, with the spread of each time and the error of each result: [{where}]({where}); "
        "`make bench` measures anew."
    )
    return "\n\n".join(text)


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
            for name, label in TITLES.items():
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
                        color=COLORS[name],
                        label=label,
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
    readme.PATH.write_text(readme.replace(text, MARKER, section(), BEFORE))


if __name__ == "__main__":
    main()
