"""The measurements as a table in the terminal (rich), as bars in a PNG (matplotlib) and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Result = dict[str, Any]  # of one problem: title, variants (rows of the table), absent


def print_table(result: Result, console: Any) -> None:
    """One problem: times beside memory beside errors."""
    from rich import box
    from rich.table import Table

    texts = {"title_justify": "left", "caption_justify": "left"}
    table = Table(
        title=result["title"],
        caption=_caption(result),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        **texts,
    )
    table.add_column("")  # the only one that wraps in a narrow terminal: no number may be cut off
    errors = (f"error:\n{name}" for name in result["error_names"])
    for column in ("\nms", "\n±", "time\n/ ours", "extra\nMB", *errors):
        table.add_column(column, justify="right", no_wrap=True)
    best = min(row["median_ms"] for row in result["variants"].values())
    for name, row in result["variants"].items():
        low, high = row["quartiles_ms"]
        memory = row.get("extra_bytes")
        cells = [
            row["label"],
            f"{row['median_ms']:.4g}",
            f"{(high - low) / 2 / row['median_ms']:.0%}" if high > low else "",
            f"{row['time_over_ours']:.2f}",
            "" if memory is None else f"{memory / 1e6:.0f}",
            *(f"{row['errors'][error]:.1e}" for error in result["error_names"]),
        ]
        is_best, is_ours = row["median_ms"] == best, name.startswith("ours")
        table.add_row(*cells, style="bold green" if is_best else "green" if is_ours else None)
    console.print(table)


def _caption(result: Result) -> str:
    memory = "extra MB: peak memory of one call, its gradients included."
    lines = [f"±: half of the middle half of the rounds. {memory} {result['error_note']}"]
    lines += [f"absent: {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines)


def write_png(results: list[Result], path: Path) -> str | None:
    """Bars of times, memory and the greatest error. Returns why there is no picture, or None."""
    try:
        from matplotlib.figure import Figure  # no pyplot: it looks for a display
        from matplotlib.ticker import NullFormatter
    except ImportError:
        return "no picture: matplotlib is not installed"
    figure = Figure(figsize=(12, 0.8 + sum(1 + 0.42 * len(result["variants"]) for result in results)))
    axes = figure.subplots(
        len(results), 3, squeeze=False, gridspec_kw={"height_ratios": [len(r["variants"]) for r in results]}
    )
    for result, row in zip(results, axes, strict=True):
        rows = list(result["variants"].values())[::-1]
        labels = [values["label"] for values in rows]
        colours = ["#00796b" if label.startswith("ava_ext") else "#9e9e9e" for label in labels]
        measures = {
            "ms": [values["median_ms"] for values in rows],
            "peak extra memory, MB": [(values.get("extra_bytes") or 0) / 1e6 for values in rows],
            "greatest relative error": [max(values["errors"].values()) for values in rows],
        }
        for axis, (title, values) in zip(row, measures.items(), strict=True):
            bars = axis.barh(labels, values, color=colours)
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
            axis.set_title(title, fontsize=9)
            axis.margins(x=0.18)
            axis.spines[["top", "right"]].set_visible(False)
            if title.endswith("error") and min(values) > 0:
                axis.set_xscale("log")
                axis.xaxis.set_minor_formatter(NullFormatter())  # they would overlap
        row[0].set_ylabel(result["problem"].replace("_", " "))
        for axis in row[1:]:
            axis.set_yticklabels([])
    figure.suptitle("\n".join(result["title"] for result in results), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return None
