"""Names that can be imported, and the components: the tree in CONTRIBUTING.md, modules, lists and reference agree."""

import re
import sys
from pathlib import Path

import pytest
import torch
from support.new_python import run_python

import ava_ext
from ava_ext import METRICS, UnifiedLoss, losses, ops, reference
from ava_ext.losses import CANDIDATES, PARTS, ROW_TERMS
from ava_ext.losses.depths import DEPTH_METRICS

ROOT = Path(__file__).resolve().parent.parent
LOSSES = [
    "UnifiedLoss", "create_unified_loss", "DeepSeekLoss", "AdaptiveMTPLoss", "AntiRepetitionLoss",
    "AdaptiveAntiRepetitionLoss", "FocalLoss", "LabelSmoothingLoss", "ContrastiveLoss", "DiversityLoss",
    "AuxiliaryLoss", "ConsistencyLoss", "PerplexityLoss", "AdaptiveLossScaling", "CompositeLoss",
    "TemperatureScaledCrossEntropy", "MultiTokenPredictionLoss", "AuxiliaryFreeMoEBalancer", "NGramRepetitionPenalty",
    "SequenceRepetitionDetector", "SequenceUnlikelihoodLoss",
]  # fmt: skip
OTHERS = [
    "METRICS",
    "UnifiedLossConfig",
    "softmax_statistics",
    "token_log_probs",
    "token_metrics",
    "repeated_ngram_mask",
    "repetition_candidates",
    "build_info",
    "empty_cache",
]

# modules of ava_ext/losses that are no component: losses by themselves, or what components are built with
STAND_ALONE = {
    "component", "composite", "consistency", "depths", "float32_buffers", "learned_state", "perplexity",
    "quantile_balancing", "router", "scaling", "sequence_unlikelihood", "temperature",
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_importable_from_both(name):
    assert getattr(ava_ext, name) is getattr(losses, name)
    assert name in losses.__all__
    assert getattr(ava_ext, name).__doc__


@pytest.mark.parametrize("name", OTHERS)
def test_further_names(name):
    assert name in ava_ext.__all__


def test_every_exported_name_exists_once():
    for module in (ava_ext, losses, ops):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name), name


def test_importing_the_package_is_cheap():
    """torch._dynamo takes more than a second and only compiled code wants it; some programs want none of the others."""
    dear = "{'torch._dynamo', 'torch.distributed.tensor', 'rich', 'matplotlib'}"
    ours = "{'ava_ext.bench', 'ava_ext.info', 'ava_ext.reference'}"
    result = run_python(f"import sys, ava_ext; assert not ({dear} | {ours}) & set(sys.modules)")
    assert result.returncode == 0, result.stderr


def test_the_first_call_imports_nothing_dear():
    code = "import sys, torch; from torch import ones; from ava_ext import LinearLogits, functional, token_log_probs;"
    code += "head = [ones(n, 4, requires_grad=True) for n in (3, 7)]; ids = torch.arange(3);"
    code += "functional.linear_cross_entropy(*head, ids).backward(); functional.cross_entropy(ones(3, 7), ids);"
    code += "token_log_probs(LinearLogits(*head), ids)[0].sum().backward(); assert 'torch._dynamo' not in sys.modules"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module", ["config", "call", "losses.moe", "losses", "presets", "functional", "ops", "row_pass"]
)
def test_every_module_can_be_imported_first(module):
    result = run_python(f"import ava_ext.{module}")
    assert result.returncode == 0, result.stderr


def modules_on_disk():
    return {path.stem for path in (ROOT / "ava_ext" / "losses").glob("*.py")} - {"__init__"}


def modules_of_components():
    names = [module.__name__ for module in (*ROW_TERMS, *CANDIDATES)] + [part.__module__ for part in PARTS]
    return {name.rpartition(".")[2] for name in names}


def test_modules_are_the_components_of_the_lists_and_the_stand_alone_losses():
    components = modules_of_components()
    assert not components & STAND_ALONE
    assert components | STAND_ALONE == modules_on_disk()
    for name in components:
        assert sys.modules[f"ava_ext.losses.{name}"].__doc__, name


def modules_in_tree():
    """Modules that the tree of files in CONTRIBUTING.md mentions as losses/<module>.py."""
    blocks = re.findall(r"^```.*?^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    return {name for block in blocks for name in re.findall(r"losses/(\w+)\.py", block)} - {"__init__"}


def test_the_tree_of_files_is_the_folder():
    assert modules_in_tree() == modules_on_disk()


# options that turn everything on: the second for the keys of the loss's own heads
FULL = {
    "vocab_size": 5, "hidden_size": 3, "z_loss_weight": 0.1, "confidence_penalty_weight": 0.1, "use_focal_loss": True,
    "use_ngram_penalty": True, "use_immediate_repetition_penalty": True, "eos_token_id": 1, "num_experts": 3,
    "num_experts_per_token": 1, "use_moe_balancing": True, "use_auxiliary_loss": True, "use_diversity_loss": True,
    "use_contrastive_loss": True, "num_future_tokens": 2,
}  # fmt: skip


def keys_of(config):
    """Of every component that the configuration turns on."""
    on = [component for module in (*ROW_TERMS, *CANDIDATES) if (component := module.from_config(config))]
    parts = [part for kind in PARTS if (part := kind.from_config(config)) is not None]
    return {component.key for component in on if component.key} | {key for part in parts for key in part.keys}


@pytest.mark.parametrize("heads", [{"primary_loss_type": "adaptive_mtp"}, {"use_mtp": True}])
def test_the_lists_are_what_the_reference_computes(heads):
    loss_fn = UnifiedLoss(**FULL, **heads).double()
    config = loss_fn.config
    states, logits = torch.zeros(1, 4, 3).double(), torch.zeros(1, 4, 5).double()
    result = reference.unified_loss(
        config,
        logits,
        torch.zeros(1, 4, dtype=torch.int64),
        hidden_states=states,
        additional_logits=[logits, logits],
        confidence_scores=torch.full((1, 4), 0.5).double(),
        gate_logits=torch.zeros(4, 3).double(),
        expert_outputs=torch.zeros(3, 4, 3).double(),
        mtp_logits=[logits, logits],
    )
    assert {name for name in result if name not in METRICS} - {"total_loss"} == keys_of(config)
    assert {name for name in result if name in METRICS} == {*reference.METRICS} | {
        f"{name}{depth}" for name in DEPTH_METRICS for depth in (1, 2)
    }


def test_metrics_are_those_of_the_reference():
    assert set(METRICS) == {*reference.METRICS} | {f"{name}1" for name in DEPTH_METRICS}
    assert "mtp_loss_depth_17" in METRICS and "mtp_acceptance_depth_17" in METRICS
    assert "total_loss" not in METRICS
    for heads in ({"primary_loss_type": "adaptive_mtp"}, {"use_mtp": True}):
        assert not keys_of(UnifiedLoss(**FULL, **heads).config) & set(METRICS)
