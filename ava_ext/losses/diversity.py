"""Diversity of experts: how alike their outputs are, in O(n_experts) instead of O(n_experts^2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ava_ext.call import Call
from ava_ext.config import UnifiedLossConfig, check_weights
from ava_ext.losses.component import Addends, Part
from ava_ext.ops.arguments import as_mask, check_are_tensors, check_is_tensor, check_real
from ava_ext.ops.row_fields import accumulation_dtype

SIMILARITIES = ("cosine", "dot", "l2")


class DiversityLoss(Part):
    """Mean pairwise similarity of the experts' outputs, per token, then averaged over tokens.

    Let u_e be the output of expert e for a token. The sum over pairs follows from two sums over experts:

        sum_{e != f} u_e . u_f = |sum_e u_e|^2 - sum_e |u_e|^2,     divided by n_experts (n_experts - 1)

    similarity="cosine" normalises u_e to length 1, so the loss is in [-1 / (n_experts - 1), 1]. A zero vector stays
    zero: its similarity with all others is 0, its gradient too. "dot" takes the outputs as they are. "l2" is minus the
    mean squared distance, -2 (n_experts sum |u_e|^2 - |sum u_e|^2) / (n_experts (n_experts - 1)). "dot" and "l2" have
    no lower bound; use them as a metric, or if something else controls the length of the outputs.

    Args:
        weight: factor of the loss.
        similarity: "cosine", "dot" or "l2".

    Example:
        >>> loss_fn = DiversityLoss(weight=0.01)
        >>> loss_fn([torch.ones(5, 16), torch.ones(5, 16)])  # identical experts
        tensor(0.0100)
    """

    name = "diversity"
    keys = ("diversity_loss",)

    def __init__(self, weight: float = 1.0, similarity: str = "cosine") -> None:
        super().__init__()
        if similarity not in SIMILARITIES:
            raise ValueError(f"diversity_loss: expected similarity to be one of {SIMILARITIES}, got {similarity!r}")
        check_weights("diversity_loss", weight=weight)
        self.weight = weight
        self.similarity = similarity

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> DiversityLoss | None:
        """The loss where use_diversity_loss is set."""
        return cls(config.diversity_weight) if config.use_diversity_loss else None

    def of_call(self, call: Call) -> Addends:
        """The similarity of the experts' outputs, without padding."""
        outputs = _stack_experts(call.required("expert_outputs", "use_diversity_loss"))
        loss = self(outputs, call.padding_free(outputs.shape[1]))
        return Addends({"diversity_loss": call.rows.batch_share * loss})

    def forward(
        self,
        expert_outputs: Tensor | Sequence[Tensor],  # [n_experts, ..., hidden_size], or a list of [..., hidden_size]
        row_mask: Tensor | None = None,  # [...] bool
        return_detailed: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted loss.

        Args:
            expert_outputs: every expert's output for the same tokens, at least two dimensions each.
            row_mask: True where a token counts, one element per token; None: all.
            return_detailed: return {"total_loss", "diversity_loss"}, the second detached.

        Returns:
            Scalar, float32 (float64 for float64 outputs), or the dict; 0 with zero gradient if there are fewer than two
            experts or no token counts.

        Raises:
            ValueError: there is no expert, experts differ in shape, or the mask has another size.
        """
        outputs = _stack_experts(expert_outputs)
        check_are_tensors("diversity_loss", row_mask=row_mask)
        n_experts, n_rows, _ = outputs.shape
        if row_mask is not None and row_mask.numel() != n_rows:
            raise ValueError(f"diversity_loss: expected row_mask of {n_rows} rows, got shape {list(row_mask.shape)}")
        if n_experts < 2 or n_rows == 0:
            loss = outputs[..., :0].sum()  # 0, still connected to the graph
        else:
            mask = None if row_mask is None else as_mask("diversity_loss", row_mask.reshape(n_rows))
            loss = self.weight * self._mean_similarity(outputs, mask)
        if not return_detailed:
            return loss
        return {"total_loss": loss, "diversity_loss": loss.detach().clone()}

    def _mean_similarity(self, outputs: Tensor, mask: Tensor | None) -> Tensor:
        n_experts = outputs.shape[0]
        if mask is not None:
            outputs = torch.where(mask.unsqueeze(-1), outputs, 0.0)
        if self.similarity == "cosine":
            length = torch.linalg.vector_norm(outputs, dim=-1, keepdim=True)
            is_zero = length == 0
            direction = outputs * torch.where(is_zero, 0.0, 1 / length.masked_fill(is_zero, 1.0))
            squares = (~is_zero).to(outputs.dtype).sum(dim=(0, 2))  # |u|^2 is 1 or 0, whatever u
            sum_squared = direction.sum(dim=0).square().sum(dim=-1)
        else:
            squares = outputs.square().sum(dim=(0, 2))
            sum_squared = outputs.sum(dim=0).square().sum(dim=-1)
        n_pairs = n_experts * (n_experts - 1)
        if self.similarity == "l2":
            per_row = -2 * (n_experts * squares - sum_squared) / n_pairs
        else:
            per_row = (sum_squared - squares) / n_pairs
        if mask is None:
            return per_row.mean()
        return per_row.sum() / mask.sum().clamp_min(1)  # rows that do not count are rows of zeros: similarity 0


def _stack_experts(expert_outputs: Tensor | Sequence[Tensor]) -> Tensor:  # [n_experts, n_rows, hidden_size]
    if not isinstance(expert_outputs, Tensor):
        if len(expert_outputs) == 0:
            raise ValueError("diversity_loss: expected expert_outputs of at least 1 expert, got 0")
        first = expert_outputs[0]
        for number, output in enumerate(expert_outputs):
            check_is_tensor("diversity_loss", f"expert_outputs[{number}]", output)
            if output.shape != first.shape:
                raise ValueError(
                    f"diversity_loss: expected {list(first.shape)} from every expert, "
                    f"got {list(output.shape)} from expert {number}"
                )
        expert_outputs = torch.stack(tuple(expert_outputs))
    if expert_outputs.dim() < 3:
        raise ValueError(
            f"diversity_loss: expected expert_outputs [n_experts, n_rows, hidden_size], "
            f"got {list(expert_outputs.shape)}"
        )
    check_real("diversity_loss", "expert_outputs", expert_outputs)
    outputs = expert_outputs.reshape(expert_outputs.shape[0], -1, expert_outputs.shape[-1])
    return outputs.to(accumulation_dtype(outputs.dtype))
