"""Lightning trains as a plain loop, steps the loss once per optimizer step, logs its parts, and resumes exactly."""

import copy

import pytest
import torch
from tiny_models import batch, tiny

from ava_ext import UnifiedLoss

pytest.importorskip("transformers", reason="transformers is not installed")
lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from ava_ext.integrations.lightning import UnifiedLossCallback
from ava_ext.integrations.transformers import fuse_lm_head

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]
N_BATCHES, RATE = 24, 0.05


@pytest.fixture
def quiet(caplog):
    with caplog.at_level("ERROR", logger="lightning.pytorch"):
        yield


class Module(lightning.LightningModule):
    def __init__(self, fused, **options):
        super().__init__()
        self.model = tiny("Llama", dtype=torch.float32)
        self.fused = fused
        loss_fn = UnifiedLoss.from_model(self.model, fused=fused, **({"auto_step": False} | options))
        if fused:
            fuse_lm_head(self.model, loss_fn)
            self.model.report_parts = True
        else:
            self.loss_fn = loss_fn

    def training_step(self, inputs, index=None):
        if self.fused:
            return self.model(**inputs).loss
        logits = self.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        parts = self.loss_fn(logits, inputs["labels"], attention_mask=inputs["attention_mask"], return_detailed=True)
        return {"loss": parts["total_loss"], "loss_parts": parts}

    def validation_step(self, inputs, index):
        return self.training_step(inputs)

    @property
    def loss(self):
        return self.model.unified_loss if self.fused else self.loss_fn

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=RATE)


def batches(n_batches=N_BATCHES):
    return torch.utils.data.DataLoader([batch(seed) for seed in range(n_batches)], batch_size=None)


def trainer(folder, **options):
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": folder}
    return lightning.Trainer(callbacks=[UnifiedLossCallback()], **(defaults | options))


def plain_loop(module, accumulate):
    optimizer = module.configure_optimizers()
    for index, inputs in enumerate(batches()):
        output = module.training_step(inputs)
        loss = output["loss"] if isinstance(output, dict) else output
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            module.loss.step()


def assert_equal(module, expected):
    found = module.state_dict()
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_as_a_plain_loop(fused, accumulate, tmp_path):
    """The adaptive temperature included, which moves from the 10th optimizer step on."""
    module = Module(fused)
    by_hand = copy.deepcopy(module)
    plain_loop(by_hand, accumulate)
    fit = trainer(tmp_path, accumulate_grad_batches=accumulate)
    fit.fit(module, batches(), batches())
    assert module.loss.get_loss_statistics()["temperature"]["count"] == N_BATCHES // accumulate
    assert module.loss.temperature.value != 1.0
    assert_equal(module, by_hand.state_dict())
    logged = fit.callback_metrics
    assert {"cross_entropy", "main_loss", "entropy", "val_cross_entropy_epoch", "val_n_tokens_epoch"} <= set(logged)
    labels = torch.cat([inputs["labels"][:, 1:].flatten() for inputs in batches()])
    assert logged["n_tokens_epoch"] == logged["val_n_tokens_epoch"] == (labels != -100).sum()


def test_epoch_metrics_are_means_over_rows(tmp_path):
    """Of rows of different numbers in each batch; not means of means."""
    module = Module(fused=True, primary_loss_type="standard").eval()
    data = [batch(seed, n_tokens=7 + 3 * seed) for seed in range(3)]
    sums, count = 0.0, 0
    for inputs in data:
        with torch.no_grad():
            n_rows = int(module.loss.count_items(inputs["labels"], inputs["attention_mask"]))
            sums, count = sums + n_rows * float(module.model(**inputs).loss), count + n_rows
    fit = trainer(tmp_path)
    fit.validate(module, torch.utils.data.DataLoader(data, batch_size=None), verbose=False)
    assert float(fit.callback_metrics["val_cross_entropy_epoch"]) == pytest.approx(sums / count, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_is_bit_identical(fused, tmp_path):
    half, path = N_BATCHES // 2, tmp_path / "half.ckpt"
    whole = Module(fused)
    trainer(tmp_path, max_epochs=2).fit(whole, batches(half))
    first = trainer(tmp_path)
    first.fit(Module(fused), batches(half))
    first.save_checkpoint(path)
    resumed = Module(fused)
    trainer(tmp_path, max_epochs=2).fit(resumed, batches(half), ckpt_path=path)
    assert resumed.loss.get_loss_statistics()["temperature"]["count"] == N_BATCHES
    assert resumed.loss.temperature.value != 1.0
    assert_equal(resumed, whole.state_dict())


def test_what_fits_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a loss with auto_step=False"):
        trainer(tmp_path).fit(Module(fused=True, auto_step=True), batches())
    module = Module(fused=False)
    module.loss_fn = None
    with pytest.raises(ValueError, match="expected a UnifiedLoss among the modules of Module, got none"):
        trainer(tmp_path).fit(module, batches())
