"""Building on the meta device, then to_empty() and reset_parameters() on every module, as FSDP's recipes do."""

import copy

import pytest
import torch
from support.strategies import HIDDEN_SIZE, Numbers

import ava_ext
from ava_ext import UnifiedLoss, functional

V, E = 7, 3
MOE = {"num_experts": E, "num_experts_per_token": 1, "router_score": "sigmoid", "use_moe_balancing": True}
MODULES = {
    "default": lambda: UnifiedLoss(V, initial_temperature=0.7),
    "every row term": lambda: UnifiedLoss(
        V,
        primary_loss_type="standard",
        initial_temperature=0.7,
        label_smoothing=0.1,
        z_loss_weight=0.1,
        logit_softcap=9.0,
        use_focal_loss=True,
        use_ngram_penalty=True,
        ngram_size=1,
        ngram_penalty_weight=2.0,
        use_immediate_repetition_penalty=True,
        eos_token_id=1,
        class_weights=[0.5] + [1.0] * (V - 1),
    ),
    "own heads": lambda: UnifiedLoss(V, HIDDEN_SIZE, use_mtp=True),
    "shared head": lambda: UnifiedLoss(V, HIDDEN_SIZE, use_mtp=True, mtp_share_head=True),
    "experts": lambda: UnifiedLoss(V, **MOE, use_auxiliary_loss=True, use_diversity_loss=True),
    "adaptive heads": lambda: UnifiedLoss(V, primary_loss_type="adaptive_mtp", num_future_tokens=2),
    "schedule": lambda: ava_ext.AdaptiveAntiRepetitionLoss(V, initial_weight=0.5, warmup_steps=4, ngram_size=1),
    "balancer": lambda: ava_ext.AuxiliaryFreeMoEBalancer(E, 1, router_score="sigmoid"),
    "heads alone": lambda: ava_ext.MultiTokenPredictionLoss(V, HIDDEN_SIZE),
    "scaling": lambda: ava_ext.AdaptiveLossScaling(["main", "auxiliary"], initial_log_variance=0.5),
}
LOSSES = [name for name in MODULES if isinstance(MODULES[name](), UnifiedLoss)]


def rebuilt(build, dtype=torch.float32):
    """Built on meta, moved with garbage in it, and reset as FSDP's recipes reset it."""
    with torch.device("meta"):
        module = torch.nn.Sequential(build())
    module = module.to(dtype)
    module.to_empty(device="cpu")
    for name, tensor in everything(module).items():  # to_empty may well give zeros
        tensor.data.fill_(-7)
        assert tensor.device.type == "cpu", name
    torch.manual_seed(0)
    for submodule in module.modules():
        if hasattr(submodule, "reset_parameters"):
            submodule.reset_parameters()
    return module[0]


def everything(module):
    """Parameters, buffers, and every other tensor that a submodule holds."""
    others = {
        f"{prefix}.{name}": value
        for prefix, submodule in module.named_modules()
        for name, value in vars(submodule).items()
        if isinstance(value, torch.Tensor)
    }
    return dict(module.named_parameters()) | dict(module.named_buffers()) | others


def inputs(numbers, loss_fn):
    return {
        "logits": numbers.leaf(2, 6, V),
        "targets": numbers.integers(0, V, 2, 6),
        "hidden_states": numbers.normal(2, 6, HIDDEN_SIZE).float(),
        "lm_head_weight": numbers.normal(V, HIDDEN_SIZE).float() if loss_fn.mtp_share_head else None,
        "gate_logits": numbers.normal(12, E),
        "expert_outputs": numbers.normal(E, 12, 2),
        "confidence_scores": numbers.uniform(2, 6),
    }


