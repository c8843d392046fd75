"""Options: names, ranges, contradictions, and the way to a file and back."""

import dataclasses
import inspect
import json
import math
from collections import UserList

import numpy as np
import pytest
import torch

from ava_ext import (
    AdaptiveLossScaling,
    AuxiliaryFreeMoEBalancer,
    AuxiliaryLoss,
    ContrastiveLoss,
    DiversityLoss,
    LossMeter,
    MultiTokenPredictionLoss,
    PerplexityLoss,
    UnifiedLoss,
    UnifiedLossConfig,
    create_unified_loss,
)
from ava_ext.losses.component import Part
from ava_ext.losses.contrastive import info_nce

OPTIONS = {option.name: option for option in dataclasses.fields(UnifiedLossConfig)}


def test_every_option_has_a_line_of_documentation():
    for option in OPTIONS.values():
        assert option.metadata["doc"], option.name
        assert "\n" not in option.metadata["doc"], option.name


def test_signature_is_the_list_of_options():
    parameters = inspect.signature(UnifiedLoss).parameters
    assert list(parameters) == list(OPTIONS)
    for name, parameter in parameters.items():
        is_positional = name in ("vocab_size", "hidden_size")
        assert parameter.kind == (parameter.POSITIONAL_OR_KEYWORD if is_positional else parameter.KEYWORD_ONLY), name
        assert parameter.default == (parameter.empty if name == "vocab_size" else OPTIONS[name].default), name


# what a caller relies on when an option is left out
def test_defaults():
    config = UnifiedLossConfig(vocab_size=10)
    expected = {
        "hidden_size": None, "primary_loss_type": "deepseek", "ignore_index": -100, "pad_token_id": None,
        "eos_token_id": None, "reduction": "mean", "labels_are_shifted": True, "inplace_gradient": False,
        "initial_temperature": 1.0, "adaptive_temperature": None, "temperature_bounds": (0.5, 2.0),
        "temperature_gain": 1.0, "auto_step": True, "process_group": None, "linear_chunk_bytes": None,
        "label_smoothing": 0.0, "smoothing_mode": "uniform", "logit_scale": 1.0, "logit_softcap": None,
        "z_loss_weight": 0.0,
        "confidence_penalty_weight": 0.0, "use_mtp": False, "num_future_tokens": 3, "mtp_weight": 0.1,
        "mtp_type": "deepseek", "mtp_share_head": False, "mtp_detach_head": False, "mtp_own_denominator": False,
        "use_confidence_weighting": True,
        "confidence_reg_strength": 0.01, "use_ngram_penalty": False, "ngram_size": 4, "ngram_penalty_weight": 0.1,
        "ngram_window_size": None, "ngram_slots": 8, "use_immediate_repetition_penalty": False,
        "immediate_repetition_weight": 0.5, "immediate_repetition_threshold": 1, "immediate_repetition_growth": 1.0,
        "repetition_allow_list": (), "negatives_need_target": True,
        "min_sequence_length": 20, "eos_penalty_weight": 0.05, "num_experts": None,
        "num_experts_per_token": None, "num_moe_layers": 1, "use_moe_balancing": False, "gradient_balance_weight": 0.01,
        "moe_momentum": 0.9, "expert_bias_rate": 1e-3, "expert_bias_update": "sign", "expert_bias_centered": False,
        "load_balancing_per_sequence": False, "use_focal_loss": False, "focal_alpha": 1.0, "focal_gamma": 2.0,
        "accuracy_top_k": (), "class_weights": None, "token_reweighting": None, "reweighting_exponent": 1.0,
        "distillation_weight": 1.0, "distillation_temperature": 1.0,
        "distillation_tail": False,
        "use_diversity_loss": False, "diversity_weight": 0.01, "use_auxiliary_loss": False,
        "load_balancing_weight": 1e-4, "router_z_weight": 1e-3, "load_balancing_convention": "switch",
        "router_score": "softmax", "use_contrastive_loss": False, "contrastive_weight": 0.1,
        "contrastive_temperature": 0.07,
    }  # fmt: skip
    assert {option.name: getattr(config, option.name) for option in OPTIONS.values()} == {"vocab_size": 10, **expected}


