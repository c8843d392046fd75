"""Multi-token prediction: further heads that predict the tokens after the next one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from torch.utils.checkpoint import checkpoint

from ava_ext.call import Call, HeadLoss
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import Addends, Part
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_fields import TERM_NAMES

MAIN_LOSS = TERM_NAMES.index("main_loss")


def counted_ahead(
    row_weights: Tensor,  # [batch_size, n_tokens]
    segments: Tensor | None,  # [batch_size, n_tokens]
    k: int,
) -> Tensor:
    """Weight of the row k positions ahead; 0 if that is beyond the end or in another segment.

    Returns:
        [batch_size, n_tokens]: row_weights[:, t + k] where segments agree.

    Example:
        >>> counted_ahead(torch.tensor([[0.5, 0.0, 0.25, 1.0]]), None, k=2)
        tensor([[0.2500, 1.0000, 0.0000, 0.0000]])
    """
    n_tokens = row_weights.shape[1]
    k = min(k, n_tokens)
    weights = row_weights[:, k:]
    if segments is not None:
        weights = torch.where(segments[:, k:] == segments[:, : n_tokens - k], weights, 0)
    return pad(weights, (0, k))


def shift_targets(
    targets: Tensor,  # [batch_size, n_tokens]
    segments: Tensor | None,  # [batch_size, n_tokens]
    counted: Tensor,  # [batch_size, n_tokens] bool
    k: int,
    ignore_index: int,
) -> Tensor:
    """Targets of depth k: row t predicts targets[:, t + k] if that row counts and is in the same segment.

    Args:
        targets: targets of depth 0.
        segments: contiguous documents of packed rows; None: each batch row is one segment.
        counted: True where a row counts at depth 0.
        k: depth, >= 1.
        ignore_index: target of rows that do not count at this depth.

    Returns:
        [batch_size, n_tokens], the dtype of targets.

    Example:
        >>> shift_targets(torch.tensor([[5, 6, 7, 8]]), None, torch.tensor([[True, True, False, True]]), 2, -100)
        tensor([[-100,    8, -100, -100]])
    """
    k = min(k, targets.shape[1])
    # 0 or 1 in the dtype of targets, so that the rule of segments and ends stands in one place
    is_target = counted_ahead(counted.to(targets.dtype), segments, k) != 0
    return torch.where(is_target, pad(targets[:, k:], (0, k)), ignore_index)


class MTPOutput(NamedTuple):
    """What MultiTokenPrediction returns."""

    # []  mtp_weight * mean over depths, with graph; [batch_size, n_tokens] where head_loss gives that of the rows
    loss: Tensor
    depth_losses: Tensor  # [num_future_tokens]  mean loss of each depth over its own rows, unweighted; detached


def depth_metrics(
    depth_losses: Tensor,  # [num_future_tokens]
) -> dict[str, Tensor]:
    """The metric of each depth: mtp_loss_depth_1 and so on."""
    return {f"mtp_loss_depth_{depth}": loss for depth, loss in enumerate(depth_losses.unbind(), start=1)}


class ZeroLinear(nn.Linear):
    """A linear layer that starts at 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ResidualHead(nn.Module):
    """h + SiLU(Linear(RMSNorm(h))): the block of a depth in front of the shared head.

    The block starts as the identity. It still learns from the first step, because SiLU'(0) = 1/2.

    Source: Cai et al. 2024, "Medusa", section 3.1, with a norm added in front.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.linear = ZeroLinear(hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: Tensor,  # [..., hidden_size]
    ) -> Tensor:  # [..., hidden_size]
        return hidden_states + silu(self.linear(self.norm(hidden_states)))


class MultiTokenPrediction(Part):
    """mtp_weight * mean over depths k = 1..K of sum_t w_{t+k} CE(depth k's logits at t, targets[t + k]).

    w is the weight of the row that is predicted: token weight / N, or 0 if it does not count or is in another segment.
    Each depth has its own head, Linear_k(LayerNorm(h)), behind one norm. With mtp_share_head, each depth has a residual
    block in front of the given lm_head instead: lm_head(h + SiLU(Linear_k(RMSNorm_k(h)))). head_loss gets the logits of
    a depth as LinearLogits, that is, what they are computed from.

    Args:
        vocab_size, hidden_size: of the heads.
        num_future_tokens: K.
        mtp_weight: weight of the term.
        mtp_share_head: depths use the given lm_head_weight behind a residual block.
        mtp_detach_head: the shared head gets no gradient from the depths.
        ignore_index: target of a row that does not count.

    Attributes:
        norm: LayerNorm before the heads (Identity with mtp_share_head, whose blocks have their own).
        heads: num_future_tokens x Linear(hidden_size, vocab_size), or ResidualHead with mtp_share_head.

    Example:
        >>> mtp = MultiTokenPrediction(vocab_size=32000, hidden_size=512, num_future_tokens=1)
        >>> weights = torch.full(targets.shape, 1 / targets.numel())
        >>> loss = loss + mtp(hidden_states, targets, weights, None, head_loss).loss

    Source: Gloeckle et al. 2024, "Better & faster large language models via multi-token prediction"; DeepSeek-V3.
    """

    name = "mtp"
    keys = ("mtp_loss",)
    METRICS = ("mtp_loss_depth_1",)
    needs_sequences = True

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_future_tokens: int = UnifiedLossConfig.num_future_tokens,
        *,
        mtp_weight: float = UnifiedLossConfig.mtp_weight,
        mtp_share_head: bool = UnifiedLossConfig.mtp_share_head,
        mtp_detach_head: bool = UnifiedLossConfig.mtp_detach_head,
        ignore_index: int = UnifiedLossConfig.ignore_index,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.n_depths = num_future_tokens
        self.weight = mtp_weight
        self.share_head = mtp_share_head
        self.detach_head = mtp_detach_head
        self.ignore_index = ignore_index
        if self.share_head:
            self.norm: nn.Module = nn.Identity()  # a parameter that nothing uses would stop DDP
            self.heads = nn.ModuleList(ResidualHead(self.hidden_size) for _ in range(self.n_depths))
        else:
            self.norm = nn.LayerNorm(self.hidden_size)
            self.heads = nn.ModuleList(nn.Linear(self.hidden_size, self.vocab_size) for _ in range(self.n_depths))

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> MultiTokenPrediction | None:
        """The part where the configuration asks for heads of the loss."""
        if config.mtp_heads != "own" or config.hidden_size is None:
            return None
        return cls(
            config.vocab_size,
            config.hidden_size,
            config.num_future_tokens,
            mtp_weight=config.mtp_weight,
            mtp_share_head=config.mtp_share_head,
            mtp_detach_head=config.mtp_detach_head,
            ignore_index=config.ignore_index,
        )

    def of_call(self, call: Call) -> Addends:
        """The term of the call's hidden states; zeros with mtp_active=False."""
        rows, active = call.rows, call.mtp_active
        if active is False:
            zeros = torch.zeros_like(rows.weights)
            loss = zeros if call.config.reduction == "none" else zeros.new_zeros(())
            return Addends({"mtp_loss": loss}, depth_metrics(zeros.new_zeros(self.n_depths)))
        head = (call.lm_head_weight, call.lm_head_bias) if self.share_head else (None, None)
        hidden_states = call.required("hidden_states", "use_mtp")
        loss, depth_losses = self(hidden_states, rows.targets, rows.weights, call.segments, call.head_loss, *head)
        if isinstance(active, Tensor):
            loss, depth_losses = torch.where(active, loss, 0.0), torch.where(active, depth_losses, 0.0)
        return Addends({"mtp_loss": loss}, depth_metrics(depth_losses))

    def forward(
        self,
        hidden_states: Tensor,  # [batch_size, n_tokens, hidden_size]
        targets: Tensor,  # [batch_size, n_tokens]
        row_weights: Tensor,  # [batch_size, n_tokens]
        segments: Tensor | None,  # [batch_size, n_tokens]
        head_loss: HeadLoss,
        lm_head_weight: Tensor | None = None,  # [n_columns, hidden_size]
        lm_head_bias: Tensor | None = None,  # [n_columns]
    ) -> MTPOutput:
        """The weighted term and the loss of each depth.

        Args:
            hidden_states: the model's last hidden states, from which the logits are computed.
            targets: the target of each row at depth 0 (the next token).
            row_weights: token weight / N of each row at depth 0, and 0 where it does not count. No gradient.
            segments: contiguous documents of packed rows; None: each batch row is one segment.
            head_loss: the main term's cross-entropy, (logits, targets, row_weights) -> RowLoss: the sum, or each row.
            lm_head_weight: the shared head; unused without mtp_share_head.
            lm_head_bias: its bias, or None.

        Returns:
            MTPOutput.

        Raises:
            ValueError: shapes do not fit, or mtp_share_head has no lm_head_weight.
        """
        self._check(hidden_states, targets, row_weights, segments, lm_head_weight)
        weights = row_weights.detach()
        depths = range(1, self.n_depths + 1)
        depth_targets = [shift_targets(targets, segments, weights != 0, k, self.ignore_index) for k in depths]
        depth_weights = [counted_ahead(weights, segments, k) * (self.weight / self.n_depths) for k in depths]
        normed = self.norm(hidden_states.to(next(self.heads.parameters()).dtype))
        if lm_head_weight is not None and self.share_head:
            if self.detach_head:
                lm_head_weight = lm_head_weight.detach()
                lm_head_bias = None if lm_head_bias is None else lm_head_bias.detach()
            states = [checkpoint(head, normed, use_reentrant=False, preserve_rng_state=False) for head in self.heads]
            # one weight, so one pass over all depths: one gradient of it, not one per depth
            logits = LinearLogits(torch.stack(states).to(lm_head_weight.dtype), lm_head_weight, lm_head_bias)
            output = head_loss(logits, torch.stack(depth_targets), torch.stack(depth_weights))
            loss, main_loss = output.loss, output.terms[MAIN_LOSS]
            loss = loss.sum(0) if loss.dim() else loss
        else:
            parameters: Any = self.heads
            logits_of_depths = [LinearLogits(normed, head.weight, head.bias) for head in parameters]
            outputs = list(map(head_loss, logits_of_depths, depth_targets, depth_weights))
            loss = torch.stack([output.loss for output in outputs]).sum(0)
            main_loss = torch.stack([output.terms[MAIN_LOSS] for output in outputs])
        n_counted = (torch.stack(depth_targets) != self.ignore_index).sum((1, 2)).clamp_min(1)
        return MTPOutput(loss, main_loss.sum((1, 2)) / n_counted)

    def _check(
        self,
        hidden_states: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        segments: Tensor | None,
        lm_head_weight: Tensor | None,
    ) -> None:
        if targets.dim() != 2:
            raise ValueError(
                f"multi_token_prediction: expected targets [batch_size, n_tokens], got {list(targets.shape)}"
            )
        shape = list(targets.shape)
        expected = [*shape, self.hidden_size]
        if list(hidden_states.shape) != expected:
            raise ValueError(
                f"multi_token_prediction: expected hidden_states of shape {expected}, got {list(hidden_states.shape)}"
            )
        for name, value in (("row_weights", row_weights), ("segments", segments)):
            if value is not None and list(value.shape) != shape:
                raise ValueError(f"multi_token_prediction: expected {name} of shape {shape}, got {list(value.shape)}")
        if not self.share_head:
            return
        if lm_head_weight is None:
            raise ValueError("multi_token_prediction: mtp_share_head=True needs lm_head_weight, got None")
        if (
            lm_head_weight.dim() != 2
            or lm_head_weight.shape[0] < self.vocab_size
            or lm_head_weight.shape[1] != self.hidden_size
        ):
            raise ValueError(
                f"multi_token_prediction: expected lm_head_weight of shape [{self.vocab_size}, {self.hidden_size}], "
                f"got {list(lm_head_weight.shape)}"
            )