@pytest.mark.parametrize("name", MODULES)
def test_state_is_that_of_a_new_module(name):
    build = MODULES[name]
    got = rebuilt(build)
    new = build()
    torch.manual_seed(0)
    for submodule in new.modules():  # the same random numbers
        if hasattr(submodule, "reset_parameters"):
            submodule.reset_parameters()
    expected = everything(new)
    found = everything(got)
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # what needs no random numbers is the state of a module that nobody has reset
    untouched = everything(build())
    fixed = [key for key in untouched if key not in dict(new.named_parameters()) or "log_variance" in key]
    torch.testing.assert_close(
        {key: found[key] for key in fixed}, {key: untouched[key] for key in fixed}, rtol=0, atol=0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_of_a_new_loss(name):
    got, numbers = rebuilt(MODULES[name]), Numbers(0)
    new = MODULES[name]()
    new.load_state_dict(copy.deepcopy(got.state_dict()))  # random heads
    for _ in range(12):
        given = inputs(numbers, got)
        results = []
        for loss_fn in (got, new):
            result = loss_fn(**given, return_detailed=True)
            results.append((result, torch.autograd.grad(result["total_loss"], given["logits"])))
            loss_fn.step()
        torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(everything(got), everything(new), rtol=0, atol=0)


def test_casting_on_meta_leaves_the_state_alone():
    module = rebuilt(MODULES["experts"], torch.bfloat16)
    torch.testing.assert_close(everything(module), everything(MODULES["experts"]()), rtol=0, atol=0)


def test_a_checkpoint_fills_a_module_that_was_built_on_meta():
    trained, numbers = MODULES["experts"](), Numbers(1)
    for _ in range(12):
        trained(numbers.normal(2, 6, V), numbers.integers(0, V, 2, 6), gate_logits=numbers.normal(12, E),
                expert_outputs=numbers.normal(E, 12, 2))  # fmt: skip
    with torch.device("meta"):
        other = MODULES["experts"]()
    other.to_empty(device="cpu")
    for submodule in other.modules():
        if hasattr(submodule, "reset_parameters"):
            submodule.reset_parameters()
    other.load_state_dict(trained.state_dict())
    torch.testing.assert_close(dict(other.named_buffers()), dict(trained.named_buffers()), rtol=0, atol=0)


@pytest.fixture
def filled_memory():
    """What nobody has initialised is nan."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def trained(name):
    loss_fn, numbers = MODULES[name](), Numbers(1)
    for _ in range(12):
        loss_fn(**inputs(numbers, loss_fn))
        loss_fn.step()
    return loss_fn


@pytest.mark.parametrize("way", ["to_empty", "assign", "assign, then to()"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_checkpoint_is_all_that_a_loss_built_on_meta_needs(name, way, filled_memory):
    """The recipes of FSDP2 and torchtune call no reset_parameters()."""
    checkpoint, expected = trained(name).state_dict(), MODULES[name]()
    with torch.device("meta"):
        found = MODULES[name]()
    if way == "to_empty":
        found.to_empty(device="cpu")
    for loss_fn in (found, expected):
        loss_fn.load_state_dict(copy.deepcopy(checkpoint), assign=way != "to_empty")
    if way == "assign, then to()":
        found.to("cpu")
    torch.testing.assert_close(everything(found), everything(expected), rtol=0, atol=0)
    found.step()  # a rank whose first batch is empty
    results = [loss_fn(**inputs(Numbers(2), loss_fn), return_detailed=True) for loss_fn in (found, expected)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_to_empty_keeps_what_the_configuration_says(filled_memory):
    built = MODULES["every row term"]()
    expected = {key: value.clone() for key, value in built.row_pass.named_buffers()}
    torch.testing.assert_close(dict(built.to_empty(device="cpu").row_pass.named_buffers()), expected, rtol=0, atol=0)


def test_a_call_on_meta_has_the_shapes_of_a_call():
    with torch.device("meta"):
        loss_fn = MODULES["experts"]()
        given = {"gate_logits": torch.zeros(12, E), "expert_outputs": torch.zeros(E, 12, 2)}
        result = loss_fn(torch.zeros(2, 6, V), torch.zeros(2, 6, dtype=torch.int64), **given, return_detailed=True)
    real = {"gate_logits": torch.zeros(12, E), "expert_outputs": torch.zeros(E, 12, 2)}
    expected = MODULES["experts"]()(
        torch.zeros(2, 6, V), torch.zeros(2, 6, dtype=torch.int64), **real, return_detailed=True
    )
    assert {name: (value.shape, value.dtype) for name, value in result.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }
    assert all(value.device.type == "meta" for value in result.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_default_device_other_than_the_logits(dtype):
    """As torch.set_default_device("cuda") beside logits on the CPU."""
    logits, targets = torch.randn(2, 6, 5, dtype=dtype, requires_grad=True), torch.randint(5, (2, 6))
    terms = {"label_smoothing": 0.1, "z_loss_weight": 0.1}
    loss_fn = UnifiedLoss(5, class_weights=[1, 2, 3, 4, 5.5], use_ngram_penalty=True, ngram_size=2, **terms)

    def gradients():
        rows = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), **terms)
        return torch.autograd.grad(rows + loss_fn(logits, targets), logits)[0]

    expected = gradients()
    with torch.device("meta"):
        found = gradients()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


PARTS_ON_META = {
    "diversity_loss": ({"use_diversity_loss": True}, {"expert_outputs": torch.randn(4, 10, 3)}),
    "aux_load_balancing": ({"use_auxiliary_loss": True, "num_experts_per_token": 1}, {"gate_logits": torch.ones(4, E)}),
    "contrastive_loss": ({"use_contrastive_loss": True}, {"contrastive_pair": torch.ones(2, 4, 3).unbind()}),
    "moe_balancing_term": (MOE, {"gate_logits": torch.ones(4, E)}),
}


@pytest.mark.parametrize("key", PARTS_ON_META)
def test_a_part_on_meta_beside_logits_elsewhere_is_named(key):
    options, given = PARTS_ON_META[key]
    on_meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else tuple(part.to("meta") for part in value)
        for name, value in given.items()
    }
    with pytest.raises((RuntimeError, ValueError), match=r"expected .* on (cpu, got meta|meta, got cpu)"):
        UnifiedLoss(V, **options)(torch.zeros(2, 5, V), torch.zeros(2, 5).long(), **on_meta)
