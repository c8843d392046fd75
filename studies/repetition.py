"""`make study`: what the repetition losses do to a real model. SmolLM2-135M-Instruct, fine-tuned on technical text.

    python studies/repetition.py --arms cross-entropy sequence --seeds 1     a part; goes on where it stopped
    python studies/repetition.py --quick                                     minutes: does everything run?
    python studies/repetition.py --print                                     the table of the results that are there

All arms see the same data in the same order, take the same number of updates and start from the same weights. The text
is the standard library's docstrings, every fifteenth held out; text of another kind is the language reference.
Sequence-level updates (Welleck et al. 2019): the model continues prefixes greedily, and every token of a repeated
n-gram gets -log(1 - p). Results are written after every arm and seed, and a state every few updates.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import smollm2
from measures import measures, repeated_positions

from ava_ext import LinearLogits, UnifiedLoss
from ava_ext.ops import Candidates, RowFlags, row_loss, row_options

RESULTS = Path(__file__).parent / "results" / "repetition.json"


class Arm(NamedTuple):
    """What differs between two runs."""

    options: dict[str, Any]  # of UnifiedLoss
    sequence_share: float = 0.0  # of the updates that are sequence-level
    sequence_weight: float = 1.0


TOKEN = {"use_ngram_penalty": True, "ngram_size": 1, "ngram_slots": 128, "ngram_penalty_weight": 1.0}
ARMS = {
    "cross-entropy": Arm({}),
    "n-gram, weight 0.5": Arm({"use_ngram_penalty": True, "ngram_size": 4, "ngram_penalty_weight": 0.5}),
    "n-gram, weight 4": Arm({"use_ngram_penalty": True, "ngram_size": 4, "ngram_penalty_weight": 4.0}),
    "token": Arm(TOKEN),
    "sequence": Arm({}, sequence_share=0.5),
    "sequence, weight 0.25": Arm({}, sequence_share=0.5, sequence_weight=0.25),
    "both": Arm(TOKEN, sequence_share=0.5),
}


class Setting(NamedTuple):
    """What all runs share."""

    updates: int = 300
    learning_rate: float = 5e-5
    n_layers: int = 10
    batch_size: int = 8
    n_tokens: int = 128  # of a training text
    prefix_length: int = 32
    rollout_length: int = 64
    rollout_ngram: int = 4
    n_prompts: int = 64
    n_new_tokens: int = 100
    n_windows: int = 64  # held-out texts of n_tokens


QUICK = Setting(
    updates=4, n_layers=1, batch_size=2, n_tokens=48, rollout_length=24, n_prompts=4, n_new_tokens=24, n_windows=4
)


class Texts(NamedTuple):
    """Token ids [n_tokens] of three streams."""

    train: Tensor
    same_kind: Tensor
    other_kind: Tensor


def texts(tokenizer: Any, limit: int | None) -> Texts:
    """Docstrings, held-out docstrings, and the language reference."""
    import pydoc_data.topics

    from text_corpus import standard_library_documentation

    topics = {" ".join(text.split()) for text in pydoc_data.topics.topics.values()}
    documentation = [text for text in standard_library_documentation() if text not in topics]
    held_out = documentation[::15]
    train = [text for index, text in enumerate(documentation) if index % 15]
    reference = [text for text in sorted(topics) if len(text) > 500]

    def ids(documents: list[str]) -> Tensor:
        end = [tokenizer.eos_token_id]
        return torch.tensor([token for text in documents for token in tokenizer(text)["input_ids"] + end])

    return Texts(ids(train[:limit]), ids(held_out[:limit]), ids(reference[:limit]))


def windows(tokens: Tensor, length: int, count: int, seed: int) -> Tensor:  # [n] -> [count, length]
    starts = torch.randint(len(tokens) - length, (count, 1), generator=torch.Generator().manual_seed(seed))
    return tokens[starts + torch.arange(length)]


def sequence_loss(model: nn.Module, prefixes: Tensor, setting: Setting) -> tuple[Tensor, float]:
    """Mean of -log(1 - p) over the tokens of repeated n-grams in the model's own continuations, and their share."""
    rollout = smollm2.continuations(model, prefixes, setting.rollout_length)
    repeated = torch.tensor([repeated_positions(tokens, setting.rollout_ngram) for tokens in rollout.tolist()])
    ids = torch.cat([prefixes, rollout], dim=1)
    states = smollm2.hidden_states(model, ids[:, :-1])[:, prefixes.shape[1] - 1 :]  # those that predict the rollout
    logits = LinearLogits(states.flatten(0, 1), model.lm_head.weight)
    token, weight = rollout.flatten(), repeated.flatten().float()
    # the row's own target is never pushed down: any other token stands for it, and no other term looks at it
    candidates = Candidates(token.int().unsqueeze(-1), weight.unsqueeze(-1), (1,))
    others = (token + 1) % logits.shape[-1]
    options = row_options(torch.zeros(0))
    total = row_loss(logits, others, options, flags=int(RowFlags(0)), candidates=candidates, reduction="sum").loss
    return total / weight.sum().clamp_min(1), float(repeated.float().mean())


