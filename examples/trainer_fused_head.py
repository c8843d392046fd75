"""Trainer of transformers with the loss in the model: no logits, and every part of the loss in the log.

    python examples/trainer_fused_head.py                 # built-in loss and fused head, one after the other
    python examples/trainer_fused_head.py --rounds 3      # three times in turn, and the ratios
    python examples/trainer_fused_head.py --loss fused    # one of them: built_in, fused
    torchrun --nproc-per-node 2 examples/trainer_fused_head.py --loss fused

Prints the time of a step and the peak memory of the process; each loss runs in a process of its own, since memory that
one has used stays with its process.
"""

import argparse
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ava_ext import UnifiedLoss
from ava_ext.integrations.transformers import UnifiedLossTrainer


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step: of the clock, and of the processor, which others on the machine disturb less."""

    def __init__(self):
        self.clock, self.processor = [], []

    def on_step_begin(self, args, state, control, **options):
        self.begin = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **options):
        self.clock.append(time.perf_counter() - self.begin[0])
        self.processor.append(time.process_time() - self.begin[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loss", choices=["built_in", "fused"], help="default: one after the other")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1, help="how often each loss runs, without --loss")
    options = parser.parse_args()
    if options.loss is None:
        compare(options.rounds)
    else:
        train(options)


def compare(rounds):
    """Each loss in a process of its own, in turn; the medians of the rounds' ratios."""
    ratios = []
    for _ in range(rounds):
        built_in, fused = (measured(loss) for loss in ("built_in", "fused"))
        ratios.append([before / after for before, after in zip(built_in, fused, strict=True)])
    clock, processor, memory = map(statistics.median, zip(*ratios, strict=True))
    print(f"built_in / fused: time {clock:.2f}, processor time {processor:.2f}, peak memory {memory:.2f}")


def measured(loss):
    """(milliseconds of a step by the clock, by the processor, megabytes) of a process that trains with this loss."""
    command = [sys.executable, __file__, *sys.argv[1:], "--loss", loss]
    line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(line, end="", flush=True)
    pattern = r"(\d+) ms per step \((\d+) ms of the processor\), peak memory (\d+) MB"
    return [float(number) for number in re.search(pattern, line).groups()]


def train(options):
    """A few steps on random texts, the last labels of which are padding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    rows = torch.randint(options.vocab_size, (options.batch_size * options.steps, options.tokens))
    dataset = [{"input_ids": row, "labels": torch.cat([row[:-4], row.new_full((4,), -100)])} for row in rows]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=options.batch_size,
            max_steps=options.steps,
            logging_steps=options.steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        if options.loss == "built_in":
            trainer = Trainer(model, args, train_dataset=dataset, callbacks=[times])
        else:
            loss_fn = UnifiedLoss.from_model(model, primary_loss_type="standard", auto_step=False)
            trainer = UnifiedLossTrainer(model, args, train_dataset=dataset, callbacks=[times], loss_fn=loss_fn)
        trainer.train()
    clock, processor = (1000 * statistics.median(of[1:]) for of in (times.clock, times.processor))  # the first warms up
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if trainer.is_world_process_zero():
        time_of_step = f"{clock:.0f} ms per step ({processor:.0f} ms of the processor)"
        print(f"{options.loss}: {time_of_step}, peak memory {megabytes:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
