"""Lightning trains as a plain loop, steps the loss once per optimizer step, logs its parts, and resumes exactly."""

import copy
import warnings

import pytest
import torch
import torch.distributed
from support.processes import on_new_ranks
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


class SkipsAndGenerates(Module):
    """Half of its batches have no loss, and validation has none."""

    def training_step(self, inputs, index):
        return super().training_step(inputs) if index % 2 else None

    def validation_step(self, inputs, index):
        self.model.generate(inputs["input_ids"], max_new_tokens=1, do_sample=False, pad_token_id=0)


def test_a_batch_without_a_loss_counts_nothing(tmp_path):
    module = SkipsAndGenerates(True, primary_loss_type="standard")
    fitted = trainer(tmp_path, val_check_interval=N_BATCHES)
    fitted.fit(module, batches(), batches(2))
    each = module.loss.count_items(batch()["labels"], batch()["attention_mask"])
    assert fitted.callback_metrics["n_tokens_epoch"] == each * N_BATCHES / 2
    assert "val_n_tokens_epoch" not in fitted.callback_metrics


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


def test_the_log_takes_parts_as_they_are(tmp_path, monkeypatch):
    """Tensors of the step, which no one converts or reads while it runs: that would wait for a GPU."""
    module = Module(fused=True)
    fit = trainer(tmp_path, max_steps=3)
    taken = []

    def of_batch(trainer, pl_module, outputs, batch, index):
        def log_dict(values, **options):
            taken.extend(values.values())
            return log(values, **options)

        def read(self, *arguments):
            raise AssertionError("expected nobody to read a value while a step runs")

        log = pl_module.log_dict
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")  # of a value that log_dict would cast
            patch.setattr(pl_module, "log_dict", log_dict)
            for name in ("item", "tolist", "__float__", "__int__", "numpy"):
                patch.setattr(torch.Tensor, name, read)
            callback.on_train_batch_end_of_class(trainer, pl_module, outputs, batch, index)

    callback = next(one for one in fit.callbacks if isinstance(one, UnifiedLossCallback))
    callback.on_train_batch_end_of_class, callback.on_train_batch_end = callback.on_train_batch_end, of_batch
    fit.fit(module, batches())
    assert len(taken) > 3 * 5
    assert all(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in taken)


class CountedModule(Module):
    """N of the optimizer step by hand, as the table says: times the ranks and the accumulated batches."""

    def training_step(self, inputs, index=None):
        given = {name: value for name, value in inputs.items() if name != "n_items"}
        factor = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return factor * self.model(**given, num_items_in_batch=inputs["n_items"]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def micro_batches(rows):
    """Three steps of four texts, of which the last has no labels; a text is a micro-batch."""
    found = []
    for step in range(3):
        inputs = batch(step, batch_size=4)
        inputs["labels"][3] = -100
        n_items = (inputs["labels"][:, 1:] != -100).sum()
        found += [{name: value[row : row + 1] for name, value in inputs.items()} | {"n_items": n_items} for row in rows]
    return torch.utils.data.DataLoader(found, batch_size=None)


def trained(folder, rows, process_group=None, **options):
    module = CountedModule(fused=True, primary_loss_type="standard", z_loss_weight=0.1, process_group=process_group)
    fit = trainer(folder, accumulate_grad_batches=len(rows), use_distributed_sampler=False, **options)
    fit.fit(module, micro_batches(rows))
    return {name: p.detach().clone() for name, p in module.named_parameters()}, dict(fit.callback_metrics)


def train_on_rank(rank, folder):
    strategy = lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo")
    return trained(folder, [2 * rank, 2 * rank + 1], "world", devices=2, strategy=strategy)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    """2 ranks x 2 micro-batches of 1 = 4 micro-batches of 1."""
    expected, expected_metrics = trained(tmp_path, [0, 1, 2, 3])
    for found, metrics in on_new_ranks(2, train_on_rank, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        for name in ("cross_entropy_epoch", "n_tokens_epoch"):  # over the rows of both
            torch.testing.assert_close(metrics[name], expected_metrics[name])