OUT_OF_RANGE = {
    "vocab_size": [0, -1, 7.0, True, None, "7"],
    "hidden_size": [0, 1.5],
    "primary_loss_type": ["deepseeek", None, ["standard"]],
    "ignore_index": [1.5, None, True, 2**63, torch.tensor(1, device="meta")],
    "pad_token_id": [1.5, "0"],
    "eos_token_id": [10, -1, 1.5, "eos", [3, 10]],
    "reduction": ["average", None],
    "labels_are_shifted": [1, None],
    "inplace_gradient": ["yes"],
    "linear_chunk_bytes": [0],
    "initial_temperature": [0.0, -1.0, float("nan"), 3.0, "1"],
    "adaptive_temperature": [1, "yes"],
    "temperature_bounds": [(0.0, 2.0), (2.0, 0.5), (1.0,), 3, ("a", 2.0), (0.5, float("inf"))],
    "temperature_gain": [-1.0],
    "auto_step": [None],
    "label_smoothing": [-0.1, 1.1, float("nan"), True],
    "smoothing_mode": ["exclude"],
    "logit_scale": [0.0, -1.0],
    "process_group": [5, "gpu", object()],
    "logit_softcap": [0.0, -30.0, float("inf")],
    "z_loss_weight": [-1.0, 1e300, 10**400, torch.ones((), device="meta")],
    "confidence_penalty_weight": [-0.1],
    "focal_alpha": [-1.0],
    "focal_gamma": [-0.5],
    "accuracy_top_k": [(0,), (1, 1), 5, (1.5,)],
    "class_weights": [(1.0,), ("a",) * 10, 1.0, (1e300,) * 10],
    "token_reweighting": ["entropy", True],
    "reweighting_exponent": [-1.0],
    "distillation_weight": [-1.0],
    "distillation_temperature": [0.0],
    "distillation_tail": [1],
    "num_future_tokens": [0],
    "mtp_weight": [-1.0],
    "mtp_type": ["medusa"],
    "confidence_reg_strength": [-1.0],
    "ngram_size": [0, 2.0, 10**30],
    "ngram_penalty_weight": [-0.1],
    "ngram_window_size": [0],
    "ngram_slots": [0],
    "immediate_repetition_weight": [-1.0],
    "immediate_repetition_threshold": [0],
    "immediate_repetition_growth": [0.5, 1e39],
    "repetition_allow_list": [3, [1.5], None, [-(2**63) - 1]],
    "min_sequence_length": [-1],
    "eos_penalty_weight": [-1.0],
    "num_experts": [0],
    "num_experts_per_token": [0],
    "num_moe_layers": [0],
    "gradient_balance_weight": [-1.0],
    "moe_momentum": [1.0, -0.1],
    "expert_bias_rate": [-1.0],
    "expert_bias_update": ["median", None],
    "load_balancing_convention": ["deepseek"],
    "router_score": ["relu"],
    "contrastive_temperature": [0.0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^unified_loss: expected {name} to be .*, got "):
        UnifiedLoss(**{"vocab_size": 10, name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_mtp": True}, "use_mtp=True with mtp_type='deepseek' needs hidden_size, got None"),
        ({"use_moe_balancing": True}, "use_moe_balancing=True needs num_experts, got None"),
        ({"num_experts": 2, "num_experts_per_token": 3}, "num_experts_per_token to be at most num_experts = 2, got 3"),
        ({"mtp_detach_head": True}, "mtp_detach_head=True needs mtp_share_head=True"),
        ({"reduction": "none", "use_auxiliary_loss": True}, "use_auxiliary_loss=True is a batch-level term"),
        ({"reduction": "none", "use_diversity_loss": True}, "use_diversity_loss=True is a batch-level term"),
        ({"reduction": "none", "use_contrastive_loss": True}, "use_contrastive_loss=True is a batch-level term"),
        ({"expert_bias_update": "quantile"}, "expert_bias_update='quantile' needs router_score='sigmoid'"),
        (
            {"expert_bias_update": "quantile", "router_score": "sigmoid", "num_experts": 2, "num_experts_per_token": 2},
            "num_experts_per_token to be below num_experts = 2 with quantile balancing, got 2",
        ),
        ({"reduction": "none", "use_moe_balancing": True, "num_experts": 2}, "use_moe_balancing=True is a batch-level"),
    ],
)
def test_contradictory_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UnifiedLoss(10, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AuxiliaryFreeMoEBalancer(4, expert_bias_update="sgn"), "moe_balancer: expected expert_bias_update"),
        (lambda: AuxiliaryFreeMoEBalancer(4, moe_momentum=1.5), r"moe_balancer: expected moe_momentum .* got 1\.5"),
        (lambda: MultiTokenPredictionLoss(10, 4, 0), "expected num_future_tokens to be an integer >= 1, got 0"),
        (
            lambda: AuxiliaryLoss(2, load_balancing_weight=-5.0),
            "auxiliary_loss: expected load_balancing_weight .* -5",
        ),
        (lambda: AuxiliaryLoss(2, router_z_weight="x"), "auxiliary_loss: expected router_z_weight .* got 'x'"),
        (lambda: AuxiliaryLoss(2, router_score="relu"), "auxiliary_loss: expected router_score"),
        (lambda: AuxiliaryLoss(2, process_group=5), "auxiliary_loss: expected process_group .* got 5"),
        (lambda: ContrastiveLoss(weight=math.nan), "contrastive_loss: expected weight .* got nan"),
        (lambda: ContrastiveLoss(margin="x"), "contrastive_loss: expected margin .* got 'x'"),
        (lambda: info_nce(*torch.ones(2, 3, 4), temperature=-1.0), "contrastive_loss: expected temperature"),
        (lambda: DiversityLoss(weight="x"), "diversity_loss: expected weight .* got 'x'"),
        (lambda: PerplexityLoss(ignore_index=1.5), r"perplexity_loss: expected ignore_index .* got 1\.5"),
        (
            lambda: AdaptiveLossScaling(["a"], math.nan),
            "expected initial_log_variance .* got nan",
        ),
        (lambda: LossMeter(group=5), "loss_meter: expected process_group .* got 5"),
        (lambda: UnifiedLoss(10, z_loss_weight=torch.ones((), requires_grad=True)), "z_loss_weight .* requires grad"),
    ],
)
def test_single_parts_check_their_options_too(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_weight_may_be_learned():
    weight, x = torch.nn.Parameter(torch.tensor(-1.0)), torch.rand(2, 3, 4)  # alike, as every number is positive
    learned = AuxiliaryLoss(1, router_z_weight=weight)
    for loss_fn in (ContrastiveLoss(weight=weight), DiversityLoss(weight=weight), learned):
        (gradient,) = torch.autograd.grad(loss_fn(x), weight)
        assert gradient != 0


def test_an_initial_temperature_beyond_the_bounds_is_fine_where_nothing_adapts():
    assert UnifiedLoss(10, primary_loss_type="standard", initial_temperature=3.0).config.temperature_adapts is False


@pytest.mark.parametrize(
    "build", [lambda options: UnifiedLoss(10, **options), UnifiedLossConfig.from_dict, create_unified_loss]
)
def test_unknown_options_are_named_with_the_nearest_known(build):
    options = {"lable_smoothing": 0.1}
    with pytest.raises(TypeError, match="unknown option 'lable_smoothing'; did you mean 'label_smoothing'"):
        build(options if build is not create_unified_loss else {"vocab_size": 10, **options})


@pytest.mark.parametrize(
    ("name", "option"),
    [("weight", "class_weights"), ("temperature", "initial_temperature"), ("smoothing", "label_smoothing")],
)
def test_names_of_other_libraries_are_known(name, option):
    with pytest.raises(TypeError, match=f"unknown option '{name}'; did you mean '{option}'"):
        UnifiedLoss(10, **{name: 0.1})


@pytest.mark.parametrize("name", ["focal_gamma", "temperature", "step", "moe_balancer"])
def test_a_part_needs_a_name_of_its_own(name):
    class Clashing(Part):
        @classmethod
        def from_config(cls, config):
            return None

    class LossWithPart(UnifiedLoss):
        PARTS = (*UnifiedLoss.PARTS, Clashing)

    Clashing.name = name
    with pytest.raises(ValueError, match=f"expected Clashing to have a name of its own, got '{name}'"):
        LossWithPart(10)


def test_help_documents_every_option():
    text = inspect.getdoc(UnifiedLossConfig)
    for name, option in OPTIONS.items():
        assert f"\n    {name}: {option.metadata['doc']}" in text
    assert text.index("\nArgs:\n    vocab_size: ") < text.index("\nRaises:")


def test_there_and_back():
    config = UnifiedLossConfig(
        vocab_size=10, eos_token_id=[3, 4, 3], repetition_allow_list=[1], temperature_bounds=[0.7, 1.5]
    )
    assert config.eos_ids == (3, 4)
    assert UnifiedLossConfig.from_dict(config.to_dict()) == config
    assert UnifiedLossConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["temperature_bounds"] == [0.7, 1.5]
    assert create_unified_loss(config.to_dict()).config == config
    assert create_unified_loss(config).config == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 11


def test_repr_shows_what_differs_from_the_defaults():
    text = repr(UnifiedLoss(10, label_smoothing=0.1))
    assert "vocab_size=10, label_smoothing=0.1" in text
    assert "reduction" not in text


def test_errors_about_long_lists_are_short():
    with pytest.raises(ValueError, match=r"one for each class or None, got \('1', \.\.\., '1'\)$"):
        UnifiedLossConfig(50000, class_weights=["1"] * 50000)
    with pytest.raises(ValueError, match=r"expected class_weights to be vocab_size = 3 numbers, got 2$"):
        UnifiedLossConfig(3, class_weights=[1.0] * 2)


def test_any_sequence_is_a_list():
    # the lists of OmegaConf, which hydra passes, are no subclass of list
    config = UnifiedLossConfig(
        10, eos_token_id=UserList([3, 4]), repetition_allow_list=range(2), temperature_bounds=UserList([0.7, 1.5])
    )
    assert (config.eos_token_id, config.repetition_allow_list) == ((3, 4), (0, 1))
    assert UnifiedLossConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"expected eos_token_id to be token ids \(integers\) or None, got '12'"):
        UnifiedLossConfig(20, eos_token_id="12")


