"""The one pass over the rows of logits: every row term and every candidate, gradient included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ava_ext.call import Call, Logits
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import CandidateSource, RowTerm
from ava_ext.losses.float32_buffers import Float32Buffers
from ava_ext.ops.dtensor_logits import PlacedLogits
from ava_ext.ops.repetition import N_REPETITION_WEIGHTS, repetition_candidates, repetition_weights
from ava_ext.ops.row_fields import (
    N_OPTIONS,
    N_RANKS,
    OPTION_NAMES,
    TERM_NAMES,
    Candidates,
    RowFlags,
    RowLoss,
    accumulation_dtype,
    row_options,
    target_weights,
)
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.placements import CallPlacement
from ava_ext.reduction import classes_of

CROSS_ENTROPY = TERM_NAMES.index("cross_entropy")
# of the main term, what further heads have too: all but focal, token reweighting and class weights
OF_HEADS = RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING | RowFlags.EXCLUDE_TARGET | RowFlags.SOFTCAP


class RowPassOutput(NamedTuple):
    """What the pass over the rows gives."""

    loss: Tensor  # []: the sum; with reduction="none" [batch_size, n_tokens]
    terms: Tensor  # [len(names), batch_size, n_tokens]: each unweighted, without graph
    names: tuple[str, ...]  # of the terms: TERM_NAMES, then the keys of the sources that found candidates
    options: Tensor  # [N_OPTIONS]; the first is temperature / logit_scale
    rank: Tensor | None  # [batch_size, n_tokens], of the targets where accuracy_top_k wants them: see RowLoss


class RowPass(Float32Buffers):
    """Row terms and sources of candidates of a configuration, merged into one call of `row_loss`.

    Args:
        config: which rows and columns count, and how the loss is reduced.
        row_terms: the terms of the row kernel that are on.
        sources: the sources of candidates that are on.
    """

    options: Tensor
    is_temperature: Tensor
    penalty_weights: Tensor
    class_weights: Tensor | None

    def __init__(
        self, config: UnifiedLossConfig, row_terms: Sequence[RowTerm], sources: Sequence[CandidateSource]
    ) -> None:
        super().__init__()
        self.config = config
        in_order = sorted(sources, key=lambda source: source.flags & RowFlags.SOFT_TARGETS)  # the kernel has these last
        given = [(source.key, source.given, source.flags, source.temperature) for source in in_order if source.given]
        self.given = tuple(source for source in given if source[-1] == 1)
        self.given_apart = tuple(source for source in given if source[-1] != 1)  # in a pass of their own
        self.metrics = tuple((source.key, source.metric) for source in sources if source.metric is not None)
        self.repetition_keys = tuple(source.key for source in sources if source.given is None)
        flags = RowFlags(0)
        for term in row_terms:
            flags |= term.flags
        self.flags, self.head_flags = int(flags), int(flags & OF_HEADS)
        self.flags_with_entropy = int(flags | RowFlags.ENTROPY)
        self._row_options = {name: value for term in row_terms for name, value in term.options.items()}
        self._penalty_weights = {name: value for source in sources for name, value in source.weights.items()}
        padding = () if config.padding_id is None else (config.padding_id,)
        self._repetition_options: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "ignore_index": config.ignore_index,
            "repetition_allow_list": (*config.repetition_allow_list, *padding),
        }
        for source in sources:
            self._repetition_options |= source.options
        self._of_rows: dict[str, Any] = {  # arguments of every row_loss
            "vocab_size": config.vocab_size,
            "ignore_index": config.ignore_index,
            "reduction": "none" if config.reduction == "none" else "sum",
            "chunk_bytes": config.linear_chunk_bytes,
        }
        # constants of the device: nothing is copied to it in a call, and nothing is made while a graph is traced
        n_classes = None if config.class_weights is None else len(config.class_weights)
        for name, size in (
            ("options", N_OPTIONS),
            ("is_temperature", N_OPTIONS),  # 0 or 1: AveragedModel subtracts buffers, and no bools
            ("class_weights", n_classes),
            ("penalty_weights", N_REPETITION_WEIGHTS),
        ):
            constants = None if size is None else torch.empty(size, dtype=torch.float32)
            self.register_buffer(name, constants, persistent=False)
        self.reset_parameters()

    def _make_options(self, like: Tensor) -> Tensor:  # [N_OPTIONS]
        return row_options(like, **self._row_options)

    def _make_penalty_weights(self, like: Tensor) -> Tensor:  # [N_REPETITION_WEIGHTS]
        return repetition_weights(like, **self._penalty_weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RowPass:
        before = self.options
        super()._apply(fn, recurse)
        if self.options is not before:
            self.reset_parameters()  # no checkpoint has them, and to_empty() leaves them undefined
        return self

    def restore_precision(self) -> None:
        """Makes the constants float32 again, with all their digits."""
        super().restore_precision()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fills the constants."""
        with torch.device("cpu"):
            like = torch.empty(0, dtype=torch.float32)
            self.options.copy_(self._make_options(like))
            self.is_temperature.copy_(torch.tensor([name == "temperature" for name in OPTION_NAMES]))
            self.penalty_weights.copy_(self._make_penalty_weights(like))
            if self.class_weights is not None:
                self.class_weights.copy_(torch.tensor(self.config.class_weights, dtype=torch.float32))

    def run(
        self,
        call: Call,
        temperature: Tensor | None = None,  # []
        penalty_factor: Tensor | None = None,  # []
        is_detailed: bool = False,
    ) -> RowPassOutput:
        """The loss of the rows of a call; sets its temperature, head_loss and candidate_loss.

        Args:
            call: the rows.
            temperature: in place of the configuration's.
            penalty_factor: of the weights of repetition candidates.
            is_detailed: measure the entropy of each row too, which some terms need anyway, and the ranks that
                accuracy_top_k wants.
        """
        like = call.rows.weights
        # buffers have fewer digits than float64
        options = self._make_options(like) if like.dtype == torch.float64 else self.options
        if options.device != like.device:
            options = options.to(like.device)
        call.temperature = self.config.initial_temperature if temperature is None else temperature
        if temperature is not None:
            if self.config.logit_scale != 1 or temperature.dtype != options.dtype:
                temperature = temperature.to(options.dtype) / self.config.logit_scale
            options = torch.lerp(options, temperature, self.is_temperature.to(options))
        # neither holds the call: in a cycle, its logits would outlive it until Python's collector comes by
        call.head_loss = functools.partial(self._head_loss, options, call.placement, call.max_counted_rows)
        call.candidate_loss = functools.partial(self._candidate_loss, options, call.logits)
        candidates, names, flags = self._candidates(call, penalty_factor)
        flags |= self.flags_with_entropy if is_detailed else self.flags
        with_ranks = is_detailed and bool(self.config.accuracy_top_k)
        loss, terms = row_loss(
            call.logits,
            call.rows.targets,
            options,
            flags=flags,
            row_weights=like,
            candidates=candidates,
            inplace_gradient=self.config.inplace_gradient,
            max_counted_rows=call.max_counted_rows,
            target_probabilities=call.target_probabilities,
            smoothing_weights=call.class_weights if self.config.label_smoothing > 0 else None,
            with_ranks=with_ranks,
            **self._of_rows,
        )
        rank = None
        if with_ranks:
            terms, rank = terms[:-N_RANKS], terms[-N_RANKS]
        for key, named_by, own_flags, own_temperature in self.given_apart:
            given = named_by(call)
            if given is not None:
                apart = row_loss(
                    call.logits,
                    call.rows.targets,
                    options * own_temperature ** self.is_temperature.to(options),
                    flags=int(self.flags & RowFlags.SOFTCAP | own_flags),
                    row_weights=like,
                    candidates=given,
                    max_counted_rows=call.max_counted_rows,
                    **self._of_rows,
                )
                loss, terms = loss + apart.loss, torch.cat([terms, apart.terms[len(TERM_NAMES) :]])
                names = (*names, key)
        return RowPassOutput(loss, terms, (*TERM_NAMES, *names), options, rank)

    def _head_loss(
        self,
        options: Tensor,  # [N_OPTIONS]
        placement: CallPlacement | None,
        most: int | None,  # rows of the call that count
        logits: Logits,  # [..., n_columns]
        targets: Tensor,  # [...]
        row_weights: Tensor,  # [...]
    ) -> RowLoss:
        """HeadLoss, once the first three are bound."""
        placed = logits if placement is None else placement.head(logits)
        real = accumulation_dtype(logits.dtype)  # a head may be of another precision than the main logits
        if most is not None and targets.dim() > 2:  # several depths, each of which counts a part of the rows
            most *= len(targets)
        options, row_weights = options.to(real), row_weights.to(real)
        of_rows: dict[str, Any] = {"flags": self.head_flags, "row_weights": row_weights, "max_counted_rows": most}
        return row_loss(placed, targets, options, **of_rows, **self._of_rows)

    def _candidate_loss(
        self,
        options: Tensor,  # [N_OPTIONS]
        logits: PlacedLogits,  # [..., n_columns]
        targets: Tensor,  # [...]
        row_weights: Tensor,  # [...]
        candidates: Candidates,
    ) -> RowLoss:
        """CandidateLoss, once the first two are bound."""
        of_rows = self._of_rows | {"ignore_index": -1, "row_weights": row_weights, "candidates": candidates}
        return row_loss(logits, targets, options, flags=self.flags & RowFlags.SOFTCAP, **of_rows)

    def _candidates(
        self,
        call: Call,
        penalty_factor: Tensor | None,  # []
    ) -> tuple[Candidates | None, tuple[str, ...], int]:
        """Every token that the rows push down or up, in one list of slots, the names of its groups, and their flags."""
        rows, found, names, flags = call.rows, [], self.repetition_keys, 0
        if call.class_weights is not None:
            found.append(target_weights(classes_of(rows.targets, call.class_weights)))
            names = ("class_weights", *names)
        if self.repetition_keys:
            like = rows.weights
            is_double = like.dtype == torch.float64
            weights = self._make_penalty_weights(like) if is_double else self.penalty_weights
            if weights.device != like.device:
                weights = weights.to(like.device)
            tokens, targets, segments = _with_prefix(call)
            candidates = repetition_candidates(
                tokens,
                targets,
                weights=weights,
                segments=segments,
                tokens_include_row=call.context is not None,
                **self._repetition_options,
            )
            n_prefix = tokens.shape[1] - rows.targets.shape[1]
            if n_prefix > 0:
                ids, weights, groups = candidates
                candidates = Candidates(ids[:, n_prefix:], weights[:, n_prefix:], groups)
            if penalty_factor is not None:
                candidates = candidates._replace(weights=candidates.weights * penalty_factor.to(weights))
            found.append(candidates)
        for key, named_by, of_source, _ in self.given:
            given = named_by(call)
            if given is not None:
                found.append(given)
                names, flags = (*names, key), flags | of_source
        if len(found) < 2:
            return (found[0] if found else None), names, flags
        ids, weights = (torch.cat([getattr(part, name) for part in found], -1) for name in ("ids", "weights"))
        return Candidates(ids, weights, tuple(size for part in found for size in part.groups)), names, flags


def _with_prefix(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:  # each [batch_size, n_prefix + n_tokens]
    """Tokens, targets and segments in which repetition is looked for: the prefix belongs to the first row's segment."""
    targets, prefix, segments = call.rows.targets, call.prefix, call.segments
    tokens = targets if call.context is None else call.context
    if prefix is None or targets.shape[1] == 0:
        return tokens, targets, segments
    if segments is not None:
        segments = torch.cat([segments[:, :1].expand(prefix.shape), segments], 1)
    # of the prefix's rows nothing is asked but whether they count: any token will do for their target
    return torch.cat([prefix, tokens], 1), torch.cat([prefix, targets], 1), segments
