"""What one forward of UnifiedLoss was given, checked and brought into one form: rows [batch_size, n_tokens]."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ava_ext.config import UnifiedLossConfig, plain
from ava_ext.ops.arguments import (
    check_constants,
    check_integers,
    check_is_tensor,
    check_real,
    check_several_of_rows,
    check_shape,
    has_shape,
)
from ava_ext.ops.dtensor_logits import gathered_weight, has_dtensor
from ava_ext.ops.dtensors import DTENSOR, is_dtensor, whole
from ava_ext.ops.linear_logits import LinearLogits, is_weight_itself
from ava_ext.ops.row_fields import Candidates, RowLoss, accumulation_dtype
from ava_ext.ops.sharded_logits import ShardedLogits
from ava_ext.placements import CallPlacement, check_is_local, check_is_whole
from ava_ext.reduction import count_rows, keep_rows
from ava_ext.sequences import segment_numbers, shift_left

Logits = Tensor | LinearLogits | ShardedLogits
Heads = Tensor | Sequence[Logits] | None
# The loss of a head's rows: logits [..., n_columns], targets [...], row_weights [...] -> RowLoss, whose loss is the
# weighted sum [], or with reduction="none" that of each row [...]; 0 where the target is ignored.
HeadLoss = Callable[[Logits, Tensor, Tensor], RowLoss]
# The penalty of candidates alone, on rows of the main logits: targets [...] (-1: the row does not count), row_weights
# [...], candidates -> RowLoss.
CandidateLoss = Callable[[Tensor, Tensor, Candidates], RowLoss]


# one value, or several, for each row of the logits
ROW_WISE = (
    "logits", "targets", "attention_mask", "hidden_states", "token_weights", "input_ids", "negative_ids",
    "negative_weights", "soft_target_ids", "soft_target_weights", "target_probabilities",
)  # fmt: skip
# tensors on the device of the logits; logits, hidden_states and lm_head_weight may come in other forms
TENSORS = (
    "targets", "attention_mask", "token_weights", "input_ids", "position_ids", "segment_ids", "cu_seqlens",
    "negative_ids", "negative_weights", "soft_target_ids", "soft_target_weights", "confidence_scores", "prefix_ids",
    "mtp_depth_weights", "global_expert_counts", "target_probabilities",
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class Call:
    """The arguments of one forward, see `UnifiedLoss.forward`, and what is made of them.

    A flat batch [n_rows] becomes one sequence [1, n_rows].

    Attributes:
        rows: which rows count, their targets and weights.
        segments: [batch_size, n_tokens], a number that changes where a text begins; None: a batch row is one text.
        context: [batch_size, n_tokens], the tokens read, ignore_index where masked; None: the targets are the context.
        prefix: [batch_size, n_prefix], what comes before the context in the first row's text, ignore_index where
            masked; None: nothing.
        keep_targets: [batch_size, n_tokens] bool, rows whose target is not padding, without the row behind the last
            label of each text; None: all.
        keep_tokens: [batch_size, n_tokens] bool, tokens that are not padding; None: all.
        placement: how the rows are spread over ranks; None: this process has all of them.
        kept_rows: [batch_size, n_tokens] bool, rows that are not padding, whether they have a target or not; None: all.
        kept_weights: [batch_size, n_tokens], the token weights of rows, whether they have a target or not; None: 1.
        temperature: what divides the main logits, adaptive or not; the pass over the rows sets it.
        candidate_loss: the penalty of candidates on rows of the main logits; the pass over the rows sets it.
        head_loss: main's cross-entropy for the logits of a further head; the pass over the rows sets it.
        recording: whether this call counts for what components learn; a tensor where a traced graph finds out.
        router: the statistics of its router, which parts share: `losses.router.router_of_call` measures them.
        learned: what parts learn from this call, each called with `recording` once the whole loss is computed: a call
            that raises teaches nothing.

    Raises:
        ValueError: on an argument that is missing, superfluous, or of a shape that does not fit.
        TypeError: on an argument of another kind.
    """

    config: UnifiedLossConfig
    needs_sequences: Sequence[str]  # keys of the components that want rows in the order of the text
    logits: Any  # [batch_size, n_tokens, n_columns] or [n_rows, n_columns]
    targets: Any  # [batch_size, n_tokens] or [n_rows]
    attention_mask: Tensor | None = None  # as targets
    hidden_states: Any = None  # as logits, [..., hidden_size]
    primary_logits: Any = None  # as logits
    additional_logits: Heads = None  # of logits' shape, one per head
    mtp_hidden_states: Any = None  # num_future_tokens of hidden_states' shape
    mtp_depth_weights: Tensor | None = None  # [num_future_tokens]
    confidence_scores: Tensor | None = None  # [batch_size], [batch_size, 1], [batch_size, n_tokens] or with 1
    mtp_active: bool | Tensor | None = None
    gate_logits: Tensor | Sequence[Tensor | None] | None = None  # [n, n_experts] per layer
    expert_indices: Tensor | Sequence[Tensor | None] | None = None  # [n, k] per layer
    global_expert_counts: Tensor | None = None  # [n_layers, n_experts]
    expert_outputs: Tensor | Sequence[Tensor] | None = None  # [n_experts, n, hidden_size]
    lm_head_weight: Any = None  # [n_columns, hidden_size]
    lm_head_bias: Tensor | None = None  # [n_columns]
    token_weights: Tensor | None = None  # as targets
    input_ids: Tensor | None = None  # as targets
    prefix_ids: Tensor | None = None  # [batch_size, n_prefix]; [n_prefix] beside flat targets
    position_ids: Tensor | None = None  # as targets, or [1, n_tokens]
    segment_ids: Tensor | None = None  # as targets, or [1, n_tokens]
    cu_seqlens: Tensor | None = None  # [n_segments + 1]
    num_items_in_batch: float | Tensor | None = None
    negative_ids: Tensor | None = None  # as targets, and [n_negatives]
    negative_weights: Tensor | None = None  # as negative_ids
    soft_target_ids: Tensor | None = None  # as targets, and [n_soft_targets]
    soft_target_weights: Tensor | None = None  # as soft_target_ids
    target_probabilities: Tensor | None = None  # as targets, and [vocab_size]
    contrastive_pair: tuple[Tensor, Tensor] | None = None  # two of [n_pairs, hidden_size]
    max_counted_rows: int | None = None
    labels_are_shifted: bool | None = None  # None: as the configuration says

    class_weights: Tensor | None = None  # [vocab_size], of the loss

    placement: CallPlacement | None = dataclasses.field(init=False, default=None)
    temperature: float | Tensor = dataclasses.field(init=False, repr=False)  # not there yet where a check fails
    head_loss: HeadLoss = dataclasses.field(init=False, repr=False)
    candidate_loss: CandidateLoss = dataclasses.field(init=False, repr=False)
    recording: bool | Tensor = dataclasses.field(init=False, default=False)
    router: Any = dataclasses.field(init=False, default=None)
    learned: list[Callable[[bool | Tensor], None]] = dataclasses.field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        if self.labels_are_shifted is None:
            self.labels_are_shifted = config.labels_are_shifted
        if not isinstance(self.labels_are_shifted, bool):
            self.labels_are_shifted = _flag("labels_are_shifted to be True, False or None", self.labels_are_shifted)
        if isinstance(self.hidden_states, (tuple, list)) and self.hidden_states:  # of every layer
            self.hidden_states = self.hidden_states[-1]  # what the head reads
        if isinstance(self.lm_head_weight, nn.Module):
            self.lm_head_weight, self.lm_head_bias = _weight_and_bias(self.lm_head_weight, self.lm_head_bias)
        if is_dtensor(self.lm_head_weight) and not _reads_dtensors(self):  # once, for every head that reads it
            self.lm_head_weight, self.lm_head_bias = (
                gathered_weight(part) for part in (self.lm_head_weight, self.lm_head_bias)
            )
        if not isinstance(self.mtp_active, (bool, type(None), Tensor)):  # 0 is not False, and would mean on
            self.mtp_active = _flag("mtp_active to be a bool, a torch.Tensor or None", self.mtp_active)
        self.logits = _logits_of(self)
        if DTENSOR in sys.modules:
            self._take_whole()
        _check_tensors(self)
        _check_shapes(self)
        self.targets_shape = self.targets.shape  # as given
        self.is_flat = self.targets.dim() == 1
        is_packed = not (self.segment_ids is None and self.position_ids is None and self.cu_seqlens is None)
        if self.is_flat:
            if not is_packed:
                _check_order(self)
            for name in (*ROW_WISE, "prefix_ids"):
                value = getattr(self, name)
                if value is not None:
                    setattr(self, name, value.unsqueeze(0))
        if DTENSOR in sys.modules:
            self._place()
        targets = self.targets
        self.rows_shape = (targets.shape[0], targets.shape[1])
        if targets.dtype != torch.int64:
            targets = targets.long()  # before ignore_index is shifted in: uint8 has no -100
        self.segments = None
        if is_packed:
            segments = segment_numbers(self.rows_shape, self.segment_ids, self.position_ids, self.cu_seqlens)
            self.segments = None if segments is None else segments.expand(targets.shape)
        self.context = _tokens_read(config, self.input_ids, self.attention_mask)
        self.prefix = _tokens_read(config, self.prefix_ids, None)
        token_weights = self.token_weights
        keep = keep_rows(config, targets, self.attention_mask)
        self.keep_tokens = self.keep_targets = keep
        if not self.labels_are_shifted:
            targets = shift_left(targets, config.ignore_index)
            token_weights, keep = (None if given is None else shift_left(given, 0) for given in (token_weights, keep))
            if self.segments is not None:  # behind the last label of a text there is no row
                is_within = self.segments == shift_left(self.segments, -1)
                keep = is_within if keep is None else keep & is_within
            self.keep_targets = None if keep is None else keep[:, :-1]
        self.kept_rows, self.kept_weights = keep, token_weights
        dtype = accumulation_dtype(self.logits.dtype)
        if self.class_weights is not None:
            if dtype == torch.float64 and config.class_weights is not None:  # the loss's buffer has fewer digits
                self.class_weights = torch.tensor(config.class_weights, dtype=dtype, device="cpu")
            self.class_weights = self.class_weights.to(self.logits.device, dtype)
        n_items = self.num_items_in_batch
        self.rows = count_rows(config, targets, keep, token_weights, n_items, dtype, self.class_weights)
        if self.placement is not None:
            self.rows = self.placement.share(self.rows, config.ignore_index)

    def _take_whole(self) -> None:
        """What is aligned with the rows, as tensors of all rows, where it may be DTensors."""
        beside = has_dtensor(self.logits)
        names = [name for name in ROW_WISE if name not in ("logits", "hidden_states")]
        for name in (*names, "position_ids", "segment_ids"):
            setattr(self, name, whole("unified_loss", name, getattr(self, name), beside))

    def _place(self) -> None:
        """Where the rows are, if they are spread over ranks, and the hidden states that parts read."""
        config = self.config
        self.placement = CallPlacement.of(config, self.logits)
        if self.placement is None:
            self.hidden_states = whole("unified_loss", "hidden_states", self.hidden_states, False)
        else:
            if config.mtp_heads == "own" or config.use_contrastive_loss:
                self.hidden_states = self.placement.hidden_states(self.hidden_states)
            if config.mtp_heads == "hidden_states" and self.mtp_hidden_states is not None:
                self.mtp_hidden_states = [self.placement.hidden_states(depth) for depth in self.mtp_hidden_states]
        for name in (
            "gate_logits",
            "expert_indices",
            "expert_outputs",
            "confidence_scores",
            "contrastive_pair",
            "prefix_ids",
        ):
            check_is_local(name, getattr(self, name))

    def required(self, argument: str, option: str) -> Any:
        """The argument, or a ValueError that names it and the option that wants it."""
        value = getattr(self, argument)
        if value is None:
            raise ValueError(f"unified_loss: {option} needs {argument}, got None")
        return value

    @property
    def effective_logits(self) -> dict[str, Any]:
        """What `losses.effective_logits` makes of the main logits, as arguments of softmax_statistics."""
        config = self.config
        scale = {"logit_scale": config.logit_scale, "logit_softcap": config.logit_softcap}
        return {"temperature": self.temperature, **scale}

    def like_targets(
        self,
        values: Tensor,  # [..., batch_size, n_tokens]
    ) -> Tensor:
        """Row-wise results in the shape that the caller expects: without the row behind the last label, flat for flat
        targets.
        """
        if not self.labels_are_shifted:
            values = values[..., :-1]
        return values.squeeze(-2) if self.is_flat else values

    def no_loss(self) -> Tensor:  # [], or with reduction="none" [batch_size, n_tokens]
        """The term of a part that is off in this call."""
        weights = self.rows.weights
        return torch.zeros_like(weights) if self.config.reduction == "none" else weights.new_zeros(())

    def own_rows(self) -> Tensor | None:  # [batch_size, n_tokens] bool
        """Which rows this rank has; None: all."""
        rows = None if self.placement is None else self.placement.rows
        if rows is None:
            return None
        return rows.among_all(torch.ones(rows.sizes, dtype=torch.bool, device=self.targets.device))

    def padding_free(self, n_rows: int) -> Tensor | None:
        """[n_rows] bool: which rows of a router or an expert are not padding; None: all, or their number is another.

        Raises:
            ValueError: one row less for each text that is spread over ranks: nothing tells which it is.
        """
        for keep in (self.keep_targets, self.keep_tokens):
            if keep is None:
                continue
            if self.placement is not None:
                if keep.shape == self.rows_shape:
                    keep = self.placement.local(keep)
                elif self.kept_rows is None or self.placement.is_within_texts:
                    self.placement.check_has_last_rows(n_rows)
                    continue  # without the row behind the last label: no block of the rows
                else:
                    keep = self.placement.local(self.kept_rows)[:, :-1]
            if keep.numel() == n_rows:
                return keep.reshape(-1)
        return None


def _tokens_read(
    config: UnifiedLossConfig,
    ids: Tensor | None,  # [batch_size, n_tokens]
    attention_mask: Tensor | None,  # [batch_size, n_tokens]
) -> Tensor | None:  # [batch_size, n_tokens] int64
    """The tokens that are a row's context; ignore_index where they are padding."""
    if ids is None:
        return None
    tokens = ids.long()
    keep = keep_rows(config, tokens, attention_mask)
    return tokens if keep is None else torch.where(keep, tokens, config.ignore_index)


