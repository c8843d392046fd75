"""A weight for every column of a row, read beside its logits: target probabilities, or weights of label smoothing.

    probabilities q:         sum_j q_j (-log p_j), in place of the target's -log p
    smoothing weights w:     e/V sum_j w_j (-log p_j), in place of e/V sum_j (-log p_j)

The formulas of their gradient by the logits stand in csrc/softmax_rows.h. By the probabilities it is -log p.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ava_ext.ops.arguments import check_devices, with_dense_rows
from ava_ext.ops.counted_rows import host_sees
from ava_ext.ops.derivatives import refuse_tangents, wants_gradient, without_second_derivative
from ava_ext.ops.dtensor_logits import PlacedLogits
from ava_ext.ops.linear_logits import LinearLogits, rows_of_a_chunk, without_autocast
from ava_ext.ops.row_evaluation import RowOptions
from ava_ext.ops.row_fields import SMOOTHING_WEIGHTS, TARGET_PROBABILITIES, RowFlags, RowInputs, accumulation_dtype
from ava_ext.ops.sharded_logits import LocalRows, ShardedLogits

CACHE_BYTES = 2**19  # of a chunk of logits that exist, for each thread: several passes over it stay in the cache


def as_column_weights(
    logits: Tensor | LinearLogits | ShardedLogits,  # [..., n_columns]
    flags: int,
    vocab_size: int,
    target_probabilities: Tensor | None,  # [..., vocab_size]
    smoothing_weights: Tensor | None,  # [vocab_size]
) -> tuple[Tensor | None, int]:  # as given, and flags
    """column_weights as the operators take them, in the logits' type or float32 (float64), and the flag of their kind.

    Raises:
        ValueError: shapes do not fit, both are given, smoothing_weights require grad, or a target is to be left out of
            the smoothing beside target_probabilities.
        NotImplementedError: columns are spread over ranks.
    """
    given = smoothing_weights if target_probabilities is None else target_probabilities
    if given is None:
        return None, 0
    name = "smoothing_weights" if target_probabilities is None else "target_probabilities"
    if target_probabilities is not None and smoothing_weights is not None:
        raise ValueError("row_loss: expected target_probabilities or smoothing_weights, got both")
    if target_probabilities is not None and flags & RowFlags.EXCLUDE_TARGET:
        raise ValueError(
            "row_loss: expected flags without EXCLUDE_TARGET beside target_probabilities, which have no one target, "
            f"got {RowFlags(flags)!r}"
        )
    if isinstance(logits, ShardedLogits):
        raise NotImplementedError(f"row_loss: {name} beside logits whose columns are spread over ranks")
    check_devices("row_loss", logits, **{name: given})
    rows = () if target_probabilities is None else tuple(logits.shape[:-1])
    # no "in": in a graph it takes two sizes for different of which one is a symbol
    fits = given.shape[-1] == vocab_size or given.shape[-1] == logits.shape[-1]
    if given.shape[:-1] != rows or given.dim() != len(rows) + 1 or not fits:
        expected = ", ".join(map(str, (*rows, vocab_size)))
        raise ValueError(f"row_loss: expected {name} of shape [{expected}], got {list(given.shape)}")
    if not given.is_floating_point() or wants_gradient(given):
        got = "one that does" if given.is_floating_point() else given.dtype
        raise ValueError(f"row_loss: expected {name} of floating point that do not require grad, got {got}")
    real = accumulation_dtype(logits.dtype)
    if given.dtype not in (real, logits.dtype) or target_probabilities is None:
        given = given.to(real)
    return with_dense_rows(given), SMOOTHING_WEIGHTS if target_probabilities is None else TARGET_PROBABILITIES


def with_probability_gradient(
    loss: Tensor,  # [] or [...]
    target_probabilities: Tensor,  # [..., vocab_size], requires grad
    logits: PlacedLogits,  # [..., n_columns]
    inputs: RowInputs,  # of [...]
    chunk_bytes: int | None,
) -> Tensor:  # as loss
    """loss, whose derivative by a probability is row weight times (1 - e) times -log p, or 0 where the probability is 0
    and its column masked. Without RowFlags.CROSS_ENTROPY nothing of the loss is of the probabilities, and it is 0.

    Backward makes it with plain PyTorch; forward costs nothing, but within torch.func.
    """
    if isinstance(logits, Tensor) and torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        return _with_term_of_probabilities(loss, target_probabilities, logits, inputs)
    if isinstance(logits, (ShardedLogits, LocalRows)):
        raise NotImplementedError("row_loss: a gradient of target_probabilities beside logits spread over ranks")
    parts = tuple(logits) if isinstance(logits, LinearLogits) else (logits,)
    return _ProbabilityGradient.apply(loss, target_probabilities, inputs, (logits.dtype, chunk_bytes), *parts)


def _with_term_of_probabilities(
    loss: Tensor,  # [] or [...]
    target_probabilities: Tensor,  # [..., vocab_size], requires grad
    logits: Tensor,  # [..., n_columns]
    inputs: RowInputs,  # of [...]
) -> Tensor:  # as loss
    """loss and the term of the probabilities less itself, in plain PyTorch, which every transform of torch.func takes.

    Its derivatives by the probabilities are those that the loss has, by them and the logits too.
    """
    if not inputs.flags & RowFlags.CROSS_ENTROPY:
        return loss
    size = inputs.vocab_size
    ignored = (inputs.targets == inputs.ignore_index).unsqueeze(-1)  # such a row may hold nan
    log_probs = _log_probs(logits[..., :size].masked_fill(ignored, 0), inputs)
    has_no_part = (log_probs == -math.inf) & (target_probabilities[..., :size] == 0)
    difference = target_probabilities - target_probabilities.detach()  # 0, with the derivative of the first
    term = -(difference[..., :size].masked_fill(ignored, 0) * log_probs.masked_fill(has_no_part, 0)).sum(-1)
    term = _weighed(term, inputs)
    return loss + (term.sum() if loss.dim() < inputs.targets.dim() else term)


def _weighed(
    values: Tensor,  # [...]: of rows
    inputs: RowInputs,  # of [...]
) -> Tensor:  # [...]
    """Times what weighs the term of the probabilities in a row: its weight, and 1 - e."""
    if inputs.row_weights is not None:
        values = values * inputs.row_weights
    if inputs.flags & RowFlags.LABEL_SMOOTHING:
        values = values * (1 - RowOptions(*inputs.options.unbind()).label_smoothing)
    return values


class _ProbabilityGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, target_probabilities, inputs, constants, *parts):
        ctx.inputs = inputs._replace(targets=None, options=None, row_weights=None, candidates=None)
        ctx.constants, ctx.n_parts = constants, len(parts)
        ctx.save_for_backward(target_probabilities, inputs.targets, inputs.options, inputs.row_weights, *parts)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad_loss):
        refuse_tangents("row_loss", (grad_loss,))
        probabilities, targets, options, row_weights, *parts = ctx.saved_tensors
        inputs = ctx.inputs._replace(targets=targets, options=options, row_weights=row_weights)
        vocab_size, (dtype, chunk_bytes) = inputs.vocab_size, ctx.constants
        if not inputs.flags & RowFlags.CROSS_ENTROPY:
            return grad_loss, torch.zeros_like(probabilities), None, None, *(None,) * ctx.n_parts
        factors = _weighed(-grad_loss.expand(targets.shape), inputs)
        factors, ignored = factors.reshape(-1, 1), targets.reshape(-1) == inputs.ignore_index
        flat_probabilities = probabilities.reshape(-1, probabilities.shape[-1])
        # of the factors, so that it holds a batch where they do
        gradient = factors.new_zeros(flat_probabilities.shape, dtype=probabilities.dtype)
        states = parts[0].detach().reshape(-1, parts[0].shape[-1])
        # what the host can read is asked first: on the CPU a pass that compares or chooses takes as long as log_softmax
        host_knows = host_sees(targets)
        if host_knows and ctx.n_parts == 1:
            chunk_bytes = chunk_bytes or CACHE_BYTES * torch.get_num_threads()
        for rows in _chunks(factors.shape[0], vocab_size, dtype, gradient.device, chunk_bytes):
            logits = states[rows]
            if ctx.n_parts > 1:
                with without_autocast(gradient.device):
                    logits = logits.to(dtype) @ parts[1].detach()[:vocab_size].to(dtype).t()
                    if parts[2] is not None:
                        logits = logits + parts[2].detach()[:vocab_size].to(dtype)
            log_probs = _log_probs(logits[:, :vocab_size], inputs)
            if not (host_knows and log_probs.amin() > -math.inf):
                has_no_part = (log_probs == -math.inf) & (flat_probabilities[rows, :vocab_size] == 0)
                log_probs = log_probs.masked_fill(has_no_part, 0)
            gradient[rows, :vocab_size] = (log_probs * factors[rows]).to(gradient.dtype)
        if host_knows:
            gradient.index_fill_(0, ignored.nonzero().squeeze(1), 0)
        else:
            gradient.masked_fill_(ignored.unsqueeze(1), 0)
        gradient = gradient.view(probabilities.shape)
        gradient = without_second_derivative(gradient, probabilities, *parts, grad_loss)
        # the logits' gradient depends on the probabilities, and is differentiated by way of what comes from above
        grad_loss = without_second_derivative(grad_loss, probabilities, grad_loss)
        return grad_loss, gradient, None, None, *(None,) * ctx.n_parts


def _chunks(
    n_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None
) -> list[slice]:
    if torch.compiler.is_compiling():  # a graph of any number of rows has no loop over them
        return [slice(None)]
    size = rows_of_a_chunk(n_rows, vocab_size, dtype, device, chunk_bytes)
    return [slice(begin, begin + size) for begin in range(0, n_rows, size)]


def _log_probs(
    logits: Tensor,  # [n_rows, vocab_size]
    inputs: RowInputs,
) -> Tensor:  # [n_rows, vocab_size]
    given = RowOptions(*inputs.options.unbind())
    z = logits.to(inputs.options.dtype)
    if inputs.flags & RowFlags.SOFTCAP:
        z = torch.where(z == -math.inf, z, given.softcap * torch.tanh(z / given.softcap))
    return torch.log_softmax(z / given.temperature, -1)
