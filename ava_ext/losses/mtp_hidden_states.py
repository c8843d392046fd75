"""Multi-token prediction by depth modules of the model, which give hidden states of their own, as in DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ava_ext.call import Call, Logits
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import Addends, Part
from ava_ext.losses.depths import (
    active_rows,
    additional_heads,
    depth_means,
    depth_metrics,
    depth_rows,
    losses_of_heads,
    parts_of_heads,
    switched_off,
)
from ava_ext.ops.arguments import check_is_tensor
from ava_ext.ops.linear_logits import LinearLogits


class HiddenStatesMTP(Part):
    """mtp_weight * mean over depths k = 1..K of c_k sum_t w_{t+k} CE(lm_head(h_k)_t, targets[t + k]).

    h_k are the call's mtp_hidden_states, what the depth modules of the model give; the head is that of the main logits.
    Row t of depth k has read the tokens up to k positions ahead of row t, and predicts the token after them. So the
    last k rows of a text predict nothing, and may hold anything. w is the weight of the row that is predicted: token
    weight / N, or 0 if it does not count or is in another segment. c_k is mtp_depth_weights[k], K is
    num_future_tokens.

    The depths share the head's weight, so they go as one batch of rows, and the weight gets one gradient of them.
    Depths with heads of their own come as additional_logits, logits or LinearLogits; those that share a weight go
    together.

    Source: DeepSeek-V3 technical report, section 2.2, equations 21 to 25.
    """

    name = "mtp_hidden_states"
    keys = ("mtp_loss",)
    needs_sequences = True

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> HiddenStatesMTP | None:
        """The part where the configuration asks for depth modules of the model."""
        return cls() if config.mtp_heads == "hidden_states" else None

    def of_call(self, call: Call) -> Addends:
        """The term of the depths that the call gives; zeros without any, and with mtp_active=False."""
        rows, active, ignore_index = call.rows, call.mtp_active, call.config.ignore_index
        heads = self._heads_of(call)
        if active is False or not heads:
            return switched_off(call, parts_of_heads(heads))
        of_rows = active_rows(rows.targets, rows.weights, active, ignore_index)
        of_depths = depth_rows(call.config, *of_rows, call.segments, call.mtp_depth_weights)
        loss, terms = losses_of_heads(heads, of_depths, call.head_loss)
        means = depth_means(terms, of_depths.targets, ignore_index, call.own_rows())
        return Addends({"mtp_loss": loss}, depth_metrics(means))

    def _heads_of(self, call: Call) -> LinearLogits | list[Logits]:
        if call.mtp_hidden_states is None:
            return additional_heads(call, "mtp_hidden_states or additional_logits")
        if call.additional_logits is not None:
            raise ValueError("unified_loss: expected mtp_hidden_states or additional_logits, got both")
        return self._shared_head(call, call.mtp_hidden_states)

    def _shared_head(
        self,
        call: Call,
        states: Tensor | Sequence[Tensor],  # num_future_tokens of [batch_size, n_tokens, hidden_size] or flat
    ) -> LinearLogits:
        weight, bias = call.lm_head_weight, call.lm_head_bias
        if weight is None and isinstance(call.logits, LinearLogits):
            weight, bias = call.logits.weight, call.logits.bias
        if weight is None:
            raise ValueError("unified_loss: mtp_hidden_states need lm_head_weight, got None")
        check_is_tensor("unified_loss", "lm_head_weight", weight)
        if call.config.mtp_detach_head:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        if not isinstance(states, Tensor):
            states = list(states)  # of any iterable
            for number, depth in enumerate(states):
                check_is_tensor("unified_loss", f"mtp_hidden_states[{number}]", depth)
        shapes = [list(depth.shape) for depth in states]
        expected = [*call.targets_shape, weight.shape[1]]
        n_depths = call.config.num_future_tokens
        if shapes != [expected] * n_depths:
            raise ValueError(
                f"unified_loss: expected mtp_hidden_states of num_future_tokens = {n_depths} times {expected}, "
                f"got {shapes}"
            )
        if not isinstance(states, Tensor):
            states = torch.stack(states)
        if call.is_flat:
            states = states.unsqueeze(1)
        head = LinearLogits(states, weight, bias)
        head.check("unified_loss", ("mtp_hidden_states", "lm_head_weight", "lm_head_bias"))
        return head
