"""What train_lm.py prints, writes and draws of its runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, also where there is no screen
import matplotlib.pyplot as plt
from evaluation import Run, repeated_ngram_rate
from matplotlib.ticker import LogLocator, NullFormatter
from text_corpus import Corpus

from ava_ext import METRICS

BASE, PLAIN, PENALISED = "base", "cross-entropy", "with penalties"
COLOURS = {BASE: "#7f7f7f", PLAIN: "#1f77b4", PENALISED: "#d95f02"}
PENALTY_COLOURS = {
    "ngram_penalty": "#7570b3",
    "immediate_repetition_penalty": "#e7298a",
    "eos_penalty": "#66a61e",
}

Runs = dict[str, Run]  # one seed: the base run, and the two that continue it


def print_samples(runs: Runs, corpus: Corpus, n_samples: int = 2) -> None:
    """The same prompts continued by both models and by their authors, with the share of repeated 4-grams of each."""
    prompts, real_text = corpus.prompts()
    texts = {name: runs[name].continuations for name in (PLAIN, PENALISED)} | {"the real text": real_text}
    print("\nGreedy continuations of held-out text, each with its share of repeated 4-grams")
    for index in range(n_samples):
        print(f'\n  "{corpus.tokenizer.decode(prompts[index].tolist())}" goes on')
        for name, tokens in texts.items():
            rate = repeated_ngram_rate(tokens[index : index + 1])
            print(f"  {name} ({rate:.0%} repeated): {corpus.tokenizer.decode(tokens[index].tolist())}")


def print_components(run: Run, n_last: int = 50) -> None:
    """Each weighted contribution to the loss, averaged over the last steps; together they are the total."""
    means = {name: statistics.fmean(values[-n_last:]) for name, values in run.components.items() if name not in METRICS}
    total = means.pop("total_loss")
    print(f"\nWhat the loss with penalties is made of (mean of its last {n_last} steps)")
    for name, mean in means.items():
        if mean > 0:
            print(f"  {name:<30}{mean:8.4f}{mean / total:8.1%}")
    print(f"  {'total_loss':<30}{total:8.4f}")


def print_trade(seeds: list[Runs], corpus: Corpus, penalty_weight: float) -> None:
    """What the penalties cost in perplexity beside what they save in repetition."""
    plain, penalised = [runs[PLAIN] for runs in seeds], [runs[PENALISED] for runs in seeds]
    perplexities = [[run.perplexity[-1] for run in kind] for kind in (plain, penalised)]
    repeats = [[100 * run.repeated[-1] for run in kind] for kind in (plain, penalised)]
    real = 100 * repeated_ngram_rate(corpus.prompts()[1])
    many = f"{len(seeds)} seeds, mean ± standard deviation" if len(seeds) > 1 else "one seed; try --seeds 3"

    print(f"\nThe trade, on held-out text, with penalty weight {penalty_weight:g} ({many})")
    row = "  {:<26}{:>16}{:>18}{:>18}{:>16}"
    print(row.format("", PLAIN, PENALISED, "change", "the real text"))
    for name, (before, after), unit, reference in (
        ("perplexity", perplexities, "", ""),
        ("repeated 4-grams, greedy", repeats, "%", f"{real:.1f}%"),
    ):
        change = [100 * (b / a - 1) for a, b in zip(before, after, strict=True)]
        print(row.format(name, spread(before, unit), spread(after, unit), spread(change, "%", sign="+"), reference))


def spread(values: list[float], unit: str = "", sign: str = "") -> str:
    """'12.3', or '12.3 ± 0.4' where there are several values."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{deviation}{unit}"


def write_json(seeds: list[Runs], options: dict[str, Any], path: Path) -> None:
    """Every number behind the table and the curves."""
    names = ("measured_at", "perplexity", "repeated", "components")
    runs = [{kind: {name: getattr(run, name) for name in names} for kind, run in runs.items()} for runs in seeds]
    path.write_text(json.dumps({"options": options, "seeds": runs}, default=str))


def plot_curves(seeds: list[Runs], corpus: Corpus, penalty_weight: float, path: Path) -> None:
    """Perplexity, repetition and the penalties along the training: the mean of the seeds, each seed thin behind it."""
    real_rate = 100 * repeated_ngram_rate(corpus.prompts()[1])
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
        for kind, colour in COLOURS.items():
            steps = seeds[0][kind].measured_at
            _draw(left, steps, [runs[kind].perplexity for runs in seeds], colour, kind)
            _draw(middle, steps, [[100 * rate for rate in runs[kind].repeated] for runs in seeds], colour, kind)
        middle.axhline(real_rate, color="black", linestyle=":", label="the real text")

        first_step = seeds[0][PENALISED].measured_at[0]
        for name, colour in PENALTY_COLOURS.items():
            curves = [_smooth(runs[PENALISED].components[name]) for runs in seeds]
            _draw(right, range(first_step, first_step + len(curves[0])), curves, colour, name.replace("_", " "))

        left.set(title="Perplexity of held-out text", yscale="log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:.0f}")
        left.yaxis.set_minor_formatter(NullFormatter())
        middle.set(title="Repeated 4-grams in greedy text, %", ylim=(0, 100))
        right.set(title=f"Penalties in the loss, weight {penalty_weight:g}", ylim=(0, None))
        for axes in (left, middle, right):
            axes.set_xlabel("step")
            axes.legend(frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw(axes: plt.Axes, steps: Sequence[int], curves: list[list[float]], colour: str, label: str) -> None:
    if len(curves) > 1:
        for curve in curves:
            axes.plot(steps, curve, color=colour, alpha=0.3, linewidth=0.8)
    mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    axes.plot(steps, mean, color=colour, linewidth=2, label=label)


def _smooth(values: list[float], window: int = 20) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
