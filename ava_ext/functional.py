"""Losses with the signatures of torch.nn.functional, and z-loss, focal loss and other terms of a row as keywords."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction  # what torch.nn.functional itself reads the deprecated flags with

from ava_ext.config import UnifiedLossConfig, plain
from ava_ext.losses import ROW_TERMS
from ava_ext.ops.arguments import check_constants, check_integers, check_is_tensor, check_real, check_shape
from ava_ext.ops.counted_rows import host_sees
from ava_ext.ops.derivatives import as_constant, refuse_tangents
from ava_ext.ops.dtensor_logits import check_is_logits, has_dtensor
from ava_ext.ops.dtensors import is_dtensor, whole
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_fields import RowFlags, accumulation_dtype, row_options, target_weights
from ava_ext.ops.row_weights import count_rows
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.reduction import classes_of

REDUCTIONS = ("mean", "sum", "none")
_PYTHON = (bool, str, type(None))
# options of UnifiedLossConfig that say something of a row of logits; label_smoothing has a keyword of its own
ROW_OPTIONS = frozenset(
    {
        "vocab_size", "initial_temperature", "smoothing_mode", "logit_scale", "logit_softcap", "z_loss_weight",
        "confidence_penalty_weight", "use_focal_loss", "focal_alpha", "focal_gamma", "token_reweighting",
        "reweighting_exponent", "inplace_gradient", "linear_chunk_bytes",
    }
)  # fmt: skip


def cross_entropy(
    input: Tensor | LinearLogits,  # [n_columns], [n_rows, n_columns] or [n_rows, n_columns, ...]
    target: Tensor,  # [], [n_rows] or [n_rows, ...]; probabilities: as input
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = UnifiedLossConfig.ignore_index,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """torch.nn.functional.cross_entropy at the speed of this library, with every other term of a row as a keyword.

    The classes are the second dimension, as in torch. With three and more dimensions, it is fastest if the classes are
    last in memory. A batch in which no row counts gives 0, not nan.

    Args:
        input: logits; or LinearLogits [..., n_columns], whose classes are the last dimension.
        target: class indices in [0, vocab_size), or ignore_index. Or floating-point probabilities q of the classes, of
            input's shape, for the loss sum_c q_c (-log p_c); they may require grad.
        weight: [n_columns], the weight of each class. "mean" divides by the sum of the targets' weights, as torch does;
            with probabilities, or where that sum is 0, by the number of rows.
        size_average, reduce: deprecated in torch; use reduction.
        ignore_index: target of a row that does not count. With probabilities every row counts.
        reduction: "mean" over the rows that count, "sum" or "none".
        label_smoothing: probability mass spread over the classes; with weight, each has its weight there too. Columns
            beyond vocab_size and those masked by a logit of -inf (with probabilities, weight and LinearLogits: by a
            bias of -inf) get none.
        options: initial_temperature, smoothing_mode, logit_scale, logit_softcap, z_loss_weight,
            confidence_penalty_weight, use_focal_loss, focal_alpha, focal_gamma, token_reweighting,
            reweighting_exponent, vocab_size, inplace_gradient and linear_chunk_bytes, as in `UnifiedLossConfig`. These
            and label_smoothing may also be numpy's numbers, or tensors on the CPU, which are read at every call; in a
            graph of torch.compile they must be Python's numbers.

    Returns:
        [], or with reduction="none" one for each row; float32, or float64 for float64 input.

    Raises:
        ValueError: shapes do not fit; or an option is out of its range, needs `UnifiedLoss`, or needs one target for
            each row and got probabilities.
        TypeError: there is no such option, an argument is not a tensor, or ignore_index is not an integer.
        IndexError: a target is out of range.

    Example:
        >>> rows = logits.flatten(0, 1)  # [n_rows, n_columns]
        >>> loss = functional.cross_entropy(rows, targets.flatten(), label_smoothing=0.1, z_loss_weight=1e-4)
        >>> loss.backward()
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    check_is_logits("cross_entropy", input, "input")
    check_is_tensor("cross_entropy", "target", target)
    if isinstance(input, Tensor) and input.dim() > 2:
        input = input.movedim(1, -1)
        if target.is_floating_point() and target.dim() > 2:
            target = target.movedim(1, -1)
    return _row_loss("cross_entropy", input, target, weight, reduction, ignore_index, label_smoothing, options)


