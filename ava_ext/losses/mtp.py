"""Multi-token prediction: further heads that predict the tokens after the next one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from ava_ext.call import Call, HeadLoss, Logits
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import Addends, Part
from ava_ext.losses.depths import (
    DEPTH_METRICS,
    DepthMeans,
    active_rows,
    depth_means,
    depth_metrics,
    depth_rows,
    losses_of_heads,
    switched_off,
)
from ava_ext.ops.arguments import check_is_tensor, check_real, check_shape
from ava_ext.ops.derivatives import without_activations
from ava_ext.ops.linear_logits import LinearLogits, is_weight_itself


class MTPOutput(NamedTuple):
    """What MultiTokenPrediction returns."""

    # []  mtp_weight * mean over depths, with graph; [batch_size, n_tokens] where head_loss gives that of the rows
    loss: Tensor
    depths: DepthMeans  # of [num_future_tokens]: loss, accuracy and acceptance of each depth; detached


class ZeroLinear(nn.Linear):
    """A linear layer that starts at 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def _residual(
    hidden_states: Tensor,  # [..., hidden_size]
    norm_weight: Tensor,  # [hidden_size]
    weight: Tensor,  # [hidden_size, hidden_size]
    bias: Tensor,  # [hidden_size]
) -> Tensor:  # [..., hidden_size]
    return hidden_states + silu(linear(rms_norm(hidden_states, norm_weight.shape, norm_weight), weight, bias))