def train(model: nn.Module, arm: Arm, data: Texts, setting: Setting, seed: int, title: str, state: Path) -> list[dict]:
    """Fine-tunes in place; goes on from `state` where it is there. Returns a line for every update."""
    loss_fn = UnifiedLoss(model.lm_head.weight.shape[0], primary_loss_type="standard", **arm.options)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=setting.learning_rate, weight_decay=0.0)
    history: list[dict[str, float]] = []
    if state.exists():
        stored = torch.load(state, weights_only=True)
        model.load_state_dict(stored["model"], strict=False)
        optimizer.load_state_dict(stored["optimizer"])
        history = stored["history"]
    model.train()
    every = round(1 / arm.sequence_share) if arm.sequence_share else 0
    progress = tqdm(range(len(history), setting.updates), title, setting.updates, initial=len(history), unit="update")
    for update in progress:
        step_seed = 100_000 * seed + update  # the same data in every arm, and after an interruption
        optimizer.param_groups[0]["lr"] = setting.learning_rate * min(1.0, (update + 1) / 10)
        if every and update % every == every - 1:
            prefixes = windows(data.train, setting.prefix_length, setting.batch_size, step_seed)
            loss, share = sequence_loss(model, prefixes, setting)
            line = {"sequence_loss": float(loss.detach()), "repeated": share}
            (arm.sequence_weight * loss).backward()
        else:
            batch = windows(data.train, setting.n_tokens + 1, setting.batch_size, step_seed)
            states = smollm2.hidden_states(model, batch[:, :-1])
            head = model.lm_head.weight
            parts = loss_fn(targets=batch[:, 1:], hidden_states=states, lm_head_weight=head, return_detailed=True)
            parts["total_loss"].backward()
            line = {name: float(value.detach()) for name, value in parts.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(line)
        progress.set_postfix({name: f"{value:.2f}" for name, value in list(line.items())[:1]})
        if (update + 1) % 20 == 0 and update + 1 < setting.updates:
            state.parent.mkdir(parents=True, exist_ok=True)
            values = {name: value.detach() for name, value in trained.items()}
            torch.save({"model": values, "optimizer": optimizer.state_dict(), "history": history}, state)
    state.unlink(missing_ok=True)
    return history


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, setting: Setting) -> float:
    loss_fn = UnifiedLoss(model.lm_head.weight.shape[0], primary_loss_type="standard", reduction="sum").eval()
    batches = windows(tokens, setting.n_tokens + 1, setting.n_windows, seed=1).split(setting.batch_size)
    total = 0.0
    for batch in batches:
        states = smollm2.hidden_states(model, batch[:, :-1])
        total += float(loss_fn(targets=batch[:, 1:], hidden_states=states, lm_head_weight=model.lm_head.weight))
    return math.exp(total / (setting.n_windows * setting.n_tokens))


