"""UnifiedLoss inside torch.compile(fullgraph=True), and without waiting for the device."""

import copy

import pytest
import torch
from support.strategies import HIDDEN_SIZE, Numbers
from torch.utils._python_dispatch import TorchDispatchMode

from ava_ext import UnifiedLoss

V, E = 7, 3
ROWS = {
    "use_ngram_penalty": True, "ngram_size": 2, "use_immediate_repetition_penalty": True, "eos_token_id": 1,
    "pad_token_id": 0, "label_smoothing": 0.1, "z_loss_weight": 0.1, "confidence_penalty_weight": 0.1,
    "use_focal_loss": True, "logit_softcap": 10.0,
}  # fmt: skip
BATCH = {
    "num_experts": E, "num_experts_per_token": 1, "router_score": "sigmoid", "use_moe_balancing": True,
    "use_auxiliary_loss": True, "use_diversity_loss": True, "use_contrastive_loss": True,
}  # fmt: skip
CONFIGURATIONS = {
    "standard": {"primary_loss_type": "standard", **ROWS},
    "standard, unshifted, by row": {
        "primary_loss_type": "standard",
        **ROWS,
        "labels_are_shifted": False,
        "reduction": "none",
    },
    "deepseek": {"primary_loss_type": "deepseek", "use_mtp": True, **ROWS, **BATCH},
    "experts": {
        "primary_loss_type": "deepseek",
        "num_experts": E,
        "num_experts_per_token": 1,
        "router_score": "sigmoid",
        "use_moe_balancing": True,
        "use_auxiliary_loss": True,
    },
    "shared head": {"primary_loss_type": "deepseek", "use_mtp": True, "mtp_share_head": True},
    "adaptive_mtp": {"primary_loss_type": "adaptive_mtp", "num_future_tokens": 2},
}


def arguments(config, seed):
    """Everything that the configuration can use, as float32."""
    numbers = Numbers(seed)
    given = {
        "logits": numbers.leaf(2, 6, V),
        "targets": numbers.integers(0, V, 2, 6),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
        "negative_ids": numbers.integers(-1, V, 2, 6, 2),
        "hidden_states": numbers.leaf(2, 6, HIDDEN_SIZE),
        "gate_logits": numbers.leaf(12, E),
        "expert_outputs": numbers.leaf(E, 12, HIDDEN_SIZE),
    }
    if config.reduction == "mean":
        given["num_items_in_batch"] = torch.tensor(20)
    if config.mtp_share_head:
        given["lm_head_weight"] = numbers.leaf(V, HIDDEN_SIZE)
    if config.primary_loss_type == "adaptive_mtp":
        given["additional_logits"] = [numbers.leaf(2, 6, V), numbers.leaf(2, 6, V)]
        given["confidence_scores"] = numbers.uniform(2, 6, low=0.1, high=0.9).requires_grad_()

    def narrow(value):
        if isinstance(value, list):
            return [narrow(element) for element in value]
        if not value.is_floating_point():
            return value
        return value.detach().float().requires_grad_(value.requires_grad)

    return {name: narrow(value) for name, value in given.items()}


def train_step(loss_fn, config, seed):
    given = arguments(config, seed)
    result = loss_fn(**given, return_detailed=True)
    result["total_loss"].sum().backward()
    values = [leaf for value in given.values() for leaf in (value if isinstance(value, list) else [value])]
    return {name: value.detach() for name, value in result.items()}, [
        leaf.grad for leaf in values if leaf.requires_grad
    ]


@pytest.mark.parametrize(
    ("name", "backend"),
    # this backend chooses what is saved for backward and what is computed again as inductor does
    [("standard", "inductor")]
    + [(name, "aot_eager_decomp_partition") for name in CONFIGURATIONS if name != "standard"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_training_is_eager_training(name, backend):
    torch._dynamo.reset()
    eager = UnifiedLoss(V, HIDDEN_SIZE, **CONFIGURATIONS[name])
    compiled_loss_fn = copy.deepcopy(eager)
    compiled = torch.compile(compiled_loss_fn, fullgraph=True, backend=backend)
    for step in range(11):  # the temperature moves after ten
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            found = train_step(compiled, eager.config, step)
        torch.testing.assert_close(found, train_step(eager, eager.config, step), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(compiled_loss_fn.state_dict()), dict(eager.state_dict()), rtol=1e-5, atol=1e-6)
    # what the traced calls left behind serves eager calls
    eager_after = train_step(compiled_loss_fn, eager.config, 99)
    torch.testing.assert_close(eager_after, train_step(eager, eager.config, 99), rtol=1e-5, atol=1e-6)


def test_an_input_that_comes_when_sizes_are_dynamic():
    """Its own size is a number then, where those of the others are symbols."""
    torch._dynamo.reset()
    loss_fn = UnifiedLoss(
        V, HIDDEN_SIZE, primary_loss_type="standard", use_contrastive_loss=True, use_ngram_penalty=True
    )
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    numbers = Numbers(0)

    def given(n_tokens):
        logits, hidden_states = numbers.normal(2, n_tokens, V).float(), numbers.normal(2, n_tokens, HIDDEN_SIZE).float()
        return {"logits": logits, "targets": numbers.integers(0, V, 2, n_tokens), "hidden_states": hidden_states}

    for n_tokens in (5, 6):
        compiled(**given(n_tokens))
    of_each_sequence = torch.ones(2, 8).long().cumsum(1) // 4
    for name, value in {
        "segment_ids": of_each_sequence,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
        "attention_mask": of_each_sequence,
    }.items():
        last = given(8) | {name: value}
        torch.testing.assert_close(compiled(**last), loss_fn(**last), msg=lambda text, name=name: f"{name}: {text}")


def test_operators_of_committed_state_can_be_traced():
    torch.library.opcheck(torch.ops.ava_ext.committed.default, (torch.rand(2, 3), torch.rand(2, 3)))
    torch.library.opcheck(torch.ops.ava_ext.is_recomputation.default, (torch.rand(2, 3),))


class NoSynchronisation(TorchDispatchMode):
    """Raises where an op reads values of a tensor on the host, or has an output whose shape depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "item", "unique", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"{function} waits for the device")
        if function.overloadpacket.__name__ in ("index", "index_put_", "index_put"):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype != torch.bool for index in indices), f"{function} of a mask waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_synchronisation(name):
    loss_fn = UnifiedLoss(V, HIDDEN_SIZE, **CONFIGURATIONS[name])
    given = [arguments(loss_fn.config, seed) for seed in range(2)]
    given[1]["mtp_active"] = torch.tensor(True)
    given[1]["segment_ids"] = torch.zeros(1, 6, dtype=torch.int64)
    given[1]["cu_seqlens"] = torch.tensor([0, 4, 12])
    with NoSynchronisation():
        for values in given:
            loss_fn(**values, return_detailed=True)["total_loss"].sum().backward()
        loss_fn.step()
        loss_fn.get_loss_statistics()
        loss_fn.reset_statistics()


def test_the_watch_for_synchronisation_sees_it():
    with NoSynchronisation(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(()) > 0)
    with NoSynchronisation(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(3)[torch.tensor([True, False, True])]