class ResidualHead(nn.Module):
    """h + SiLU(Linear(RMSNorm(h))): the block of a depth in front of the shared head; backward computes it again.

    Layers that have been replaced, or have hooks, are called, and what they need is kept.

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
        layers = (self.norm, self.linear)
        is_plain = tuple(map(type, layers)) == (nn.RMSNorm, ZeroLinear)
        if not is_plain or any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers):
            return hidden_states + silu(self.linear(self.norm(hidden_states)))  # an adapter, or what gathers weights
        # the parameters of now: a backward after torch.func.functional_call finds others in the modules
        parameters = (self.norm.weight, self.linear.weight, self.linear.bias)
        return without_activations(_residual, hidden_states, *parameters)


class MultiTokenPrediction(Part):
    """mtp_weight * mean over depths k = 1..K of c_k sum_t w_{t+k} CE(depth k's logits at t, targets[t + k]).

    w is the weight of the row that is predicted: token weight / N, or 0 if it does not count or is in another segment.
    c_k is the depth's weight (1).

    Each depth has its own head, Linear_k(LayerNorm(h)), behind one norm. With mtp_share_head, each depth has a residual
    block in front of the given lm_head instead: lm_head(h + SiLU(Linear_k(RMSNorm_k(h)))). head_loss gets the logits of
    a depth as LinearLogits, that is, what they are computed from. All heads read one hidden state, that of the main
    head; for modules of the model that hand a state of their own from depth to depth, as in DeepSeek-V3, see
    losses.mtp_hidden_states.

    Args:
        config: its options of multi-token prediction, vocab_size, hidden_size (of the heads) and ignore_index.

    Attributes:
        norm: LayerNorm before the heads (Identity with mtp_share_head, whose blocks have their own).
        heads: num_future_tokens x Linear(hidden_size, vocab_size), or ResidualHead with mtp_share_head.

    Example:
        >>> mtp = MultiTokenPrediction(UnifiedLossConfig(vocab_size=32000, hidden_size=512, num_future_tokens=1))
        >>> weights = torch.full(targets.shape, 1 / targets.numel())
        >>> loss = loss + mtp(hidden_states, targets, weights, None, head_loss).loss

    Source: Gloeckle et al. 2024, "Better & faster large language models via multi-token prediction"; DeepSeek-V3.
    """

    name = "mtp"
    keys = ("mtp_loss",)
    METRICS = tuple(f"{name}1" for name in DEPTH_METRICS)
    needs_sequences = True

    def __init__(self, config: UnifiedLossConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size, n_depths = config.hidden_size, config.num_future_tokens
        assert hidden_size is not None  # use_mtp needs it
        self.hidden_size = hidden_size
        if config.mtp_share_head:
            self.norm: nn.Module = nn.Identity()  # a parameter that nothing uses would stop DDP
            self.heads = nn.ModuleList(ResidualHead(hidden_size) for _ in range(n_depths))
        else:
            self.norm = nn.LayerNorm(hidden_size)
            self.heads = nn.ModuleList(nn.Linear(hidden_size, config.vocab_size) for _ in range(n_depths))

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> MultiTokenPrediction | None:
        """The part where the configuration asks for heads of the loss."""
        return cls(config) if config.mtp_heads == "own" else None

    def of_call(self, call: Call) -> Addends:
        """The term of the call's hidden states; with mtp_active=False zeros, in the graph of what it would read."""
        config, rows, active = self.config, call.rows, call.mtp_active
        head = (call.lm_head_weight, call.lm_head_bias) if config.mtp_share_head else (None, None)
        if active is False:
            parts = (*self.parameters(), call.hidden_states, *(() if config.mtp_detach_head else head))
            return switched_off(call, parts)
        hidden_states = call.required("hidden_states", "use_mtp")
        of_rows = (*active_rows(rows.targets, rows.weights, active, config.ignore_index), call.segments)
        of_call = (call.head_loss, *head, call.mtp_depth_weights, call.own_rows())
        loss, means = self(hidden_states, *of_rows, *of_call)
        return Addends({"mtp_loss": loss}, depth_metrics(means))

    def forward(
        self,
        hidden_states: Tensor,  # [batch_size, n_tokens, hidden_size]
        targets: Tensor,  # [batch_size, n_tokens]
        row_weights: Tensor,  # [batch_size, n_tokens]
        segments: Tensor | None,  # [batch_size, n_tokens]
        head_loss: HeadLoss,
        lm_head_weight: Tensor | None = None,  # [n_columns, hidden_size]
        lm_head_bias: Tensor | None = None,  # [n_columns]
        depth_weights: Tensor | None = None,  # [num_future_tokens]
        own_rows: Tensor | None = None,  # [batch_size, n_tokens] bool
    ) -> MTPOutput:
        """The weighted term and the loss of each depth.

        Args:
            hidden_states: the model's last hidden states, from which the logits are computed.
            targets: the target of each row at depth 0 (the next token); ignore_index where the row does not count.
            row_weights: token weight / N of each row at depth 0, and 0 where it does not count. No gradient.
            segments: contiguous documents of packed rows; None: each batch row is one segment.
            head_loss: the main term's cross-entropy, (logits, targets, row_weights) -> RowLoss: the sum, or each row.
            lm_head_weight: the shared head; unused without mtp_share_head.
            lm_head_bias: its bias, or None.
            depth_weights: c_k. No gradient; a schedule may change the values.
            own_rows: the rows whose terms head_loss gives, where others are on other ranks; None: all.

        Returns:
            MTPOutput.

        Raises:
            ValueError: shapes do not fit, or mtp_share_head has no lm_head_weight.
        """
        config, ignore_index = self.config, self.config.ignore_index
        self._check(hidden_states, targets, row_weights, segments, lm_head_weight)
        rows = depth_rows(config, targets, row_weights.detach(), segments, depth_weights)
        # what a row that predicts nothing holds may be nan: 0 times nan would reach the gradients of norms and blocks
        predicts = (rows.targets != ignore_index).any(0).unsqueeze(-1)
        hidden_states = torch.where(predicts, hidden_states, 0.0)
        # FSDP may leave it no parameters()
        first: Any = self.heads[0].linear if config.mtp_share_head else self.heads[0]
        if not hasattr(first, "weight"):  # an adapter may have another name for it
            first = self.norm
        normed = self.norm(hidden_states.to(first.weight.dtype))
        heads: LinearLogits | list[Logits]
        if lm_head_weight is not None and config.mtp_share_head:
            if config.mtp_detach_head:
                lm_head_weight = lm_head_weight.detach()
                lm_head_bias = None if lm_head_bias is None else lm_head_bias.detach()
            states = [head(normed) for head in self.heads]
            heads = LinearLogits(torch.stack(states).to(lm_head_weight.dtype), lm_head_weight, lm_head_bias)
        else:
            # called only where they are more than a weight (an adapter), or a hook makes that before each call (prune)
            heads = [
                LinearLogits(normed, head.weight, head.bias) if is_weight_itself(head) else head(normed)
                for head in self.heads
            ]
        loss, terms = losses_of_heads(heads, rows, head_loss)
        return MTPOutput(loss, depth_means(terms, rows.targets, ignore_index, own_rows))

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
        vocab_size, hidden_size = self.config.vocab_size, self.hidden_size
        check_shape("multi_token_prediction", (*targets.shape, hidden_size), hidden_states=hidden_states)
        check_real("multi_token_prediction", "hidden_states", hidden_states)
        check_shape("multi_token_prediction", targets.shape, row_weights=row_weights, segments=segments)
        if not self.config.mtp_share_head:
            return
        if lm_head_weight is None:
            raise ValueError("multi_token_prediction: mtp_share_head=True needs lm_head_weight, got None")
        check_is_tensor("multi_token_prediction", "lm_head_weight", lm_head_weight)
        shape = list(lm_head_weight.shape)
        if len(shape) != 2 or shape[0] < vocab_size or shape[1] != hidden_size:
            raise ValueError(
                f"multi_token_prediction: expected lm_head_weight of shape [{vocab_size}, {hidden_size}], got {shape}"
            )