def _flag(expected: str, value: Any) -> bool:
    """A bool of numpy, as comparing its numbers gives, as Python's own."""
    found = value if isinstance(value, Tensor) else plain(value)
    if not isinstance(found, bool):
        raise TypeError(f"unified_loss: expected {expected}, got {type(value).__name__}")
    return found


def _tensor(name: str, value: Any) -> Tensor:
    if value is None:
        raise ValueError(f"unified_loss: expected {name}, got None")
    check_is_tensor("unified_loss", name, value)
    return value


def _weight_and_bias(head: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of a linear layer."""
    if not is_weight_itself(head):
        raise TypeError(
            "unified_loss: expected lm_head_weight to be a torch.Tensor or a torch.nn.Linear, got "
            f"{type(head).__name__}, which may do more than one matrix product, or whose weight a hook makes: pass "
            "logits, or its merged weight"
        )
    return head.weight, head.bias if bias is None else bias


def _as_logits(name: str, value: Any) -> Logits:
    if isinstance(value, (Tensor, LinearLogits, ShardedLogits)):
        return value
    given = getattr(value, "logits", None)  # what a model of transformers returns
    if isinstance(given, Tensor):
        return given
    raise TypeError(
        f"unified_loss: expected {name} to be a torch.Tensor, LinearLogits or a model's output with .logits, "
        f"got {type(value).__name__}"
    )


def _reads_dtensors(call: Call) -> bool:
    """Whether logits or hidden states are DTensors, which say whose rows a rank has."""
    depths = call.mtp_hidden_states
    of_model = getattr(call.logits, "logits", call.logits)
    several = depths if isinstance(depths, (tuple, list)) else (depths,)
    return has_dtensor(of_model) or any(is_dtensor(states) for states in (call.hidden_states, *several))


def _logits_of(call: Call) -> Logits:  # [..., n_columns]
    """What the main term reads: logits or primary_logits, or what lm_head makes of hidden_states."""
    config, hidden_states, weight, bias = call.config, call.hidden_states, call.lm_head_weight, call.lm_head_bias
    if bias is not None and weight is None:
        raise ValueError("unified_loss: lm_head_bias needs lm_head_weight, got None")
    if call.primary_logits is not None and config.mtp_heads != "adaptive":
        raise ValueError(
            "unified_loss: expected primary_logits with adaptive heads only (primary_loss_type='adaptive_mtp', or "
            f"use_mtp=True with mtp_type='adaptive'), got them with primary_loss_type={config.primary_loss_type!r}"
        )
    by_preference = [("logits", call.logits), ("primary_logits", call.primary_logits)]
    if config.primary_loss_type == "adaptive_mtp":
        by_preference.reverse()
    for name, given in by_preference:
        if given is not None:
            if weight is not None and not (config.mtp_share_head or config.mtp_heads == "hidden_states"):
                raise ValueError(
                    f"unified_loss: expected {name} or lm_head_weight, got both (only mtp_share_head=True and "
                    "mtp_type='hidden_states' use both)"
                )
            chosen = _as_logits(name, given)
            break
    else:
        if hidden_states is None or weight is None:
            raise ValueError("unified_loss: expected logits, or hidden_states and lm_head_weight, got neither")
        check_is_whole("lm_head_weight", weight)
        chosen = LinearLogits(hidden_states, weight, bias)
    if isinstance(chosen, LinearLogits):
        chosen.check("unified_loss", ("hidden_states", "lm_head_weight", "lm_head_bias"))
        if len(chosen.weight) < config.vocab_size:
            raise ValueError(
                f"unified_loss: expected lm_head_weight with at least vocab_size = {config.vocab_size} rows, got shape "
                f"{list(chosen.weight.shape)}"
            )
    return chosen


def _check_tensors(call: Call) -> None:
    device = call.logits.device
    for name in TENSORS:
        value = getattr(call, name)
        if value is None and name != "targets":
            continue
        if _tensor(name, value).device != device:
            raise ValueError(f"unified_loss: expected {name} on {device} as the logits, got {value.device}")
        check_real("unified_loss", name, value)
    if call.hidden_states is not None:
        _tensor("hidden_states", call.hidden_states)


def _check_shapes(call: Call) -> None:
    logits, targets = call.logits, call.targets
    shape, vocab_size = targets.shape, call.config.vocab_size
    if targets.dim() not in (1, 2):
        raise ValueError(
            f"unified_loss: expected targets of shape [batch_size, n_tokens] or [n_rows], got {list(shape)}"
        )
    check_shape("unified_loss", logits.shape[:-1], targets=targets)
    if logits.shape[-1] < vocab_size:
        raise ValueError(
            f"unified_loss: expected logits with at least vocab_size = {vocab_size} columns, "
            f"got shape {list(logits.shape)}"
        )
    for name in ("targets", "input_ids", "prefix_ids", "negative_ids", "soft_target_ids"):
        ids = getattr(call, name)
        if ids is not None:
            check_integers("unified_loss", name, ids)
    for name in ("attention_mask", "token_weights", "input_ids"):
        given = getattr(call, name)
        if given is not None:
            check_shape("unified_loss", shape, **{name: given})
    if call.token_weights is not None:
        check_constants("unified_loss", token_weights=call.token_weights)
    if call.hidden_states is not None:
        check_several_of_rows("unified_loss", shape, "hidden_states", call.hidden_states, "hidden_size")
    if call.prefix_ids is not None:
        check_several_of_rows("unified_loss", shape[:-1], "prefix_ids", call.prefix_ids, "n_prefix")
        if call.input_ids is None and not call.labels_are_shifted:
            raise ValueError("unified_loss: prefix_ids with labels_are_shifted=False need input_ids, got None")
    _check_soft_targets(call, shape)
    _check_probabilities(call, shape)
    ids, weights = call.negative_ids, call.negative_weights
    if ids is None:
        if weights is not None:
            raise ValueError("unified_loss: negative_weights need negative_ids, got None")
        return
    check_several_of_rows("unified_loss", shape, "negative_ids", ids, "n_negatives")
    check_shape("unified_loss", ids.shape, negative_weights=weights)


def _check_soft_targets(call: Call, shape: torch.Size) -> None:
    ids, weights = call.soft_target_ids, call.soft_target_weights
    if ids is None and weights is None:
        return
    if ids is None or weights is None:
        given, missing = ("weights", "ids") if ids is None else ("ids", "weights")
        raise ValueError(f"unified_loss: soft_target_{given} need soft_target_{missing}, got None")
    if call.config.distillation_weight == 0:
        raise ValueError("unified_loss: soft_target_ids need distillation_weight above 0, got 0")
    check_several_of_rows("unified_loss", shape, "soft_target_ids", ids, "n_soft_targets")
    check_shape("unified_loss", ids.shape, soft_target_weights=weights)


def _check_probabilities(call: Call, shape: torch.Size) -> None:
    probabilities, config = call.target_probabilities, call.config
    if probabilities is None:
        return
    if not has_shape(probabilities, (*shape, call.logits.shape[-1])):
        check_shape("unified_loss", (*shape, config.vocab_size), target_probabilities=probabilities)
    if not probabilities.is_floating_point():
        raise ValueError(f"unified_loss: expected target_probabilities of floating point, got {probabilities.dtype}")
    if (option := config.needs_one_target) is not None:
        raise ValueError(f"unified_loss: {option} needs one target for each row, got target_probabilities")


def _check_order(call: Call) -> None:
    wanting = [*call.needs_sequences, *([] if call.labels_are_shifted else ["labels_are_shifted=False"])]
    if wanting:
        raise ValueError(
            f"unified_loss: {wanting[0]} needs sequences: expected targets of shape [batch_size, n_tokens], or "
            f"segment_ids, position_ids or cu_seqlens, got targets of shape {list(call.targets.shape)}"
        )
