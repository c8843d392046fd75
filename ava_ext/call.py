"""What one forward of UnifiedLoss was given, checked and brought into one form: rows [batch_size, n_tokens]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ava_ext.config import UnifiedLossConfig
from ava_ext.distributed.placements import CallPlacement, check_is_local, check_is_whole, whole
from ava_ext.ops.dtensor_logits import gathered_weight, is_dtensor
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_fields import RowLoss, accumulation_dtype
from ava_ext.ops.sharded_logits import ShardedLogits
from ava_ext.reduction import Rows, count_rows, keep_rows
from ava_ext.sequences import segment_numbers, shift_left

Logits = Tensor | LinearLogits
Heads = Tensor | Sequence[Logits] | None
# The loss of a head's rows: logits [..., n_columns], targets [...], row_weights [...] -> RowLoss, whose loss is the
# weighted sum [], or with reduction="none" that of each row [...]; 0 where the target is ignored.
HeadLoss = Callable[[Logits, Tensor, Tensor], RowLoss]


class Call:
    """The arguments of one forward. A flat batch [n_rows] is one sequence; see `UnifiedLoss.forward` for each.

    Attributes:
        rows: which rows count, their targets and weights.
        segments: [batch_size, n_tokens], a number that changes where a text begins; None: a batch row is one text.
        context: [batch_size, n_tokens], the tokens read, ignore_index where masked; None: the targets are the context.
        keep_targets: [batch_size, n_tokens] bool, rows whose target is no padding, without the row behind the last
            label; None: all.
        keep_tokens: [batch_size, n_tokens] bool, tokens that are no padding; None: all.
        head_loss: main's cross-entropy for the logits of a further head; the pass over the rows sets it.
        recording: whether this call counts for what components learn; a tensor where a traced graph finds out.
        made: what parts share, each made by the first that asks.

    Raises:
        ValueError: on an argument that is missing, superfluous, or of a shape that does not fit.
        TypeError: on an argument of another kind.
    """

    head_loss: HeadLoss
    recording: bool | Tensor = False

    def __init__(
        self,
        config: UnifiedLossConfig,
        needs_sequences: Sequence[str],  # keys of the components that want rows in the order of the text
        *,
        logits: Any,  # [batch_size, n_tokens, n_columns] or [n_rows, n_columns]
        targets: Any,  # [batch_size, n_tokens] or [n_rows]
        attention_mask: Tensor | None,  # as targets
        hidden_states: Any,  # as logits, [..., hidden_size]
        primary_logits: Any,  # as logits
        additional_logits: Heads,  # of logits' shape, one per head
        confidence_scores: Tensor | None,  # [batch_size], [batch_size, 1], [batch_size, n_tokens] or with 1
        mtp_active: bool | Tensor | None,
        gate_logits: Tensor | Sequence[Tensor | None] | None,  # [n, n_experts] per layer
        expert_indices: Tensor | Sequence[Tensor | None] | None,  # [n, k] per layer
        expert_outputs: Tensor | Sequence[Tensor] | None,  # [n_experts, n, hidden_size]
        lm_head_weight: Any,  # [n_columns, hidden_size]
        lm_head_bias: Tensor | None,  # [n_columns]
        token_weights: Tensor | None,  # as targets
        input_ids: Tensor | None,  # as targets
        position_ids: Tensor | None,  # as targets, or [1, n_tokens]
        segment_ids: Tensor | None,  # as targets, or [1, n_tokens]
        cu_seqlens: Tensor | None,  # [n_segments + 1]
        num_items_in_batch: float | Tensor | None,
        negative_ids: Tensor | None,  # as targets, and [n_negatives]
        negative_weights: Tensor | None,  # as negative_ids
        contrastive_pair: tuple[Tensor, Tensor] | None,  # two of [n_pairs, hidden_size]
    ) -> None:
        if isinstance(hidden_states, (tuple, list)) and hidden_states:  # of every layer: the head reads the last
            hidden_states = hidden_states[-1]
        if isinstance(lm_head_weight, nn.Module):
            lm_head_weight, lm_head_bias = _weight_and_bias(lm_head_weight, lm_head_bias)
        if is_dtensor(lm_head_weight) and not is_dtensor(hidden_states):  # once, for every head that reads it
            lm_head_weight, lm_head_bias = gathered_weight(lm_head_weight), gathered_weight(lm_head_bias)
        logits = _logits_of(config, logits, primary_logits, hidden_states, lm_head_weight, lm_head_bias)
        beside_dtensor = is_dtensor(logits) or (isinstance(logits, LinearLogits) and is_dtensor(logits.hidden_states))
        targets, attention_mask, token_weights, input_ids, position_ids, segment_ids, negative_ids, negative_weights = (
            whole(name, given, beside_dtensor)
            for name, given in (
                ("targets", targets), ("attention_mask", attention_mask), ("token_weights", token_weights),
                ("input_ids", input_ids), ("position_ids", position_ids), ("segment_ids", segment_ids),
                ("negative_ids", negative_ids), ("negative_weights", negative_weights),
            )
        )  # fmt: skip
        targets = _tensor("targets", targets)
        _check_shapes(
            config, logits, targets, hidden_states, attention_mask, token_weights, input_ids, negative_ids,
            negative_weights,
        )  # fmt: skip
        self.config = config
        self.is_flat = targets.dim() == 1
        is_packed = not (segment_ids is None and position_ids is None and cu_seqlens is None)
        if self.is_flat:
            if not is_packed:
                _check_order(config, needs_sequences, targets)
            logits, targets = logits.unsqueeze(0), targets.unsqueeze(0)
            attention_mask, token_weights, input_ids, hidden_states, negative_ids, negative_weights = (
                None if given is None else given.unsqueeze(0)
                for given in (attention_mask, token_weights, input_ids, hidden_states, negative_ids, negative_weights)
            )
        self.logits: Logits | ShardedLogits = logits
        self.placement = CallPlacement.of(config, logits)
        if self.placement is None:
            hidden_states = whole("hidden_states", hidden_states, beside_dtensor)
        elif config.mtp_heads == "own" or config.use_contrastive_loss:
            hidden_states = self.placement.hidden_states(hidden_states)
        self.hidden_states = hidden_states
        self.additional_logits = additional_logits
        self.confidence_scores = confidence_scores
        self.mtp_active = mtp_active
        for name, given in (
            ("gate_logits", gate_logits), ("expert_indices", expert_indices), ("expert_outputs", expert_outputs),
            ("confidence_scores", confidence_scores), ("contrastive_pair", contrastive_pair),
        ):  # fmt: skip
            check_is_local(name, given)
        self.gate_logits = gate_logits
        self.expert_indices = expert_indices
        self.expert_outputs = expert_outputs
        self.lm_head_weight = lm_head_weight
        self.lm_head_bias = lm_head_bias
        self.negative_ids = negative_ids
        self.negative_weights = negative_weights
        self.contrastive_pair = contrastive_pair
        self.made: dict[str, Any] = {}

        self.segments: Tensor | None = None
        if is_packed:
            self.segments = segment_numbers((*targets.shape,), segment_ids, position_ids, cu_seqlens)
            if self.segments is not None:
                self.segments = self.segments.expand(targets.shape)
        self.context: Tensor | None = None
        if input_ids is not None:
            input_ids = input_ids.long()
            keep = keep_rows(config, input_ids, attention_mask)
            self.context = input_ids if keep is None else torch.where(keep, input_ids, config.ignore_index)
        targets = targets.long()  # also before ignore_index is shifted in: uint8 has no -100
        self.keep_tokens = self.keep_targets = keep_rows(config, targets, attention_mask)
        if not config.labels_are_shifted:
            targets = shift_left(targets, config.ignore_index)
            attention_mask = None if attention_mask is None else shift_left(attention_mask, 0)
            token_weights = None if token_weights is None else shift_left(token_weights, 0)
            keep = keep_rows(config, targets, attention_mask)
            self.keep_targets = None if keep is None else keep[:, :-1]
            if self.segments is not None:
                targets = targets.masked_fill(self.segments != shift_left(self.segments, -1), config.ignore_index)
        self.rows: Rows = count_rows(
            config, targets, attention_mask, token_weights, num_items_in_batch, accumulation_dtype(logits.dtype)
        )
        if self.placement is not None:
            self.rows = self.placement.share(self.rows, config.ignore_index)

    def required(self, argument: str, option: str) -> Any:
        """The argument, or a ValueError that names it and the option that wants it."""
        value = getattr(self, argument)
        if value is None:
            raise ValueError(f"unified_loss: {option} needs {argument}, got None")
        return value

    def like_targets(
        self,
        values: Tensor,  # [..., batch_size, n_tokens]
    ) -> Tensor:
        """Row-wise results in the shape that the caller expects: without the row behind the last label, flat for flat
        targets.
        """
        if not self.config.labels_are_shifted:
            values = values[..., :-1]
        return values.squeeze(-2) if self.is_flat else values

    def padding_free(self, n_rows: int) -> Tensor | None:
        """[n_rows] bool: which rows of a router or an expert are no padding; None: all, or their number is another."""
        of_rows = (self.keep_targets, self.keep_tokens)
        for keep in of_rows if self.placement is None else map(self.placement.local, of_rows):
            if keep is not None and keep.numel() == n_rows:
                return keep.reshape(-1)
        return None


def _tensor(name: str, value: Any) -> Tensor:
    if value is None:
        raise ValueError(f"unified_loss: expected {name}, got None")
    if not isinstance(value, Tensor):
        raise TypeError(f"unified_loss: expected {name} to be a torch.Tensor, got {type(value).__name__}")
    return value


def _weight_and_bias(head: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of a linear layer. A layer that does more (an adapter, a scale) would silently lose it."""
    if type(head) is not nn.Linear:
        raise TypeError(
            "unified_loss: expected lm_head_weight to be a torch.Tensor or a torch.nn.Linear, got "
            f"{type(head).__name__}, which may do more than one matrix product: pass logits, or its merged weight"
        )
    return head.weight, head.bias if bias is None else bias


