"""Draws docs/figures/*.svg: plots of the results in benchmarks/results/ and studies/results/, and the drawings of "How
it works". `make docs` runs it.

python docs/figures.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "figures"
BENCHMARKS, STUDIES = ROOT / "benchmarks" / "results", ROOT / "studies" / "results"
OURS, OTHERS = "#00796b", ("#616161", "#9e9e9e", "#bdbdbd")
LINES = ("#616161", "#1565c0", "#ef6c00", "#00796b", "#8e24aa", "#c62828", "#6d4c41", "#d4a017")

matplotlib.rcParams.update(
    {"svg.hashsalt": "ava_ext", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def rows() -> Figure:
    """How many times faster than PyTorch, from logits."""
    result = load(BENCHMARKS / "amd_epyc.json")
    names = {
        "ours": "cross-entropy",
        "ours_inplace": "in place",
        "terms_ours": "every row term",
        "softcap_ours": "with soft cap",
    }
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(result["row_loss"]), sharey=True)
    for axis, case in zip(axes, result["row_loss"], strict=True):
        for offset, key, colour in ((-0.2, "faster_than_eager", OURS), (0.2, "faster_than_compiled", "#80cbc4")):
            values = [case["ratios"][name][key] for name in names]
            label = {"faster_than_eager": "than eager", "faster_than_compiled": "than torch.compile"}[key]
            bars = axis.bar([place + offset for place in range(len(names))], values, 0.4, color=colour, label=label)
            axis.bar_label(bars, fmt="%.0fx", fontsize=7)
        axis.set_xticks(range(len(names)), names.values(), rotation=15)
        axis.set_title(f"[{case['n_rows']}, {case['vocab_size']}] {case['dtype']}, forward and backward")
        axis.set_yscale("log")
        axis.set_ylim(1, 150)  # 1: as fast as PyTorch
        ticks = [1, 2, 5, 10, 20, 50, 100]
        axis.set_yticks(ticks, [f"{tick}x" for tick in ticks])
        axis.set_yticks([], minor=True)
    axes[0].set_ylabel("times faster")
    axes[0].legend(frameon=False)
    return figure


def memory() -> Figure:
    """Peak memory of one call over that of the logits."""
    result = load(BENCHMARKS / "amd_epyc.json")
    names = {
        "eager": "eager", "compiled": "compiled", "ours": "ava_ext", "ours_inplace": "ava_ext, in place",
        "terms_eager": "every term, eager", "terms_compiled": "every term, compiled",
        "terms_ours": "every term, ava_ext",
    }  # fmt: skip
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, len(result["peak_memory"]), sharey=True)
    for axis, case in zip(axes, result["peak_memory"], strict=True):
        values = [case["extra_over_logits"][name] for name in names][::-1]
        labels = list(names.values())[::-1]
        bars = axis.barh(labels, values, color=[OURS if "ava_ext" in label else OTHERS[1] for label in labels])
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
        axis.set_title(f"{case['dtype']}: peak extra memory / logits")
    return figure


def router() -> Figure:
    """Balancing losses of a router, forward and backward."""
    cases = [
        case for case in load(BENCHMARKS / "amd_epyc.json")["router"] if len(case["size"]) == 3 and case["size"][0] > 8
    ]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots(1, len(cases))
    names = {"eager": "eager", "compiled": "compiled", "ours": "ava_ext"}
    for axis, case in zip(axes, cases, strict=True):
        values = [case["times"][name]["median_ms"] for name in names]
        axis.bar_label(axis.bar(list(names.values()), values, color=[OTHERS[0], OTHERS[1], OURS]), fmt="%.0f")
        axis.set_title(f"router {case['size'][:2]}, ms")
    return figure


def accuracy() -> Figure:
    """Error of the target's gradient by gap."""
    found = load(BENCHMARKS / "accuracy.json")["errors"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in found))
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, len(dtypes), sharey=True)
    for axis, dtype in zip(axes, dtypes, strict=True):
        for number, row in enumerate(row for row in found if row["dtype"] == dtype and "linear" not in row["way"][:15]):
            gaps = [int(gap) for gap in row["gaps"] if int(gap) >= 0 and (dtype != "float16" or int(gap) <= 20)]
            errors = [row["gaps"][str(gap)]["target"] for gap in gaps]
            is_ours = row["way"].startswith("ava_ext")
            style = (
                {"color": OURS, "linewidth": 2.5, "zorder": 3}
                if is_ours
                else {"color": LINES[number], "linewidth": 1.2}
            )
            axis.plot(gaps, errors, marker="o", markersize=3, label=row["way"], **style)
        axis.set_yscale("log")
        axis.set_title(dtype)
        axis.set_xlabel("the target leads by")
    axes[0].set_ylabel("relative error of the\ntarget's gradient")
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def moe_balance() -> Figure:
    """MaxVio and loss over the steps: mean of the seeds, and their standard deviation as a band."""
    arms = load(STUDIES / "moe_balance.json")["arms"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, seeds), colour in zip(arms.items(), LINES, strict=False):
        runs = list(seeds.values())
        for axis, key in ((left, "max_violation"), (right, "loss")):
            middle = [mean(values) for values in zip(*(run[key] for run in runs), strict=True)]
            axis.plot(runs[0]["steps"], middle, color=colour, label=name, linewidth=1.4)
            if len(runs) > 1:
                spread = [stdev(values) for values in zip(*(run[key] for run in runs), strict=True)]
                low, high = zip(*((m - s, m + s) for m, s in zip(middle, spread, strict=True)), strict=True)
                axis.fill_between(runs[0]["steps"], low, high, color=colour, alpha=0.12, linewidth=0)
    left.set(title="MaxVio of the training batch", xlabel="step", ylim=(0, None))
    right.set(title="cross-entropy of the training batch", xlabel="step")
    left.legend(frameon=False, fontsize=7)
    return figure


