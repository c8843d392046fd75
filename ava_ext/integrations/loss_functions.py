"""UnifiedLoss in the forms in which transformers calls a loss: of a model, and of Trainer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ava_ext.config import UnifiedLossConfig
from ava_ext.model_config import logit_options
from ava_ext.unified_loss import UnifiedLoss


def causal_lm_loss(loss_fn: UnifiedLoss) -> Callable[..., Tensor]:
    """For model.loss_function: the loss of logits and of labels that are not shifted, or of shift_labels.

    The model passes neither attention_mask nor router logits: mark padding with labels of -100. What the model itself
    adds to its loss stays. `attach_loss` reads all of these. Do not use this for a masked language model, or any other
    with model.loss_type "ForMaskedLM" (T5Gemma, Dia): its labels belong to the rows themselves, but the model does not
    say so, and they would be shifted. Use `attach_loss` with shift_labels, or `trainer_loss`. Models that compute a
    cross-entropy of their own (T5, BART, BERT) never call this function; `attach_loss` raises there.

    Raises:
        ValueError: a loss with logit_softcap: a model caps its logits before it calls its loss function.

    Example:
        >>> model.loss_function = causal_lm_loss(UnifiedLoss.from_model(model, fused=False))
    """
    check_is_loss("causal_lm_loss", loss_fn)
    refuse_logit_options(loss_fn.config, "causal_lm_loss")
    return functools.partial(loss_of_logits, loss_fn)  # goes with the model through copy and pickle


def loss_of_logits(
    loss_fn: UnifiedLoss,
    logits: Tensor,  # [batch_size, n_tokens, n_columns]
    labels: Tensor | None = None,  # [batch_size, n_tokens]
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int | None = None,
    shift_labels: Tensor | None = None,  # [batch_size, n_tokens]
    **options: Any,
) -> Tensor:  # []
    """As `causal_lm_loss` describes it."""
    refuse_logit_options(loss_fn.config, "causal_lm_loss")
    check_ignore_index("causal_lm_loss", loss_fn.config, ignore_index)
    is_shifted = shift_labels is not None
    targets = shift_labels if is_shifted else labels
    if isinstance(targets, Tensor):
        targets = targets.to(logits.device)  # a model that is spread over devices ends on another than it begins
    # a copy: models add to it in place
    return loss_fn(logits, targets, num_items_in_batch=num_items_in_batch, labels_are_shifted=is_shifted).clone()


def trainer_loss(loss_fn: UnifiedLoss) -> Callable[..., Tensor]:
    """For Trainer(compute_loss_func=...): the loss of a model's outputs and of its labels.

    The labels of a causal model are shifted here, also those of BartForCausalLM, XLNet and the like, whose own loss
    does not shift them. Those of an encoder-decoder or a masked language model belong to the rows themselves; the
    class of the outputs tells. Trainer passes neither attention_mask nor position_ids, so mark padding with labels of
    -100. It does not pass the labels to the model either, which then cannot add its own auxiliary loss.
    UnifiedLossTrainerMixin has none of these limits.

    Raises:
        ValueError: the loss has logit_softcap, which the model has applied already; terms of a router, which need
            attention_mask; or class_weights or pad_token_id. When called: the outputs have an auxiliary loss, which
            would be left out.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, compute_loss_func=trainer_loss(loss_fn))
    """
    check_is_loss("trainer_loss", loss_fn)
    config = loss_fn.config
    refuse_logit_options(config, "trainer_loss")
    for option in ("use_auxiliary_loss", "use_moe_balancing"):
        if getattr(config, option):
            raise ValueError(
                f"trainer_loss: {option}=True needs the attention_mask, which Trainer does not give to a loss function"
                ": use UnifiedLossTrainerMixin"
            )
    for option, value, what in (
        ("class_weights", config.class_weights, "by the number of labels, not by the sum of their weights"),
        ("pad_token_id", config.padding_id, "by the number of labels, those of padding included"),
    ):
        if value is not None:
            raise ValueError(
                f"trainer_loss: expected a loss without {option}: Trainer divides {what}: use UnifiedLossTrainerMixin"
            )

    def loss(
        outputs: Any,  # of the model: .logits [batch_size, n_tokens, n_columns]
        labels: Tensor,  # [batch_size, n_tokens]
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:  # []
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError(
                "trainer_loss: the model computes an auxiliary loss, which Trainer would leave out: use "
                "UnifiedLossTrainerMixin, which adds it, or set model.config.output_router_logits=False "
                "(router_aux_loss_coef=0.0 of SFTConfig)"
            )
        within = getattr(outputs, "language_model_outputs", None)  # BLIP-2, around a model of either kind
        kind = type(within or outputs).__name__
        is_aligned = any(name in kind for name in ("Seq2SeqLM", "Seq2SeqMoE", "MaskedLM"))
        # a copy: Trainer multiplies it in place
        return loss_fn(outputs, labels, num_items_in_batch=num_items_in_batch, labels_are_shifted=is_aligned).clone()

    return loss


def check_is_loss(owner: str, loss_fn: Any) -> None:
    """Raises TypeError unless it is a UnifiedLoss, or wraps one and has its config, as a compiled loss does."""
    if not isinstance(getattr(loss_fn, "config", None), UnifiedLossConfig):
        kind = type(loss_fn)
        raise TypeError(f"{owner}: expected a UnifiedLoss as loss_fn, got {kind.__module__}.{kind.__qualname__}")


def check_steps(loss_fn: UnifiedLoss, n_ranks: int = 1) -> None:
    """Raises ValueError for a loss that also steps by itself, or that would learn separately on each rank."""
    config = loss_fn.config
    if loss_fn._learns and config.auto_step:
        raise ValueError(
            "UnifiedLossCallback: expected a loss with auto_step=False: with auto_step=True it steps for every "
            "micro-batch, and the callback once more for every optimizer step"
        )
    if loss_fn._learns and n_ranks > 1 and config.process_group is None:
        raise ValueError(
            "UnifiedLossCallback: expected a loss with process_group='world', got None: its state would differ between "
            f"the {n_ranks} ranks"
        )


def check_ignore_index(owner: str, config: UnifiedLossConfig, ignore_index: int | None) -> None:
    """Raises ValueError where a model gives its loss function another one than that of the loss."""
    if ignore_index not in (None, config.ignore_index):
        raise ValueError(f"{owner}: expected ignore_index={config.ignore_index} as the loss, got {ignore_index}")


def refuse_logit_options(config: UnifiedLossConfig, owner: str) -> None:
    """Raises ValueError where the loss would do to a model's logits what the model has done to them already."""
    for option, without in (("logit_softcap", None), ("logit_scale", 1.0)):
        value = getattr(config, option)
        if value != without:
            raise ValueError(
                f"{owner}: expected a loss without {option}, got {value}: the logits of a model are capped and scaled "
                "already. UnifiedLoss.from_model(model, fused=False) leaves both out; fuse_lm_head wants them"
            )