def linear_cross_entropy(
    input: Tensor,  # [n_rows, hidden_size] or [..., hidden_size]
    linear_weight: Tensor,  # [n_columns, hidden_size]
    target: Tensor,  # [n_rows] or [...]; probabilities: [..., n_columns]
    *,
    linear_bias: Tensor | None = None,  # [n_columns]
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """`cross_entropy` of linear(input, linear_weight, linear_bias), a chunk of rows at a time.

    It has the signature of torch.nn.functional.linear_cross_entropy, except that linear_chunk_bytes sets the size of a
    chunk in place of torch's `options`.

    Args:
        input, linear_weight, linear_bias: logits = input @ linear_weight.T + linear_bias predict target.
        ignore_index: target of a row that does not count; None: -100.
        weight, target, reduction, label_smoothing, options: as in `cross_entropy`.

    Returns:
        [], or with reduction="none" one for each row; float32, or float64 for float64 input.

    Raises:
        As `cross_entropy`.

    Example:
        >>> loss = functional.linear_cross_entropy(hidden_states, lm_head.weight, targets, z_loss_weight=1e-4)
        >>> loss.backward()
    """
    logits = LinearLogits(input, linear_weight, linear_bias)
    logits.check("linear_cross_entropy", ("input", "linear_weight", "linear_bias"))
    check_is_tensor("linear_cross_entropy", "target", target)
    index = UnifiedLossConfig.ignore_index if ignore_index is None else ignore_index
    return _row_loss("linear_cross_entropy", logits, target, weight, reduction, index, label_smoothing, options)


def _row_loss(
    owner: str,
    logits: Tensor | LinearLogits,  # [..., n_columns]
    target: Tensor,  # [...], or probabilities [..., n_columns]
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    options: dict[str, Any],
) -> Tensor:  # [] or [...]
    options = {name: _number(owner, name, value) for name, value in options.items()}
    ignore_index = _number(owner, "ignore_index", ignore_index)
    if type(ignore_index) is not int:
        raise TypeError(f"{owner}: expected ignore_index to be an integer, got {ignore_index!r}")
    label_smoothing = _number(owner, "label_smoothing", label_smoothing)
    terms = _row_terms(owner, label_smoothing, **options)
    if weight is not None:
        check_is_tensor(owner, "weight", weight)
        check_shape(owner, logits.shape[-1:], weight=weight)
        check_real(owner, "weight", weight)
        check_constants(owner, weight=weight)
    probabilities = None
    if target.is_floating_point():
        _check_probabilities(owner, target, logits, ignore_index, terms)
        probabilities = target
        if weight is not None:
            of_columns = (_beside(target, weight), label_smoothing, logits, options.get("vocab_size"))
            probabilities = _weighted_probabilities(target, *of_columns)
            terms = _row_terms(owner, 0.0, **options)
        target = target.new_zeros(target.shape[:-1], dtype=torch.int64)
        weight = None
    if reduction not in REDUCTIONS:
        raise ValueError(f"{owner}: expected reduction to be one of {REDUCTIONS}, got {reduction!r}")
    check_shape(owner, logits.shape[:-1], target=target)
    dtype = accumulation_dtype(logits.dtype)
    if target.dtype != torch.int64:
        check_integers(owner, "target", target)
        target = target.long()
    target = whole(owner, "target", target, has_dtensor(logits))
    row_weights = candidates = smoothing_weights = None
    flags = terms.flags
    if weight is not None:
        weight = whole(owner, "weight", weight, True).to(dtype).contiguous()
        flags |= RowFlags.TARGET_WEIGHTS
        candidates = target_weights(classes_of(target, weight))
        smoothing_weights = weight if label_smoothing > 0 else None
    if reduction == "mean":
        *_, row_weights = count_rows(target.reshape(-1), None, None, weight, None, ignore_index, True, dtype)
        row_weights = row_weights.view(target.shape)
    return row_loss(
        logits,
        target,
        row_options(target.new_empty(0, dtype=dtype), **dict(terms.options)),
        flags=flags,
        row_weights=row_weights,
        candidates=candidates,
        vocab_size=options.get("vocab_size"),
        ignore_index=ignore_index,
        reduction="none" if reduction == "none" else "sum",
        inplace_gradient=options.get("inplace_gradient", False),
        chunk_bytes=options.get("linear_chunk_bytes"),
        target_probabilities=probabilities,
        smoothing_weights=smoothing_weights,
    ).loss


def _check_probabilities(
    owner: str,
    probabilities: Tensor,  # [..., n_columns]
    logits: Tensor | LinearLogits,  # [..., n_columns]
    ignore_index: int,
    terms: _RowTerms,
) -> None:
    if probabilities.shape != logits.shape:
        raise ValueError(
            f"{owner}: expected probabilities as target of shape {list(logits.shape)}, got {list(probabilities.shape)}"
        )
    if ignore_index >= 0:
        raise ValueError(f"{owner}: expected no ignore_index beside probabilities as target, got {ignore_index}")
    if terms.needs_one_target is not None:
        raise ValueError(f"{owner}: {terms.needs_one_target} needs one target for each row, got probabilities")


def _weighted_probabilities(
    probabilities: Tensor,  # [..., n_columns]
    weight: Tensor,  # [n_columns]
    label_smoothing: float,
    logits: Tensor | LinearLogits,  # [..., n_columns]
    vocab_size: int | None,
) -> Tensor:  # [..., n_columns]
    """w_c ((1 - e) q_c + e/V), which leaves no smoothing to the kernel.

    e/V is 0 on the columns that are not there, and V the number of those that are, as in the kernel.
    """
    dtype = torch.promote_types(accumulation_dtype(probabilities.dtype), accumulation_dtype(logits.dtype))
    probabilities, weight = probabilities.to(dtype), weight.to(dtype)
    if label_smoothing == 0:
        return probabilities * weight
    is_there = _columns_that_are_there(logits, vocab_size)
    share = label_smoothing / is_there.sum(-1, keepdim=True).clamp_min(1).to(dtype)
    share = _beside(probabilities, torch.where(is_there, share, 0)) * weight
    return probabilities * ((1 - label_smoothing) * weight) + share


def _columns_that_are_there(
    logits: Tensor | LinearLogits,  # [..., n_columns]
    vocab_size: int | None,
) -> Tensor:  # [..., n_columns], or [n_columns] where they are the same in every row
    """Not padding, and not masked by a logit of -inf; of LinearLogits, whose logits do not exist, by a bias of -inf."""
    columns = torch.arange(logits.shape[-1], device=logits.device)
    is_there = columns < (logits.shape[-1] if vocab_size is None else vocab_size)
    masked_by = logits.bias if isinstance(logits, LinearLogits) else logits
    # to look for the lowest costs a small part of what it costs to compare and to choose
    if masked_by is None or (masked_by.numel() and host_sees(masked_by) and masked_by.detach().amin() > -math.inf):
        return is_there
    is_masked = masked_by.detach() == -math.inf
    return is_there & ~(is_masked.full_tensor() if is_dtensor(is_masked) else is_masked)


def _beside(
    target: Any,  # [...] or [..., n_columns]
    values: Any,  # [...]: the same on every rank
) -> Any:
    """Values as a DTensor where the target is one, and else as none: torch multiplies no DTensor by a Tensor."""
    if is_dtensor(target) == is_dtensor(values):
        return values
    if is_dtensor(values):
        return values.full_tensor()
    from torch.distributed.tensor import DTensor, Replicate

    mesh = target.device_mesh
    return DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)


