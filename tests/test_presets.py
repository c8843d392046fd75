"""The loss classes that are UnifiedLoss with the options each is about."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.strategies import HIDDEN_SIZE, Numbers

import ava_ext
from ava_ext import UnifiedLoss
from ava_ext.losses import (
    AdaptiveAntiRepetitionLoss,
    AdaptiveMTPLoss,
    AntiRepetitionLoss,
    DeepSeekLoss,
    FocalLoss,
    LabelSmoothingLoss,
    NGramRepetitionPenalty,
    SequenceRepetitionDetector,
)
from ava_ext.losses.contrastive import info_nce, simctg

V = 7
STANDARD = {"primary_loss_type": "standard"}
REPETITION = {"use_ngram_penalty": True, "use_immediate_repetition_penalty": True}
SAME = [
    (DeepSeekLoss(V), {"primary_loss_type": "deepseek"}),
    (DeepSeekLoss(V, HIDDEN_SIZE, use_mtp=True), {"hidden_size": HIDDEN_SIZE, "use_mtp": True}),
    (AdaptiveMTPLoss(V, num_future_tokens=2), {"primary_loss_type": "adaptive_mtp", "num_future_tokens": 2}),
    (FocalLoss(V, 0.5, 3.0), {**STANDARD, "use_focal_loss": True, "focal_alpha": 0.5, "focal_gamma": 3.0}),
    (FocalLoss(V), {**STANDARD, "use_focal_loss": True}),
    (LabelSmoothingLoss(V), {**STANDARD, "label_smoothing": 0.1}),
    (
        LabelSmoothingLoss(V, 0.2, "exclude_target"),
        {**STANDARD, "label_smoothing": 0.2, "smoothing_mode": "exclude_target"},
    ),
    (AntiRepetitionLoss(V, 2, 0), {**STANDARD, **REPETITION, "eos_token_id": 2, "pad_token_id": 0}),
    (AntiRepetitionLoss(V, ngram_size=2), {**STANDARD, **REPETITION, "ngram_size": 2}),
]


@pytest.mark.parametrize(("preset", "options"), SAME, ids=lambda value: type(value).__name__)
def test_a_preset_is_unified_loss_with_these_options(preset, options):
    assert preset.config == UnifiedLoss(V, **options).config
    assert isinstance(preset, UnifiedLoss)


class LossOfAUser(UnifiedLoss):
    def __init__(self, n_classes, sharpness=2.0):
        super().__init__(n_classes, initial_temperature=1 / sharpness)


class LossWithoutArgumentsOfItsOwn(UnifiedLoss):
    pass


NAMED = [getattr(ava_ext, name) for name in ava_ext.losses.__all__]
PRESETS = [kind for kind in NAMED if isinstance(kind, type) and issubclass(kind, UnifiedLoss)]


@pytest.mark.parametrize("kind", [*PRESETS, LossOfAUser], ids=lambda kind: kind.__name__)
def test_the_signature_is_that_of_the_class(kind):
    own = inspect.signature(vars(kind)["__init__"]).parameters.values()
    assert list(inspect.signature(kind).parameters.values()) == list(own)[1:]


@pytest.mark.parametrize("kind", PRESETS)
def test_the_call_of_every_preset_is_that_of_unified_loss(kind):
    assert inspect.signature(kind.forward) == inspect.signature(UnifiedLoss.forward)


def test_the_signature_without_an_init_is_the_list_of_options():
    assert inspect.signature(LossWithoutArgumentsOfItsOwn) == inspect.signature(UnifiedLoss)


def arguments(numbers, n_heads=3):
    return {
        "logits": numbers.leaf(2, 6, V),
        "targets": numbers.integers(0, 3, 2, 6),
        "hidden_states": numbers.leaf(2, 6, HIDDEN_SIZE),
        "additional_logits": numbers.leaf(n_heads, 2, 6, V),
        "confidence_scores": numbers.uniform(2, 6),
    }


def test_presets_give_the_loss_of_their_options():
    given = arguments(Numbers(0))
    expected = F.cross_entropy(given["logits"].flatten(0, 1), given["targets"].flatten(), label_smoothing=0.3)
    torch.testing.assert_close(LabelSmoothingLoss(V, 0.3)(**given), expected, rtol=1e-12, atol=0)
    rows = F.cross_entropy(given["logits"].flatten(0, 1), given["targets"].flatten(), reduction="none")
    focal = 0.25 * ((1 - torch.exp(-rows)) ** 1.5 * rows).mean()
    torch.testing.assert_close(FocalLoss(V, alpha=0.25, gamma=1.5)(**given), focal, rtol=1e-12, atol=0)
    result = AntiRepetitionLoss(V, eos_token_id=5, ngram_size=1)(**given, return_detailed=True)
    addends = {"main_loss", "ngram_penalty", "immediate_repetition_penalty", "eos_penalty"}
    given_alone = {"negative_penalty", "distillation_loss"}  # 0 without what they want
    assert {name for name in result if name not in ava_ext.METRICS} == {"total_loss", *addends, *given_alone}
    assert all(result[name] > 0 for name in addends) and not any(result[name] for name in given_alone)
    for preset in (DeepSeekLoss(V, HIDDEN_SIZE, use_mtp=True).double(), AdaptiveMTPLoss(V)):
        result = preset(**given, return_detailed=True)
        assert result["mtp_loss"] > 0
        result["total_loss"].backward()


@pytest.mark.parametrize("preset", [DeepSeekLoss, AdaptiveMTPLoss, FocalLoss, LabelSmoothingLoss, AntiRepetitionLoss])
def test_every_option_of_unified_loss_is_taken_and_checked(preset):
    assert preset(V, z_loss_weight=0.5, reduction="sum").config.z_loss_weight == 0.5
    with pytest.raises(TypeError, match="unknown option 'z_loss'; did you mean 'z_loss_weight'"):
        preset(V, z_loss=0.5)


# -- penalties on a schedule


def penalties(loss_fn, seed=1):
    result = loss_fn(**arguments(Numbers(seed)), return_detailed=True)
    names = ("ngram_penalty", "immediate_repetition_penalty", "eos_penalty")
    return torch.stack([result[name] for name in names]), result


def test_the_schedule_moves_with_the_steps():
    options = {"eos_token_id": 5, "ngram_size": 1, "immediate_repetition_growth": 2.0}
    loss_fn = AdaptiveAntiRepetitionLoss(V, initial_weight=0.5, final_weight=4.0, warmup_steps=5, **options)
    full, result = penalties(AntiRepetitionLoss(V, **options))
    assert (full > 0).all()
    for step in range(8):
        factor = 0.5 + 3.5 * min(step / 5, 1)
        found, found_result = penalties(loss_fn)
        torch.testing.assert_close(found, factor * full, rtol=1e-6, atol=0)
        torch.testing.assert_close(found_result["main_loss"], result["main_loss"], rtol=0, atol=0)
        assert loss_fn.penalty_factor().item() == pytest.approx(factor)
        penalties(loss_fn)  # a micro-batch moves nothing
        loss_fn.step()
    assert loss_fn.steps == 8


def test_a_schedule_that_starts_at_nothing():
    loss_fn = AdaptiveAntiRepetitionLoss(V, eos_token_id=5, ngram_size=1, warmup_steps=2)
    assert (penalties(loss_fn)[0] == 0).all()
    loss_fn.step()
    torch.testing.assert_close(penalties(loss_fn)[0], 0.5 * penalties(AntiRepetitionLoss(V, 5, ngram_size=1))[0])


def test_the_schedule_is_part_of_a_checkpoint():
    loss_fn = AdaptiveAntiRepetitionLoss(V, warmup_steps=10)
    for _ in range(3):
        loss_fn.step()
    other = AdaptiveAntiRepetitionLoss(V, warmup_steps=10)
    other.load_state_dict(loss_fn.state_dict())
    assert other.penalty_factor().item() == pytest.approx(0.3)
    assert loss_fn.bfloat16().steps.dtype == torch.int64


@pytest.mark.parametrize("prefix", ["", "0."])
def test_an_older_checkpoint_of_the_schedule_loads(prefix):
    loss_fn, other = (AdaptiveAntiRepetitionLoss(V, warmup_steps=10) for _ in range(2))
    for _ in range(3):
        loss_fn.step()
    names = {"schedule.steps": "steps"}
    checkpoint = {prefix + names.get(name, name): value for name, value in loss_fn.state_dict().items()}
    (torch.nn.Sequential(other) if prefix else other).load_state_dict(checkpoint)
    assert other.steps == 3


@pytest.mark.parametrize("kinds", [(AntiRepetitionLoss, AdaptiveAntiRepetitionLoss)[::step] for step in (1, -1)])
def test_a_schedule_more_or_less_loads(kinds):
    source, destination = (kind(V) for kind in kinds)
    source.temperature.value.fill_(0.7)
    destination.load_state_dict(source.state_dict())
    assert destination.temperature.value == source.temperature.value


def test_auto_step_may_be_turned_on():
    loss_fn = AdaptiveAntiRepetitionLoss(V, eos_token_id=5, warmup_steps=10, auto_step=True)
    penalties(loss_fn)
    assert loss_fn.steps == 1
    penalties(loss_fn.eval())
    assert loss_fn.steps == 1


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_steps": 0}, {"warmup_steps": None}, {"warmup_steps": 2.5},
        {"warmup_steps": True}, {"initial_weight": -1.0}, {"final_weight": -1.0}, {"final_weight": math.nan},
        {"initial_weight": "0"}, {"final_weight": 1e39},
    ],
)  # fmt: skip
def test_bad_schedules_raise(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"adaptive_anti_repetition_loss: expected {name} to be .*, got "):
        AdaptiveAntiRepetitionLoss(V, **options)


def test_a_schedule_takes_numbers_of_numpy_and_torch():
    loss_fn = AdaptiveAntiRepetitionLoss(
        V, warmup_steps=np.int64(4), final_weight=np.float32(2.0), initial_weight=torch.tensor(1)
    )
    loss_fn.step()
    assert loss_fn.penalty_factor() == 1.25


@pytest.mark.parametrize(
    "options",
    [{"initial_temperature": 2.0}, {"logit_softcap": 2.0}, {"logit_scale": 0.3}, {"class_weights": [*range(V)]}],
)
@pytest.mark.parametrize(
    ("preset", "key", "on"),
    [
        (
            NGramRepetitionPenalty,
            "ngram_penalty",
            {"use_ngram_penalty": True, "ngram_size": 3, "ngram_penalty_weight": 1.0},
        ),
        (
            SequenceRepetitionDetector,
            "immediate_repetition_penalty",
            {"use_immediate_repetition_penalty": True, "immediate_repetition_weight": 1.0},
        ),
    ],
)
def test_a_penalty_alone_reads_the_effective_logits(preset, key, on, options):
    numbers = Numbers(0)
    logits, targets = numbers.normal(1, 8, V), torch.tensor([[1, 2, 3, 1, 2, 4, 4, 1]])
    alone = preset(penalty_weight=1.0, vocab_size=V, **options)(logits, targets, return_detailed=True)
    whole = UnifiedLoss(V, **STANDARD, **on, **options)(logits, targets, return_detailed=True)
    assert alone["total_loss"] > 0
    for name in ("total_loss", "temperature"):
        torch.testing.assert_close(alone[name], whole[key if name == "total_loss" else name])


ALONE = pytest.mark.parametrize("preset", [NGramRepetitionPenalty, SequenceRepetitionDetector])


@ALONE
@pytest.mark.parametrize(
    ("options", "component"),
    [
        ({"label_smoothing": 0.3}, "primary"),
        ({"z_loss_weight": 9.0}, "z_loss"),
        ({"use_focal_loss": True}, "focal"),
        ({"token_reweighting": "dft"}, "reweighting"),
        ({"eos_token_id": 1}, "eos"),
        ({"distillation_temperature": 2.0}, "distillation"),
        ({"negatives_need_target": False}, "negatives"),
        ({"use_mtp": True, "hidden_size": 4}, "mtp"),
        ({"primary_loss_type": "adaptive_mtp"}, "adaptive_mtp"),
        ({"use_moe_balancing": True, "num_experts": 2}, "moe"),
    ],
)
def test_a_penalty_alone_takes_no_options_of_other_components(preset, options, component):
    options = {name: value for name, value in options.items() if getattr(preset(vocab_size=V), name) != value}
    name = next(iter(options))
    with pytest.raises(
        ValueError, match=rf"expected options of this penalty .*{name}=.* change ava_ext.losses.{component}$"
    ):
        preset(vocab_size=V, **options)


@ALONE
@pytest.mark.parametrize("name", ["negative_ids", "soft_target_ids", "target_probabilities"])
def test_a_penalty_alone_takes_no_arguments_of_other_components(preset, name):
    with pytest.raises(ValueError, match=f"expected no {name}, which this penalty does not read"):
        preset(vocab_size=V)(torch.zeros(1, 2, V), torch.zeros(1, 2).long(), **{name: torch.zeros(1, 2, V)})


@ALONE
def test_a_penalty_alone_loads_the_state_of_a_whole_loss(preset):
    whole = UnifiedLoss(V, HIDDEN_SIZE, use_mtp=True, num_experts=4, use_moe_balancing=True)
    whole.temperature.value.fill_(0.7)
    alone = preset(vocab_size=V)
    alone.load_state_dict(whole.state_dict())
    assert alone.temperature.value == whole.temperature.value


@pytest.mark.parametrize("ignore_index", [-1, 0])
@pytest.mark.parametrize(("of_heads", "of_states"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_heads_alone_take_their_ignore_index_and_mixed_precisions(ignore_index, of_heads, of_states):
    mtp = ava_ext.MultiTokenPredictionLoss(V, HIDDEN_SIZE, 1, ignore_index=ignore_index).to(of_heads)
    hidden_states, targets = Numbers(0).normal(1, 4, HIDDEN_SIZE).to(of_states), torch.tensor([[1, 2, 3, ignore_index]])
    got = mtp(hidden_states, targets, return_detailed=True)
    logits = mtp.mtp.heads[0](mtp.mtp.norm(hidden_states.to(of_heads)))[0, :2]
    expected = F.cross_entropy(logits, targets[0, 1:3])
    torch.testing.assert_close(got["mtp_loss_depth_1"], expected)
    torch.testing.assert_close(got["total_loss"], mtp.config.mtp_weight * expected * 2 / 3)
    with pytest.raises(
        ValueError, match=r"expected targets to be integers of shape \[batch_size, n_tokens\], got float32"
    ):
        mtp(hidden_states, targets.float())


def test_the_mask_of_heads_alone_is_named():
    mtp = ava_ext.MultiTokenPredictionLoss(HIDDEN_SIZE, V)
    with pytest.raises(ValueError, match=r"multi_token_prediction_loss: expected attention_mask of shape \[2, 6\]"):
        mtp(torch.randn(2, 6, HIDDEN_SIZE), torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 5))


def test_what_is_no_tensor_is_named_by_a_loss_that_stands_alone():
    rows, ids, mask = torch.zeros(1, 4, 3), torch.zeros(1, 4).long(), np.ones((1, 4))
    mtp, written = ava_ext.MultiTokenPredictionLoss(5, 3), ava_ext.SequenceUnlikelihoodLoss(3)
    for match, call in {
        "contrastive_loss: expected second": lambda: info_nce(rows[0], mask),
        "contrastive_loss: expected row_mask": lambda: info_nce(rows[0], rows[0], row_mask=mask),
        "contrastive_loss: expected inputs": lambda: ava_ext.ContrastiveLoss()(mask),
        "contrastive_loss: expected attention_mask": lambda: ava_ext.ContrastiveLoss()(rows, attention_mask=mask),
        "contrastive_loss: expected hidden_states": lambda: simctg(mask),
        "contrastive_loss: expected segment_ids": lambda: simctg(rows, segment_ids=mask),
        "perplexity_loss: expected targets": lambda: ava_ext.PerplexityLoss()(rows, mask),
        "perplexity_loss: expected attention_mask": lambda: ava_ext.PerplexityLoss()(rows, ids, mask),
        "consistency_loss: expected targets": lambda: ava_ext.ConsistencyLoss()(rows, None),
        "consistency_loss: expected attention_mask": lambda: ava_ext.ConsistencyLoss()(rows, rows, mask),
        "multi_token_prediction_loss: expected targets": lambda: mtp(rows, mask),
        "multi_token_prediction_loss: expected attention_mask": lambda: mtp(rows, ids, mask),
        "diversity_loss: expected row_mask": lambda: ava_ext.DiversityLoss()(rows, mask),
        "sequence_unlikelihood: expected tokens": lambda: written.repeats(mask),
        "sequence_unlikelihood: expected continuation_mask": lambda: written(rows, ids, mask),
        "sequence_unlikelihood: expected segment_ids": lambda: written(rows, ids, segment_ids=mask),
    }.items():
        with pytest.raises(TypeError, match=f"^{match} to be a torch.Tensor, got "):
            call()
