"""Tables and sentences made from rows of result files."""

import dataclasses
import math
from collections import defaultdict
from typing import Any, NamedTuple

from benchmarks.cases import Case
from benchmarks.features import features

DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward+backward"}
TITLES = {
    "ours": "pallas_flash",
    "cudnn": "cuDNN",
    "fa4": "fa4-jax",
    "tokamax": "tokamax",
    "tokamax_triton": "tokamax Triton",
    "xla": "XLA",
}
# What a case off the grid may keep of its grid neighbour's throughput, float16 of bfloat16's.
OFF_GRID, OF_BFLOAT16 = 0.8, 0.95

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
    names = [field.name for field in dataclasses.fields(Case)]
    for row in rows:
        if "error" not in row:
            groups[Case(**{name: row[name] for name in names})][row["impl"]] = row
    return [(case, group) for case, group in groups.items() if "ours" in group]


def cell(group: dict[str, Row], direction: str) -> Cell | None:
    """Ours and the fastest peer, or None where no peer was measured."""
    speeds = {name: row[f"{direction}_tflops"] for name, row in group.items() if name != "ours"}
    if not speeds:
        return None
    best = max(speeds, key=lambda name: speeds[name])
    return Cell(group["ours"][f"{direction}_tflops"], speeds[best], TITLES.get(best, best))


def lined(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        "| " + " | ".join(words) + " |" if words else "|---" * len(heads) + "|"
        for words in (heads, [], *lines)
    )


def table(groups: list[Group], first: dict[str, Any], last: dict[str, Any] | None = None) -> str:
    """A line for each case; `first` and `last`: heading -> what stands there, from the case."""
    lines = []
    for case, group in groups:
        words = [str(get(case)) for get in first.values()]
        for direction in DIRECTIONS:
            c = cell(group, direction)
            words.append(
                f"{c.ours:.0f} : {c.best:.0f} {c.peer}, **{c.ratio:.2f}**"
                if c
                else f"{group['ours'][f'{direction}_tflops']:.0f} : none"
            )
        lines.append(words + [str(get(case)) for get in (last or {}).values()])
    return lined([*first, *DIRECTIONS.values(), *(last or {})], lines)


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


class Kept(NamedTuple):
    """A case beside one that the kernels were made for."""

    neighbour: Case
    at_least: float
    # Direction -> throughput of ours over the neighbour's.
    ratios: dict[str, float]

    def __str__(self) -> str:
        numbers = " ".join(
            f"**{ratio:.2f}**" if ratio < self.at_least else f"{ratio:.2f}"
            for ratio in self.ratios.values()
        )
        return f"{numbers} of `{self.neighbour}`"


def padded(case: Case) -> Case:
    """With lengths and head dims at the next multiples of 16, which count as work."""
    sizes = ("q_len", "kv_len", "head_dim", "value_dim")
    return dataclasses.replace(case, **{name: -(-getattr(case, name) // 16) * 16 for name in sizes})


def kept(grid: list[Group], beyond: list[Group]) -> dict[Case, Kept]:
    """Of every square case beyond the grid: what it keeps of its neighbour's throughput.

    The neighbour of float16 is the same in bfloat16; that of another case is the grid's nearest in
    head_dim, then in length, the smaller of two.
    """
    on_grid = dict(grid)
    same = dict(beyond)
    found: dict[Case, Kept] = {}
    for case, group in beyond:
        half = dataclasses.replace(case, dtype="bfloat16")
        if case.dtype == "float16" and half in same:
            neighbour, at_least, other = half, OF_BFLOAT16, same[half]
        elif case.dtype == "bfloat16" and case.q_len == case.kv_len and case not in on_grid:
            near = [c for c in on_grid if c.causal == case.causal]
            if not near:
                continue
            neighbour = min(
                near,
                key=lambda c: (
                    abs(c.head_dim - case.head_dim),
                    c.head_dim,
                    abs(c.q_len - case.q_len),
                    c.q_len,
                ),
            )
            at_least, other = OFF_GRID, on_grid[neighbour]
        else:
            continue
        work = padded(case).flops["fwd"] / case.flops["fwd"]
        ratios = {
            d: work * group["ours"][f"{d}_tflops"] / other["ours"][f"{d}_tflops"]
            for d in DIRECTIONS
        }
        found[case] = Kept(neighbour, at_least, ratios)
    return found


def cliffs(found: dict[Case, Kept]) -> str:
    """The worst of `kept`, off the grid and in float16."""
    parts = []
    for at_least, what in ((OFF_GRID, "off the grid"), (OF_BFLOAT16, "float16")):
        all_ratios = [
            (ratio, direction, case)
            for case, k in found.items()
            if k.at_least == at_least
            for direction, ratio in k.ratios.items()
        ]
        if all_ratios:
            ratio, direction, case = min(all_ratios, key=lambda item: item[0])
            below = sum(r < at_least for r, *_ in all_ratios)
            parts.append(
                f"- {what}: at worst {ratio:.2f} of the neighbour's throughput "
                f"({DIRECTIONS[direction]} of `{case}`); {below} of {len(all_ratios)} figures are "
                f"below {at_least}"
            )
    return "\n".join(parts)


def startup(groups: list[Group]) -> str:
    """How long each new shape took to build."""
    seconds = ", ".join(f"`{case}` {group['ours']['build_s']:.1f}" for case, group in groups)
    return (
        "Seconds to trace, lower and compile forward and backward of a new shape, the first of "
        f"them in a new process: {seconds}."
    )


def _feature_cell(group: dict[str, Row], direction: str) -> str:
    """Ours and the fastest peer in ms, and how many times as fast as that ours is."""
    ms = {n: row[f"{direction}_ms"] for n, row in group.items() if not n.startswith("ours")}
    own = group["ours"][f"{direction}_ms"]
    if not ms:
        return f"{own:.3f} : none"
    best = min(ms, key=lambda name: ms[name])
    return f"{own:.3f} : {ms[best]:.3f} {TITLES.get(best, best)}, **{ms[best] / own:.2f}**"


def features_table(rows: list[Row]) -> str:
    """A line for each feature that was measured."""
    lines = []
    for feature in features():
        group = {row["impl"]: row for row in rows if row["case"] == feature.name}
        if "ours" not in group:
            continue
        own = group["ours"]
        if "error" in own:
            lines.append([f"`{feature}`", *["failed"] * 4])
            continue
        group = {name: row for name, row in group.items() if "error" not in row}
        beside = ""
        if feature.beside and (other := group.get(f"ours, {feature.beside.label}")):
            ratios = [own[f"{d}_ms"] / other[f"{d}_ms"] for d in ("fwd", "fwd_bwd")]
            at_most = feature.beside.at_most
            numbers = " ".join(f"**{r:.2f}**" if r > at_most else f"{r:.2f}" for r in ratios)
            beside = f"{numbers} of {feature.beside.label} (at most {at_most})"
        served = "" if own["backend"] == "hopper" else f", {own['backend']}"
        lines.append(
            [
                f"`{feature}`{served}",
                _feature_cell(group, "fwd"),
                _feature_cell(group, "fwd_bwd"),
                beside,
                f"{own['peak_temp_bytes'] / 2**20:.0f}",
            ]
        )
    heads = ["case", "forward", "forward+backward", "time beside ours", "temporary MiB"]
    return lined(heads, lines)
