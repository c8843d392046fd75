"""Consistency of two predictions of the same tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ava_ext.ops.arguments import (
    check_are_tensors,
    check_has_columns,
    check_is_tensor,
    check_positive,
    check_real,
    check_shape,
)
from ava_ext.ops.counted_rows import host_sees, kept_by
from ava_ext.ops.row_fields import accumulation_dtype

DIVERGENCES = ("kl", "js")


class ConsistencyLoss(nn.Module):
    """T^2 times the mean divergence of two softmax distributions, both at temperature T.

    p is the softmax of targets / T, q that of logits / T:

        "kl":  KL(p || q) = sum_j p_j (log p_j - log q_j)            (distillation; R-Drop uses both directions)
        "js":  1/2 KL(p || m) + 1/2 KL(q || m),  m = (p + q) / 2     (symmetrical, at most log 2)

    T^2 keeps the size of the gradient when T changes (Hinton et al. 2015, "Distilling the knowledge in a neural
    network"). A column at -inf in both has probability 0 and adds nothing to the sum.

    Args:
        divergence: "kl" or "js".
        temperature: T.
        detach_targets: give the targets no gradient, as a teacher's.

    Example:
        >>> loss_fn = ConsistencyLoss("js")
        >>> loss_fn(torch.zeros(4, 10), torch.zeros(4, 10))
        tensor(0.)
    """

    def __init__(self, divergence: str = "kl", temperature: float = 1.0, detach_targets: bool = False) -> None:
        super().__init__()
        if divergence not in DIVERGENCES:
            raise ValueError(f"consistency_loss: expected divergence to be one of {DIVERGENCES}, got {divergence!r}")
        check_positive("consistency_loss", temperature=temperature)
        self.divergence = divergence
        self.temperature = temperature
        self.detach_targets = detach_targets

    def forward(
        self,
        logits: Tensor,  # [..., vocab_size]
        targets: Tensor,  # [..., vocab_size]
        attention_mask: Tensor | None = None,  # [...]
        return_detailed: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean over rows.

        Args:
            logits: predictions.
            targets: logits of the other prediction.
            attention_mask: not 0 where a row counts; None: all.
            return_detailed: return {"total_loss", "consistency_loss"}, the second detached.

        Returns:
            Scalar, float32 (float64 for float64 logits), or the dict; 0 where no row counts.

        Raises:
            ValueError: the shapes differ.
        """
        check_has_columns("consistency_loss", "logits", logits)
        check_is_tensor("consistency_loss", "targets", targets)
        check_are_tensors("consistency_loss", attention_mask=attention_mask)
        check_shape("consistency_loss", logits.shape, targets=targets)
        check_shape("consistency_loss", logits.shape[:-1], attention_mask=attention_mask)
        if self.detach_targets:
            targets = targets.detach()
        mask = None if attention_mask is None else kept_by("consistency_loss", attention_mask)
        if mask is not None and all(map(host_sees, (mask, logits, targets))):  # rows that do not count cost nothing
            counted = mask.flatten().nonzero().squeeze(1)
            logits, targets = (_rows(values, counted) for values in (logits, targets))
            mask = None
        log_q, log_p = self._log_probability(logits, mask), self._log_probability(targets, mask)
        divergence = _kl if self.divergence == "kl" else _js
        rows = divergence(log_p, log_q, _may_be_masked(log_p, log_q))
        n_rows = max(rows.numel(), 1) if mask is None else mask.sum().clamp_min(1)
        loss = self.temperature**2 * rows.sum() / n_rows
        if not return_detailed:
            return loss
        return {"total_loss": loss, "consistency_loss": loss.detach().clone()}

    def _log_probability(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        check_real("consistency_loss", "logits", logits)
        logits = logits.to(accumulation_dtype(logits.dtype))
        if mask is not None:  # equal rows, so that rows that do not count have divergence 0
            logits = torch.where(mask.unsqueeze(-1), logits, 0.0)
        return torch.log_softmax(logits if self.temperature == 1 else logits / self.temperature, dim=-1)


def _rows(
    logits: Tensor,  # [..., vocab_size]
    counted: Tensor,  # [n_counted]: numbers of rows
) -> Tensor:  # [n_counted, vocab_size]
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if len(counted) == len(rows) else rows.index_select(0, counted)


def _may_be_masked(log_p: Tensor, log_q: Tensor) -> bool:
    """Whether a column may be at -inf. To look costs a small part of what it costs to choose between columns."""
    both = log_p.detach(), log_q.detach()
    return not (log_p.numel() and host_sees(log_p) and all(values.amin() > -torch.inf for values in both))


def _kl(log_p: Tensor, log_q: Tensor, may_be_masked: bool) -> Tensor:  # [..., vocab_size] each -> [...]
    p, difference = log_p.exp(), log_p - log_q
    if may_be_masked:
        difference = torch.where(p > 0, difference, 0.0)
    return (p * difference).sum(dim=-1)


def _js(log_p: Tensor, log_q: Tensor, may_be_masked: bool) -> Tensor:  # [..., vocab_size] each -> [...]
    first, second = log_p, log_q
    if may_be_masked:
        # the derivatives of logaddexp at -inf are nan; e^lowest is so small that it changes no mean that counts
        lowest = -0.9 * math.log(torch.finfo(log_p.dtype).max)
        first, second = (values.masked_fill(values == -torch.inf, lowest) for values in (log_p, log_q))
    log_m = torch.logaddexp(first, second) - math.log(2)
    return 0.5 * (_kl(log_p, log_m, may_be_masked) + _kl(log_q, log_m, may_be_masked))
