"""Rows of logits under torch.func.grad, torch.func.jvp and forward-mode automatic differentiation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # the public one imports torch._dynamo at once, this one when it is called

from ava_ext import _library  # noqa: F401  the operators exist once it is imported
from ava_ext.ops.derivatives import counted_only, has_tangent, refuse_tangents
from ava_ext.ops.row_fields import accumulation_dtype

_row_loss = torch.ops.ava_ext.row_loss.default


def transformed_row_loss(
    logits: Tensor,  # [..., n_columns]
    targets: Tensor,  # [...]
    *constants: object,
) -> tuple[Tensor, Tensor]:  # [...], [N_TERMS + n_groups, ...]
    """The operator row_loss with the further arguments that it takes, differentiable as torch.func wants it."""
    refuse_tangents("row_loss", (constant for constant in constants if isinstance(constant, Tensor)))
    if logits.dtype == torch.float16:
        logits = logits.float()  # a float16 gradient rounded before the scaler's factor would be zeros
    return _TransformedRowLoss.apply(logits, targets, *constants)[:2]


class _TransformedRowLoss(torch.autograd.Function):
    """In the form that torch.func takes, which costs Python that the everyday form does without.

    The gradient is an output, so that whoever differentiates it is told that there are no second derivatives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits, targets, options, row_weights, ids, weights, groups, flags, vocab_size, ignore_index, column_weights
    ):
        inputs = (logits, targets, options, row_weights, ids, weights, groups, flags, vocab_size, ignore_index)
        with torch._C._AutoDispatchBelowAutograd():
            loss, terms, grad_logits, *_ = _row_loss(*inputs, True, False, column_weights)
        return loss, terms, grad_logits

    @staticmethod
    def setup_context(ctx, inputs, output):
        targets, ignore_index = inputs[1], inputs[9]
        _, terms, grad_logits = output
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        ignored = targets == ignore_index
        ctx.save_for_backward(grad_logits, ignored)
        ctx.save_for_forward(grad_logits, ignored)

    @staticmethod
    @_disable_dynamo  # which would fail at the wrapped tensors of a function that it left to eager mode
    def backward(ctx, grad_loss, _, grad_grad_logits):
        grad_logits, ignored = ctx.saved_tensors
        if grad_grad_logits is not None or has_tangent(grad_logits, grad_loss):
            raise RuntimeError("ava_ext: double backward is not supported")
        factors = counted_only(grad_loss, ignored).unsqueeze(-1)
        return (grad_logits * factors).to(grad_logits.dtype), *(None,) * 10

    @staticmethod
    def jvp(ctx, logits_tangent, *_):
        grad_logits, ignored = ctx.saved_tensors
        products = (grad_logits * logits_tangent).sum(-1, dtype=accumulation_dtype(grad_logits.dtype))
        # the gradient has a tangent that nobody may use: it tells backward that one is asked for
        return counted_only(products, ignored), None, torch.zeros_like(grad_logits)