def test_numbers_of_numpy_are_pythons_own():
    options = {
        "vocab_size": np.int64(10), "hidden_size": np.int32(4), "num_future_tokens": np.uint8(2),
        "label_smoothing": np.float64(0.25), "z_loss_weight": np.float16(0.5), "use_ngram_penalty": np.True_,
        "eos_token_id": np.array([1, 2]), "repetition_allow_list": [np.int64(3)], "pad_token_id": np.int16(0),
        "temperature_bounds": np.array([0.5, 2.0]), "adaptive_temperature": np.bool_(False),
    }  # fmt: skip
    plain = {
        "vocab_size": 10, "hidden_size": 4, "num_future_tokens": 2, "label_smoothing": 0.25, "z_loss_weight": 0.5,
        "use_ngram_penalty": True, "eos_token_id": (1, 2), "repetition_allow_list": (3,), "pad_token_id": 0,
        "temperature_bounds": (0.5, 2.0), "adaptive_temperature": False,
    }  # fmt: skip
    config = UnifiedLossConfig(**options)
    assert config == UnifiedLossConfig(**plain)
    for name, value in plain.items():
        assert type(getattr(config, name)) is type(value), name
    assert UnifiedLossConfig.from_json(config.to_json()) == config
    loss_fn = create_unified_loss(options)
    logits, targets = torch.zeros(2, 3, 10), torch.tensor([[1, 2, 3], [4, 5, 6]])
    torch.testing.assert_close(loss_fn(logits, targets), UnifiedLoss(**plain)(logits, targets), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"expected ngram_size to be an integer >= 1, got 2.5"):
        UnifiedLossConfig(vocab_size=10, ngram_size=np.float64(2.5))