def evaluate(model: nn.Module, tokenizer: Any, data: Texts, setting: Setting) -> dict[str, Any]:
    """Perplexity and measures of repetition on held-out text of both kinds, and three continuations to read."""
    model.eval()
    result: dict[str, Any] = {}
    for kind in ("same_kind", "other_kind"):
        tokens = getattr(data, kind)
        prefixes = windows(tokens, setting.prefix_length, setting.n_prompts, seed=2)
        result[kind] = {"perplexity": perplexity(model, tokens, setting)}
        for way in ("greedy", "sampled"):
            found = [
                smollm2.continuations(model, part, setting.n_new_tokens, sample=way == "sampled")
                for part in prefixes.split(16)
            ]
            result[kind][way] = measures(torch.cat(found).tolist())
            if way == "greedy":
                pairs = zip(prefixes[:3].tolist(), torch.cat(found)[:3].tolist(), strict=True)
                result[kind]["texts"] = [[tokenizer.decode(a), tokenizer.decode(b)] for a, b in pairs]
    return result


def table(results: dict[str, Any]) -> str:
    """Held-out text of both kinds, mean ± standard deviation over the seeds."""
    lines = ["| loss | seeds | perplexity | seq-rep-4, greedy | ends in a loop | perplexity, other kind | seq-rep-4 |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    arms = {"before fine-tuning": {"-": results["before"]}} if results.get("before") else {}
    for name, seeds in {**arms, **results["arms"]}.items():
        runs = [run.get("after", run) for run in seeds.values()]
        if not runs:
            continue
        columns = [
            _spread([run["same_kind"]["perplexity"] for run in runs]),
            _spread([100 * run["same_kind"]["greedy"]["seq_rep_4"] for run in runs], " %"),
            _spread([100 * run["same_kind"]["greedy"]["ends_in_loop"] for run in runs], " %"),
            _spread([run["other_kind"]["perplexity"] for run in runs]),
            _spread([100 * run["other_kind"]["greedy"]["seq_rep_4"] for run in runs], " %"),
        ]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], unit: str = "") -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}{unit}"
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.1f} ± {deviation:.1f}{unit}"


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="none: the model as it is")
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in Setting()._asdict().items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value))
    parser.add_argument("--quick", action="store_true", help="a few updates of one layer, two arms, one seed")
    parser.add_argument("--print", action="store_true", help="the table of the results that are there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--cache", type=Path, default=Path("build/study"), help="the float32 model, and states to resume"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.print:
        print(table(json.loads(options.output.read_text())), end="")
        return
    if missing := smollm2.missing_packages():
        raise SystemExit(f"studies/repetition.py: expected {', '.join(missing)} to be installed; `make study` does it")
    setting = QUICK if options.quick else Setting()
    given = {name: getattr(options, name) for name in Setting._fields if getattr(options, name) is not None}
    setting = setting._replace(**given)
    arms = ["cross-entropy", "sequence"] if options.quick else options.arms
    n_seeds = 1 if options.quick else options.seeds

    results: dict[str, Any] = {"setting": setting._asdict(), "before": None, "arms": {}}
    if options.output.exists() and (stored := json.loads(options.output.read_text()))["setting"] == results["setting"]:
        results = stored
    left = [(seed, name) for seed in range(n_seeds) for name in arms if str(seed) not in results["arms"].get(name, {})]
    if left or results["before"] is None:
        model, tokenizer = smollm2.load(options.cache / "smollm2", setting.n_layers)
        data = texts(tokenizer, limit=40 if options.quick else None)
        if results["before"] is None:
            results["before"] = evaluate(model, tokenizer, data, setting)
            _write(results, options.output)
        for seed, name in left:
            model, _ = smollm2.load(options.cache / "smollm2", setting.n_layers)
            state = options.cache / f"{name.replace(' ', '_').replace(',', '')}_{seed}_{setting.updates}.pt"
            history = train(model, ARMS[name], data, setting, seed, f"{name}, seed {seed}", state)
            after = evaluate(model, tokenizer, data, setting)
            results["arms"].setdefault(name, {})[str(seed)] = {"history": history, "after": after}
            _write(results, options.output)
    print(table(results), end="")


def _write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
