"""Trainer of transformers with the loss in the model: no logits, and every part of the loss in the log.

    python examples/trainer_fused_head.py                 # built-in loss and fused head, one after the other
    python examples/trainer_fused_head.py --loss fused    # one of them: built_in, fused
    torchrun --nproc-per-node 2 examples/trainer_fused_head.py --loss fused

Prints the time of a step and the peak memory of the process; each loss runs in a process of its own, since memory that
one has used stays with its process.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ava_ext import UnifiedLoss
from ava_ext.integrations.transformers import UnifiedLossTrainer


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **options):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **options):
        self.seconds.append(time.perf_counter() - self.begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loss", choices=["built_in", "fused"], help="default: one after the other")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    if options.loss is None:
        for loss in ("built_in", "fused"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--loss", loss], check=True)
        return
    train(options)


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
    seconds = sorted(times.seconds[1:])[(options.steps - 1) // 2]  # the first step warms up
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if trainer.is_world_process_zero():
        print(f"{options.loss}: {1000 * seconds:.0f} ms per step, peak memory {megabytes:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
