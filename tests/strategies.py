"""Hypothesis strategies that several test files draw from: problems for the kernels over rows of logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from ava_ext.ops.softmax_rows import Candidates, RowTerms, accumulation_dtype, row_coefficients

IGNORED = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass
class RowProblem:
    """The arguments of `row_loss`; the logits are a view of a base whose other elements are nan."""

    base: Tensor  # what holds the logits
    view: Callable[[Tensor], Tensor]  # base -> logits [..., n_columns]
    targets: Tensor  # [...]
    coefficients: Tensor  # [7]
    terms: int
    row_weights: Tensor | None  # [...]
    candidates: Candidates | None
    vocab_size: int
    ignore_index: int = IGNORED

    @property
    def logits(self):
        return self.view(self.base)

    @property
    def arguments(self):
        """The arguments of the op row_loss behind the logits."""
        ids, weights, groups = self.candidates or (None, None, ())
        return (
            self.targets, self.coefficients, self.row_weights, ids, weights, list(groups), self.terms, self.vocab_size,
            self.ignore_index,
        )  # fmt: skip

    @property
    def options(self):
        """The keyword arguments of the public function behind logits, targets and coefficients."""
        return dict(
            terms=self.terms,
            row_weights=self.row_weights,
            candidates=self.candidates,
            vocab_size=self.vocab_size,
            ignore_index=self.ignore_index,
        )

    @property
    def is_expanded(self):
        return any(
            stride == 0 and size > 1 for size, stride in zip(self.logits.shape, self.logits.stride(), strict=True)
        )

    def in_dtype(self, dtype):
        """The same numbers in another dtype, as far as it holds them."""
        real = accumulation_dtype(dtype)
        candidates = self.candidates and self.candidates._replace(weights=self.candidates.weights.to(real))
        return replace(
            self,
            base=self.base.to(dtype),
            coefficients=self.coefficients.to(real),
            row_weights=None if self.row_weights is None else self.row_weights.to(real),
            candidates=candidates,
        )


# name: shape of the rows and of the base for n columns, and the view of the base. Few rows: the reference is slow
LAYOUTS = {
    "contiguous": lambda n: ((5,), (5, n), lambda base: base),
    "one row": lambda n: ((), (n,), lambda base: base),
    "no rows": lambda n: ((2, 0), (2, 0, n), lambda base: base),
    "without the last token": lambda n: ((2, 3), (2, 4, n), lambda base: base[:, :-1]),
    "transposed": lambda n: ((3, 2), (2, 3, n), lambda base: base.transpose(0, 1)),
    "columns of a wider tensor": lambda n: ((4,), (4, n + 8), lambda base: base[:, 3 : n + 3]),
    "every other row": lambda n: ((3,), (6, n), lambda base: base[1::2]),
    "expanded": lambda n: ((2, 3), (3, n), lambda base: base.expand(2, *base.shape)),
    "many dimensions": lambda n: (
        (2, 1, 2, 2),
        (2, 3, 2, n + 1),
        lambda base: base.transpose(0, 2)[:, None, 1:, :, 1:],
    ),
}
# one block of columns is 256, 512 or 1024 wide; before and behind whole registers are heads and tails
VOCABULARIES = [1, 2, 3, 7, 16, 31, 33, 64, 100, 255, 513, 1023, 1024, 1025, 1500, 2500]


@st.composite
def row_terms(draw):
    """Any subset of the terms."""
    return sum(draw(st.lists(st.sampled_from(list(RowTerms)), unique=True).map(lambda flags: [int(f) for f in flags])))


def draw_logits(draw, generator, shape, temperature):
    """float64 values of many kinds: flat, wide, far from 0, peaked, rising or falling from block to block."""
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.0, 0.2, 1.0, 6.0]))
    logits += torch.linspace(0, draw(st.sampled_from([0.0, 0.0, 200.0, -200.0])), shape[-1], dtype=torch.float64)
    logits += draw(st.sampled_from([0.0, 0.0, -30.0, 300.0]))
    peak = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
    gap = temperature * draw(st.sampled_from([0.0, 0.0, 3.0, 20.0, 60.0]))
    if gap:
        logits.scatter_(-1, peak, logits.amax(-1, keepdim=True) + gap)
    return logits


@st.composite
def row_problems(draw, dtypes=DTYPES, layouts=tuple(LAYOUTS), vocabularies=VOCABULARIES):
    """Problems for which float32 can be right: candidates are never further than 75 from each other in z."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random_ids(bound, shape):
        return torch.randint(bound, shape, generator=generator)

    dtype, terms = draw(st.sampled_from(dtypes)), draw(row_terms())
    real = accumulation_dtype(dtype)
    vocab_size = draw(st.sampled_from(vocabularies))
    n_columns = vocab_size + draw(st.sampled_from([0, 0, 1, 40]))
    layout = draw(st.sampled_from(layouts))
    rows, base_shape, view = LAYOUTS[layout](n_columns)
    temperature = draw(st.sampled_from([1.0, 1.0, 0.4, 2.7]))
    coefficients = row_coefficients(
        torch.empty(0, dtype=dtype),
        temperature=temperature,
        label_smoothing=draw(st.sampled_from([0.1, 0.5, 1.0])),
        focal_alpha=draw(st.sampled_from([1.0, 0.25])),
        focal_gamma=draw(st.sampled_from([0.0, 0.5, 2.0])),
        z_loss_weight=draw(st.sampled_from([1e-3, 0.5])),
        confidence_penalty_weight=draw(st.sampled_from([0.1, 1.0])),
        logit_softcap=draw(st.sampled_from([5.0, 30.0])),
    )

    base = torch.full(base_shape, math.nan, dtype=dtype)
    stored = view(base)[0] if layout == "expanded" else view(base)
    logits = draw_logits(draw, generator, (*stored.shape[:-1], vocab_size), temperature)
    n_candidates = draw(st.sampled_from([0, 0, 1, 3, 7]))
    if n_candidates and logits.numel():
        logits = torch.maximum(logits, logits.amax(-1, keepdim=True) - 75 * temperature)
    if draw(st.integers(0, 9)) == 0:
        logits = logits.round()  # many equal columns
    targets = random_ids(vocab_size, rows)
    # rows are never masked altogether; one time in six the target may be
    kept = targets if draw(st.integers(0, 5)) else random_ids(vocab_size, rows)
    masked = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.3, 0.97]))
    kept = kept[0] if layout == "expanded" else kept
    stored[..., :vocab_size] = logits.masked_fill(masked.scatter(-1, kept.unsqueeze(-1), False), -math.inf)
    ignored = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    if layout not in ("expanded", "one row"):
        stored[ignored] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1.0]))

    candidates = None
    if n_candidates:
        most_likely = logits.argmax(-1).expand(rows)
        choices = torch.stack([random_ids(vocab_size, rows), most_likely, targets, torch.full(rows, -1)], -1)
        ids = choices.gather(-1, random_ids(4, (*rows, n_candidates))).to(torch.int32)
        weights = (torch.rand(ids.shape, generator=generator, dtype=real) * 2).masked_fill(
            random_ids(5, ids.shape) == 0, 0
        )
        groups = (1, n_candidates - 1) if draw(st.booleans()) else (n_candidates,)
        candidates = Candidates(ids, weights, groups)
    row_weights = torch.rand(rows, generator=generator, dtype=real) * 3 - 1 if draw(st.booleans()) else None
    ignore_index = draw(st.sampled_from([IGNORED, -1, vocab_size - 1]))
    if ignore_index >= 0:
        ignored |= targets == ignore_index
    targets = targets.masked_fill(ignored, ignore_index)
    return RowProblem(base, view, targets, coefficients, terms, row_weights, candidates, vocab_size, ignore_index)
