"""`make study`: what the repetition losses do to a real model. SmolLM2-135M-Instruct, fine-tuned on technical text.

    python studies/repetition.py --arms cross-entropy token --seeds 1     a part; goes on where it stopped
    python studies/repetition.py --quick                                  minutes: does everything run?
    python studies/repetition.py --print                                  the table of the existing results

All arms of a seed see the same data in the same order, take the same number of updates and start from the same weights.
The text is the standard library's documentation, long docstrings and sections of the language reference. Whole
documents are held out, and every passage and prompt lies within one. Every few updates a small validation part, held
out too, is measured; choices go by that, the tables by the rest and by text of another kind, torch.nn's documentation.
With sequence-level unlikelihood (Welleck et al. 2019), the model also continues prefixes greedily, and every token of a
repeated n-gram gets -log(1 - p): cross-entropy of the text and this, of the rollouts, make one update. Results are
written after every arm and seed, and a state every few updates. Several processes may run different arms or seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import smollm2
from measures import measures, ngrams

from ava_ext import LinearLogits, SequenceUnlikelihoodLoss, UnifiedLoss

KINDS = ("held_out", "other")  # of the texts that the tables are about
RESULTS = Path(__file__).parent / "results" / "repetition.json"
MIN_CHARACTERS = 1200  # of a document


class Arm(NamedTuple):
    """What differs between two runs."""

    options: dict[str, Any]  # of UnifiedLoss
    rollout_ngram: int | None = None  # of the sequence-level loss; None: without


TOKEN = {"use_ngram_penalty": True, "ngram_size": 1, "ngram_slots": 128, "ngram_penalty_weight": 1.0}
ARMS = {
    "cross-entropy": Arm({}),
    "sequence, n = 4": Arm({}, 4),
    "sequence, n = 6": Arm({}, 6),
    "sequence, n = 8": Arm({}, 8),
    "token": Arm(TOKEN),
    "token and sequence, n = 6": Arm(TOKEN, 6),
    "n-gram, weight 0.5": Arm({"use_ngram_penalty": True, "ngram_size": 4, "ngram_penalty_weight": 0.5}),
    "n-gram, weight 4": Arm({"use_ngram_penalty": True, "ngram_size": 4, "ngram_penalty_weight": 4.0}),
}


TO_READ = ("cross-entropy", "token", "sequence, n = 6")  # the texts of all would be too many


class Setting(NamedTuple):
    """What all runs share."""

    updates: int = 256
    learning_rate: float = 3e-4  # at its highest; falls to 0
    n_layers: int = 10
    batch_size: int = 4
    n_tokens: int = 128  # of a training text
    n_rollouts: int = 4  # per update
    rollout_updates: int = 8  # that share one round of rollouts: a large batch costs less per token
    prefix_length: int = 32
    rollout_length: int = 64
    sequence_weight: float = 1.0
    n_prompts: int = 48  # half of them where the continuation is sampled
    n_new_tokens: int = 100
    n_windows: int = 48  # held-out passages of n_tokens
    validation_updates: int = 32  # between two looks at the validation part


QUICK = Setting(
    updates=4,
    n_layers=1,
    batch_size=2,
    n_tokens=48,
    rollout_updates=2,
    rollout_length=24,
    n_prompts=4,
    n_new_tokens=12,
    n_windows=4,
    validation_updates=2,
)


class Texts(NamedTuple):
    """Whole documents, each a tensor of token ids [n_tokens]."""

    train: list[Tensor]
    validation: list[Tensor]  # held out, for choices of the setting
    held_out: list[Tensor]  # for the table
    other: list[Tensor]  # of another kind, for the table


def texts(tokenizer: Tokenizer, limit: int | None) -> Texts:
    """Long documents, without copies."""
    from text_corpus import standard_library_documentation, torch_nn_documentation

    def ids(documents: list[str]) -> list[Tensor]:
        return [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(documents[:limit])]

    found = without_copies(standard_library_documentation(MIN_CHARACTERS))
    train = [text for index, text in enumerate(found) if index % 4]
    other = without_copies(torch_nn_documentation(MIN_CHARACTERS))
    return Texts(ids(train), ids(found[4::8]), ids(found[::8]), ids(other))


def without_copies(documents: list[str], n_words: int = 12) -> list[str]:
    """Leaves out what mostly stands in an earlier document: the standard library has modules in C and in Python."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for document in documents:
        found = set(ngrams(document.split(), n_words))
        if len(found & seen) <= 0.1 * len(found):
            kept.append(document)
            seen |= found
    return kept


