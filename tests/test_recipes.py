"""The recipes of docs/recipes.md against plain PyTorch, each answer in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_usage_guide import ROOT, run, sections

N, LENGTH, HIDDEN, VOCAB = 6, 7, 4, 11
PAGE = ROOT / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def recipes():
    """The functions that the page defines."""
    namespace = {"__name__": "documentation"}
    (blocks,) = sections(PAGE).values()
    for block in blocks:
        run(PAGE, block, namespace)
    return namespace


class Answers:
    """Answers behind prompts of different lengths, one with padding, in float64; policy and two frozen models."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        draw = {"generator": generator, "dtype": torch.float64}
        self.labels = torch.randint(0, VOCAB, (N, LENGTH), generator=generator)
        for number in range(N):
            self.labels[number, : 1 + number % 3] = -100
        self.labels[2, 5:] = -100
        self.states = torch.randn(N, LENGTH, HIDDEN, **draw).requires_grad_()
        self.weight = torch.randn(VOCAB, HIDDEN, **draw).requires_grad_()
        logits = F.linear(self.states, self.weight)
        self.plain = self.gather(logits)
        self.reference, self.old = (
            self.gather((logits + scale * torch.randn(logits.shape, **draw)).detach()) for scale in (0.5, 0.2)
        )
        self.reference_padded, self.old_padded = map(self.padded, (self.reference, self.old))

    def gather(self, logits):
        """The log-probabilities of each answer's tokens, a vector for each answer."""
        log_probs = logits.log_softmax(-1)
        return [
            torch.stack([log_probs[n, t, token] for t, token in enumerate(row) if token != -100])
            for n, row in enumerate(self.labels.tolist())
        ]

    def padded(self, of_answers):
        values = torch.zeros(N, LENGTH, dtype=torch.float64)
        for n, answer in enumerate(of_answers):
            values[n, self.labels[n] != -100] = answer
        return values

    def check(self, got, expected):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
        leaves = (self.states, self.weight)
        gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (got, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        assert gradients[0][0].abs().max() > 0


@pytest.fixture
def answers(recipes):
    answers = Answers()
    answers.log_probs = recipes["answer_log_probs"](answers.states, answers.weight, answers.labels)
    torch.testing.assert_close(answers.log_probs, answers.padded(answers.plain), rtol=1e-12, atol=1e-13)
    return answers


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def test_dpo(recipes, answers):
    ratios = [p.sum() - r.sum() for p, r in zip(answers.plain, answers.reference, strict=True)]
    expected = sum(-torch.log(sigmoid(0.3 * (ratios[n] - ratios[n + 3]))) for n in range(3)) / 3
    answers.check(recipes["dpo_loss"](answers.log_probs, answers.reference_padded, beta=0.3), expected)


def test_simpo(recipes, answers):
    means = [p.mean() for p in answers.plain]
    expected = sum(-torch.log(sigmoid(2.0 * (means[n] - means[n + 3]) - 0.5)) for n in range(3)) / 3
    answers.check(recipes["simpo_loss"](answers.log_probs, answers.labels, beta=2.0, margin=0.5), expected)


def test_orpo(recipes, answers):
    odds = [p.mean().exp() / (1 - p.mean().exp()) for p in answers.plain]
    of_ratio = sum(-torch.log(sigmoid(torch.log(odds[n] / odds[n + 3]))) for n in range(3)) / 3
    expected = -torch.cat(answers.plain[:3]).mean() + 0.2 * of_ratio
    answers.check(recipes["orpo_loss"](answers.log_probs, answers.labels, weight=0.2), expected)


@pytest.mark.parametrize("mismatched", [[0.3, -0.1, 0.2], [-0.5, 0.1, -0.2]])
def test_kto(recipes, answers, mismatched):
    is_good = torch.tensor([True, False, False, True, True, False])
    z = max(0.0, sum(mismatched) / 3)
    expected = 0
    for n, (p, r) in enumerate(zip(answers.plain, answers.reference, strict=True)):
        ratio = p.sum() - r.sum()
        expected = expected + (
            1.5 * (1 - sigmoid(0.2 * (ratio - z))) if is_good[n] else 0.7 * (1 - sigmoid(0.2 * (z - ratio)))
        )
    ratios = torch.tensor(mismatched, dtype=torch.float64)
    given = (answers.log_probs, answers.reference_padded, is_good, ratios)
    answers.check(recipes["kto_loss"](*given, beta=0.2, good_weight=1.5, bad_weight=0.7), expected / N)


def surrogate(ratio, advantage, low, high):
    return torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)


ADVANTAGES = torch.tensor([1.2, -0.7, 0.0, 0.4, -1.0, 0.1], dtype=torch.float64)


def test_advantages(recipes):
    got = recipes["group_advantages"](torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0]), n_answers=3)
    deviation = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    expected = torch.tensor([-2 / deviation, -1 / deviation, 3 / deviation, 0, 0, 0])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_grpo(recipes, answers):
    expected = 0
    for p, old, reference, advantage in zip(
        answers.plain, answers.old, answers.reference, ADVANTAGES.tolist(), strict=True
    ):
        kl = (reference - p).exp() - (reference - p) - 1
        expected = expected - (surrogate((p - old).exp(), advantage, 0.1, 0.1) - 0.3 * kl).mean() / N
    given = (answers.log_probs, answers.old_padded, answers.reference_padded, answers.labels, ADVANTAGES)
    answers.check(recipes["grpo_loss"](*given, clip=0.1, beta=0.3), expected)


def test_equal_rewards_have_no_advantage(recipes):
    assert not recipes["group_advantages"](torch.full((7,), 0.1), n_answers=7).any()  # their mean is not 0.1


def test_dapo(recipes, answers):
    # the second group has no signal; the last answer of the first has the mean reward, and its tokens count
    advantages = torch.tensor([1.2, -1.2, 0, 0, 0, 0], dtype=torch.float64)
    used = range(3)
    total = sum(
        surrogate((answers.plain[n] - answers.old[n]).exp(), advantages[n].item(), 0.1, 0.15).sum() for n in used
    )
    expected = -total / sum(len(answers.plain[n]) for n in used)
    given = (answers.log_probs, answers.old_padded, answers.labels, advantages)
    answers.check(recipes["dapo_loss"](*given, n_answers=3, low=0.1, high=0.15), expected)


def test_gspo(recipes, answers):
    expected = 0
    for p, old, advantage in zip(answers.plain, answers.old, ADVANTAGES.tolist(), strict=True):
        ratio = (p.sum() - old.sum()).div(len(p)).exp()
        expected = expected - surrogate(ratio, advantage, 0.05, 0.06) / N
    given = (answers.log_probs, answers.old_padded, answers.labels, ADVANTAGES)
    answers.check(recipes["gspo_loss"](*given, low=0.05, high=0.06), expected)


def test_kl_to_a_reference_is_unbiased(recipes):
    # the expectation over the policy's own samples, exactly
    policy, reference = torch.randn(
        2, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).log_softmax(-1)
    estimates = recipes["kl_to_reference"](policy, reference)
    assert (estimates >= 0).all()
    expected = F.kl_div(reference, policy, log_target=True, reduction="sum")
    torch.testing.assert_close((policy.exp() * estimates).sum(), expected, rtol=1e-12, atol=0)
