"""The last layer and the loss as one module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ava_ext.ops.arguments import check_is_tensor
from ava_ext.ops.linear_logits import is_weight_itself


class FusedHead(nn.Module):
    """lm_head and the loss in one module: hidden states in, the loss out, without logits. Without targets, the logits.

    It is one module so that wrappers see the head used: fully_shard(fused_head) gathers its weight for forward and
    backward and reduces its gradient as that of any other layer, and DistributedDataParallel sees it run. Under FSDP2's
    mixed precision, which casts tensors of floating point on their way in, pass num_items_in_batch as a number:
    float(n).

    Args:
        lm_head: torch.nn.Linear; its weight may be a DTensor, in Shard(0) for vocabulary parallelism.
        loss_fn: a UnifiedLoss.

    Example:
        >>> model.lm_head = FusedHead(model.lm_head, loss_fn)
        >>> fully_shard(model.lm_head)
        >>> loss = model.lm_head(hidden_states, targets, num_items_in_batch=n_items)
    """

    def __init__(self, lm_head: nn.Linear, loss_fn: nn.Module) -> None:
        super().__init__()
        if not is_weight_itself(lm_head):
            raise TypeError(
                f"fused_head: expected lm_head to be a torch.nn.Linear, got {type(lm_head).__name__}, which may do "
                "more than one matrix product, or whose weight a hook makes"
            )
        check_is_tensor("fused_head", "loss_fn", loss_fn, (nn.Module,), "a UnifiedLoss")
        self.lm_head = lm_head
        self.loss_fn = loss_fn

    def forward(
        self,
        hidden_states: Tensor,  # [batch_size, n_tokens, hidden_size] or [n_rows, hidden_size]
        targets: Tensor | None = None,  # [batch_size, n_tokens] or [n_rows]
        **arguments: Any,
    ) -> Any:
        """The loss of loss_fn, with its further keywords; without targets, the logits [..., n_columns]."""
        if targets is None:
            return self.lm_head(hidden_states)
        return self.loss_fn(
            targets=targets,
            hidden_states=hidden_states,
            lm_head_weight=self.lm_head.weight,
            lm_head_bias=self.lm_head.bias,
            **arguments,
        )