def passages(documents: list[Tensor], length: int, count: int, seed: int) -> Tensor:  # [count, length]
    """From anywhere in the text, each within one document."""
    n_places = torch.tensor([max(len(document) - length + 1, 0) for document in documents])
    ends = n_places.cumsum(0)
    places = torch.randint(int(ends[-1]), (count,), generator=torch.Generator().manual_seed(seed))
    chosen = torch.searchsorted(ends, places, right=True)
    starts = places - (ends - n_places)[chosen]
    pairs = zip(chosen.tolist(), starts.tolist(), strict=True)
    return torch.stack([documents[number][start : start + length] for number, start in pairs])


class Windows:
    """Neighbouring passages, each within one document, and what the frozen layers make of them: computed once, kept in
    a file."""

    def __init__(self, model: smollm2.SmolLM2, documents: list[Tensor], n_tokens: int, path: Path) -> None:
        whole = torch.cat([tokens.unfold(0, n_tokens + 1, n_tokens) for tokens in documents if len(tokens) > n_tokens])
        self.model, n_windows = model, len(whole)
        self.inputs, self.targets = whole[:, :-1], whole[:, 1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (n_windows, n_tokens, model.sizes.hidden_size)
        self.states = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=model.dtype).view(shape)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, chosen: Tensor) -> tuple[Tensor, Tensor]:  # [n] -> [n, n_tokens, hidden_size], [n, n_tokens]
        absent = chosen[~self.states[chosen, -1].any(-1)]
        if len(absent):
            self.states[absent] = self.model.frozen_states(self.inputs[absent])
        return self.states[chosen], self.targets[chosen]


def windows_of(
    model: smollm2.SmolLM2, documents: Texts, setting: Setting, cache: Path
) -> dict[str, Windows]:  # of each field of Texts
    windows = {}
    for kind, part in documents._asdict().items():
        name = f"{kind}_{sum(map(len, part))}_{setting.n_tokens}_{model.n_frozen}"
        windows[kind] = Windows(model, part, setting.n_tokens, cache / "frozen_states" / name)
    return windows


def sequence_loss(
    model: smollm2.SmolLM2,
    written: smollm2.Continuation,
    ngram_size: int,
) -> tuple[Tensor, Tensor]:
    """-log(1 - p) of the tokens of repeated n-grams in what the model wrote, over all it wrote; and their share.

    Divided by the tokens that repeat instead, the last few repetitions, which are often right, would weigh as much as
    all loops at the start.
    """
    n_tokens = written.tokens.shape[1]
    predicting = model.hidden_states(written.frozen_states)[:, -n_tokens:].to(model.dtype)
    loss_fn = SequenceUnlikelihoodLoss(len(model.head), ngram_size)
    repeated = loss_fn.repeats(written.tokens).float().mean()
    logits = LinearLogits(predicting, model.head)
    return loss_fn(logits, written.tokens, num_items_in_batch=written.tokens.numel()), repeated


