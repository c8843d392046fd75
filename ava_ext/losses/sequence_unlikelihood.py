"""Sequence-level unlikelihood: a text that the model generated, and what of it repeats itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ava_ext.config import UnifiedLossConfig
from ava_ext.ops.arguments import check_are_tensors, check_is_tensor
from ava_ext.ops.dtensor_logits import check_is_logits
from ava_ext.ops.dtensors import is_dtensor, whole
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.repeated_ngrams import repeated_ngram_mask
from ava_ext.ops.row_fields import Candidates, RowFlags, accumulation_dtype, row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.reduction import check_is_mean, items_of
from ava_ext.sequences import segment_numbers


class SequenceUnlikelihoodLoss(nn.Module):
    """Pushes down what the model repeats in text that it generated: the mean of -log(1 - p(token)) over these tokens.

    These are the tokens of an n-gram that occurred before; see `repeated_ngram_mask`. The model generates greedily or
    by sampling; the logits are those of a forward over what it wrote. 0 where nothing repeats.

    Args:
        vocab_size: size of the vocabulary; columns beyond it are padding. At least 2.
        ngram_size: n. 4 as in the paper; on a real model (docs/studies/repetition.md) 6 cost less perplexity for nearly
            the same effect, because honest text repeats short n-grams.
        reduction: "mean" over the tokens that repeat (or num_items_in_batch, where given), "sum" or "none".
        initial_temperature, logit_softcap, linear_chunk_bytes: as in `UnifiedLossConfig`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> generated = torch.tensor([[7, 8, 9, 5, 7, 8, 9, 3]])  # of a prompt that is not in it
        >>> logits = torch.randn(1, 8, 50, requires_grad=True)  # logits[:, t] predicts generated[:, t]
        >>> SequenceUnlikelihoodLoss(50, ngram_size=3)(logits, generated).backward()
        >>> logits.grad.abs().sum(-1).count_nonzero()
        tensor(3)

    Source: Welleck et al. 2019, "Neural text generation with unlikelihood training", section 5.2, equation 8. The code
    of its authors, too, lets the earlier n-gram overlap.
    """

    def __init__(
        self,
        vocab_size: int,
        ngram_size: int = 4,
        *,
        reduction: str = "mean",
        initial_temperature: float = 1.0,
        logit_softcap: float | None = None,
        linear_chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.config = UnifiedLossConfig(
            vocab_size=vocab_size,
            primary_loss_type="standard",
            ngram_size=ngram_size,
            reduction=reduction,
            initial_temperature=initial_temperature,
            logit_softcap=logit_softcap,
            linear_chunk_bytes=linear_chunk_bytes,
        )
        if vocab_size < 2:
            raise ValueError(f"sequence_unlikelihood: expected vocab_size >= 2, got {vocab_size}")

    def forward(
        self,
        logits: Tensor | LinearLogits,  # [batch_size, n_tokens, n_columns]
        tokens: Tensor,  # [batch_size, n_tokens]
        continuation_mask: Tensor | None = None,  # [batch_size, n_tokens]
        *,
        segment_ids: Tensor | None = None,  # [batch_size, n_tokens] or [1, n_tokens]
        num_items_in_batch: float | Tensor | None = None,
        max_counted_rows: int | None = None,
    ) -> Tensor:
        """The loss, a scalar; with reduction="none" that of every token, [batch_size, n_tokens].

        Args:
            logits: logits[:, t] predict tokens[:, t]; or LinearLogits, of which a few rows exist at a time.
            tokens: what was generated. With a prompt in front, tokens[:, t] is the token behind it and all before.
            continuation_mask: tokens where it is 0 (prompt, padding) belong to no n-gram and are not penalised. Without
                it padding is text: it repeats itself.
            segment_ids: the texts that are packed into one row.
            num_items_in_batch: what the sum is divided by instead of the number of tokens that repeat: their number in
                all micro-batches (`repeats` tells those of one), or that of all written tokens.
            max_counted_rows: an upper bound of how many tokens repeat; see `ops.row_loss`.

        Raises:
            ValueError: shapes do not fit, or num_items_in_batch is negative or beside a reduction other than "mean".
            TypeError: it is not a number, or another argument is not a tensor.
            IndexError: a token that repeats is out of range (CPU).
        """
        check_is_logits("sequence_unlikelihood", logits)
        check_is_tensor("sequence_unlikelihood", "tokens", tokens)
        if logits.shape[:-1] != tokens.shape or logits.shape[-1] < self.config.vocab_size:
            raise ValueError(
                f"sequence_unlikelihood: expected logits of shape [{', '.join(map(str, tokens.shape))}, at least "
                f"{self.config.vocab_size}], got {list(logits.shape)}"
            )
        if num_items_in_batch is not None:
            check_is_mean("sequence_unlikelihood", self.config)
        repeats = self.repeats(tokens, continuation_mask, segment_ids=segment_ids)
        if not is_dtensor(repeats):  # of tokens that are one: every rank has all of them
            tokens = whole("sequence_unlikelihood", "tokens", tokens, True)
        real = accumulation_dtype(logits.dtype)
        # the row kernel leaves out a row's own target: another one, whose own loss is off
        tokens = tokens.long()
        targets = torch.where(repeats, (tokens == 0).long(), -1)
        # the row kernel takes -1 for an absent id, and refuses -2 as it does others out of range
        ids = tokens.masked_fill(tokens == -1, -2).unsqueeze(-1)
        weights = repeats.to(real)
        if self.config.reduction == "mean":
            n_items = weights.sum() if num_items_in_batch is None else num_items_in_batch
            weights = weights / items_of(n_items, weights.device, weights.dtype, "sequence_unlikelihood")
        softcap = self.config.logit_softcap
        options = row_options(
            torch.empty(0, dtype=real, device=tokens.device),
            temperature=self.config.initial_temperature,
            logit_softcap=softcap,
        )
        try:
            return row_loss(
                logits,
                targets,
                options,
                flags=int(RowFlags.SOFTCAP) if softcap else 0,
                row_weights=weights,
                candidates=Candidates(ids, torch.ones_like(ids, dtype=real), (1,)),
                vocab_size=self.config.vocab_size,
                ignore_index=-1,
                reduction="none" if self.config.reduction == "none" else "sum",
                chunk_bytes=self.config.linear_chunk_bytes,
                max_counted_rows=max_counted_rows,
            ).loss
        except IndexError as error:
            raise IndexError(
                f"sequence_unlikelihood: expected tokens that repeat to be in [0, {self.config.vocab_size}): leave "
                "padding out by continuation_mask"
            ) from error

    def repeats(
        self,
        tokens: Tensor,  # [batch_size, n_tokens]
        continuation_mask: Tensor | None = None,  # [batch_size, n_tokens]
        *,
        segment_ids: Tensor | None = None,  # [batch_size, n_tokens] or [1, n_tokens]
    ) -> Tensor:
        """[batch_size, n_tokens] bool: the tokens that are penalised."""
        check_is_tensor("sequence_unlikelihood", "tokens", tokens)
        check_are_tensors("sequence_unlikelihood", continuation_mask=continuation_mask, segment_ids=segment_ids)
        segments = None
        if segment_ids is not None:
            segments = segment_numbers((tokens.shape[0], tokens.shape[1]), segment_ids, None, None)
        return repeated_ngram_mask(tokens, self.config.ngram_size, mask=continuation_mask, segments=segments)
