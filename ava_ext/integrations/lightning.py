"""UnifiedLoss with Lightning: one step() per optimizer step, and the parts of the loss in the log.

The loss is a module of the LightningModule, or of a model in it (`fuse_lm_head`): Lightning then optimizes its
parameters and keeps its state in checkpoints. The guide's section "Training stacks" has a table of who divides by what:
Lightning divides what training_step returns by accumulate_grad_batches, and DistributedDataParallel by the ranks.

    class Model(lightning.LightningModule):
        def training_step(self, batch, index):
            parts = self.loss_fn(self(batch), batch["labels"], return_detailed=True)
            return {"loss": parts["total_loss"], "loss_parts": parts}

    Trainer(callbacks=[UnifiedLossCallback()])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ava_ext.integrations.loss_functions import check_steps
from ava_ext.losses import METRICS
from ava_ext.meter import LossMeter
from ava_ext.unified_loss import UnifiedLoss

__all__ = ["UnifiedLossCallback"]


class UnifiedLossCallback(Callback):
    """Steps every UnifiedLoss of a LightningModule once per optimizer step, and logs its parts.

    It takes the parts from "loss_parts" in what training_step or validation_step returns (the dict of
    return_detailed=True), or from `loss_parts` of a model with the loss in its forward, after `model.report_parts =
    True`. The parts of each batch go to log_dict as they are, tensors on the device. At the end of an epoch, the
    metrics over all rows of all micro-batches and ranks are logged as <prefix><name>_epoch, with one synchronisation
    (`ava_ext.LossMeter`). With manual optimization it steps once after each batch in which an optimizer has, however
    often, and sees the parts of that batch's last call.

    Args:
        prefix: put before the names in the log; those of validation also get "val_" in front.

    Raises:
        ValueError: when training begins: there is no loss, or one that steps automatically (auto_step=True) or learns
            separately on each rank.

    Example:
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[UnifiedLossCallback()])
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self._step = 0
        self._meters = {"": LossMeter("world"), "val_": LossMeter("world")}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the losses can be stepped from here."""
        losses = _losses_of(pl_module)
        if not losses:
            raise ValueError(
                f"UnifiedLossCallback: expected a UnifiedLoss among the modules of {type(pl_module).__name__}, got "
                "none: set it as an attribute, so that its state is in the checkpoint"
            )
        for loss_fn in losses:
            check_steps(loss_fn, trainer.world_size)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the count of optimizer steps begins, in a resumed run too."""
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Forgets the parts of earlier calls: this batch may have no loss."""
        _forget_parts(pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Forgets the parts of earlier calls, those of training too."""
        _forget_parts(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Commits what was learned, where this batch ended an optimizer step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            for loss_fn in _losses_of(pl_module):
                loss_fn.step()
        self._log(pl_module, outputs, "")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the parts of this batch."""
        self._log(pl_module, outputs, "val_")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch's metrics."""
        self._log_epoch(pl_module, "")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the validation's metrics."""
        self._log_epoch(pl_module, "val_")

    def _log(self, pl_module: LightningModule, outputs: Any, stage: str) -> None:
        parts = _parts_of(pl_module, outputs)
        if parts is None:
            return
        self._meters[stage].update(parts)
        if not stage:  # validation is logged by epoch; integers would be cast, with a warning
            shown = {f"{self.prefix}{name}": part.detach() for name, part in parts.items() if part.is_floating_point()}
            pl_module.log_dict(shown, on_step=True, on_epoch=False)

    def _log_epoch(self, pl_module: LightningModule, stage: str) -> None:
        values = self._meters[stage].compute()
        self._meters[stage].reset()
        shown = {f"{stage}{self.prefix}{name}_epoch": value for name, value in values.items() if name in METRICS}
        if shown:
            pl_module.log_dict(shown, on_step=False, on_epoch=True)


def _losses_of(pl_module: LightningModule) -> list[UnifiedLoss]:
    return [module for module in pl_module.modules() if isinstance(module, UnifiedLoss)]


def _parts_of(pl_module: LightningModule, outputs: Any) -> Mapping[str, Tensor] | None:
    """The parts of the last call: from what the step returned, or of the model with the loss in its forward."""
    if isinstance(outputs, Mapping) and "loss_parts" in outputs:
        return outputs["loss_parts"]
    return next((model.loss_parts for model in _models_with_parts(pl_module)), None)


def _forget_parts(pl_module: LightningModule) -> None:
    for model in _models_with_parts(pl_module):
        model.loss_parts = None


def _models_with_parts(pl_module: LightningModule) -> list[Any]:
    return [module for module in pl_module.modules() if isinstance(getattr(module, "loss_parts", None), dict)]