def train(
    model: smollm2.SmolLM2,
    arm: Arm,
    text: Windows,
    documents: Texts,
    validation: Windows,
    setting: Setting,
    seed: int,
    title: str,
    state: Path,
) -> list[dict[str, float]]:
    """Fine-tunes in place; goes on from `state` where it is there. Returns a line for every update."""
    loss_fn = UnifiedLoss(len(model.head), primary_loss_type="standard", **arm.options)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=setting.learning_rate, weight_decay=0.0)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))  # the same in every arm
    history: list[dict[str, float]] = []
    if state.exists():
        stored = torch.load(state, weights_only=True)
        model.load_state_dict(stored["model"], strict=False)
        optimizer.load_state_dict(stored["optimizer"])
        history = stored["history"]
    rollouts: list[smollm2.Continuation] = []
    progress = tqdm(range(len(history), setting.updates), title, setting.updates, initial=len(history), unit="update")
    for update in progress:
        optimizer.param_groups[0]["lr"] = setting.learning_rate * min((update + 1) / 10, 1 - update / setting.updates)
        states, targets = text[order.roll(-update * setting.batch_size)[: setting.batch_size]]
        hidden = model.hidden_states(states).to(model.dtype)
        parts = loss_fn(targets=targets, hidden_states=hidden, lm_head_weight=model.head, return_detailed=True)
        parts["total_loss"].backward()
        line = {name: float(value.detach()) for name, value in parts.items()}
        if arm.rollout_ngram:
            if not rollouts:
                n_rollouts, step_seed = setting.n_rollouts * setting.rollout_updates, 100_000 * seed + update
                prefixes = passages(documents.train, setting.prefix_length, n_rollouts, step_seed)
                written = smollm2.continuations(model, prefixes, setting.rollout_length)
                split = zip(*(part.split(setting.n_rollouts) for part in written), strict=True)
                rollouts = [smollm2.Continuation(*parts) for parts in split]
            loss, repeated = sequence_loss(model, rollouts.pop(), arm.rollout_ngram)
            (setting.sequence_weight * loss).backward()
            line |= {"sequence_loss": float(loss.detach()), "repeated": float(repeated)}
        line["gradient_norm"] = float(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        history.append(line)
        if (update + 1) % setting.validation_updates == 0:
            line |= validate(model, validation, documents.validation, setting)
        progress.set_postfix({name: f"{line[name]:.2f}" for name in ("total_loss", "repeated") if name in line})
        if not rollouts and (update + 1) % setting.rollout_updates == 0 and update + 1 < setting.updates:
            state.parent.mkdir(parents=True, exist_ok=True)
            values = {name: value.detach() for name, value in trained.items()}
            torch.save(
                {"model": values, "optimizer": optimizer.state_dict(), "history": history}, state.with_suffix(".new")
            )
            state.with_suffix(".new").replace(state)  # in one step: a stopped run finds the old or the new one, whole
    state.unlink(missing_ok=True)
    return [{name: float(f"{value:.5g}") for name, value in line.items()} for line in history]  # enough for curves


@torch.no_grad()
def perplexity(model: smollm2.SmolLM2, text: Windows, setting: Setting, n_windows: int) -> float:
    """Of n_windows passages, evenly from the whole text."""
    chosen = torch.linspace(0, len(text) - 1, n_windows).long()
    loss_fn = UnifiedLoss(len(model.head), primary_loss_type="standard", reduction="sum").eval()
    total, head = 0.0, model.head.float()
    for part in chosen.split(setting.batch_size):
        states, targets = text[part]
        total += float(loss_fn(targets=targets, hidden_states=model.hidden_states(states), lm_head_weight=head))
    return math.exp(total / (n_windows * setting.n_tokens))


def validate(model: smollm2.SmolLM2, text: Windows, documents: list[Tensor], setting: Setting) -> dict[str, float]:
    """A quarter of what `evaluate` measures, on text for choices."""
    prefixes = passages(documents, setting.prefix_length, setting.n_prompts // 4, seed=1)
    written = smollm2.continuations(model, prefixes, setting.n_new_tokens).tokens
    return {
        "validation_perplexity": perplexity(model, text, setting, setting.n_windows // 4),
        "validation_seq_rep_4": measures(written.tolist())["seq_rep_4"],
    }


def evaluate(
    model: smollm2.SmolLM2, tokenizer: Tokenizer, documents: Texts, windows: dict[str, Windows], setting: Setting
) -> dict[str, dict[str, Any]]:
    """Of each kind of held-out text: perplexity, measures of repetition, and three continuations to read."""
    result: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        found: dict[str, Any] = {"perplexity": perplexity(model, windows[kind], setting, setting.n_windows)}
        for way, n_prompts in (("greedy", setting.n_prompts), ("sampled", setting.n_prompts // 2)):
            prefixes = passages(getattr(documents, kind), setting.prefix_length, n_prompts, seed=2)
            written = smollm2.continuations(model, prefixes, setting.n_new_tokens, sample=way == "sampled").tokens
            found[way] = measures(written.tolist())
            if way == "greedy":
                pairs = zip(prefixes[:3].tolist(), written[:3].tolist(), strict=True)
                found["texts"] = [[tokenizer.decode(a), tokenizer.decode(b)] for a, b in pairs]
        result[kind] = found
    return result


def rollout_table(results: dict[str, Any]) -> str:
    """What the model wrote in training, mean over the seeds: how much repeats, and -log(1 - p) of each such token."""
    n_updates = results["setting"]["rollout_updates"]
    lines = ["| loss | repeated tokens, first and last round | -log(1 - p) of each | that is p |", "| --- " * 4 + "|"]
    for name, seeds in results["arms"].items():
        histories = [run["history"] for run in seeds.values() if "repeated" in run["history"][0]]
        if not histories:
            continue
        shares, losses = [], []
        for updates in (slice(n_updates), slice(-n_updates, None)):
            lines_of = [line for history in histories for line in history[updates]]
            shares.append(sum(line["repeated"] for line in lines_of) / len(lines_of))
            losses.append(sum(line["sequence_loss"] for line in lines_of) / len(lines_of) / shares[-1])
        cells = [f"{100 * first:.0f} %, {100 * last:.0f} %" for first, last in [shares]]
        cells += [f"{first:.2f}, {last:.2f}" for first, last in [losses, [1 - math.exp(-loss) for loss in losses]]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def validation_table(results: dict[str, Any]) -> str:
    """Perplexity and greedy seq-rep-4 of the validation part along the updates, mean over the seeds."""
    arms = results["arms"]
    history = next(iter(next(iter(arms.values())).values()))["history"]
    updates = [number for number, line in enumerate(history) if "validation_perplexity" in line]
    titles = ["loss", *(f"after {number + 1} updates" for number in updates)]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for name, seeds in arms.items():
        cells = [name]
        for number in updates:
            found = [run["history"][number] for run in seeds.values()]
            mean = {key: statistics.mean(line[key] for line in found) for key in found[0] if key.startswith("valid")}
            cells.append(f"{mean['validation_perplexity']:.2f}, {100 * mean['validation_seq_rep_4']:.1f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class Column(NamedTuple):
    title: str
    name: str  # of the measure
    way: str = ""  # of the continuations
    is_short: bool = False  # also in the short table


COLUMNS = (
    Column("perplexity", "perplexity", is_short=True),
    Column("seq-rep-4, greedy", "seq_rep_4", "greedy", is_short=True),
    Column("ends in a loop", "ends_in_loop", "greedy", is_short=True),
    Column("seq-rep-4, sampled", "seq_rep_4", "sampled"),
)


def table(results: dict[str, Any], kind: str = "held_out", short: bool = False) -> str:
    """Mean ± standard deviation over the seeds; other arms against cross-entropy's."""
    columns = [column for column in COLUMNS if column.is_short or not short]
    titles = ["loss", "seeds", *(column.title for column in columns)]
    titles.insert(3, "against cross-entropy")
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    plain = results["arms"].get("cross-entropy", {})
    arms = {"before fine-tuning": {"": {"after": results["before"]}}} if results["before"] else {}
    for name, seeds in {**arms, **results["arms"]}.items():
        runs = {seed: run["after"][kind] for seed, run in seeds.items()}
        cells = [name, str(len(seeds)) if name in results["arms"] else "-"]
        cells += [_spread([_value(run, column) for run in runs.values()], column) for column in columns]
        ratios = [
            100 * (_value(run, COLUMNS[0]) / _value(plain[seed]["after"][kind], COLUMNS[0]) - 1)
            for seed, run in runs.items()
            if seed in plain and name != "cross-entropy"
        ]
        cells.insert(3, f"{sum(ratios) / len(ratios):+.1f} %" if ratios else "-")
        lines.append("| " + " | ".join(cells) + " |")
    cells = ["the text itself", "-", "-"]
    for column in columns:
        measured = results["text"][kind] if column.way == "greedy" else {}
        cells.append(_spread([100 * measured[column.name]], column) if column.name in measured else "-")
    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def other_table(results: dict[str, Any]) -> str:
    return table(results, "other")


def short_table(results: dict[str, Any]) -> str:
    return table(results, short=True)


def _value(run: dict[str, Any], column: Column) -> float:
    return 100 * run[column.way][column.name] if column.way else run[column.name]


def _spread(values: list[float], column: Column) -> str:
    digits, unit = (1, " %") if column.way else (2, "")
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{deviation}{unit}"


def readings(results: dict[str, Any]) -> str:
    """The first prompts, and how some arms (their first seed) go on."""
    arms = {"before fine-tuning": results["before"]}
    arms |= {name: seeds[min(seeds)]["after"] for name, seeds in results["arms"].items() if name in TO_READ}
    found = []
    for index, (prefix, _) in enumerate(results["before"]["held_out"]["texts"]):
        found.append(f"*{_plain(prefix)}* ...\n")
        found += [f"* **{name}**: {_plain(run['held_out']['texts'][index][1])}" for name, run in arms.items()]
        found.append("")
    return "\n".join(found)


def _plain(text: str) -> str:
    """As one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>|\[\]#$])", r"\\\1", " ".join(text.split()))


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="none: the model as it is")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    for name, value in Setting()._asdict().items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value))
    parser.add_argument("--quick", action="store_true", help="a few updates of one layer, two arms, one seed")
    parser.add_argument("--print", action="store_true", help="the table of the existing results")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--cache", type=Path, default=Path("build/study"), help="the float32 model, and states to resume"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.print:
        results = json.loads(options.output.read_text())
        print(table(results), other_table(results), validation_table(results), rollout_table(results), sep="\n", end="")
        return
    if missing := smollm2.missing_packages():
        raise SystemExit(f"studies/repetition.py: expected {', '.join(missing)} to be installed; `make study` does it")
    setting = QUICK if options.quick else Setting()
    given = {name: getattr(options, name) for name in Setting._fields if getattr(options, name) is not None}
    setting = setting._replace(**given)
    arms = ["cross-entropy", "sequence, n = 4"] if options.quick else options.arms
    seeds = range(options.seed, options.seed + (1 if options.quick else options.seeds))

    results: dict[str, Any] = {"setting": setting._asdict(), "text": None, "before": None, "arms": {}}
    if options.output.exists() and (stored := json.loads(options.output.read_text()))["setting"] == results["setting"]:
        results = stored
    left = [(seed, name) for seed in seeds for name in arms if str(seed) not in results["arms"].get(name, {})]
    if left or not results["before"] or not results.get("text"):
        model, tokenizer = smollm2.load(options.cache / "smollm2", setting.n_layers)
        documents = texts(tokenizer, limit=8 if options.quick else None)
        windows = windows_of(model, documents, setting, options.cache)
        results["text"] = {}
        for kind in KINDS:  # as long as what the model writes: how much of it repeats?
            found = passages(getattr(documents, kind), setting.n_new_tokens, setting.n_prompts, seed=2)
            results["text"][kind] = measures(found.tolist())
        for seed, name in left:
            model, _ = smollm2.load(options.cache / "smollm2", setting.n_layers)
            state = options.cache / f"{re.sub(r'[^a-z0-9]+', '_', name)}_{seed}_{setting.updates}.pt"
            title = f"{name}, seed {seed}"
            history = train(
                model, ARMS[name], windows["train"], documents, windows["validation"], setting, seed, title, state
            )
            after = evaluate(model, tokenizer, documents, windows, setting)
            results["arms"].setdefault(name, {})[str(seed)] = {"history": history, "after": after}
            _write(results, options.output)
        if results["before"] is None:
            model, _ = smollm2.load(options.cache / "smollm2", setting.n_layers)
            results["before"] = evaluate(model, tokenizer, documents, windows, setting)
        _write(results, options.output)
    print(table(results), other_table(results), sep="\n", end="")


def _write(results: dict[str, Any], path: Path) -> None:
    """Beside what another process has written meanwhile: two may run different arms."""
    if path.exists() and (stored := json.loads(path.read_text()))["setting"] == results["setting"]:
        results["before"] = results["before"] or stored["before"]
        for name, seeds in stored["arms"].items():
            results["arms"][name] = {**seeds, **results["arms"].get(name, {})}
    order = {name: index for index, name in enumerate(ARMS)}
    results["arms"] = dict(sorted(results["arms"].items(), key=lambda arm: order[arm[0]]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
