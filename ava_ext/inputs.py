"""What a call of UnifiedLoss was given, checked and brought into one form: rows [batch_size, n_tokens]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.ops.linear_rows import LinearLogits
from ava_ext.ops.softmax_rows import accumulation_dtype
from ava_ext.reduction import Rows, count_rows, keep_rows
from ava_ext.sequences import segment_numbers, shift_left


class Inputs(NamedTuple):
    """The rows of one call; a flat batch [n_rows] is one sequence."""

    logits: Tensor | LinearLogits  # [batch_size, n_tokens, n_columns]
    rows: Rows  # of [batch_size, n_tokens]
    segments: Tensor | None  # [batch_size, n_tokens]
    context: Tensor | None  # [batch_size, n_tokens]: tokens read, ignore_index where masked; None: the targets
    negative_ids: Tensor | None  # [batch_size, n_tokens, n_negatives]
    negative_weights: Tensor | None  # [batch_size, n_tokens, n_negatives]
    hidden_states: Tensor | None  # [batch_size, n_tokens, hidden_size]
    keep_targets: (
        Tensor | None
    )  # bool: rows whose target is no padding, without the row behind the last label; None: all
    keep_tokens: Tensor | None  # [batch_size, n_tokens] bool: tokens that are no padding; None: all
    is_flat: bool

    def like_targets(
        self,
        values: Tensor,  # [..., batch_size, n_tokens]
        config: UnifiedLossConfig,
    ) -> Tensor:
        """Row-wise results in the shape the caller expects: without the row behind the last label,
        flat for flat targets.
        """
        if not config.labels_are_shifted:
            values = values[..., :-1]
        return values.squeeze(-2) if self.is_flat else values

    def padding_free(self, n_rows: int) -> Tensor | None:
        """[n_rows] bool: which of so many rows of a router or an expert are no padding;
        None: all, or another number.
        """
        for keep in (self.keep_targets, self.keep_tokens):
            if keep is not None and keep.numel() == n_rows:
                return keep.reshape(-1)
        return None


def given_logits(
    config: UnifiedLossConfig,
    logits: Tensor | LinearLogits | None,  # [..., n_columns]
    primary_logits: Tensor | LinearLogits | None,  # [..., n_columns]
    hidden_states: Tensor | None,  # [..., hidden_size]
    lm_head_weight: Tensor | None,  # [n_columns, hidden_size]
    lm_head_bias: Tensor | None,  # [n_columns]
) -> Tensor | LinearLogits:
    """logits, primary_logits, or what lm_head makes of hidden_states: exactly one of them must be given."""
    if lm_head_bias is not None and lm_head_weight is None:
        raise ValueError("unified_loss: lm_head_bias needs lm_head_weight, got None")
    if primary_logits is not None and config.primary_loss_type != "adaptive_mtp":
        raise ValueError(
            "unified_loss: expected primary_logits with primary_loss_type='adaptive_mtp' only, "
            f"got them with {config.primary_loss_type!r}"
        )
    if primary_logits is not None and logits is not None:
        raise ValueError("unified_loss: expected logits or primary_logits, got both")
    given = logits if primary_logits is None else primary_logits
    if given is None:
        if hidden_states is None or lm_head_weight is None:
            raise ValueError("unified_loss: expected logits, or hidden_states and lm_head_weight, got neither")
        given = LinearLogits(hidden_states, lm_head_weight, lm_head_bias)
    elif lm_head_weight is not None and not config.mtp_share_head:
        name = "logits" if primary_logits is None else "primary_logits"
        raise ValueError(
            f"unified_loss: expected {name} or lm_head_weight, got both (only mtp_share_head=True uses both)"
        )
    if isinstance(given, LinearLogits):
        given.check("unified_loss", ("hidden_states", "lm_head_weight", "lm_head_bias"))
        if len(given.weight) < config.vocab_size:
            raise ValueError(
                f"unified_loss: expected lm_head_weight with at least vocab_size = {config.vocab_size} rows, got shape "
                f"{list(given.weight.shape)}"
            )
    return given


def prepare(
    config: UnifiedLossConfig,
    logits: Tensor | LinearLogits,  # [batch_size, n_tokens, n_columns] or [n_rows, n_columns]
    targets: Tensor | None,  # [batch_size, n_tokens] or [n_rows]
    *,
    needs_sequences: tuple[str, ...],  # keys of the components that do
    attention_mask: Tensor | None,  # as targets
    hidden_states: Tensor | None,  # as logits, [..., hidden_size]
    token_weights: Tensor | None,  # as targets
    input_ids: Tensor | None,  # as targets
    position_ids: Tensor | None,  # as targets, or [1, n_tokens]
    segment_ids: Tensor | None,  # as targets, or [1, n_tokens]
    cu_seqlens: Tensor | None,  # [n_segments + 1]
    num_items_in_batch: float | Tensor | None,
    negative_ids: Tensor | None,  # as targets, and [n_negatives]
    negative_weights: Tensor | None,  # as negative_ids
) -> Inputs:
    """Checks shapes, finds segments, shifts labels, counts rows.

    Raises:
        ValueError: on shapes that do not fit; on rows without order where a component needs it.
    """
    if targets is None:
        raise ValueError("unified_loss: expected targets, got None")
    if targets.dim() not in (1, 2):
        raise ValueError(
            f"unified_loss: expected targets of shape [batch_size, n_tokens] or [n_rows], got {list(targets.shape)}"
        )
    if logits.shape[:-1] != targets.shape:
        raise _bad_shape("targets", logits.shape[:-1], targets)
    if logits.shape[-1] < config.vocab_size:
        raise ValueError(
            f"unified_loss: expected logits with at least vocab_size = {config.vocab_size} columns, "
            f"got shape {list(logits.shape)}"
        )
    for name, ids in (("targets", targets), ("input_ids", input_ids), ("negative_ids", negative_ids)):
        if ids is not None and (ids.is_floating_point() or ids.dtype == torch.bool):
            raise ValueError(f"unified_loss: expected {name} of integers, got {ids.dtype}")
    of_rows = {"attention_mask": attention_mask, "token_weights": token_weights, "input_ids": input_ids}
    for name, given in of_rows.items():
        if given is not None and given.shape != targets.shape:
            raise _bad_shape(name, targets.shape, given)
    if hidden_states is not None and hidden_states.shape[:-1] != targets.shape:
        raise _bad_shape("hidden_states", (*targets.shape, "hidden_size"), hidden_states)
    if negative_weights is not None and negative_ids is None:
        raise ValueError("unified_loss: negative_weights need negative_ids, got None")
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("unified_loss: expected token_weights without requires_grad: they get no gradient")
    is_flat = targets.dim() == 1
    if is_flat:
        if segment_ids is None and position_ids is None and cu_seqlens is None:
            wanting = needs_sequences if config.labels_are_shifted else (*needs_sequences, "labels_are_shifted=False")
            if wanting:
                raise ValueError(
                    f"unified_loss: {wanting[0]} needs sequences: expected targets of shape [batch_size, n_tokens], or "
                    f"segment_ids, position_ids or cu_seqlens, got targets of shape {list(targets.shape)}"
                )
        logits, targets = logits.unsqueeze(0), targets.unsqueeze(0)
        attention_mask, token_weights, input_ids, hidden_states, negative_ids, negative_weights = (
            None if given is None else given.unsqueeze(0)
            for given in (attention_mask, token_weights, input_ids, hidden_states, negative_ids, negative_weights)
        )
    segments = None
    if not (segment_ids is None and position_ids is None and cu_seqlens is None):
        segments = segment_numbers((targets.shape[0], targets.shape[1]), segment_ids, position_ids, cu_seqlens)
        segments = None if segments is None else segments.expand(targets.shape)
    context = input_ids
    if context is not None:
        keep_context = keep_rows(config, context, attention_mask)
        context = context if keep_context is None else torch.where(keep_context, context, config.ignore_index)
    keep_tokens = keep_targets = keep_rows(config, targets, attention_mask)
    if not config.labels_are_shifted:
        targets = shift_left(targets, config.ignore_index)
        attention_mask = None if attention_mask is None else shift_left(attention_mask, 0)
        token_weights = None if token_weights is None else shift_left(token_weights, 0)
        keep_targets = keep_rows(config, targets, attention_mask)
        keep_targets = None if keep_targets is None else keep_targets[:, :-1]
        if segments is not None:
            targets = targets.masked_fill(segments != shift_left(segments, -1), config.ignore_index)
    rows = count_rows(
        config, targets.long(), attention_mask, token_weights, num_items_in_batch, accumulation_dtype(logits.dtype)
    )
    return Inputs(
        logits,
        rows,
        segments,
        context,
        negative_ids,
        negative_weights,
        hidden_states,
        keep_targets,
        keep_tokens,
        is_flat,
    )


def _bad_shape(name: str, expected: tuple[int | str, ...], got: Tensor) -> ValueError:
    shape = ", ".join(map(str, expected))
    return ValueError(f"unified_loss: expected {name} of shape [{shape}], got {list(got.shape)}")
