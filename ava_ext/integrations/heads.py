"""The weight of a language model's head, with its gradients: a linear layer, or one under an adapter of peft."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ava_ext.ops.dtensors import is_dtensor
from ava_ext.ops.linear_logits import LinearLogits, is_linear


def weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:  # [n_columns, hidden_size], [n_columns]
    """What the head multiplies by and adds; gradients of both reach whatever they are made of.

    torch.nn.Linear gives its own. LoRA and DoRA (peft) give the merged weight, W + s B A, rows of the length that DoRA
    learns: one [n_columns, hidden_size] more per call. A ModulesToSaveWrapper gives its active copy. What DeepSpeed
    ZeRO 3 has partitioned is gathered; a shard of FSDP2 is given as it is, and the loss gathers it.

    Raises:
        TypeError: a head that does something else, or whose weight is not here; what to do instead.
    """
    hook = getattr(head, "_hf_hook", None)
    if hook is not None and getattr(hook, "offload", True):
        raise _refused(head, "weights that accelerate moves to the device for each call", "keep the head on its device")
    peft = sys.modules.get("peft")
    if peft is not None:
        if isinstance(head, peft.utils.other.ModulesToSaveWrapper):
            is_on = not head.disable_adapters and head.active_adapters
            return weight_and_bias(head.modules_to_save[head.active_adapters[0]] if is_on else head.original_module)
        if isinstance(head, peft.tuners.lora.Linear):
            weight, bias, low_rank = _of_lora(head)
            for lora_A, lora_B in low_rank:
                weight = weight + (lora_B @ lora_A).to(weight.dtype)
            return weight, bias
    if not is_linear(head):
        raise _refused(head, "a forward of its own", "use attach_loss, which takes the logits that the model computes")
    if head.weight.is_meta:
        raise _refused(head, "a weight on the meta device", "load it first")
    return _gathered(head.weight), _gathered(head.bias)


def device_of(head: nn.Module, model: nn.Module) -> torch.device:
    """Where the head of the model gives logits; it may have no parameters of its own."""
    device = next(itertools.chain(head.parameters(), model.parameters())).device
    hook = vars(head).get("_hf_hook")
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def n_columns_of(head: nn.Module) -> int | None:
    """Its out_features, which a weight that is spread over ranks does not tell.

    Of what peft has wrapped, the original's: ensure_weight_tying makes a copy that has in_features and out_features
    swapped.
    """
    return getattr(getattr(head, "original_module", head), "out_features", None)


def logits_of_lora(
    head: nn.Module,
    hidden_states: Tensor,  # [..., hidden_size]
) -> LinearLogits | None:
    """Of a head with LoRA: the logits of [h, A h] and [W, s B]; None of any other.

    Merged in bfloat16, W + s B A would be W as long as s B A is less than half of its last digit.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(head, peft.tuners.lora.Linear):
        return None
    weight, bias, low_rank = _of_lora(head)
    if not low_rank or is_dtensor(weight):
        return None
    inputs, columns = [hidden_states], [weight]
    for lora_A, lora_B in low_rank:
        inputs.append(nn.functional.linear(hidden_states.to(lora_A.dtype), lora_A).to(hidden_states.dtype))
        columns.append(lora_B.to(weight.dtype))
    return LinearLogits(torch.cat(inputs, -1), torch.cat(columns, 1), bias)


class _Copy(torch.autograd.Function):
    """A copy, which outlives the memory of the original."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _gathered(parameter: Any) -> Any:
    """The whole of a parameter that DeepSpeed ZeRO 3 has partitioned; of another one, itself."""
    if not hasattr(parameter, "ds_id"):
        return parameter
    if parameter.shape == parameter.ds_shape:  # a module that has not given it back yet has it here
        return _Copy.apply(parameter)
    with sys.modules["deepspeed"].zero.GatheredParameters([parameter]):  # the graph's record too is of its whole shape
        return _Copy.apply(parameter)


def _of_lora(head: Any) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
    """Of a peft.tuners.lora.Linear: weight and bias, and A and s B of each LoRA that is not in the weight."""
    weight, bias = weight_and_bias(head.get_base_layer())
    low_rank: list[tuple[Tensor, Tensor]] = []
    if head.disable_adapters or head.merged:
        if head.disable_adapters and head.merged:
            raise _refused(head, "merged adapters that are disabled", "unmerge them first")
        return weight, bias, low_rank
    names = [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        dropout, scale = head.lora_dropout[name], head.scaling[name]
        if head.training and getattr(dropout, "p", 0.0) > 0:
            raise _refused(head, f"lora_dropout={dropout.p}", "use lora_dropout=0.0 for the head, or attach_loss")
        lora_A, lora_B = _gathered(head.lora_A[name].weight), scale * _gathered(head.lora_B[name].weight)
        variant = head.lora_variant.get(name)
        if variant is None:
            low_rank.append((lora_A, lora_B))
            if head.lora_B[name].bias is not None:
                shift = (scale * _gathered(head.lora_B[name].bias)).to(weight.dtype)
                bias = shift if bias is None else bias + shift
        elif getattr(variant, "__name__", type(variant).__name__) == "DoraLinearVariant" and name == names[0]:
            merged = weight.to(lora_B.dtype) + lora_B @ lora_A
            # a constant in the backward, as in section 4.3 of "DoRA: Weight-decomposed low-rank adaptation"
            length = torch.linalg.vector_norm(merged.detach(), dim=1)
            magnitude = _gathered(head.lora_magnitude_vector[name].weight)
            weight = ((magnitude / length).unsqueeze(1) * merged).to(weight.dtype)
        else:
            raise _refused(head, "an adapter that is neither LoRA nor a single DoRA", "use attach_loss")
    return weight, bias, low_rank


def _refused(head: nn.Module, what: str, instead: str) -> TypeError:
    return TypeError(
        f"fuse_lm_head: expected a head that is one linear layer, got {type(head).__name__} with {what}: {instead}"
    )
