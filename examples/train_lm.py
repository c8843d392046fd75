"""Train a small GPT on real text, with and without repetition penalties, and see what they cost and what they save.

    python examples/train_lm.py             # under 5 minutes on 2 cores
    python examples/train_lm.py --quick     # under a minute: everything runs, little is learnt
    python examples/train_lm.py --seeds 3   # three times as long: mean and spread

A base model learns the documentation of the standard library with cross-entropy. From that checkpoint the training goes
on twice, over the same batches: with cross-entropy alone, and with UnifiedLoss's penalties on repeated n-grams,
repeated tokens and early ends. Both models then face text they have not seen: how well they predict it (perplexity,
lower is better), and how much of what they write, always taking the likeliest token, is repetition.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import report
import torch
from evaluation import Run
from report import BASE, PENALISED, PLAIN
from small_gpt import SmallGPT
from text_corpus import Corpus, standard_library_documentation
from torch import Tensor
from tqdm import tqdm

from ava_ext import UnifiedLoss

CONTEXT = 128  # tokens that the model sees
BATCH_SIZE = 8  # windows of CONTEXT tokens per step
LEARNING_RATE = 2e-3
# A model in a loop has just repeated its last token's successor. Longer n-grams seldom come twice in real text: with
# ngram_size=4 there is little to learn from, and greedy text repeats nearly as much as without a penalty.
NGRAM_SIZE = 2


def plain_loss(corpus: Corpus) -> UnifiedLoss:
    """With nothing turned on UnifiedLoss equals F.cross_entropy."""
    return UnifiedLoss(corpus.vocab_size, primary_loss_type="standard")


def penalised_loss(corpus: Corpus, penalty_weight: float) -> UnifiedLoss:
    """Cross-entropy, and a push away from every token that would repeat what the text has just said."""
    return UnifiedLoss(
        corpus.vocab_size,
        primary_loss_type="standard",
        use_ngram_penalty=True,
        ngram_size=NGRAM_SIZE,
        ngram_penalty_weight=penalty_weight,
        use_immediate_repetition_penalty=True,
        immediate_repetition_weight=penalty_weight,
        eos_token_id=corpus.end_of_text,
        min_sequence_length=20,  # tokens; every document of the corpus is longer
    )


def train(
    model: SmallGPT,
    optimizer: torch.optim.Optimizer,
    loss_fn: UnifiedLoss,
    corpus: Corpus,
    learning_rates: Tensor,  # [n_steps]
    first_step: int,
    measure_every: int,
    seed: int,
    title: str,
) -> Run:
    """One AdamW step per learning rate, with a measurement before the first and at regular intervals."""
    generator = torch.Generator().manual_seed(seed)
    run, history = Run(), None
    run.measure(model, corpus, first_step)
    progress = tqdm(learning_rates.tolist(), desc=title, unit="step", dynamic_ncols=True)
    for step, learning_rate in enumerate(progress, start=1):
        inputs, targets, segment_ids = corpus.random_batch(BATCH_SIZE, generator)
        loss = loss_fn(model(inputs), targets, segment_ids=segment_ids, return_detailed=True)

        optimizer.zero_grad()
        loss["total_loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()

        if history is None:
            history = torch.empty(len(learning_rates), len(loss))
        history[step - 1] = torch.stack(list(loss.values())).detach()
        if step % measure_every == 0 or step == len(learning_rates):
            run.measure(model, corpus, first_step + step)
        if step % 10 == 0:  # reading a value waits for it: not at every step
            progress.set_postfix(loss=f"{loss['total_loss'].item():.2f}", perplexity=f"{run.perplexity[-1]:.0f}")
    run.components = dict(zip(loss, history.T.tolist(), strict=True))
    return run


def compare(corpus: Corpus, n_steps: int, measure_every: int, penalty_weight: float, seed: int) -> dict[str, Run]:
    """Trains a base model for n_steps, then goes on from it with either loss for as many."""
    torch.manual_seed(seed)
    model = SmallGPT(corpus.vocab_size, corpus.context)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)

    warm_up = torch.arange(1, n_steps + 1) / max(1, n_steps // 10)
    base_rates = LEARNING_RATE * warm_up.clamp(max=1)
    falling_rates = LEARNING_RATE * torch.linspace(1, 0, n_steps + 1)[:-1]

    title = f"seed {seed}, {BASE:<14}"
    runs = {BASE: train(model, optimizer, plain_loss(corpus), corpus, base_rates, 0, measure_every, seed, title)}
    for name, loss_fn in ((PLAIN, plain_loss(corpus)), (PENALISED, penalised_loss(corpus, penalty_weight))):
        checkpoint = copy.deepcopy((model, optimizer))
        title = f"seed {seed}, {name:<14}"
        runs[name] = train(*checkpoint, loss_fn, corpus, falling_rates, n_steps, measure_every, seed + 1000, title)
    return runs


def main() -> None:
    options = parse_options()
    start = time.perf_counter()
    corpus = Corpus.from_texts(standard_library_documentation(), CONTEXT)
    print(
        f"Documentation of the standard library: {len(corpus.train_tokens):,} tokens to learn from, "
        f"{len(corpus.validation_tokens):,} held out, {corpus.vocab_size:,} different ones"
    )
    measure_every = max(1, options.steps // (2 if options.quick else 6))
    seeds = [
        compare(corpus, options.steps, measure_every, options.penalty_weight, seed)
        for seed in range(options.seed, options.seed + options.seeds)
    ]
    report.print_samples(seeds[0], corpus)
    report.print_components(seeds[0][PENALISED])
    report.print_trade(seeds, corpus, options.penalty_weight)

    options.output.mkdir(parents=True, exist_ok=True)
    report.write_json(seeds, vars(options), options.output / "results.json")
    report.plot_curves(seeds, corpus, options.penalty_weight, options.output / "curves.png")
    print(f"\n{options.output}/curves.png and results.json written, {time.perf_counter() - start:.0f} s in all")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="steps of each of the three runs")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run")
    parser.add_argument("--penalty-weight", type=float, default=16.0, help="weight of the penalties on repetition")
    parser.add_argument("--output", type=Path, default=Path("build/train_lm"), help="folder of the curves and numbers")
    parser.add_argument("--quick", action="store_true", help="few steps: does everything run?")
    options = parser.parse_args()
    if options.steps is None:
        options.steps = 60 if options.quick else 600
    return options


if __name__ == "__main__":
    main()
