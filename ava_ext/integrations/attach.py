"""Putting UnifiedLoss into a causal language model of transformers, and taking it out again."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from ava_ext.integrations.heads import device_of, n_columns_of, weight_and_bias
from ava_ext.integrations.loss_functions import check_is_loss, refuse_logit_options, refuse_shared_head
from ava_ext.integrations.loss_in_forward import LossInForward, RecordsInput, class_with
from ava_ext.ops.linear_logits import has_accelerate_hooks
from ava_ext.unified_loss import UnifiedLoss

_BESIDE_LOSS = (  # attributes of a model with a loss in it
    "trained_when_put", "_keys_before_loss", "has_computed_loss", "loss_parts", "report_parts",
)  # fmt: skip


def attach_loss(model: nn.Module, loss_fn: UnifiedLoss) -> nn.Module:
    """Lets model(..., labels=labels) compute loss_fn from the model's logits; returns the model.

    Like `fuse_lm_head`, but from the logits that the model computes: for heads that fuse_lm_head refuses.

    Raises:
        ValueError: the loss caps or scales logits that the model has capped or scaled already, or shares the head of
            such a model with depths of multi-token prediction; the model already has a loss in it, or its forward was
            replaced on the instance.
    """
    return _put_into(model, loss_fn, is_fused=False)


def fuse_lm_head(model: nn.Module, loss_fn: UnifiedLoss) -> nn.Module:
    """Lets model(..., labels=labels) compute loss_fn from hidden states; returns the model.

    In training, the logits never exist as a whole, and the output has none. In evaluation (model.eval()) it has them,
    unless you pass skip_logits=True. Without labels the output is as before.

    The loss becomes a module of the model, `model.unified_loss`: its parameters are trained, moved and reduced over
    ranks together with the model's. save_pretrained leaves it out; UnifiedLossCallback saves it.

    A weight that FSDP2 or DeepSpeed ZeRO 3 has spread over ranks is gathered for each call, and its gradient is reduced
    like that of any other weight. Put the loss into the model before they wrap the model.

    In addition to its own arguments, the model's forward then takes: num_items_in_batch (N, see UnifiedLoss),
    shift_labels (labels that are shifted already), skip_logits, and loss_inputs (a dict of further arguments of the
    loss, such as token_weights). attention_mask and position_ids reach the loss if they are [batch_size, n_tokens];
    without position_ids, seq_idx or cu_seq_lens_q says where packed texts begin. A loss that needs router logits gets
    them too. If the model adds a loss of its own (the load balancing of a mixture of experts), this is kept; with
    num_items_in_batch it is multiplied by this call's share of the items.

    Args:
        model: a causal language model of transformers, or a PeftModel around one (adapters first, then the loss).
        loss_fn: made by `UnifiedLoss.from_model(model)`, or one with the soft cap and the scale of the model; otherwise
            the first call with labels raises ValueError.

    Raises:
        TypeError: the head is not a single linear layer, or the model does something unknown to its logits; the message
            says what to do instead.
        ValueError: the model already has a loss in it.

    Example:
        >>> model = fuse_lm_head(LlamaForCausalLM(config), UnifiedLoss.from_model(config))
        >>> model(input_ids=input_ids, labels=input_ids).loss.backward()
    """
    return _put_into(model, loss_fn, is_fused=True)


def unfuse(model: nn.Module) -> UnifiedLoss:
    """Takes the loss out of a model that `fuse_lm_head` or `attach_loss` put it into, and returns it."""
    inner: Any = causal_lm_of(model)
    if not isinstance(inner, LossInForward):
        raise ValueError(f"unfuse: expected a model with a loss in it, got {type(inner).__name__}")
    loss_fn = inner.unified_loss
    for head in inner.modules():
        if isinstance(head, RecordsInput):
            for name in ("owner", "n_columns"):
                vars(head).pop(name, None)
            _become(head, head.class_before_loss)
    inner._keys_to_ignore_on_save = inner._keys_before_loss
    del inner.unified_loss
    for name in _BESIDE_LOSS:
        vars(inner).pop(name, None)
    _become(inner, inner.class_before_loss)
    return loss_fn


def causal_lm_of(model: Any) -> Any:
    """The model of transformers inside what wraps it: torch.compile, DistributedDataParallel, peft."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _put_into(model: nn.Module, loss_fn: UnifiedLoss, is_fused: bool) -> nn.Module:
    owner = "fuse_lm_head" if is_fused else "attach_loss"
    check_is_loss(owner, loss_fn)
    inner = causal_lm_of(model)
    name, config = type(inner).__name__, loss_fn.config
    if isinstance(inner, LossInForward):
        raise ValueError(
            f"{owner}: expected a model without a loss in it, got {name} with one: call unfuse(model) first"
        )
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "loss_function"):
        raise TypeError(f"{owner}: expected a causal language model of transformers, got {name}")
    if "forward" in vars(inner) and not has_accelerate_hooks(inner):
        raise ValueError(
            f"{owner}: expected a model with the forward of its class, got {name} with one of its own, which another "
            "library has put there: put the loss into the model before Accelerator.prepare, SFTTrainer and the like"
        )
    if config.labels_are_shifted:
        raise ValueError(
            f"{owner}: expected a loss with labels_are_shifted=False, got True: UnifiedLoss.from_model sets it"
        )
    if config.reduction == "none":
        raise ValueError(f"{owner}: expected a loss with reduction 'mean' or 'sum', got 'none'")
    head = inner.get_output_embeddings()
    if head is None:
        raise TypeError(f"{owner}: expected a model with a head, got {name}, whose get_output_embeddings() is None")
    if is_fused:
        weight_and_bias(head)
    else:
        refuse_logit_options(config, owner)
        refuse_shared_head(config, inner)
    _become(head, class_with(RecordsInput, type(head), is_fused))
    head.owner, head.n_columns = name, n_columns_of(head)
    inner.unified_loss = loss_fn.to(device_of(head, inner))
    inner.trained_when_put = {name: p.requires_grad for name, p in loss_fn.named_parameters()}
    inner._keys_before_loss = inner._keys_to_ignore_on_save
    inner._keys_to_ignore_on_save = {
        *(inner._keys_before_loss or ()),
        *(f"unified_loss.{key}" for key in loss_fn.state_dict()),
    }
    _become(inner, class_with(LossInForward, type(inner), is_fused))
    return model


def _become(module: Any, cls: Any) -> None:
    """Changes the class of an instance, and so the forward that hooks of accelerate call."""
    if has_accelerate_hooks(module):
        module._old_forward = MethodType(cls.forward, module)
    module.__class__ = cls
