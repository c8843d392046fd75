"""What the start page defines for other libraries does what it says."""

import re
from pathlib import Path

import pytest
import torch
from support.new_python import run_python
from tiny_models import batch, loss_of, own_loss, tiny

from ava_ext import UnifiedLoss

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def snippet(name):
    """The names of the start page's block that defines this one."""
    section = re.search(r"^## In your training stack\n(.*?)^## ", README.read_text(), re.M | re.S)[1]
    blocks = re.findall(r"^```python no-run\n(.*?)^```$", section, re.M | re.S)
    namespace = {"UnifiedLoss": UnifiedLoss, "__name__": "documentation"}
    exec(next(block for block in blocks if name in block), namespace)
    return namespace[name]


def test_loss_in_the_model():
    pytest.importorskip("accelerate", reason="Trainer wants it")
    model = tiny("Llama")
    expected, _ = own_loss(model, **batch())
    model = snippet("with_loss")(model)
    found, gradients = loss_of(model, **batch())
    assert 0 < found - expected < 0.01  # the z-loss
    assert gradients["lm_head.weight"].abs().sum() > 0


def test_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer wants it")
    model, inputs = tiny("Llama", dtype=torch.float32), batch(batch_size=4)
    data = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
    args = transformers.TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, logging_steps=1)
    trainer = snippet("trainer_of")(model, args, data)
    trainer.train()
    assert trainer.state.log_history[0]["z_loss"] > 0
    assert "cross_entropy" in trainer.state.log_history[0]


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny("Llama", dtype=torch.float32)
            self.loss_fn = UnifiedLoss.from_model(self.model, fused=False, auto_step=False)

        def training_step(self, inputs, index):
            parts = self.loss_fn(self.model(inputs["input_ids"]), inputs["labels"], return_detailed=True)
            return {"loss": parts["total_loss"], "loss_parts": parts}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = snippet("make_trainer")(default_root_dir=tmp_path, enable_progress_bar=False, **options)
    trainer.fit(module, torch.utils.data.DataLoader([batch(seed) for seed in range(3)], batch_size=None))
    assert module.loss_fn.get_loss_statistics()["temperature"]["count"] == 3
    assert "cross_entropy_epoch" in trainer.callback_metrics


def test_the_package_imports_none_of_them():
    modules = "{'transformers', 'accelerate', 'peft', 'trl', 'lightning', 'deepspeed'}"
    program = f"import sys, ava_ext, ava_ext.distributed, ava_ext.integrations; assert not {modules} & set(sys.modules)"
    result = run_python(program)
    assert result.returncode == 0, result.stderr
