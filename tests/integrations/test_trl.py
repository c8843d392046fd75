"""SFTTrainer with the loss in the model trains as it does by itself; a policy gradient without logits."""

import pytest
import torch
from tiny_models import V, batch, gradients, tiny

from ava_ext import LinearLogits, UnifiedLoss, token_log_probs

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

from ava_ext.integrations.transformers import UnifiedLossTrainerMixin

pytestmark = pytest.mark.filterwarnings("ignore")


class UnifiedLossSFTTrainer(UnifiedLossTrainerMixin, trl.SFTTrainer):
    """The recipe: the mixin first, then any trainer; the loss goes into the model before that trainer sees it."""


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(V)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2")


def texts():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, V, (3 + 2 * row,), generator=generator).tolist() for row in range(8)]
    return datasets.Dataset.from_dict({"text": [" ".join(f"w{token}" for token in row) for row in rows]})


def trained(make, folder, family="Llama", **given):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "bf16": False}
    options |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "seed": 1, "learning_rate": 1e-2}
    options |= {"optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "gradient_checkpointing": False}
    options |= given
    model = tiny(family, dtype=torch.float32)
    args = trl.SFTConfig(str(folder), disable_tqdm=True, **options)
    trainer = make(model, args, train_dataset=texts(), processing_class=tokenizer())
    trainer.train()
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    return kept, trainer.state.log_history


def with_plain_loss(model, args, **given):
    loss_fn = UnifiedLoss.from_model(model, primary_loss_type="standard", auto_step=False)
    return UnifiedLossSFTTrainer(model, args, loss_fn=loss_fn, **given)


def test_sft_with_the_fused_head(tmp_path):
    expected, expected_log = trained(trl.SFTTrainer, tmp_path)
    found, log = trained(with_plain_loss, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    for entry, expected_entry in zip(log[:2], expected_log[:2], strict=True):
        assert entry["loss"] == pytest.approx(expected_entry["loss"], rel=1e-5)
        assert entry["cross_entropy"] == pytest.approx(entry["loss"], rel=1e-5)
        assert entry["entropy"] == pytest.approx(expected_entry["entropy"], rel=1e-2)


def test_weight_of_the_load_balancing_of_the_model(tmp_path):
    """SFTTrainer writes it into the configuration, which the model has read before."""
    options = {"router_aux_loss_coef": 0.5, "gradient_accumulation_steps": 1, "packing": True, "max_length": 8}
    options |= {"packing_strategy": "wrapped", "family": "Mixtral"}
    expected, _ = trained(trl.SFTTrainer, tmp_path, **options)
    found, log = trained(with_plain_loss, tmp_path, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert log[0]["model_aux_loss"] > 0.5
    options |= {"family": "Glm4Moe"}
    with pytest.raises(ValueError, match=r"expected router_aux_loss_coef=None, got 0\.5: Glm4MoeForCausalLM has none"):
        trained(with_plain_loss, tmp_path, **options)


def test_dft_is_an_option_of_the_loss(tmp_path):
    def make(model, args, **given):
        options = {"primary_loss_type": "standard", "token_reweighting": "dft", "auto_step": False}
        return UnifiedLossSFTTrainer(model, args, loss_fn=UnifiedLoss.from_model(model, **options), **given)

    with pytest.raises(ValueError, match=r"expected loss_type='nll', got 'dft': token_reweighting='dft'"):
        trained(make, tmp_path, loss_type="dft")
    expected, _ = trained(trl.SFTTrainer, tmp_path, loss_type="dft")
    found, _ = trained(make, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj"]}, {"target_modules": "all-linear", "exclude_modules": ".*unified_loss.*"}]
)
def test_heads_of_the_loss_train_beside_adapters_that_the_trainer_makes(options, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    heads = []

    def make(model, args, **given):
        loss_fn = UnifiedLoss.from_model(model, use_mtp=True, num_future_tokens=1, auto_step=False)
        heads.append((loss_fn, [p.detach().clone() for p in loss_fn.parameters()]))
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
        return UnifiedLossSFTTrainer(model, args, loss_fn=loss_fn, peft_config=config, **given)

    trained(make, tmp_path)
    loss_fn, before = heads[0]
    assert before and all(not torch.equal(p, was) for p, was in zip(loss_fn.parameters(), before, strict=True))
    options = {"target_modules": "all-linear"}
    with pytest.raises(ValueError, match=r"expected no adapters in the loss, .*exclude_modules"):
        trained(make, tmp_path)


def test_policy_gradient_without_logits():
    """One step as of GRPO: group advantages, clipped ratio, KL to a reference; as with log_softmax of whole logits."""
    policy, reference = tiny("Llama"), tiny("Llama").eval()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn_like(p))
    inputs = batch(batch_size=4)
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    targets = torch.cat([inputs["labels"][:, 1:], torch.full((4, 1), -100)], 1)
    keep = targets != -100

    def log_probs_of(model, fused):
        hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        if fused:
            return token_log_probs(LinearLogits(hidden, model.lm_head.weight), targets)
        log_probs = model.lm_head(hidden).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return torch.where(keep, log_probs.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1), 0.0), entropy

    def loss_of(fused):
        log_probs, entropy = log_probs_of(policy, fused)
        with torch.no_grad():
            of_reference, _ = log_probs_of(reference, fused)
            old = of_reference  # what sampled the texts
        ratio = (log_probs - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
        kl = (of_reference - log_probs).exp() - (of_reference - log_probs) - 1
        return torch.where(keep, -gain + 0.04 * kl - 0.01 * entropy, 0.0).sum() / keep.sum()

    found = []
    for fused in (True, False):
        policy.zero_grad()
        loss = loss_of(fused)
        loss.backward()
        found.append((loss.detach(), gradients(policy)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-13)
    assert found[0][1]["lm_head.weight"].abs().sum() > 0
