"""Everything together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.reference.batch_terms import diversity, info_nce, simctg
from ava_ext.reference.router_rows import global_load_balancing, router_terms
from ava_ext.reference.rows import Rows, mtp_terms, row_terms
from ava_ext.reference.sequences import class_weights_of, counted_rows, denominator, is_padding, segment_numbers


def unified_loss(
    config: UnifiedLossConfig,
    logits: Tensor | None = None,  # [B, T, vocab] or [n_rows, vocab]
    targets: Tensor | None = None,  # [B, T] or [n_rows]
    attention_mask: Tensor | None = None,  # as targets
    hidden_states: Tensor | None = None,  # [B, T, H] or [n_rows, H]
    primary_logits: Tensor | None = None,  # as logits
    additional_logits: Tensor | Sequence[Tensor] | None = None,  # num_future_tokens of logits' shape
    confidence_scores: Tensor | None = None,  # [B], [B, 1], [B, T] or [B, T, 1]
    mtp_active: bool | Tensor | None = None,  # [] or [B]: False switches the heads of every kind off
    gate_logits: Tensor | Sequence[Tensor] | None = None,  # [N, E], [layers, N, E], or [..., E] for one layer
    expert_indices: Tensor | Sequence[Tensor] | None = None,  # [N, k] or [layers, N, k]
    expert_outputs: Tensor | Sequence[Tensor] | None = None,  # [E, N, H] or [E, B, T, H]
    *,
    lm_head_weight: Tensor | None = None,  # [vocab, H]
    lm_head_bias: Tensor | None = None,  # [vocab]
    token_weights: Tensor | None = None,  # as targets
    input_ids: Tensor | None = None,  # as targets
    position_ids: Tensor | None = None,  # as targets or [1, T]
    segment_ids: Tensor | None = None,  # as targets or [1, T]
    cu_seqlens: Tensor | None = None,  # [n_segments + 1]
    num_items_in_batch: float | Tensor | None = None,
    global_expert_counts: Tensor | None = None,  # [layers, E]: load balancing is this call's addend of theirs
    mtp_hidden_states: Tensor | Sequence[Tensor] | None = None,  # num_future_tokens of hidden_states' shape
    mtp_depth_weights: Tensor | None = None,  # [num_future_tokens]
    negative_ids: Tensor | None = None,  # [B, T, M]
    negative_weights: Tensor | None = None,  # [B, T, M]
    soft_target_ids: Tensor | None = None,  # [B, T, K]
    soft_target_weights: Tensor | None = None,  # [B, T, K]
    target_probabilities: Tensor | None = None,  # [B, T, vocab], aligned with the rows
    contrastive_pair: tuple[Tensor, Tensor] | None = None,  # two of [n, H]
    max_counted_rows: int | None = None,  # changes no value
    temperature: float | Tensor | None = None,  # [] the adaptive one; default initial_temperature
    expert_load: Tensor | None = None,  # [layers, E], default 1/E
    expert_bias: Tensor | None = None,  # [layers, E], for the own top-k
    mtp_logits: Sequence[Tensor] | Callable[[int], Tensor] | None = None,  # of logits' shape; or depth 1..K -> that
) -> dict[str, Tensor]:
    """What UnifiedLoss(...).forward(..., return_detailed=True) returns: total_loss, its addends (detached), METRICS.

    The keys depend on the configuration only: `negative_penalty`, `distillation_loss` are there (0) if none are given,
    `confidence_regularization` where the adaptive heads use confidence weighting and its strength is > 0, the `moe_`
    metrics with use_moe_balancing or use_auxiliary_loss. Choices where the specification is silent:

    * Router rows, expert outputs and hidden states leave out *padding* (attention_mask 0 or a pad target), not rows
      that are only ignore_index: prompts are routed too. In unshifted mode a router over all B T tokens is masked by
      the unshifted mask. moe_ metrics: counts of this call, per layer, then averaged over layers.
    * Terms of a batch are multiplied by n_local / N with num_items_in_batch under "mean" (n_local: number of local rows
      that count), else by 1, or 0 where no row counts: the whole loss is 0 then.
    * primary "adaptive_mtp" uses the adaptive heads whatever mtp_type says. The depth metrics are the depth's loss
      (with main's smoothing), unweighted, over the rows that count at that depth. BCE rows are weighted and divided by
      N as token terms are.
    * labels_are_shifted=False on flat rows needs segments; reduction "none" then has the shape [B, T-1].
    """
    adaptive_heads = config.primary_loss_type == "adaptive_mtp" or (config.use_mtp and config.mtp_type == "adaptive")
    model_heads = config.use_mtp and not adaptive_heads and config.mtp_type == "hidden_states"
    deepseek_heads = config.use_mtp and not adaptive_heads and not model_heads
    if primary_logits is not None and (config.primary_loss_type == "adaptive_mtp" or logits is None):
        logits = primary_logits
    if logits is None and hidden_states is not None and lm_head_weight is not None:
        logits = F.linear(hidden_states, lm_head_weight, lm_head_bias)
    logits = _required(logits, "logits (or hidden_states and lm_head_weight)", "unified_loss")
    targets = _required(targets, "targets", "unified_loss")

    given_head = (lm_head_weight, lm_head_bias)
    flat = targets.dim() == 1
    has_sequences = not flat or any(given is not None for given in (segment_ids, position_ids, cu_seqlens))
    needs_sequences = {
        "use_ngram_penalty": config.use_ngram_penalty,
        "use_immediate_repetition_penalty": config.use_immediate_repetition_penalty,
        "eos_token_id": bool(config.eos_ids) and config.eos_penalty_weight > 0,
        "use_mtp": deepseek_heads or adaptive_heads or model_heads,
        "use_contrastive_loss": config.use_contrastive_loss and contrastive_pair is None,
        "labels_are_shifted=False": not config.labels_are_shifted,
    }
    for option, is_on in needs_sequences.items():
        if is_on and not has_sequences:
            raise ValueError(
                f"unified_loss: {option} needs sequences: expected targets of shape [B, T], or segment_ids, "
                f"position_ids or cu_seqlens, got targets of shape {list(targets.shape)}"
            )
    # [n_rows, ...] is one sequence [1, n_rows, ...]; unshifted: row t predicts label t + 1
    rows_end, labels_start = (None, None) if config.labels_are_shifted else (-1, 1)

    def of_rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x.unsqueeze(0) if flat else x)[:, :rows_end]

    def of_labels(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x.unsqueeze(0) if flat else x)[:, labels_start:]

    n_batch, n_time = (1, len(targets)) if flat else targets.shape
    token_segments = segment_numbers(
        n_batch, n_time, segment_ids=segment_ids, position_ids=position_ids, cu_seqlens=cu_seqlens
    )
    token_keep, token_mask = ~is_padding(config, targets, attention_mask), of_rows(attention_mask)
    logits, targets, attention_mask = of_rows(logits), of_labels(targets), of_labels(attention_mask)
    row_keep = ~is_padding(config, targets, attention_mask)
    segments = token_segments[:, :rows_end]
    label_in_segment = token_segments[:, labels_start:] == segments
    targets = torch.where(label_in_segment, targets, config.ignore_index)
    counted = counted_rows(config, targets, attention_mask)
    for b, t in (counted & ((targets < 0) | (targets >= config.vocab_size))).nonzero().tolist():
        raise IndexError(
            f"unified_loss: expected targets in [0, vocab_size = {config.vocab_size}) or ignore_index, "
            f"got {int(targets[b, t])} in row {b * targets.shape[1] + t}"
        )
    dtype = logits.dtype
    weights = torch.ones_like(targets, dtype=dtype) if token_weights is None else of_labels(token_weights).to(dtype)
    of_class = class_weights_of(config, targets, counted).to(dtype)
    if not (counted * weights * of_class).any():  # no class that counts has a weight: N is as without class weights
        of_class = torch.ones_like(of_class)
    n = denominator(config, counted, weights * of_class, num_items_in_batch).to(dtype)
    temperature = config.initial_temperature if temperature is None else temperature
    rows = Rows(config, targets, counted, segments, weights, n, temperature)

    # unshifted: the mask is that of the tokens read, and that of the labels where it is shifted with them
    read = {"attention_mask": attention_mask}
    if input_ids is not None:
        read = {"input_ids": of_rows(input_ids), "attention_mask": token_mask}
    beside = (negative_ids, negative_weights, soft_target_ids, soft_target_weights, target_probabilities)
    has_row = row_keep & label_in_segment  # whether there is a label or not
    terms = [row_terms(rows, logits, read, *map(of_rows, beside), has_row, num_items_in_batch is not None)]
    if deepseek_heads or adaptive_heads or model_heads:
        heads, confidence = [], None
        is_weighted = adaptive_heads and config.use_confidence_weighting
        is_active = torch.as_tensor(True if mtp_active is None else mtp_active).bool().reshape(-1, 1)  # [1 or B, 1]
        if is_active.any():
            if model_heads and mtp_hidden_states is not None:
                head = [x if x is None or not config.mtp_detach_head else x.detach() for x in given_head]
                heads = [F.linear(states, *head) for states in mtp_hidden_states]
            elif (adaptive_heads or model_heads) and additional_logits is None and mtp_active is None:
                heads = []  # as many as are given
            elif model_heads:
                heads = list(_required(additional_logits, "mtp_hidden_states or additional_logits", "mtp_active"))
            elif adaptive_heads:
                heads = list(_required(additional_logits, "additional_logits", "mtp_active"))
            elif callable(mtp_logits):
                heads = [mtp_logits(depth) for depth in range(1, config.num_future_tokens + 1)]
            else:
                heads = list(_required(mtp_logits, "hidden_states", "use_mtp"))
            if is_weighted and heads:
                scores = _required(confidence_scores, "confidence_scores", "use_confidence_weighting").to(dtype)
                per_batch_row = scores.reshape(n_batch, n_time if scores.numel() == n_batch * n_time else 1)
                confidence = per_batch_row.expand(n_batch, n_time)[:, :rows_end]
        is_calibrated = is_weighted and config.confidence_reg_strength > 0
        of_heads = rows._replace(counted=counted & is_active)  # N stays that of all rows
        terms.append(mtp_terms(of_heads, [of_rows(x) for x in heads], confidence, is_calibrated, mtp_depth_weights))

    def kept(n_rows: int) -> Tensor:
        """The rows that are not padding, where the mask has their number; else all. [n_rows] bool"""
        matching = [keep for keep in (has_row, token_keep) if keep.numel() == n_rows]
        return matching[0].reshape(-1) if matching else torch.ones(n_rows, dtype=torch.bool)

    of_batch = {}
    if config.use_moe_balancing or config.use_auxiliary_loss:
        option = "use_moe_balancing" if config.use_moe_balancing else "use_auxiliary_loss"
        gates = _layers(config, _required(gate_logits, "gate_logits", option))
        chosen = [None] * len(gates) if expert_indices is None else _layers(config, expert_indices)
        keeps = [kept(len(gate)) for gate in gates]
        texts = None
        if config.use_auxiliary_loss and config.load_balancing_per_sequence:
            if any(len(gate) != token_segments.numel() for gate in gates):
                raise ValueError("unified_loss: load_balancing_per_sequence needs a row of gate_logits for each target")
            texts = (token_segments + token_segments.numel() * torch.arange(n_batch).unsqueeze(1)).flatten()
        addends, metrics = router_terms(config, gates, keeps, chosen, expert_load, expert_bias, texts)
        if global_expert_counts is not None and config.use_auxiliary_loss:
            addend = global_load_balancing(config, gates, keeps, chosen, global_expert_counts.to(dtype))
            addends.pop("aux_load_balancing")  # an addend of the global batch is not a mean of this one
            terms.append(({"aux_load_balancing": addend}, {}))
        of_batch |= addends
        terms.append(({}, metrics))
    if config.use_diversity_loss:
        outputs = torch.stack(list(_required(expert_outputs, "expert_outputs", "use_diversity_loss")))
        outputs = outputs.reshape(len(outputs), -1, outputs.shape[-1])
        of_batch["diversity_loss"] = config.diversity_weight * diversity(outputs, kept(outputs.shape[1]))
    if config.use_contrastive_loss:
        if contrastive_pair is not None:
            contrast = info_nce(*contrastive_pair, config.contrastive_temperature)
        else:
            states = _required(hidden_states, "contrastive_pair or hidden_states", "use_contrastive_loss")
            contrast = simctg(of_rows(states), has_row, segments)
        of_batch["contrastive_loss"] = config.contrastive_weight * contrast
    share = counted.any().to(dtype)
    if num_items_in_batch is not None and config.reduction == "mean":
        share = counted.sum() / n
    terms.append(({name: share * value for name, value in of_batch.items()}, {}))

    addends = {name: value for term_addends, _ in terms for name, value in term_addends.items()}
    metrics = {name: value for _, term_metrics in terms for name, value in term_metrics.items()}
    result = {"total_loss": torch.stack(list(addends.values())).sum(0)}
    result |= {name: value.detach() for name, value in (addends | metrics).items()}
    return {name: value.squeeze(0) if flat and value.dim() == 2 else value for name, value in result.items()}


def _required(value: Any, argument: str, option: str) -> Any:
    if value is None:
        raise ValueError(f"unified_loss: {option} needs {argument}, got None")
    return value


def _layers(
    config: UnifiedLossConfig,
    x: Tensor | Sequence[Tensor],  # [layers, N, E], [N, E], [..., E]
) -> list[Tensor]:
    """One [N, E] per layer. A tensor of more than two dimensions has layers in front if num_moe_layers says as many."""
    if isinstance(x, Tensor):
        x = list(x) if x.dim() > 2 and len(x) == config.num_moe_layers else [x]
    return [layer.reshape(-1, layer.shape[-1]) for layer in x]
