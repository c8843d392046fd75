"""What a configuration says about the loss, by attribute names; and N told without logits."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ava_ext import UnifiedLoss
from ava_ext.model_config import options_of

LLAMA = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 4}


def config(**attributes):
    return SimpleNamespace(**(LLAMA | attributes))


def test_vocabulary_width_and_labels():
    loss_fn = UnifiedLoss.from_model(config(), primary_loss_type="standard")
    assert (loss_fn.vocab_size, loss_fn.hidden_size, loss_fn.labels_are_shifted) == (32, 8, False)
    assert loss_fn.num_experts is None and loss_fn.logit_softcap is None
    assert UnifiedLoss.from_model(config(), vocab_size=30, labels_are_shifted=True).vocab_size == 30
    assert UnifiedLoss.from_model(SimpleNamespace(config=config())).vocab_size == 32
    of_images = SimpleNamespace(get_text_config=lambda: config(vocab_size=31))
    assert UnifiedLoss.from_model(of_images).vocab_size == 31
    for name in ("unpadded_vocab_size", "output_vocab_size"):  # Inkling, Apertus 1.5
        assert [UnifiedLoss.from_model(config(**{name: size})).vocab_size for size in (None, 30)] == [32, 30]
    with pytest.raises(ValueError, match="expected a configuration with vocab_size, got SimpleNamespace"):
        UnifiedLoss.from_model(SimpleNamespace())


# names in use: Mixtral, Qwen, DeepSeek, Ernie
@pytest.mark.parametrize("n_experts", ["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"])
@pytest.mark.parametrize("k", ["num_experts_per_tok", "moe_topk", "moe_k"])
def test_experts(n_experts, k):
    options = options_of(config(**{n_experts: 6, k: 2}, first_k_dense_replace=1))
    assert [options[name] for name in ("num_experts", "num_experts_per_token", "num_moe_layers")] == [6, 2, 3]
    listed = options_of(config(**{n_experts: 6, k: 2}, mlp_layer_types=["dense", "sparse", "dense", "sparse"]))
    assert listed["num_moe_layers"] == 2
    assert "num_experts" not in options_of(config(**{n_experts: 1}))


@pytest.mark.parametrize(
    ("attributes", "n_experts", "k"),
    [
        ({"n_routed_experts": 6, "zero_expert_num": 3, "moe_topk": 2}, 9, 2),
        ({"num_experts": 6, "num_experts_per_tok": 1, "model_type": "zaya"}, 7, 1),
        ({"ffn_config": SimpleNamespace(moe_num_experts=6, moe_top_k=2)}, 6, 2),
    ],
    ids=["LongCat-Flash", "ZAYA", "DBRX"],
)
def test_experts_among_which_a_router_chooses(attributes, n_experts, k):
    """As many as it has logits: with experts that do nothing."""
    options = options_of(config(**attributes))
    assert (options["num_experts"], options["num_experts_per_token"]) == (n_experts, k)


@pytest.mark.parametrize(
    ("attributes", "n_layers"),
    [
        ({"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]}, 3),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, 1),
        ({"moe_layer_interval": 1, "moe_layer_start_index": 1}, 3),
        ({"layers_num_experts": [1, 6, 1, 6]}, 2),
        ({"layers_block_type": ["mamba", "moe", "attention", "moe"]}, 2),
        ({"model_type": "jetmoe"}, 8),
        ({"model_type": "longcat_flash", "num_layers": 2}, 2),
    ],
    ids=["DeepSeek-V4", "Qwen2", "Ernie", "Jamba", "Nemotron-H", "JetMoe", "LongCat-Flash"],
)
def test_layers_of_a_configuration(attributes, n_layers):
    assert options_of(config(num_experts=6, **attributes))["num_moe_layers"] == n_layers


def test_no_layer_with_experts():
    assert "num_experts" not in options_of(config(num_experts=6, mlp_layer_types=["dense"] * 4))


def test_layers_and_score_of_a_model():
    """A model knows better than its configuration which of its layers have experts."""
    router = nn.Linear(8, 6)
    router.e_score_correction_bias = nn.Parameter(torch.zeros(6))
    block = nn.ModuleDict({"experts": nn.Linear(8, 8), "gate": router})
    model = nn.Sequential(nn.Linear(8, 8), block)
    model.vision_tower = nn.ModuleDict({"experts": nn.Linear(8, 8), "gate": nn.Linear(8, 6)})
    model.config = config(n_routed_experts=6, num_experts_per_tok=2)
    options = options_of(model)
    assert options["num_moe_layers"] == 1 and options["router_score"] == "sigmoid"


def test_score_of_a_router():
    """A correction bias tells no score, and one that is neither softmax nor sigmoid is not taken for one of them."""
    router = nn.Linear(8, 6)
    router.e_score_correction_bias = nn.Parameter(torch.zeros(6))
    model = nn.ModuleDict({"experts": nn.Linear(8, 8), "gate": router})
    for model_type in ("ernie4_5_moe", "ernie4_5_vl_moe_text", "longcat_flash"):
        model.config = config(num_experts=6, model_type=model_type)
        assert "router_score" not in options_of(model)
    model.config = config(num_experts=6, scoring_func="sqrtsoftplus")
    assert "router_score" not in options_of(model)
    for term in ("use_auxiliary_loss", "use_moe_balancing"):
        with pytest.raises(ValueError, match="got 'sqrtsoftplus' in SimpleNamespace"):
            options_of(model, **{term: True})
        assert options_of(model, **{term: True}, router_score="sigmoid")["router_score"] == "sigmoid"


def test_router_logits_that_are_probabilities():
    experts = config(num_experts=6, model_type="gemma4_text")
    for term in ("use_auxiliary_loss", "use_moe_balancing"):
        with pytest.raises(ValueError, match="expected router_logits, got probabilities, which a model"):
            options_of(experts, **{term: True})
        assert options_of(experts, **{term: True}, router_score="softmax")["num_experts"] == 6


@pytest.mark.parametrize(
    "attributes",
    [{"scoring_func": "sigmoid"}, {"expert_selection_fn": "sigmoid"}]
    + [{"model_type": name} for name in ("afmoe", "flint", "lfm2_moe", "llama4_text")],
    ids=["DeepSeek-V4", "Cohere 2 MoE", "AfMoE", "Flint", "LFM2 MoE", "Llama 4"],
)
def test_sigmoid_without_a_correction_bias(attributes):
    assert options_of(config(num_experts=6, **attributes))["router_score"] == "sigmoid"


@pytest.mark.parametrize("name", ["final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap"])
def test_soft_cap(name):
    assert options_of(config(**{name: 30.0}))["logit_softcap"] == 30.0
    assert "logit_softcap" not in options_of(config(**{name: 30.0}), fused=False)  # the logits are capped already
    assert "logit_softcap" not in options_of(config(**{name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("logit_scale", 0.25), ("logits_scaling", 4.0), ("lm_head_multiplier", 0.25), ("output_multiplier", 0.25)],
)
def test_scale_of_the_logits(name, value):
    """Granite, Cohere, Falcon-H1: never left out silently."""
    scaled = config(**{name: value})
    assert "logit_scale" not in options_of(scaled, fused=False) and "logit_scale" not in options_of(
        config(**{name: 1.0})
    )
    assert options_of(scaled)["logit_scale"] == 0.25
    assert UnifiedLoss.from_model(scaled).logit_scale == 0.25


def test_scales_of_other_families():
    """Hidden states divided in place of logits; a factor by the name of a divisor; a text model in another model."""
    assert "logit_scale" not in options_of(config(logits_scaling=4.0, model_type="minicpm3"))
    assert options_of(config(logits_scaling=4.0, model_type="hyperclovax"))["logit_scale"] == 4.0
    for model_type, expected in (("llava", None), ("gemma3", None), ("granite4_vision", 0.25), ("paligemma", 0.25)):
        around = SimpleNamespace(get_text_config=lambda: config(logits_scaling=4.0), model_type=model_type)
        assert options_of(around).get("logit_scale") == expected


TARGETS = torch.tensor([[3, 5, -100, 7, 0], [-100, 1, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0], [0, 1, 0, 1, 2]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]])
ENDS = torch.tensor([0, 4, 5, 7, 10])  # of the same texts, in one


@pytest.mark.parametrize("labels_are_shifted", [False, True])
@pytest.mark.parametrize("pad_token_id", [None, 0])
@pytest.mark.parametrize(
    "given",
    [{}, {"attention_mask": MASK}, {"position_ids": POSITIONS}, {"segment_ids": SEGMENTS}, {"cu_seqlens": ENDS}],
    ids=lambda given: next(iter(given), "nothing"),
)
def test_items_are_those_that_the_loss_counts(labels_are_shifted, pad_token_id, given):
    options = {"labels_are_shifted": labels_are_shifted, "pad_token_id": pad_token_id}
    loss_fn = UnifiedLoss(8, primary_loss_type="standard", **options)
    logits = torch.randn(2, 5, 8)
    n_items = loss_fn.count_items(TARGETS, **given)
    assert n_items.dtype == torch.int64 and n_items.dim() == 0
    assert n_items == loss_fn(logits, TARGETS, return_detailed=True, **given)["n_tokens"]
    with_items = loss_fn(logits, TARGETS, num_items_in_batch=n_items, **given)
    torch.testing.assert_close(with_items, loss_fn(logits, TARGETS, **given))


@pytest.mark.parametrize("class_weights", [None, [0.5, 1.0, 0.0, 2.0, 1.5, 1.0, 3.0, 0.1]])
def test_items_with_token_weights_are_a_sum_of_weights(class_weights):
    options = {"labels_are_shifted": False, "class_weights": class_weights}
    loss_fn = UnifiedLoss(8, primary_loss_type="standard", **options)
    logits, given = torch.randn(2, 5, 8), {"token_weights": torch.rand(2, 5), "segment_ids": SEGMENTS}
    with_items = loss_fn(logits, TARGETS, num_items_in_batch=loss_fn.count_items(TARGETS, **given), **given)
    torch.testing.assert_close(with_items, loss_fn(logits, TARGETS, **given))


def test_items_of_unshifted_labels():
    """The first label of each text is predicted by nothing: (labels != -100).sum() is one too many for each."""
    labels = torch.randint(0, 8, (3, 5))
    assert UnifiedLoss(8, labels_are_shifted=False).count_items(labels) == 3 * 4
    assert UnifiedLoss(8).count_items(labels) == 3 * 5
    assert UnifiedLoss(8).count_items(labels.flatten()) == 15
    assert UnifiedLoss(8).count_items(torch.full((2, 3), -100)) == 0
