"""Lightning with the loss in the model: temperature and parts of the loss in the log, state in the checkpoint.

python examples/lightning_fused_head.py
"""

import tempfile

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ava_ext import UnifiedLoss
from ava_ext.integrations.lightning import UnifiedLossCallback
from ava_ext.integrations.transformers import fuse_lm_head


class Model(lightning.LightningModule):
    """A small Llama that computes its loss from hidden states."""

    def __init__(self):
        super().__init__()
        sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        fuse_lm_head(self.model, UnifiedLoss.from_model(self.model, auto_step=False, z_loss_weight=1e-4))
        self.model.report_parts = True  # for the callback

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def batches(n_batches=20):
    """Texts in which every token follows from the one before."""
    texts = [(torch.randint(512, (8, 1)) + 7 * torch.arange(32)) % 512 for _ in range(n_batches)]
    return torch.utils.data.DataLoader([{"input_ids": text, "labels": text} for text in texts], batch_size=None)


def main():
    torch.manual_seed(0)
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", default_root_dir=folder, callbacks=[UnifiedLossCallback()], **options
        )
        trainer.fit(model, batches())
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name:28} {float(value):.4f}")


if __name__ == "__main__":
    main()
