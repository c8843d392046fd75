"""UnifiedLoss with transformers: a model's forward or loss function, Trainer, checkpoints, routers.

    fuse_lm_head(model, loss_fn)       model(..., labels=labels) computes the loss from hidden states, without logits
    attach_loss(model, loss_fn)        the same from the logits that the model computes
    unfuse(model)                      takes the loss out again
    causal_lm_loss(loss_fn)            for model.loss_function
    trainer_loss(loss_fn)              for Trainer(compute_loss_func=...)
    UnifiedLossCallback(loss_fn)       one step() per optimizer step; its state in the checkpoint
    UnifiedLossTrainerMixin            all of it for Trainer and its subclasses, with the parts of the loss in the log
    bind_expert_bias(model, loss_fn)   expert_bias moves the routers of DeepSeek-V3, GLM-4 MoE, ...

The guide's section "Training stacks" has a table of what each stack divides the loss by, and how to undo it. Without
num_items_in_batch, each call divides by its own N: all micro-batches and ranks then have the same weight, no matter how
many tokens they hold.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ava_ext.integrations.attach import attach_loss, causal_lm_of, fuse_lm_head, unfuse
from ava_ext.integrations.expert_bias import ExpertBiasBinding, bind_expert_bias
from ava_ext.integrations.loss_functions import causal_lm_loss, check_is_loss, check_steps, trainer_loss
from ava_ext.integrations.loss_in_forward import DECIDE_ROWS, LossInForward
from ava_ext.losses import METRICS
from ava_ext.meter import LossMeter
from ava_ext.model_config import text_config
from ava_ext.unified_loss import UnifiedLoss

__all__ = [
    "ExpertBiasBinding",
    "UnifiedLossCallback",
    "UnifiedLossTrainer",
    "UnifiedLossTrainerMixin",
    "attach_loss",
    "bind_expert_bias",
    "causal_lm_loss",
    "fuse_lm_head",
    "trainer_loss",
    "unfuse",
]

FILE_NAME = "unified_loss.pt"  # in a checkpoint's folder


class UnifiedLossCallback(TrainerCallback):
    """Steps the loss once per optimizer step, and keeps its state and parameters in the checkpoints of Trainer.

    A resumed run continues exactly like an uninterrupted one, and load_best_model_at_end also loads the loss of the
    best model. A plain Trainer passes the number of labels as N: a loss that counts otherwise (class_weights,
    pad_token_id, packed texts) needs UnifiedLossTrainerMixin.

    Args:
        loss_fn: if it learns anything, with auto_step=False, and with process_group="world" on several ranks.
        resume_from: the folder that you pass to train(resume_from_checkpoint=...), if it is not in output_dir.
            UnifiedLossTrainerMixin finds it without this.

    Raises:
        ValueError: a loss that steps automatically. When training begins: a loss that learns separately on each rank,
            or whose parameters no optimizer has, or that are frozen; label_smoothing_factor; at the first step, a
            Trainer with a loss of its own around a model with this one. FileNotFoundError: a checkpoint without the
            loss.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[UnifiedLossCallback(loss_fn)])
    """

    def __init__(self, loss_fn: UnifiedLoss, resume_from: str | None = None) -> None:
        check_is_loss("UnifiedLossCallback", loss_fn)
        check_steps(loss_fn)
        self.loss_fn = loss_fn
        self.resume_from = resume_from
        self._model_with_loss: Any = None  # found when training begins

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Checks that the loss can learn, and loads what it had learned."""
        self._model_with_loss = _with_this_loss(options.get("model"), self.loss_fn)
        if self._model_with_loss is None:  # which is where its model is
            self.loss_fn.to(args.device)
        check_steps(self.loss_fn, args.world_size)
        _refuse_label_smoothing("UnifiedLossCallback", args)
        if self._model_with_loss is not None:
            _check_trained("UnifiedLossCallback", self._model_with_loss)
            self._model_with_loss.has_computed_loss = False
        optimizer = options.get("optimizer")
        if optimizer is not None:
            trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            lost = [name for name, p in self.loss_fn.named_parameters() if p.requires_grad and id(p) not in trained]
            if lost:
                raise ValueError(
                    f"UnifiedLossCallback: expected the optimizer to have the loss's parameters, got none of {lost}: "
                    "put the loss into the model with fuse_lm_head or attach_loss before Trainer is made"
                )
        if state.global_step > 0:
            self._load(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Checks that the model with the loss in it has computed it."""
        model = self._model_with_loss
        if model is not None and not model.has_computed_loss and args.n_gpu < 2:  # DataParallel computes in copies
            raise ValueError(
                "UnifiedLossCallback: expected Trainer to train with the loss in the model, got a step without it: a "
                "Trainer that computes its own loss, as SFTTrainer does, needs UnifiedLossTrainerMixin, and "
                "use_liger_kernel needs liger_kernel_config={'fused_linear_cross_entropy': False}"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Commits what the micro-batches of this step have taught."""
        self.loss_fn.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Loads the loss of the best model, where Trainer has loaded that."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            content = _content_of(os.path.join(state.best_model_checkpoint, FILE_NAME))
            self.loss_fn.load_state_dict(content["loss"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:
        """Saves the loss beside the model."""
        folder = _checkpoint_folder(args, state)
        if not args.should_save:
            return
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"UnifiedLossCallback: expected the checkpoint in {folder}, got no such folder")
        content = {"loss": self.loss_fn.state_dict(), "log_history": json.dumps(state.log_history, sort_keys=True)}
        torch.save(content, os.path.join(folder, FILE_NAME))

    def _load(self, args: TrainingArguments, state: TrainerState) -> None:
        folders = [self.resume_from, args.resume_from_checkpoint, _checkpoint_folder(args, state)]
        for folder in folders:
            path = os.path.join(folder, FILE_NAME) if isinstance(folder, str) else ""
            if os.path.isfile(path):
                content = _content_of(path)
                # another run's checkpoint of the same step may be in a folder that was not named
                if folder == self.resume_from or _begin_alike(json.loads(content["log_history"]), state.log_history):
                    self.loss_fn.load_state_dict(content["loss"])
                    return
        raise FileNotFoundError(
            f"UnifiedLossCallback: training goes on after step {state.global_step}; expected {FILE_NAME} of that "
            f"checkpoint in one of {[folder for folder in folders if isinstance(folder, str)]}, got none of this run: "
            "give resume_from=, the folder that train(resume_from_checkpoint=...) gets"
        )


def _with_this_loss(model: Any, loss_fn: UnifiedLoss) -> Any:
    """The model of transformers in it, if that computes this loss in its forward; otherwise None."""
    inner = None if model is None else causal_lm_of(model)
    return inner if isinstance(inner, LossInForward) and inner.unified_loss is loss_fn else None


def _check_trained(owner: str, model: LossInForward) -> None:
    """That what the loss learns by gradient is what it was when the loss was put into the model."""
    expected = model.trained_when_put
    found = {name: parameter.requires_grad for name, parameter in model.unified_loss.named_parameters()}
    if found.keys() != expected.keys():
        raise ValueError(
            f"{owner}: expected no adapters in the loss, got parameters "
            f"{sorted(found.keys() - expected.keys())}: give exclude_modules='.*unified_loss.*' to peft"
        )
    frozen = [name for name in expected if expected[name] and not found[name]]
    if frozen:
        raise ValueError(
            f"{owner}: expected the parameters of the loss as they were put into the model, "
            f"got {frozen} frozen: put the loss in after get_peft_model, or freeze them before"
        )


def _refuse_label_smoothing(owner: str, args: TrainingArguments) -> None:
    if args.label_smoothing_factor:
        raise ValueError(
            f"{owner}: expected label_smoothing_factor=0, got {args.label_smoothing_factor}: label_smoothing is an "
            "option of the loss"
        )


def _take_aux_loss_weight(trainer: Any, model: LossInForward) -> None:
    """Gives the model the weight of its load balancing in SFTConfig; SFTTrainer only writes it into the configuration,
    which the model has read before.
    """
    weight = getattr(trainer.args, "router_aux_loss_coef", None)
    if weight is not None and hasattr(model, "router_aux_loss_coef"):
        model.router_aux_loss_coef = weight
    elif weight and not hasattr(text_config(model), "router_aux_loss_coef"):
        raise ValueError(
            f"UnifiedLossTrainerMixin: expected router_aux_loss_coef=None, got {weight}: {type(model).__name__} has "
            "none of this name: use_auxiliary_loss and load_balancing_weight are options of the loss"
        )


class _CallbackOfTrainer(UnifiedLossCallback):
    """Of UnifiedLossTrainerMixin, whose log begins anew with each training, also of another batch size."""

    at_begin: Callable[[], None]

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        super().on_train_begin(*arguments, **options)
        self.at_begin()


def _with_prompt(model: Any, batch: Any) -> Any:
    """The arguments that peft makes of a batch where an adapter of it puts tokens of its own before each text."""
    adapter: Any = getattr(model, "active_peft_config", None)
    if not getattr(adapter, "is_prompt_learning", False):
        return batch
    batch = {name: value for name, value in batch.items() if name != "position_ids"}
    if adapter.peft_type != "PREFIX_TUNING":  # whose prefix is in the cache
        for name, value in (("labels", -100), ("attention_mask", 1)):
            if isinstance(batch.get(name), Tensor):
                batch[name] = nn.functional.pad(batch[name], (adapter.num_virtual_tokens, 0), value=value)
    return batch


def _begin_alike(*histories: list[dict[str, Any]]) -> bool:
    """Whether one is the other with further entries, of what was logged while a checkpoint was saved or loaded."""
    n_entries = min(map(len, histories))
    first, second = (json.dumps(history[:n_entries], sort_keys=True) for history in histories)  # nan is equal there
    return first == second


def _content_of(path: str) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")


class _LoggedCalls:
    """The calls whose parts are to be logged together."""

    def __init__(self) -> None:
        self.meter = LossMeter("world")
        self.n = 0  # of this rank
        self.n_is_of_all_ranks = False  # whether N of the last one was that of all ranks, which then share one loss

    def add(self, parts: dict[str, Tensor], n_is_of_all_ranks: bool) -> None:
        self.meter.update(parts)
        self.n += 1
        self.n_is_of_all_ranks = n_is_of_all_ranks

    def clear(self) -> None:
        self.meter.reset()
        self.n = 0


class UnifiedLossTrainerMixin:
    """Makes a Trainer, or a subclass of it, train with UnifiedLoss. Put it first among the bases.

    The loss is put into the model (`fuse_lm_head`, or `attach_loss` with fuse=False), unless it is there already. So
    its parameters are optimized, clipped and reduced over ranks like the model's, and attention_mask and position_ids
    reach it. What the model adds to its loss is added here too, and logged as model_aux_loss. UnifiedLossCallback steps
    and saves the loss. num_items_in_batch is the N of this loss, class weights and loss_inputs included. If a subclass
    computes a loss in its own compute_loss (SFTTrainer), that loss is replaced.

    In addition to `loss`, the log has every part of the loss per optimizer step, so that the parts add up to it, and
    the metrics (`ava_ext.METRICS`) over all rows of all ranks since the last log. evaluate() and predict() return the
    same, per batch, with their prefix.

    Args:
        loss_fn: made by UnifiedLoss.from_model(model). One that learns (by default, its temperature) needs
            auto_step=False, and process_group="world" on several ranks.
        fuse: use fuse_lm_head; False: attach_loss.
        arguments, options: those of Trainer.

    Raises:
        ValueError: for label_smoothing_factor, compute_loss_func, model_init, DataParallel, loss_type="dft" of
            SFTTrainer, and its router_aux_loss_coef if the model has no option of this name: the message says what to
            use instead. Or the loss has adapters, or parameters that were frozen after it was put into the model.

    Example:
        >>> class MyTrainer(UnifiedLossTrainerMixin, Trainer): ...
        >>> trainer = MyTrainer(model, args, train_dataset=data, loss_fn=loss_fn)
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # what Trainer has

    def __init__(
        self, model: Any = None, *arguments: Any, loss_fn: UnifiedLoss, fuse: bool = True, **options: Any
    ) -> None:
        for name in ("model_init", "compute_loss_func"):
            if options.get(name) is not None:
                raise ValueError(f"UnifiedLossTrainerMixin: expected no {name}, got one: the loss is in the model")
        if not isinstance(model, nn.Module):
            raise ValueError(f"UnifiedLossTrainerMixin: expected a model, got {type(model).__name__}")
        inner = causal_lm_of(model)
        if not isinstance(inner, LossInForward):
            (fuse_lm_head if fuse else attach_loss)(model, loss_fn)
        elif inner.unified_loss is not loss_fn:
            raise ValueError("UnifiedLossTrainerMixin: expected loss_fn to be the loss in the model, got another")
        inner.report_parts = True
        self.loss_fn = loss_fn
        self._model_with_loss = inner
        self._calls = {True: _LoggedCalls(), False: _LoggedCalls()}  # by whether the model trains
        self._logged_step = 0
        _check_trained("UnifiedLossTrainerMixin", inner)
        super().__init__(model, *arguments, **options)  # type: ignore[call-arg]
        for name, parameter in loss_fn.named_parameters():  # a peft_config of SFTTrainer freezes all but adapters
            if inner.trained_when_put.get(name):
                parameter.requires_grad_(True)
        _check_trained("UnifiedLossTrainerMixin", inner)
        _refuse_label_smoothing("UnifiedLossTrainerMixin", self.args)
        if getattr(self.args, "loss_type", None) == "dft":  # of SFTTrainer
            raise ValueError(
                "UnifiedLossTrainerMixin: expected loss_type='nll', got 'dft': token_reweighting='dft' is an option of "
                "the loss"
            )
        _take_aux_loss_weight(self, inner)
        if self.args.n_gpu > 1:
            raise ValueError("UnifiedLossTrainerMixin: expected one process per GPU (torchrun), got DataParallel")
        self._callback = _CallbackOfTrainer(loss_fn)
        self._callback.at_begin = functools.partial(self._clear_meter, is_training=True)
        self.add_callback(self._callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Trainer's, which tells the callback where the loss is."""
        self._callback.resume_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *arguments, **options)  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **options: Any,
    ) -> Any:
        """The loss that the model's forward computes; its parts are kept for the log."""
        self._model_with_loss.loss_parts = None  # a call without labels has none
        if getattr(self, "aux_loss_enabled", False):  # of SFTTrainer; models of images take it from no configuration
            inputs = {**inputs, "output_router_logits": True}
        found = Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch, **options)
        self._count_call(model, num_items_in_batch is not None and self.args.average_tokens_across_devices)
        return found

    def _count_call(self, model: nn.Module, n_is_of_all_ranks: bool) -> None:
        """Keeps the parts of the last call for the log, if it had labels."""
        parts = self._model_with_loss.loss_parts
        if parts is not None:
            self._calls[model.training].add(parts, n_is_of_all_ranks)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *arguments: Any, **options: Any
    ) -> Any:
        """Trainer's; no logits where only the loss is wanted."""
        if prediction_loss_only and self._model_with_loss.is_fused:
            inputs = {**inputs, "skip_logits": True}
        self._model_with_loss.loss_parts, n_calls = None, self._calls[model.training].n
        found = super().prediction_step(model, inputs, prediction_loss_only, *arguments, **options)  # type: ignore[misc]
        if self._calls[model.training].n == n_calls:  # Seq2SeqTrainer calls the model itself where it generates
            self._count_call(model, n_is_of_all_ranks=False)
        return found

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Trainer's; the parts of the loss are in its metrics, of evaluate() and of predict()."""
        self._clear_meter(is_training=False)
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)  # type: ignore[misc]
        values = self._read_meter(is_training=False)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        counts = [self._n_items(batch, device) for batch in batch_samples]
        found = [n_items for n_items in counts if n_items is not None]
        if not found:
            return None
        # from here as Trainer does with the number of labels
        n_items = torch.stack(found).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            n_items = self.accelerator.gather(n_items).sum()
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return n_items / parallelism.non_data_parallel_size if parallelism else n_items

    def _n_items(self, batch: Any, device: torch.device) -> Tensor | None:  # []
        """N of one micro-batch, of the arguments that the model's forward will make of it; None without labels."""
        if not hasattr(batch, "get"):
            return None
        batch = _with_prompt(self.model, batch)
        shifted = batch.get("shift_labels")
        labels = batch.get("labels") if shifted is None else shifted
        if not isinstance(labels, Tensor):
            return None
        rows = self._model_with_loss.rows_of_call(labels, shifted is not None, batch, batch.get("loss_inputs"))
        decide = {name: rows[name] for name in (*DECIDE_ROWS, "token_weights") if name in rows}
        decide |= {name: value.to(device) for name, value in decide.items() if isinstance(value, Tensor)}
        return self.loss_fn.count_items(**decide)

    def _clear_meter(self, is_training: bool) -> None:
        self._calls[is_training].clear()
        if is_training:
            self._logged_step = self.state.global_step

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Trainer's, with the parts of the loss."""
        if "loss" in logs:
            logs |= self._read_meter(is_training=True)
        super().log(logs, *arguments, **options)  # type: ignore[misc]

    def _read_meter(self, is_training: bool) -> dict[str, float]:
        """Parts per optimizer step, or per batch of an evaluation, and metrics, since the last time."""
        calls = self._calls[is_training]
        values, n_losses = calls.meter.compute(), calls.n
        if is_training:
            n_losses = self.state.global_step - self._logged_step
        self._clear_meter(is_training)
        values.pop("total_loss", None)
        # the meter adds up the ranks: their parts are shares of one loss only where they share one N
        n_losses = max(n_losses, 1) * (1 if calls.n_is_of_all_ranks else self.args.world_size)
        return {name: value if name in METRICS else value / n_losses for name, value in values.items()}


class UnifiedLossTrainer(UnifiedLossTrainerMixin, Trainer):
    """Trainer with UnifiedLoss; see `UnifiedLossTrainerMixin`."""