def repetition() -> Figure | None:
    """Perplexity against greedy seq-rep-4 of held-out text, one point for each seed and a cross for their spread."""
    path = STUDIES / "repetition.json"
    if not path.exists():
        return None
    result = load(path)
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axis = figure.subplots()
    before = result["before"]["held_out"]
    axis.scatter(before["perplexity"], before["greedy"]["seq_rep_4"], marker="*", color="black", label="before")
    for (name, seeds), colour in zip(result["arms"].items(), LINES, strict=False):
        runs = [run["after"]["held_out"] for run in seeds.values()]
        x, y = [run["perplexity"] for run in runs], [run["greedy"]["seq_rep_4"] for run in runs]
        axis.scatter(x, y, color=colour, label=name, s=18)
        if len(runs) > 1:
            axis.errorbar(mean(x), mean(y), xerr=stdev(x), yerr=stdev(y), color=colour, alpha=0.5)
    axis.set(xlabel="perplexity", ylabel="seq-rep-4, greedy", ylim=(0, None))
    axis.legend(frameon=False, fontsize=7)
    return figure


def repetition_updates() -> Figure | None:
    """The validation part over the updates: mean of the seeds."""
    path = STUDIES / "repetition.json"
    if not path.exists():
        return None
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {"validation_perplexity": "perplexity", "validation_seq_rep_4": "seq-rep-4, greedy"}
    for (name, seeds), colour in zip(load(path)["arms"].items(), LINES, strict=False):
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            updates = [number for number, line in enumerate(next(iter(seeds.values()))["history"], 1) if key in line]
            runs = [[line[key] for line in run["history"] if key in line] for run in seeds.values()]
            middle = [mean(values) for values in zip(*runs, strict=True)]
            axis.plot(updates, middle, color=colour, label=name, marker="o", markersize=3, linewidth=1.4)
            axis.set(title=f"validation part: {title}", xlabel="update")
    axes[1].set_ylim(0, None)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Any]:
    """An empty sheet; one unit is a tenth of an inch."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    axes.axis("off")
    return figure, axes


def _box(axes: Any, x: float, y: float, width: float, height: float, text: str, colour: str = "#e0f2f1") -> None:
    edge = OURS if colour == "#e0f2f1" else OTHERS[0]
    style = {"boxstyle": "round,pad=0,rounding_size=1", "facecolor": colour, "edgecolor": edge, "linewidth": 1.2}
    axes.add_patch(FancyBboxPatch((x, y), width, height, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, linespacing=1.4)


def _row(axes: Any, x: float, y: float, n_cells: int, text: str, shades: str) -> None:
    """A row as long as the vocabulary."""
    for cell in range(n_cells):
        style = {"facecolor": shades, "alpha": 0.25 + 0.5 * ((7 * cell) % 5) / 5, "edgecolor": "white"}
        axes.add_patch(Rectangle((x + 2 * cell, y), 2, 3.5, **style))
    axes.text(x + n_cells, y - 2, text, ha="center", va="center", fontsize=8)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": OTHERS[0], "linewidth": 1.2})
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 1.3, text, ha="center", fontsize=7.5, style="italic")


def one_pass() -> Figure:
    """A row of logits, what is made of it, and its gradient."""
    figure, axes = _canvas(9, 2.6)
    _row(axes, 2, 18, 10, "a row of logits: V numbers", OURS)
    _box(axes, 34, 16.5, 21, 7, "statistics\nmax, R, B, U, V\nand u of a few columns")
    _box(axes, 65, 16.5, 23, 7, "terms\ncross-entropy, z-loss,\npenalties, metrics")
    _box(axes, 65, 3, 23, 7, "coefficients\na, b, k, and s of a few columns")
    _row(axes, 2, 5, 10, "its gradient: V numbers", "#ef6c00")
    _arrow(axes, (22.5, 20), (33.5, 20), "measure")
    _arrow(axes, (55.5, 20), (64.5, 20), "evaluate")
    _arrow(axes, (76.5, 16), (76.5, 10.5))
    _arrow(axes, (64.5, 6.7), (22.5, 6.7), "differentiate, while the row is in the cache or on the chip")
    return figure


def without_logits() -> Figure:
    """The fused linear layer: a chunk of rows at a time, through one buffer."""
    figure, axes = _canvas(9, 3)
    grey = "#f5f5f5"
    _box(axes, 2, 4, 14, 22, "", grey)
    axes.text(9, 27.5, "hidden states", ha="center", fontsize=8)
    for number, y in enumerate((19.5, 12.5, 5.5)):
        _box(axes, 3.5, y, 11, 5.5, f"chunk {number + 1}", "#b2dfdb" if number == 0 else "#ffffff")
    _box(axes, 28, 18, 22, 8, "buffer\nlogits of the chunk")
    _box(axes, 28, 4, 22, 8, "the same memory\ntheir gradient")
    _box(axes, 66, 18, 22, 8, "gradient of the\nchunk's hidden states", grey)
    _box(axes, 66, 4, 22, 8, "gradient of the weight:\nall chunks add to it", grey)
    _arrow(axes, (16.5, 22), (27.5, 22), "times weight")
    _arrow(axes, (39, 17.5), (39, 12.5))
    axes.text(40, 14.6, "the row kernel", fontsize=7.5, style="italic")
    _arrow(axes, (50.5, 9.5), (65.5, 20.5), "")
    axes.text(54, 16.5, "times weight", fontsize=7.5, style="italic", ha="center")
    _arrow(axes, (50.5, 7), (65.5, 7), "times states")
    return figure


FIGURES: dict[str, Callable[[], Figure | None]] = {
    "rows": rows, "memory": memory, "router": router, "accuracy": accuracy, "moe_balance": moe_balance,
    "repetition": repetition, "repetition_updates": repetition_updates, "one_pass": one_pass,
    "without_logits": without_logits,
}  # fmt: skip


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        if (figure := draw()) is not None:
            figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    print(f"figures are in {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