class _RowTerms(NamedTuple):
    """What the options of a call come to; without tensors, so that it can be kept."""

    flags: int
    options: tuple[tuple[str, float], ...]  # of row_options
    needs_one_target: str | None  # as of the configuration


def _number(owner: str, name: str, value: Any) -> Any:
    """The option as Python's own number, as UnifiedLossConfig keeps it, and as it is at this call."""
    if type(value) in (float, int):
        return as_constant(value)
    if type(value) in _PYTHON:
        return value
    if isinstance(value, Tensor):
        check_constants(owner, **{name: value})
        refuse_tangents(owner, (value,))
        device = value.device.type
        if device != "cpu":  # to read it would wait for the device at every call
            raise ValueError(
                f"{owner}: expected {name} to be a number of Python, or a tensor on the CPU, got one on {device}"
            )
    if torch.compiler.is_compiling() and hasattr(value, "tolist"):  # in a graph it has no value, or that of now forever
        raise ValueError(f"{owner}: expected {name} to be a number of Python in a compiled graph")
    return plain(value)


@functools.lru_cache(maxsize=1024, typed=True)
def _make_row_terms(owner: str, label_smoothing: float, /, **given: Any) -> _RowTerms:
    UnifiedLossConfig.check_names(given, owner)
    if "class_weights" in given:
        raise TypeError(f"{owner}: unknown option 'class_weights'; did you mean 'weight'?")
    for name in given:
        if name not in ROW_OPTIONS:
            raise ValueError(f"{owner}: {name} needs a module: expected UnifiedLoss, got the function")
    UnifiedLossConfig.checked(owner, label_smoothing=label_smoothing, **given)
    # of the row terms none depends on the vocabulary, whose size may be unknown while a graph is traced
    any_size = {"vocab_size": 1, **given}
    config = UnifiedLossConfig(primary_loss_type="standard", label_smoothing=label_smoothing, **any_size)
    terms = [term for module in ROW_TERMS if (term := module.from_config(config)) is not None]
    return _RowTerms(
        int(functools.reduce(operator.or_, (term.flags for term in terms))),
        tuple((name, value) for term in terms for name, value in term.options.items()),
        config.needs_one_target,
    )


def _row_terms(owner: str, label_smoothing: float, /, **options: Any) -> _RowTerms:
    is_hashable = all(isinstance(value, Hashable) for value in (label_smoothing, *options.values()))
    make = _make_row_terms if is_hashable else _make_row_terms.__wrapped__  # which names what is out of its range
    return make(owner, label_smoothing, **options)


# while a graph is traced the options are checked, not traced. This is what torch.compiler.assume_constant_result sets;
# the decorator itself imports torch._dynamo, which takes more than a second
_row_terms._dynamo_marked_constant = True  # type: ignore[attr-defined]
