"""Contrastive losses over representations: InfoNCE of pairs, SimCTG over the tokens of a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ava_ext.call import Call
from ava_ext.config import UnifiedLossConfig, check_weights
from ava_ext.losses.component import Addends, Part
from ava_ext.ops.arguments import (
    as_mask,
    check_are_tensors,
    check_integers,
    check_is_tensor,
    check_positive,
    check_real,
    check_shape,
    has_shape,
)
from ava_ext.ops.counted_rows import kept_by
from ava_ext.ops.derivatives import without_activations
from ava_ext.ops.linear_logits import without_autocast
from ava_ext.ops.row_fields import accumulation_dtype

# similarities held at a time; backward computes blocks again where they are several, so this bounds the memory of both
# passes
BLOCK_ELEMENTS = 2**22
LEFT_OUT = -1e30  # e^ of it is 0 beside any similarity, and log sum exp has a gradient where there is nothing else


def info_nce(
    first: Tensor,  # [n_pairs, hidden_size]
    second: Tensor,  # [n_pairs, hidden_size]
    *,
    temperature: float = UnifiedLossConfig.contrastive_temperature,
    row_mask: Tensor | None = None,  # [n_pairs] bool
    document_ids: Tensor | None = None,  # [n_pairs]
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """Symmetrical InfoNCE: each row of `first` has to find its partner among all rows of `second`, and the reverse.

        loss = 1/2 mean_i [ -log softmax_j(a_i . b_j / temperature)_i  -  log softmax_j(b_i . a_j / temperature)_i ]

    a and b are the rows divided by their length.

    Args:
        first, second: partners at equal positions.
        temperature: of the cosine similarities.
        row_mask: True where a pair counts, as a pair and as a negative; None: all.
        document_ids: pairs of the same document do not serve as negatives of each other; None: all other pairs do.
        block_elements: how many similarities are held at a time (at least one row of them), beside n_pairs numbers of
            each block.

    Returns:
        Scalar, float32 (float64 for float64 inputs); 0 where no pair counts.

    Raises:
        ValueError: the shapes differ, document_ids are not integers, row_mask is of floats, or a temperature given as a
            number is not above 0.
        TypeError: an input is not a tensor.

    Example:
        >>> info_nce(torch.eye(4), torch.eye(4), temperature=0.07) < 1e-5
        tensor(True)

    Source: van den Oord et al. 2018; symmetrical as in Radford et al. 2021 (CLIP).
    """
    check_is_tensor("contrastive_loss", "first", first)
    check_is_tensor("contrastive_loss", "second", second)
    check_are_tensors("contrastive_loss", row_mask=row_mask, document_ids=document_ids)
    if not isinstance(temperature, Tensor):  # to read one would wait for the device
        check_positive("contrastive_loss", temperature=temperature)
    if first.dim() != 2 or first.shape != second.shape:
        raise ValueError(
            "contrastive_loss: expected a pair of equal shapes [n_pairs, hidden_size], got "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    n_pairs = first.shape[0]
    check_shape("contrastive_loss", (n_pairs,), row_mask=row_mask, document_ids=document_ids)
    if document_ids is not None:
        check_integers("contrastive_loss", "document_ids", document_ids, "[n_pairs]")
    mask = None if row_mask is None else as_mask("contrastive_loss", row_mask)
    a, b = _directions(first, mask), _directions(second, mask)
    of_blocks = _by_blocks(_info_nce_block, block_elements, a, b, mask, document_ids, temperature)
    if not of_blocks:
        return a.sum() + b.sum()  # 0, connected to the graph
    of_queries, partner, lse = zip(*of_blocks, strict=True)
    lse_of_keys = lse[0] if len(lse) == 1 else torch.stack(lse).logsumexp(0)
    losses = torch.cat(of_queries) + (lse_of_keys - torch.cat(partner))
    if mask is None:
        return 0.5 * losses.mean()
    return 0.5 * (losses * mask).sum() / mask.sum().clamp_min(1)


def _info_nce_block(
    start: int,
    queries: Tensor,  # [block_rows, hidden_size]
    keys: Tensor,  # [n_pairs, hidden_size]
    mask: Tensor | None,  # [n_pairs] bool
    document_ids: Tensor | None,  # [n_pairs]
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # [block_rows], [block_rows], [n_pairs]
    """Of each query, -log softmax of its partner over the keys, and the partner's similarity; of each key, log sum exp
    over these queries: with that of other blocks, what the other direction needs.
    """
    stop = start + queries.shape[0]
    rows = torch.arange(start, stop, device=queries.device)
    with without_autocast(queries.device):
        similarity = queries @ keys.T / temperature
    is_left_out = None
    if document_ids is not None:  # all of the same document but the partner
        is_left_out = document_ids[start:stop].unsqueeze(1) == document_ids
        is_left_out = is_left_out & (rows.unsqueeze(1) != torch.arange(keys.shape[0], device=queries.device))
    if mask is not None:
        is_masked = ~(mask[start:stop].unsqueeze(1) & mask)
        is_left_out = is_masked if is_left_out is None else is_left_out | is_masked
    if is_left_out is not None:
        similarity = similarity.masked_fill(is_left_out, LEFT_OUT)
    losses = cross_entropy(similarity, rows, reduction="none")
    # of the same product as log sum exp: where a row is sure, the two cancel, in the gradient too
    return losses, similarity.gather(1, rows.unsqueeze(1)).squeeze(1), similarity.logsumexp(0)


def simctg(
    hidden_states: Tensor,  # [batch_size, n_tokens, hidden_size]
    attention_mask: Tensor | None = None,  # [batch_size, n_tokens]
    *,
    segment_ids: Tensor | None = None,  # [batch_size, n_tokens]
    margin: float = 0.5,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """SimCTG: pushes the representations of different tokens of a sequence apart.

        loss = sum over pairs i != j of max(0, margin - 1 + cos(h_i, h_j)) / number of pairs

    A pair is two tokens that count, of the same sequence and segment. One mean goes over all pairs of the batch, as in
    the authors' code.

    Args:
        hidden_states: the last layer's representations.
        attention_mask: not 0 where a token counts; None: all.
        segment_ids: separate documents packed in one row; [1, n_tokens] broadcasts; None: a row is one segment.
        margin: rho; a cosine of at most 1 - margin costs nothing.
        block_elements: how many similarities are held at a time (at least one row of them).

    Returns:
        Scalar, float32 (float64 for float64 inputs); 0 where no sequence has two tokens.

    Raises:
        ValueError: shapes do not fit, or segment_ids are not integers.

    Example:
        >>> simctg(torch.ones(1, 5, 8))  # all tokens are alike: the margin
        tensor(0.5000)

    Source: Su et al. 2022, "A contrastive framework for neural text generation", equation 2.
    """
    check_is_tensor("contrastive_loss", "hidden_states", hidden_states)
    check_are_tensors("contrastive_loss", attention_mask=attention_mask, segment_ids=segment_ids)
    if hidden_states.dim() != 3:
        raise ValueError(
            "contrastive_loss: expected hidden_states [batch_size, n_tokens, hidden_size], "
            f"got {list(hidden_states.shape)}"
        )
    batch_size, n_tokens, _ = hidden_states.shape
    for name, value in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if value is not None and not has_shape(value, (batch_size, n_tokens), (1, n_tokens)):
            raise ValueError(
                f"contrastive_loss: expected {name} of shape [{batch_size}, {n_tokens}], got {list(value.shape)}"
            )
    if segment_ids is not None:
        check_integers("contrastive_loss", "segment_ids", segment_ids, "[batch_size, n_tokens]")
    mask = None if attention_mask is None else kept_by("contrastive_loss", attention_mask).expand(batch_size, n_tokens)
    segments = None if segment_ids is None else segment_ids.expand(batch_size, n_tokens)
    directions = _directions(hidden_states, mask)
    total = directions[..., :0].sum()
    n_pairs = torch.zeros((), dtype=torch.int64, device=hidden_states.device)
    for costs, n in _by_blocks(_simctg_block, block_elements, directions, directions, mask, segments, margin):
        total, n_pairs = total + costs, n_pairs + n
    return total / n_pairs.clamp_min(1)


def _simctg_block(
    start: int,
    queries: Tensor,  # [batch_size, block_rows, hidden_size]
    keys: Tensor,  # [batch_size, n_tokens, hidden_size]
    mask: Tensor | None,  # [batch_size, n_tokens] bool
    segments: Tensor | None,  # [batch_size, n_tokens]
    margin: float,
) -> tuple[Tensor, Tensor]:  # [], []
    """Of the queries, the sum of what pairs cost and how many pairs there are."""
    columns, stop = torch.arange(keys.shape[1], device=keys.device), start + queries.shape[1]
    pairs = columns[start:stop, None] != columns  # [block_rows, n_tokens], or of each sequence
    if mask is not None:
        pairs = pairs & mask[:, start:stop, None] & mask[:, None, :]
    if segments is not None:
        pairs = pairs & (segments[:, start:stop, None] == segments[:, None, :])
    with without_autocast(queries.device):
        cosines = queries @ keys.transpose(1, 2)
    excess = torch.relu(margin - 1 + cosines)
    return torch.where(pairs, excess, 0.0).sum(), pairs.expand(excess.shape).sum()


def _by_blocks(
    of_block: Callable[..., tuple[Tensor, ...]],
    block_elements: int,
    queries: Tensor,  # [..., n_rows, hidden_size]
    *beside: Any,
) -> list[tuple[Tensor, ...]]:
    """of_block(its first row, its queries, *beside) of each block; of several, backward computes each again."""
    n_rows = queries.shape[-2]
    block_rows = max(1, block_elements // max(math.prod(queries.shape[:-1]), 1))
    n_blocks = (n_rows + block_rows - 1) // block_rows  # a compiled graph fits every n_rows with as many
    if n_blocks == 1:
        return [of_block(0, queries, *beside)]
    starts = (block * block_rows for block in range(n_blocks))
    of_blocks = ((start, queries.narrow(-2, start, min(block_rows, n_rows - start)), *beside) for start in starts)
    return [without_activations(of_block, *arguments) for arguments in of_blocks]


def _directions(vectors: Tensor, mask: Tensor | None) -> Tensor:  # [..., hidden_size], [...] -> [..., hidden_size]
    """Vectors of length 1 where mask, 0 elsewhere; a zero vector stays zero, with gradient 0. mask None: all count."""
    check_real("contrastive_loss", "representations", vectors)
    vectors = vectors.to(accumulation_dtype(vectors.dtype))
    if mask is not None:
        vectors = torch.where(mask.unsqueeze(-1), vectors, 0.0)
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * torch.where(length == 0, 0.0, 1 / length.masked_fill(length == 0, 1.0))


class ContrastiveLoss(Part):
    """InfoNCE of a pair of representations, or SimCTG over the tokens of one; see info_nce and simctg.

    Args:
        temperature: of InfoNCE.
        margin: of SimCTG.
        weight: factor of the loss.

    Example:
        >>> loss_fn = ContrastiveLoss(temperature=0.07)
        >>> queries, documents = torch.randn(4, 16), torch.randn(4, 16)  # [n_pairs, hidden_size] each
        >>> loss = loss_fn(queries, documents)
        >>> loss = loss_fn(hidden_states, attention_mask=attention_mask)  # [batch_size, n_tokens, hidden_size]: SimCTG
    """

    name = "contrastive"
    keys = ("contrastive_loss",)

    def __init__(
        self,
        temperature: float = UnifiedLossConfig.contrastive_temperature,
        margin: float = 0.5,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive("contrastive_loss", temperature=temperature)
        check_weights("contrastive_loss", margin=margin, weight=weight)
        self.temperature = temperature
        self.margin = margin
        self.weight = weight

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> ContrastiveLoss | None:
        """The loss where use_contrastive_loss is set."""
        if not config.use_contrastive_loss:
            return None
        return cls(config.contrastive_temperature, weight=config.contrastive_weight)

    def of_call(self, call: Call) -> Addends:
        """InfoNCE of the call's pair, or SimCTG of its hidden states."""
        if call.contrastive_pair is not None:
            loss = self(*_two_tensors(call.contrastive_pair))
        else:
            tokens, segments = call.hidden_states, call.segments
            if tokens is None:
                raise ValueError("unified_loss: use_contrastive_loss needs contrastive_pair or hidden_states, got None")
            if not call.labels_are_shifted:  # the row behind the last label is none
                tokens, segments = tokens[:, :-1], None if segments is None else segments[:, :-1]
            loss = self(tokens, attention_mask=call.keep_targets, segment_ids=segments)
        return Addends({"contrastive_loss": call.rows.batch_share * loss})

    def forward(
        self,
        inputs: Tensor,  # [n_pairs, hidden_size] or [batch_size, n_tokens, hidden_size]
        targets: Tensor | None = None,  # [n_pairs, hidden_size]
        attention_mask: Tensor | None = None,  # [n_pairs] or [batch_size, n_tokens]
        return_detailed: bool = False,
        *,
        segment_ids: Tensor | None = None,  # [batch_size, n_tokens]
        document_ids: Tensor | None = None,  # [n_pairs]
    ) -> Tensor | dict[str, Tensor]:
        """The weighted loss.

        Args:
            inputs: with targets, the first elements of the pairs. Without, [batch_size, n_tokens, hidden_size] for
                SimCTG, or [2 n_pairs, hidden_size], whose second half holds the partners of the first.
            targets: the second elements of the pairs.
            attention_mask: not 0 where a pair or a token counts; None: all.
            return_detailed: return {"total_loss", "contrastive_loss"}, the second detached.
            segment_ids: SimCTG: documents packed in one row.
            document_ids: InfoNCE: pairs of one document do not serve as negatives of each other.

        Returns:
            Scalar, or the dict.

        Raises:
            ValueError: shapes that do not fit, segment_ids for InfoNCE, document_ids for SimCTG.
        """
        check_is_tensor("contrastive_loss", "inputs", inputs)
        check_are_tensors("contrastive_loss", targets=targets, attention_mask=attention_mask)
        is_simctg = targets is None and inputs.dim() == 3
        if is_simctg and document_ids is not None:
            raise ValueError("contrastive_loss: expected no document_ids with SimCTG, which takes segment_ids")
        if not is_simctg and segment_ids is not None:
            raise ValueError("contrastive_loss: expected no segment_ids with InfoNCE, which takes document_ids")
        if is_simctg:
            loss = simctg(inputs, attention_mask, segment_ids=segment_ids, margin=self.margin)
        else:
            if targets is None:
                if inputs.dim() != 2 or inputs.shape[0] % 2:
                    raise ValueError(
                        "contrastive_loss: without targets, expected inputs [2 n_pairs, hidden_size] or "
                        f"[batch_size, n_tokens, hidden_size], got {list(inputs.shape)}"
                    )
                inputs, targets = inputs.chunk(2)
            mask = None if attention_mask is None else kept_by("contrastive_loss", attention_mask)
            loss = info_nce(inputs, targets, temperature=self.temperature, row_mask=mask, document_ids=document_ids)
        loss = self.weight * loss
        if not return_detailed:
            return loss
        return {"total_loss": loss, "contrastive_loss": loss.detach().clone()}


def _two_tensors(pair: Any) -> tuple[Tensor, Tensor]:
    """contrastive_pair, checked."""
    if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
        got = [type(part).__name__ for part in pair] if isinstance(pair, Sequence) else type(pair).__name__
        raise TypeError(f"unified_loss: expected contrastive_pair to be two tensors, got {got}")
    first, second = pair
    return first, second