def _as_logits(name: str, value: Any) -> Logits | ShardedLogits:
    if isinstance(value, (Tensor, LinearLogits, ShardedLogits)):
        return value
    given = getattr(value, "logits", None)  # what a model of transformers returns
    if isinstance(given, Tensor):
        return given
    raise TypeError(
        f"unified_loss: expected {name} to be a torch.Tensor, LinearLogits or a model's output with .logits, "
        f"got {type(value).__name__}"
    )


def _logits_of(
    config: UnifiedLossConfig,
    logits: Any,  # [..., n_columns]
    primary_logits: Any,  # [..., n_columns]
    hidden_states: Tensor | None,  # [..., hidden_size]
    lm_head_weight: Tensor | None,  # [n_columns, hidden_size]
    lm_head_bias: Tensor | None,  # [n_columns]
) -> Logits | ShardedLogits:
    """What the main term reads: logits or primary_logits, or what lm_head makes of hidden_states."""
    if lm_head_bias is not None and lm_head_weight is None:
        raise ValueError("unified_loss: lm_head_bias needs lm_head_weight, got None")
    if primary_logits is not None and config.mtp_heads != "adaptive":
        raise ValueError(
            "unified_loss: expected primary_logits with adaptive heads only (primary_loss_type='adaptive_mtp', or "
            f"use_mtp=True with mtp_type='adaptive'), got them with primary_loss_type={config.primary_loss_type!r}"
        )
    by_preference = [("logits", logits), ("primary_logits", primary_logits)]
    if config.primary_loss_type == "adaptive_mtp":
        by_preference.reverse()
    for name, given in by_preference:
        if given is not None:
            if lm_head_weight is not None and not config.mtp_share_head:
                raise ValueError(
                    f"unified_loss: expected {name} or lm_head_weight, got both (only mtp_share_head=True uses both)"
                )
            chosen = _as_logits(name, given)
            break
    else:
        if hidden_states is None or lm_head_weight is None:
            raise ValueError("unified_loss: expected logits, or hidden_states and lm_head_weight, got neither")
        check_is_whole("lm_head_weight", lm_head_weight)
        chosen = LinearLogits(
            _tensor("hidden_states", hidden_states), _tensor("lm_head_weight", lm_head_weight), lm_head_bias
        )
    if isinstance(chosen, LinearLogits):
        chosen.check("unified_loss", ("hidden_states", "lm_head_weight", "lm_head_bias"))
        if len(chosen.weight) < config.vocab_size:
            raise ValueError(
                f"unified_loss: expected lm_head_weight with at least vocab_size = {config.vocab_size} rows, got shape "
                f"{list(chosen.weight.shape)}"
            )
    return chosen


