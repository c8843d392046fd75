"""`make demo`: a real model that writes in loops, and the same model after a few minutes with the sequence-level loss.

    python studies/demo.py            under 5 minutes on 2 cores
    python studies/demo.py --quick    does everything run?

SmolLM2-135M-Instruct continues technical text that it is not trained on, always with the likeliest token. Then
cross-entropy, and unlikelihood of what repeats in the model's own greedy continuations, train its last layers. Before
and after: perplexity, repetition, texts to read. `make study` takes more time, compares with other losses, and
docs/studies/repetition.md says what follows.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import repetition
import smollm2
from measures import measures, repeated_positions
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer
from torch import Tensor

ARM = "sequence, n = 4"
SETTING = repetition.Setting(updates=56, n_prompts=32, n_windows=32, validation_updates=1000)  # none
# a measure -> how it is shown, and its format
ROWS = {
    "perplexity": ("perplexity", "{:.1f}"),
    "seq_rep_4": ("repeated 4-grams", "{:.1%}"),
    "ends_in_loop": ("texts that end in a loop", "{:.0%}"),
}


def look(
    model: smollm2.SmolLM2,
    prefixes: Tensor,  # [n_prompts, prefix_length]
    text: repetition.Windows,
    setting: repetition.Setting,
) -> dict[str, Any]:
    """How well the model predicts held-out text, what it writes, and how much of that repeats."""
    written = smollm2.continuations(model, prefixes, setting.n_new_tokens).tokens.tolist()
    perplexity = repetition.perplexity(model, text, setting, setting.n_windows)
    return {"perplexity": perplexity, **measures(written), "written": written}


def show_texts(
    console: Console, tokenizer: Tokenizer, prefixes: Tensor, looks: dict[str, dict[str, Any]], n_texts: int
) -> None:
    """The same prompts, continued before and after; what repeats is red."""
    console.print("\nGreedy continuations of held-out text. [red]Red repeats four tokens that were there before.[/red]")
    for index in range(n_texts):
        console.print(Text(f"\n... {tokenizer.decode(prefixes[index].tolist())}", style="italic"))
        for name, found in looks.items():
            console.print(Text(f"{name}: ", style="bold") + coloured(tokenizer, found["written"][index]))


def coloured(tokenizer: Tokenizer, tokens: list[int]) -> Text:
    text, shown = Text(), ""
    for end, is_repeat in enumerate(repeated_positions(tokens, 4), start=1):
        decoded = tokenizer.decode(tokens[:end])  # a character may need several tokens
        text.append(" ".join(decoded[len(shown) :].split("\n")), style="red" if is_repeat else "")
        shown = decoded
    return text


def show_table(
    console: Console, looks: dict[str, dict[str, Any]], of_the_text: dict[str, float], setting: repetition.Setting
) -> None:
    title = f"{setting.n_prompts} held-out prompts, {setting.n_new_tokens} new tokens each"
    table = Table("", *looks, "the text itself", title=title)
    for key, (name, form) in ROWS.items():
        values = [found.get(key) for found in [*looks.values(), of_the_text]]
        table.add_row(name, *("" if value is None else form.format(value) for value in values))
    console.print()
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, help="default: as many as fit into five minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few updates of one layer: does everything run?")
    parser.add_argument("--output", type=Path, default=Path("build/demo.json"), help="the numbers and the texts")
    parser.add_argument("--cache", type=Path, default=Path("build/study"), help="the float32 model")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if missing := smollm2.missing_packages():
        raise SystemExit(f"studies/demo.py: expected {', '.join(missing)} to be installed; `make demo` does it")
    setting = repetition.QUICK if options.quick else SETTING
    if options.updates is not None:
        setting = setting._replace(updates=options.updates)
    start, console = time.perf_counter(), Console(highlight=False)
    console.print("SmolLM2-135M-Instruct, and the documentation of Python's standard library")
    model, tokenizer = smollm2.load(options.cache / "smollm2", setting.n_layers)
    documents = repetition.texts(tokenizer, limit=8 if options.quick else None)
    windows = repetition.windows_of(model, documents, setting, options.cache)
    prefixes = repetition.passages(documents.held_out, setting.prefix_length, setting.n_prompts, seed=2)
    itself = repetition.passages(documents.held_out, setting.n_new_tokens, setting.n_prompts, seed=2)

    looks = {"before": look(model, prefixes, windows["held_out"], setting)}
    arm, title, state = (
        repetition.ARMS[ARM],
        "training",
        options.cache / f"demo_{options.seed}_{setting.updates}_{setting.n_layers}.pt",
    )
    train, validation = windows["train"], windows["validation"]
    repetition.train(model, arm, train, documents, validation, setting, options.seed, title, state)
    looks["after"] = look(model, prefixes, windows["held_out"], setting)

    show_texts(console, tokenizer, prefixes, looks, n_texts=3)
    show_table(console, looks, measures(itself.tolist()), setting)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"setting": setting._asdict(), **looks}) + "\n")
    console.print(f"\n{options.output} written, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
