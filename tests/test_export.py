"""torch.export with any batch size and length, and AOTInductor's package of the exported program."""

import copy
import shutil

import pytest
import torch
from support.strategies import HIDDEN_SIZE

from ava_ext import SequenceUnlikelihoodLoss, UnifiedLoss
from ava_ext.ops.row_fields import row_options
from ava_ext.ops.softmax_rows import row_loss

V = 11
SHAPES = ((3, 7), (1, 2), (5, 40))
# each leaves another of the operators' lists empty
LOSSES = {
    "standard": {"primary_loss_type": "standard"},
    "default": {"initial_temperature": 0.75},
    "repetition": {"use_ngram_penalty": True, "ngram_size": 2, "use_immediate_repetition_penalty": True},
    "allowed": {"use_ngram_penalty": True, "ngram_size": 1, "repetition_allow_list": (3,), "pad_token_id": 0},
    "eos": {"eos_token_id": (1, 2), "min_sequence_length": 4, "eos_penalty_weight": 0.5},
}


class Model(torch.nn.Module):
    """Every loss of the logits, then of the hidden states and the head's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(V, HIDDEN_SIZE)
        self.head = torch.nn.Linear(HIDDEN_SIZE, V)
        self.losses = torch.nn.ModuleList(UnifiedLoss(V, **options) for options in LOSSES.values())

    def forward(self, targets):
        hidden_states = self.embedding(targets)
        linear = {"lm_head_weight": self.head.weight, "lm_head_bias": self.head.bias}
        dense = [loss_fn(self.head(hidden_states), targets) for loss_fn in self.losses]
        return dense + [loss_fn(hidden_states=hidden_states, targets=targets, **linear) for loss_fn in self.losses]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def batch(shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(shape[1]))


def exported(model, strict):
    batch_size, n_tokens = torch.export.Dim("batch_size", min=1, max=64), torch.export.Dim("n_tokens", min=2, max=512)
    shapes = ({0: batch_size, 1: n_tokens},)
    return torch.export.export(model, (batch((2, 6)),), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(model, strict):
    program = exported(model, strict).module()
    for shape in SHAPES:
        torch.testing.assert_close(program(batch(shape)), model(batch(shape)))


def any_sizes(name, shape):
    """A loss, and arguments of which one has a size of the batch: rows that repeat, sequences that are on, texts."""
    generator = torch.Generator().manual_seed(shape[1])
    given = {"logits": torch.randn(*shape, V, generator=generator)}
    if name == "repeats":
        return SequenceUnlikelihoodLoss(V, ngram_size=2), given | {"tokens": batch(shape) % 3}
    given["targets"] = batch(shape)
    if name == "active":
        options = {"use_mtp": True, "mtp_type": "adaptive", "use_confidence_weighting": False, "num_future_tokens": 1}
        given |= {"additional_logits": given["logits"].unsqueeze(0), "mtp_active": torch.arange(shape[0]) % 2}
    else:
        options = {"use_auxiliary_loss": True, "load_balancing_per_sequence": True, "num_experts": 3}
        options |= {"num_experts_per_token": 1, "load_balancing_weight": 1.0}
        ends = torch.arange(shape[0] + 1) * shape[1]
        given |= {"gate_logits": given["logits"][..., :3].contiguous(), "cu_seqlens": ends}
    return UnifiedLoss(V, primary_loss_type="standard", **options), given


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["repeats", "active", "texts"])
def test_no_size_becomes_a_constant(name, strict):
    loss_fn, given = any_sizes(name, (2, 6))
    batch_size, n_tokens = torch.export.Dim("batch_size", min=2, max=64), torch.export.Dim("n_tokens", min=4, max=512)
    of_rows = {0: batch_size, 1: n_tokens}
    shapes = {key: of_rows for key in given}
    shapes |= {"additional_logits": {1: batch_size, 2: n_tokens}} if name == "active" else {}
    shapes |= {"mtp_active": {0: batch_size}} if name == "active" else {}
    shapes |= {"cu_seqlens": {0: batch_size + 1}} if name == "texts" else {}
    program = torch.export.export(loss_fn, (), given, dynamic_shapes=shapes, strict=strict).module()
    _, other = any_sizes(name, (3, 7))
    torch.testing.assert_close(program(**other), loss_fn(**other))


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.slow
def test_a_package_of_aot_inductor(model, tmp_path):
    program = exported(model, False)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "losses.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for shape in SHAPES:
        torch.testing.assert_close(package(batch(shape)), model(batch(shape)))
    values = {round(float(loss), 4) for loss in model(batch(SHAPES[-1]))}
    assert len(values) == len(LOSSES)  # every option has an effect


def test_no_groups_may_be_none():
    """AOTInductor hands an operator None where its argument was an empty list."""
    logits, targets = torch.randn(5, V), torch.tensor([1, 2, -100, 0, 3])
    given = (logits, targets, row_options(logits), None, None, None)
    found = torch.ops.ava_ext.row_loss(*given, None, 1, V, -100, True, False)
    expected = row_loss(logits, targets, row_options(logits))
    torch.testing.assert_close(found[0], expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected.terms, rtol=0, atol=0)
    loss, terms = torch.ops.ava_ext.row_loss_(logits.clone(), *given[1:], None, 1, V, -100)
    torch.testing.assert_close((loss, terms), tuple(found[:2]), rtol=0, atol=0)


def test_no_tokens_may_be_none():
    text, weights = torch.tensor([[1, 1, 2, 1, 1]]), torch.ones(4)
    options = {"tokens_include_row": True, "vocab_size": V, "ignore_index": -100, "min_sequence_length": 0}
    options |= {"use_immediate_repetition_penalty": True, "immediate_repetition_threshold": 1}
    options |= {"ngram_size": 2, "ngram_window_size": 0, "ngram_slots": 2}
    candidates = torch.ops.ava_ext.repetition_candidates
    found = candidates(text, text, None, weights, repetition_allow_list=None, eos_ids=None, **options)
    expected = candidates(text, text, None, weights, repetition_allow_list=[], eos_ids=[], **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_training_loss_reads_and_learns_nothing(strict):
    experts = {"num_experts": 3, "num_experts_per_token": 1, "router_score": "sigmoid", "use_moe_balancing": True}
    loss_fn = UnifiedLoss(V, gradient_balance_weight=2.0, auto_step=True, **experts)
    given = {"logits": torch.randn(2, 6, V), "targets": batch((2, 6)), "gate_logits": torch.randn(12, 3)}
    for _ in range(12):
        loss_fn(**given)
    before = copy.deepcopy(loss_fn).eval()
    program = torch.export.export(loss_fn, (), given, strict=strict).module(check_guards=False)
    torch.testing.assert_close(program(**given), before(**given))
    program(**given)
    torch.testing.assert_close(dict(loss_fn.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    assert loss_fn.temperature.count == 12 and loss_fn.temperature.pending_rows == 0


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_computed_again_in_training_is_plain_in_a_program(strict):
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, primary_loss_type="standard", use_mtp=True, mtp_share_head=True)
    states, weight = torch.randn(2, 6, HIDDEN_SIZE), torch.randn(V, HIDDEN_SIZE)
    given = {"targets": batch((2, 6)), "hidden_states": states, "lm_head_weight": weight}
    program = torch.export.export(loss_fn, (), given, strict=strict).module()
    torch.testing.assert_close(program(**given), loss_fn(**given))


@pytest.mark.parametrize("strict", [True, False])
def test_a_program_that_was_exported_without_grad_is_differentiable(strict):
    loss_fn = UnifiedLoss(V, primary_loss_type="standard")
    logits, targets = torch.randn(2, 3, V), torch.randint(V, (2, 3))
    program = torch.export.export(loss_fn, (logits, targets), strict=strict).module()
    logits.requires_grad_()
    expected, found = (torch.autograd.grad(loss(logits, targets), logits)[0] for loss in (loss_fn, program))
    torch.testing.assert_close(found, expected)
