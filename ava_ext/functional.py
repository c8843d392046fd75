"""UnifiedLoss as a function, where nothing has to be remembered between two calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.unified_loss import UnifiedLoss

# options of what has parameters, buffers or further inputs
_OF_A_MODULE = (
    "use_mtp",
    "use_moe_balancing",
    "use_diversity_loss",
    "use_auxiliary_loss",
    "use_contrastive_loss",
    "adaptive_temperature",
)


def linear_unified_loss(
    input: Tensor,  # [batch_size, n_tokens, hidden_size] or [n_rows, hidden_size]
    linear_weight: Tensor,  # [n_columns, hidden_size]
    target: Tensor,  # [batch_size, n_tokens] or [n_rows]
    *,
    linear_bias: Tensor | None = None,  # [n_columns]
    attention_mask: Tensor | None = None,  # as target
    token_weights: Tensor | None = None,  # as target
    input_ids: Tensor | None = None,  # as target
    position_ids: Tensor | None = None,  # as target, or [1, n_tokens]
    segment_ids: Tensor | None = None,  # as target, or [1, n_tokens]
    cu_seqlens: Tensor | None = None,  # [n_segments + 1]
    num_items_in_batch: float | Tensor | None = None,
    negative_ids: Tensor | None = None,  # as target, and [n_negatives]
    negative_weights: Tensor | None = None,  # as negative_ids
    return_detailed: bool = False,
    **options: Any,
) -> Tensor | dict[str, Tensor]:
    """Cross-entropy, and every further row-wise term, of linear(input, linear_weight, linear_bias) without the logits.

    Arguments in the order of torch.nn.functional.linear_cross_entropy. Without options it is that function, but that a
    batch without a counted row gives 0, not nan.

    Args:
        input, linear_weight, linear_bias, target: logits = input @ linear_weight.T + linear_bias predict target.
        attention_mask to return_detailed: as in `UnifiedLoss`.
        options: of `UnifiedLossConfig`: reduction, ignore_index, label_smoothing, z_loss_weight, use_ngram_penalty,
            linear_chunk_bytes, ...; vocab_size is the number of rows of linear_weight if not given.

    Returns:
        As UnifiedLoss: a scalar, with reduction="none" of the shape of target, with return_detailed a dict.

    Raises:
        ValueError: on shapes that do not fit; on an option that needs a `UnifiedLoss`, which keeps parameters, states
            or takes further inputs. TypeError: on an unknown option. IndexError: on a counted target out of range.

    Example:
        >>> loss = linear_unified_loss(hidden_states, lm_head.weight, targets, z_loss_weight=1e-4)
        >>> loss.backward()
    """
    for name in _OF_A_MODULE:
        if options.get(name):
            raise ValueError(f"linear_unified_loss: {name} needs a module: expected UnifiedLoss, got the function")
    if options.get("primary_loss_type", "standard") != "standard":
        raise ValueError(
            "linear_unified_loss: expected primary_loss_type='standard', "
            f"got {options['primary_loss_type']!r}, which needs UnifiedLoss"
        )
    options.setdefault("vocab_size", linear_weight.shape[0])
    # lists as they stand in configuration files are no keys
    key = tuple([(name, tuple(value) if isinstance(value, list) else value) for name, value in sorted(options.items())])
    _make_loss(key)
    return _LOSSES[key](
        targets=target,
        attention_mask=attention_mask,
        hidden_states=input,
        return_detailed=return_detailed,
        lm_head_weight=linear_weight,
        lm_head_bias=linear_bias,
        token_weights=token_weights,
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
        num_items_in_batch=num_items_in_batch,
        negative_ids=negative_ids,
        negative_weights=negative_weights,
    )


# made at the first call with these options
_LOSSES: dict[tuple[tuple[str, Any], ...], UnifiedLoss] = {}


@torch.compiler.assume_constant_result  # a module is made while the graph is traced, not in it
def _make_loss(options: tuple[tuple[str, Any], ...]) -> None:
    if options not in _LOSSES:
        UnifiedLossConfig.check_names(dict(options), "linear_unified_loss")
        _LOSSES[options] = UnifiedLoss(**{**dict(options), "primary_loss_type": "standard"})
