"""What was measured on a GPU, for the notebooks: the result files, and the plots made from them.

    python -m notebooks.figures

draws the README's plots anew from the committed files.
"""

import json
import pathlib
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
# The command that makes each file.
COMMANDS = {
    "grid": "python -m benchmarks.run --suite grid",
    "paper_figure": "python -m benchmarks.paper_figure",
    "notebook_figures": "python -m benchmarks.notebook_figures",
    "decode": "python -m benchmarks.decode",
}
# Name in the files -> name in the plots, and its colour.
FORMS = {
    "standard": ("standard attention", "tab:gray"),
    "flash1": ("FlashAttention, textbook", "tab:orange"),
    "flash2": ("FlashAttention-2, textbook", "tab:blue"),
    "ours": ("pallas_flash", "tab:red"),
    "cudnn": ("cuDNN", "tab:green"),
}

Results = dict[str, Any]


def load(name: str) -> Results | None:
    """A result file; without one None, and the command that makes it is printed."""
    paths = sorted(RESULTS.glob(f"*/{name}.json"))
    if paths:
        return json.loads(paths[0].read_text())
    print(f"Nothing measured yet. On a Hopper GPU, in the project's folder: {COMMANDS[name]}")
    return None


def where(results: Results) -> str:
    """Device, version and day, for a plot's title."""
    rows = next(x for x in results.values() if isinstance(x, list) and x and "date" in x[0])
    return f"{results['device']}, JAX {results['jax']}, {max(row['date'] for row in rows)}"


def speed_bars(results: Results, direction: str = "fwd_bwd") -> Any:
    """TFLOP/s against the length: a panel for each head_dim and mask, as in the papers."""
    rows = results["rows"]
    lengths = sorted({row["q_len"] for row in rows})
    names = [name for name in FORMS if any(row["impl"] == name for row in rows)]
    figure, panels = plt.subplots(2, 2, figsize=(12, 7), layout="constrained", sharey=True)
    for ax, (head_dim, causal) in zip(
        panels.flat, ((d, c) for d in (64, 128) for c in (False, True)), strict=True
    ):
        for i, name in enumerate(names):
            at = {
                row["q_len"]: row
                for row in rows
                if (row["impl"], row["head_dim"], row["causal"]) == (name, head_dim, causal)
            }
            x = np.arange(len(lengths)) + (i - (len(names) - 1) / 2) * 0.17
            speeds = [at.get(length, {}).get(f"{direction}_tflops", 0) for length in lengths]
            bars = ax.bar(x, speeds, 0.17, label=FORMS[name][0], color=FORMS[name][1])
            labels = [_label(at.get(length, {}), direction) for length in lengths]
            ax.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
        ax.set_title(f"head_dim {head_dim}, {'causal' if causal else 'no mask'}")
        ax.set_xticks(range(len(lengths)), lengths)
        ax.set(xlabel="T, tokens (16384 tokens in all)", ylabel="TFLOP/s")
        ax.margins(y=0.12)
    panels[0, 0].legend(fontsize=8)
    words = {"fwd": "forward", "fwd_bwd": "forward + backward"}[direction]
    figure.suptitle(f"Attention, {words}, bfloat16, 2048 channels; {where(results)}")
    return figure


def _label(row: dict[str, Any], direction: str) -> str:
    """What stands on a bar: TFLOP/s, or why there are none."""
    if f"{direction}_tflops" in row:
        return f"{row[f'{direction}_tflops']:.0f}"
    error = row.get(f"{direction}_error", "")
    return "OOM" if "RESOURCE_EXHAUSTED" in error else "failed" if error else ""


def growth(results: Results) -> Any:
    """Memory and time of one attention layer against the length."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    rows = [row for row in results["lengths"] if "causal" in row["case"]]
    for ax, what, factor, unit in (
        (panels[0], "total_bytes", 2**-30, "GiB, arguments and results included"),
        (panels[1], "ms", 1.0, "milliseconds"),
    ):
        for name in ("standard", "ours"):
            for direction, style in (("fwd_bwd", "o-"), ("fwd", "s:")):
                points = [
                    (row["length"], row[f"{direction}_{what}"] * factor)
                    for row in rows
                    # What did not run is not drawn, though its memory was planned.
                    if row["impl"] == name and f"{direction}_ms" in row
                ]
                title = {"fwd": "forward", "fwd_bwd": "forward + backward"}[direction]
                color = FORMS[name][1]
                ax.loglog(*zip(*points, strict=True), style, color=color, base=2, markersize=4)
                ax.lines[-1].set_label(f"{FORMS[name][0]}, {title}")
        ax.set(xlabel="T, tokens", ylabel=unit)
        ax.grid(alpha=0.3)
    panels[0].axhline(80, color="black", linewidth=0.8, linestyle="--", label="80 GiB")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Causal attention, 1 row, 8 heads of 128 channels, bfloat16; {where(results)}")
    return figure


def main() -> None:
    for name, plot, file in (
        ("paper_figure", speed_bars, "paper_figure.png"),
        ("paper_figure", partial(speed_bars, direction="fwd"), "paper_figure_forward.png"),
        ("notebook_figures", growth, "lengths.png"),
    ):
        for path in sorted(RESULTS.glob(f"*/{name}.json")):
            plot(json.loads(path.read_text())).savefig(path.parent / file, dpi=100)


if __name__ == "__main__":
    main()