def refuse_shared_head(config: UnifiedLossConfig, model: nn.Module) -> None:
    """Raises ValueError where a loss of logits also computes some with the head of a model that caps or scales them."""
    does = logit_options(model)
    if does and (config.mtp_share_head or config.mtp_heads == "hidden_states"):
        raise ValueError(
            f"attach_loss: {type(model).__name__} applies {does} to its logits; expected a loss that does not share "
            f"its head with depths of multi-token prediction, got mtp_share_head={config.mtp_share_head}, "
            f"mtp_type={config.mtp_type!r}: use fuse_lm_head, which applies it to them too"
        )


def check_same_logits(name: str, config: UnifiedLossConfig, softcap: float | None, scale: float) -> None:
    """Raises ValueError where the loss would not do to the logits what the model does."""
    for option, of_loss, of_model in (
        ("logit_softcap", config.logit_softcap, softcap),
        ("logit_scale", config.logit_scale, scale),
    ):
        if of_loss != of_model and not (of_loss and of_model and math.isclose(of_loss, of_model, rel_tol=1e-9)):
            raise ValueError(
                f"fuse_lm_head: {name} applies {option}={of_model} to its logits; expected a loss that does the same, "
                f"got {option}={of_loss}: UnifiedLoss.from_model(model, {option}={of_model}) makes it, attach_loss "
                "leaves it to the model"
            )
