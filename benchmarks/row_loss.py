"""The loss of one batch of logits and its gradient: ours, PyTorch's, and a copy of the logits as the yardstick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from composed import composed_loss
from torch import Tensor

from ava_ext import UnifiedLoss, repetition_candidates
from ava_ext.bench.timing import Times, interleave
from ava_ext.bench.variants import Rewritten
from ava_ext.ops import RowFlags, row_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
EOS = 0
SOFTCAP = 30.0
# what composed_loss and UnifiedLoss both take
DENSE_TERMS = {
    "label_smoothing": 0.1,
    "focal_gamma": 2.0,
    "z_loss_weight": 1e-4,
    "confidence_penalty_weight": 0.1,
}
# 8 slots of n-grams, one of immediate repetition, one of EOS, and negative_ids: 32 candidates a row
N_NEGATIVES = 22
IMMEDIATE_WEIGHT, EOS_WEIGHT, NGRAM_WEIGHT = 0.5, 0.05, 0.1
EVERY_TERM: dict[str, Any] = {
    **DENSE_TERMS,
    "use_focal_loss": True,
    "use_immediate_repetition_penalty": True,
    "immediate_repetition_weight": IMMEDIATE_WEIGHT,
    "eos_token_id": EOS,
    "eos_penalty_weight": EOS_WEIGHT,
    "min_sequence_length": 1 << 20,  # so that EOS is early in every row
    "use_ngram_penalty": True,
    "ngram_size": 2,
    "ngram_penalty_weight": NGRAM_WEIGHT,
}


class Case:
    """Logits and targets of one size and dtype. `refill` writes the logits anew, as the last GEMM of a model does."""

    def __init__(
        self,
        n_rows: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        n_sequences: int = 1,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.source = torch.empty(n_rows, vocab_size, dtype=dtype, device=device).normal_(0, 2, generator=generator)
        self.buffer = torch.empty_like(self.source)
        # sixteen words: a text that repeats itself, so that the slots of n-grams are filled
        words = torch.randint(1, vocab_size, (16,), generator=generator, device=device)
        self.targets = words[torch.randint(0, 16, (n_rows,), generator=generator, device=device)]
        self.negative_ids = torch.randint(0, vocab_size, (n_rows, N_NEGATIVES), generator=generator, device=device)
        self.text_shape = (n_sequences, n_rows // n_sequences)
        self.logits: Tensor
        self.refill()

    def refill(self) -> None:
        """Fresh logits [n_rows, vocab_size] that require grad and are no leaf; always in the same memory."""
        self.logits = Rewritten.apply(torch.zeros((), device=self.source.device, requires_grad=True), self)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Ids and weights [n_rows, 32] for composed_loss. UnifiedLoss finds them itself, within its time."""
        text = self.targets.view(self.text_shape)
        ids, weights, _ = repetition_candidates(
            text,
            text,
            weights=self.targets.new_tensor([IMMEDIATE_WEIGHT, 1.0, EOS_WEIGHT, NGRAM_WEIGHT], dtype=torch.float64),
            vocab_size=self.source.shape[-1],
            use_immediate_repetition_penalty=True,
            eos_token_id=EOS,
            min_sequence_length=EVERY_TERM["min_sequence_length"],
            use_ngram_penalty=True,
            ngram_size=EVERY_TERM["ngram_size"],
        )
        ids = torch.cat([ids.flatten(0, 1).long(), self.negative_ids], -1)
        weights = torch.cat([weights.flatten(0, 1), torch.ones_like(self.negative_ids, dtype=weights.dtype)], -1)
        absent = (ids < 0) | (ids == self.targets.unsqueeze(-1))
        real = torch.float64 if self.source.dtype == torch.float64 else torch.float32
        return ids.clamp_min(0), weights.masked_fill(absent, 0).to(real)


class Variant(NamedTuple):
    """One way to get from case.logits to the loss [] and its gradient [n_rows, vocab_size]."""

    label: str
    call: Callable[[], tuple[Tensor, Tensor]]
    is_slow: bool = False
    is_compiled: bool = False


