"""Perplexity as a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ava_ext.config import UnifiedLossConfig
from ava_ext.ops.arguments import (
    check_are_tensors,
    check_has_columns,
    check_integers,
    check_is_tensor,
    check_real,
    check_shape,
)
from ava_ext.ops.counted_rows import kept_by
from ava_ext.ops.dtensor_logits import Place
from ava_ext.ops.dtensors import is_dtensor
from ava_ext.ops.row_fields import accumulation_dtype, row_options
from ava_ext.ops.softmax_rows import row_loss


class PerplexityLoss(nn.Module):
    """exp of the mean cross-entropy over the rows that count. Mostly useful as a metric.

    Its gradient is that of the cross-entropy times the perplexity. At the start of training, perplexity is as large as
    the vocabulary, and a learning rate for cross-entropy is then far too large.

    Args:
        ignore_index: target of a row that does not count.

    Example:
        >>> PerplexityLoss()(torch.zeros(6, 10), torch.arange(6))  # uniform over 10 tokens
        tensor(10.0000)
    """

    def __init__(self, ignore_index: int = UnifiedLossConfig.ignore_index) -> None:
        super().__init__()
        UnifiedLossConfig.checked("perplexity_loss", ignore_index=ignore_index)
        self.ignore_index = ignore_index

    def forward(
        self,
        logits: Tensor,  # [..., vocab_size]
        targets: Tensor,  # [...]
        attention_mask: Tensor | None = None,  # [...]
        return_detailed: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The perplexity.

        Args:
            logits: predictions. Of a DTensor every rank has all rows: Replicate, or Shard(-1).
            targets: token ids.
            attention_mask: not 0 where a row counts; None: all rows whose target is not ignore_index.
            return_detailed: return {"total_loss", "cross_entropy"}, the second detached.

        Returns:
            Scalar, float32 (float64 for float64 logits), or the dict; 1 with zero gradient where no row counts.

        Raises:
            ValueError: shapes do not fit, or logits are a DTensor whose rows are spread over ranks.
        """
        check_has_columns("perplexity_loss", "logits", logits)
        if is_dtensor(logits) and any(Place.of("perplexity_loss", "logits", logits).is_of_rows):
            # each rank would have its share of the mean, and exp of that is no share of the perplexity
            raise ValueError(
                "perplexity_loss: expected logits of which every rank has all rows, got placements "
                f"{logits.placements}: redistribute them, or take exp of the sum of the ranks' cross-entropies"
            )
        check_is_tensor("perplexity_loss", "targets", targets)
        check_are_tensors("perplexity_loss", attention_mask=attention_mask)
        check_shape("perplexity_loss", logits.shape[:-1], targets=targets, attention_mask=attention_mask)
        check_real("perplexity_loss", "logits", logits)
        check_integers("perplexity_loss", "targets", targets)
        targets = targets.long()  # uint8 has no -100
        if attention_mask is not None:
            targets = torch.where(kept_by("perplexity_loss", attention_mask), targets, self.ignore_index)
        counted = (targets != self.ignore_index).to(accumulation_dtype(logits.dtype))
        mean = row_loss(
            logits,
            targets,
            row_options(logits),
            row_weights=counted / counted.sum().clamp_min(1),
            ignore_index=self.ignore_index,
            reduction="sum",
        ).loss
        perplexity = mean.exp()
        if not return_detailed:
            return perplexity
        return {"total_loss": perplexity, "cross_entropy": mean.detach()}