def _check_shapes(
    config: UnifiedLossConfig,
    logits: Logits | ShardedLogits,
    targets: Tensor,
    hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    token_weights: Tensor | None,
    input_ids: Tensor | None,
    negative_ids: Tensor | None,
    negative_weights: Tensor | None,
) -> None:
    shape = targets.shape
    if targets.dim() not in (1, 2):
        raise ValueError(
            f"unified_loss: expected targets of shape [batch_size, n_tokens] or [n_rows], got {list(shape)}"
        )
    if logits.shape[:-1] != shape:
        raise _bad_shape("targets", logits.shape[:-1], targets)
    if logits.shape[-1] < config.vocab_size:
        raise ValueError(
            f"unified_loss: expected logits with at least vocab_size = {config.vocab_size} columns, "
            f"got shape {list(logits.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(f"unified_loss: expected targets on {logits.device} as the logits, got {targets.device}")
    for name, ids in (("targets", targets), ("input_ids", input_ids), ("negative_ids", negative_ids)):
        if ids is not None and (ids.is_floating_point() or ids.dtype == torch.bool):
            raise ValueError(f"unified_loss: expected {name} of integers, got {ids.dtype}")
    of_rows = (("attention_mask", attention_mask), ("token_weights", token_weights), ("input_ids", input_ids))
    for name, given in of_rows:
        if given is not None and given.shape != shape:
            raise _bad_shape(name, shape, given)
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("unified_loss: expected token_weights without requires_grad: they get no gradient")
    if hidden_states is not None and hidden_states.shape[:-1] != shape:
        raise _bad_shape("hidden_states", (*shape, "hidden_size"), hidden_states)
    if negative_ids is None:
        if negative_weights is not None:
            raise ValueError("unified_loss: negative_weights need negative_ids, got None")
    elif negative_ids.shape[:-1] != shape or negative_ids.dim() != targets.dim() + 1:
        raise _bad_shape("negative_ids", (*shape, "n_negatives"), negative_ids)
    elif negative_weights is not None and negative_weights.shape != negative_ids.shape:
        raise _bad_shape("negative_weights", negative_ids.shape, negative_weights)


def _check_order(config: UnifiedLossConfig, needs_sequences: Sequence[str], targets: Tensor) -> None:
    wanting = [*needs_sequences, *([] if config.labels_are_shifted else ["labels_are_shifted=False"])]
    if wanting:
        raise ValueError(
            f"unified_loss: {wanting[0]} needs sequences: expected targets of shape [batch_size, n_tokens], or "
            f"segment_ids, position_ids or cu_seqlens, got targets of shape {list(targets.shape)}"
        )


def _bad_shape(name: str, expected: tuple[int | str, ...], got: Tensor) -> ValueError:
    shape = ", ".join(map(str, expected))
    return ValueError(f"unified_loss: expected {name} of shape [{shape}], got {list(got.shape)}")
