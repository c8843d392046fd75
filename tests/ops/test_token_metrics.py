"""Log-probability, entropy, rank and argmax of tokens, without logits as a whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ava_ext import LinearLogits, UnifiedLoss, reference, token_metrics
from ava_ext.ops import RowFlags, row_loss, row_options


@st.composite
def rows(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    vocab_size = draw(st.sampled_from([1, 2, 7, 16, 33, 255, 1025]))
    logits = torch.randn(6, vocab_size + draw(st.sampled_from([0, 3])), generator=generator, dtype=torch.float64) * 3
    if draw(st.booleans()):
        logits = logits.round()  # equals
    masked = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    masked[:, 0] = False
    logits = logits.masked_fill(masked, -math.inf)
    targets = torch.randint(vocab_size, (6,), generator=generator)
    targets[2] = -100
    targets[3] = logits[3, :vocab_size].argmax()
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    options = {"temperature": draw(st.sampled_from([1.0, 0.7])), "logit_softcap": draw(st.sampled_from([None, 2.0]))}
    return logits.to(dtype), targets, vocab_size, options


def expected_ranks(logits, targets, vocab_size):
    counted = targets != -100
    own = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1))
    rank = (logits[:, :vocab_size] > own).sum(-1)
    return torch.where(counted, rank, -1), torch.where(counted, logits[:, :vocab_size].argmax(-1), -1)


@given(rows())
def test_against_torch(case):
    logits, targets, vocab_size, options = case
    found = token_metrics(logits, targets, vocab_size=vocab_size, **options)
    rank, argmax = expected_ranks(logits, targets, vocab_size)
    assert found.rank.dtype == found.argmax.dtype == torch.int64
    assert (found.rank == rank).all()
    if options["logit_softcap"] is None:  # a soft cap makes equals
        assert (found.argmax == argmax).all()
    z = reference.effective_logits(logits.double(), vocab_size=vocab_size, **options)
    counted = targets != -100
    nll = reference.negative_log_likelihood(z, targets.clamp(min=0))
    torch.testing.assert_close(found.log_prob.double(), torch.where(counted, -nll, 0.0), rtol=1e-5, atol=1e-6)
    entropy = torch.where(counted, reference.token_entropy(z), 0.0)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


@given(rows(), st.sampled_from([None, 200]))
def test_of_linear_logits(case, chunk_bytes):
    logits, targets, vocab_size, options = case
    logits = logits.nan_to_num(neginf=-9.0).double()
    linear = LinearLogits(logits, torch.eye(logits.shape[-1], dtype=torch.float64))
    keywords = {"vocab_size": vocab_size, **options}
    for got, want in zip(
        token_metrics(linear, targets, chunk_bytes=chunk_bytes, **keywords),
        token_metrics(logits, targets, **keywords),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_equals_and_nans():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [math.nan, 1.0, 2.0, 0.0], [1.0, math.nan, 2.0, 0.0]])
    found = token_metrics(logits, torch.tensor([2, 1, 1]))
    assert found.rank.tolist() == [0, 1, 4] and found.argmax.tolist() == [1, 2, 2]


@pytest.mark.parametrize("way", ["fused", "inplace", "linear", "compiled"])
def test_beside_a_gradient(way):
    """The ranks are those of the logits, also where the gradient is written over them, and change nothing else."""
    generator = torch.Generator().manual_seed(4)
    leaf = torch.randn(7, 40, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(40, (7,), generator=generator)
    flags = int(RowFlags.CROSS_ENTROPY | RowFlags.ENTROPY)

    def run(leaf, with_ranks):
        logits = LinearLogits(leaf, torch.eye(40, dtype=torch.float64)) if way == "linear" else leaf * 1
        keywords = {"flags": flags, "with_ranks": with_ranks, "inplace_gradient": way == "inplace", "reduction": "sum"}
        return tuple(row_loss(logits, targets, row_options(leaf), **keywords))

    function = torch.compile(run, backend="aot_eager", fullgraph=True) if way == "compiled" else run
    (loss, terms), (plain, plain_terms) = function(leaf, True), run(leaf, False)
    rank, argmax = expected_ranks(leaf.detach(), targets, 40)
    assert (terms[-2] - 1 == rank).all() and (terms[-1] - 1 == argmax).all()
    torch.testing.assert_close(terms[:-2], plain_terms, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, leaf) for value in (loss, plain))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_accuracies_of_unified_loss():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 9, 20, generator=generator)
    targets = torch.randint(20, (3, 9), generator=generator).masked_fill(
        torch.rand(3, 9, generator=generator) < 0.3, -100
    )
    for reduction in ("mean", "none"):
        loss_fn = UnifiedLoss(20, primary_loss_type="standard", accuracy_top_k=(1, 5), reduction=reduction)
        parts = loss_fn(logits, targets, return_detailed=True)
        counted = targets != -100
        among = logits.topk(5).indices == targets.unsqueeze(-1)
        torch.testing.assert_close(parts["accuracy_top_5"], among.any(-1)[counted].float().mean())
        assert parts["accuracy_top_1"] == parts["accuracy"]
    equal = loss_fn(torch.zeros_like(logits), targets, return_detailed=True)  # no token is likelier than another
    assert equal["accuracy_top_1"] == equal["accuracy_top_5"] == 1 and equal["accuracy"] < 1
    empty = loss_fn(logits, torch.full_like(targets, -100), return_detailed=True)
    assert empty["accuracy_top_5"] == 0


def test_the_likeliest_of_capped_logits():
    """The cap makes them equal: argmax is the first of them, the rank that of the logits as they are stored."""
    metrics = token_metrics(torch.tensor([[0.0, 1e4, 2e4]]), torch.tensor([2]), logit_softcap=30.0)
    assert metrics.argmax.item() == 1 and metrics.rank.item() == 0