def forward_and_backward(case: Case, loss: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    def call() -> tuple[Tensor, Tensor]:
        value = loss(case.logits)
        return value, torch.autograd.grad(value, case.logits)[0]

    return call


def _ours(case: Case, **options: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    loss_fn = UnifiedLoss(case.source.shape[-1], primary_loss_type="standard", **options).to(case.source.device)
    return forward_and_backward(case, lambda logits: loss_fn(logits, case.targets))


def _ours_with_every_term(case: Case, **options: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    loss_fn = UnifiedLoss(case.source.shape[-1], primary_loss_type="standard", **EVERY_TERM, **options)
    loss_fn.to(case.source.device)
    targets, negative_ids = (value.unflatten(0, case.text_shape) for value in (case.targets, case.negative_ids))

    def loss(logits: Tensor) -> Tensor:  # [n_rows, vocab_size]
        return loss_fn(logits.unflatten(0, case.text_shape), targets, negative_ids=negative_ids)

    return forward_and_backward(case, loss)


def _kernel_in_place(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    coefficients = row_options(case.source)
    n_rows, vocab_size = case.source.shape
    row_weights = coefficients.new_full((n_rows,), 1 / n_rows)
    options = (None, None, [], int(RowFlags.CROSS_ENTROPY), vocab_size, -100)

    def call() -> tuple[Tensor, Tensor]:
        row_loss, _ = torch.ops.ava_ext.row_loss_(case.buffer, case.targets, coefficients, row_weights, *options)
        return row_loss.sum(), case.buffer

    return call


def _copy(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    destination = torch.zeros_like(case.source)
    return lambda: (destination, destination.copy_(case.buffer))


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def make_variants(case: Case) -> dict[str, Variant]:
    """All variants, by the name they have in the JSON."""
    targets, candidates = case.targets, case.candidates()
    plain_compiled = _compile(F.cross_entropy)
    variants = {
        "eager": Variant("F.cross_entropy", forward_and_backward(case, lambda z: F.cross_entropy(z, targets))),
        "compiled": Variant(
            "F.cross_entropy, compiled",
            forward_and_backward(case, lambda z: plain_compiled(z, targets)),
            is_compiled=True,
        ),
        "copy": Variant("copy_ of the logits", _copy(case)),
        "ours": Variant("UnifiedLoss", _ours(case)),
        "ours_inplace": Variant("UnifiedLoss, inplace_gradient", _ours(case, inplace_gradient=True)),
        "ours_kernel": Variant("row_loss_ on its own buffer", _kernel_in_place(case)),
    }
    for prefix, softcap in (("terms", None), ("softcap", SOFTCAP)):
        options = {**DENSE_TERMS, "logit_softcap": softcap}
        end = " + soft cap" if softcap else ""

        def composed(z: Tensor, options: dict[str, Any] = options) -> Tensor:
            return composed_loss(z, targets, *candidates, **options)

        variants |= {
            f"{prefix}_eager": Variant(
                f"every term{end}: composed", forward_and_backward(case, composed), is_slow=True
            ),
            f"{prefix}_compiled": Variant(
                f"every term{end}: composed, compiled",
                forward_and_backward(case, _compile(composed)),
                is_slow=True,
                is_compiled=True,
            ),
            f"{prefix}_ours": Variant(
                f"every term{end}: UnifiedLoss", _ours_with_every_term(case, logit_softcap=softcap)
            ),
            f"{prefix}_ours_inplace": Variant(
                f"every term{end}: UnifiedLoss, inplace_gradient",
                _ours_with_every_term(case, logit_softcap=softcap, inplace_gradient=True),
            ),
        }
    return variants


def relative(times: Times, name: str) -> dict[str, float]:
    """Speed against PyTorch (every term: against the composition), and time over copy_ and over plain UnifiedLoss."""
    prefix = name.split("_")[0] + "_" if name.startswith(("terms_", "softcap_")) else ""
    return {
        "faster_than_eager": times.ratio(f"{prefix}eager", name),
        "faster_than_compiled": times.ratio(f"{prefix}compiled", name),
        "time_over_copy": times.ratio(name, "copy"),
        "time_over_ours": times.ratio(name, "ours"),
    }


def measure(
    n_rows: int, vocab_size: int, dtype: torch.dtype, *, rounds: int, slow_every: int
) -> tuple[Times, dict[str, Variant]]:
    """Times of forward and backward of every variant; the slow ones run in every slow_every-th round only."""
    torch.compiler.reset()  # sizes of earlier cases would count against the limit of recompilations
    case = Case(n_rows, vocab_size, dtype)
    variants = make_variants(case)
    times = interleave(
        {name: variant.call for name, variant in variants.items()},
        rounds=rounds,
        before=case.refill,
        every={name: slow_every for name, variant in variants.items() if variant.is_slow},
    )
    return times, variants
