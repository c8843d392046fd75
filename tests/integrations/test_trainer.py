"""Trainer trains the same with the built-in loss, with trainer_loss, and with the loss in the model; runs resume."""

import copy
import functools

import pytest
import torch
import torch.distributed
from support.processes import on_new_ranks
from tiny_models import V, batch, forget_accelerate, tiny

from ava_ext import UnifiedLoss

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from ava_ext.integrations.transformers import (
    UnifiedLossCallback,
    UnifiedLossTrainer,
    UnifiedLossTrainerMixin,
    bind_expert_bias,
    causal_lm_loss,
    fuse_lm_head,
    trainer_loss,
)

N_TOKENS = 9


def dataset(n_rows=8):
    """Rows of different numbers of labels: means of means differ from the mean."""
    rows = batch(seed=3, batch_size=n_rows)
    for row in range(n_rows):
        n_labels = 1 + row % (N_TOKENS - 2)
        rows["labels"][row, : N_TOKENS - n_labels] = -100
    return [{name: value[row] for name, value in rows.items()} for row in range(n_rows)]


def arguments(folder, cls=transformers.TrainingArguments, **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 1e-2,
    }
    defaults |= {"report_to": [], "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "seed": 1}
    defaults |= {"disable_tqdm": True, "remove_unused_columns": False, "optim": "sgd", "lr_scheduler_type": "constant"}
    return cls(str(folder), **(defaults | options))


def plain_loss(model, fused=True, **options):
    return UnifiedLoss.from_model(model, fused=fused, primary_loss_type="standard", **({"auto_step": False} | options))


def built_in(model, args, **options):
    return transformers.Trainer(model, args, **options)


def with_loss_function(model, args, **options):
    model.loss_function = causal_lm_loss(plain_loss(model, fused=False))
    return transformers.Trainer(model, args, **options)


def with_trainer_loss(model, args, **options):
    return transformers.Trainer(model, args, compute_loss_func=trainer_loss(plain_loss(model, fused=False)), **options)


def with_fused_head(model, args, **options):
    return transformers.Trainer(fuse_lm_head(model, plain_loss(model)), args, **options)


def with_mixin(model, args, **options):
    return UnifiedLossTrainer(model, args, loss_fn=plain_loss(model), **options)


def with_mixin_attached(model, args, **options):
    return UnifiedLossTrainer(model, args, loss_fn=plain_loss(model, fused=False), fuse=False, **options)


WAYS = [with_loss_function, with_trainer_loss, with_fused_head, with_mixin, with_mixin_attached]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("unified_loss.")}


def trained(make, folder, model=None, data=None, **options):
    """(weights, log) after training and an evaluation."""
    model = tiny("Llama", dtype=torch.float32) if model is None else model
    data = dataset() if data is None else data
    trainer = make(model, arguments(folder, **options), train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    return weights(model), trainer.state.log_history


def losses(log, name):
    return [entry[name] for entry in log if name in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        {"bf16": True, "gradient_checkpointing": True},
    ],
    ids=["whole", "accumulated", "bf16 checkpointed"],
)
def test_training_as_with_the_built_in_loss(options, tmp_path):
    expected, expected_log = trained(built_in, tmp_path, **options)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if "bf16" in options else {"rtol": 1e-5, "atol": 1e-7}
    for make in WAYS:
        found, log = trained(make, tmp_path, **options)
        torch.testing.assert_close(
            found, expected, msg=lambda message, make=make: f"{make.__name__}: {message}", **tolerance
        )
        assert losses(log, "loss") == pytest.approx(losses(expected_log, "loss"), rel=tolerance["rtol"])
        assert losses(log, "eval_loss") == pytest.approx(losses(expected_log, "eval_loss"), rel=tolerance["rtol"])


def aligned_model(name):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "num_layers": 1, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 24}
    if name == "T5":
        config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config)
    sizes = {"vocab_size": V, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **dropout, intermediate_size=24))


def test_trainer_loss_of_a_model_around_an_encoder_decoder():
    """BLIP-2 with T5: only the output within its own tells that labels are those of the rows themselves."""
    from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
    from transformers.models.blip_2.modeling_blip_2 import Blip2ForConditionalGenerationModelOutput

    logits, labels = torch.randn(2, 5, V), torch.randint(V, (2, 5))
    loss = trainer_loss(UnifiedLoss(V, primary_loss_type="standard", labels_are_shifted=False))
    for within, is_aligned in ((Seq2SeqLMOutput, True), (CausalLMOutputWithPast, False)):
        outputs = Blip2ForConditionalGenerationModelOutput(logits=logits, language_model_outputs=within(logits=logits))
        rows, targets = (logits, labels) if is_aligned else (logits[:, :-1], labels[:, 1:])
        expected = torch.nn.functional.cross_entropy(rows.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(loss(outputs, labels), expected)


@pytest.mark.parametrize("name", ["T5", "BERT"])
def test_trainer_loss_of_labels_of_the_rows_themselves(name, tmp_path):
    """An encoder-decoder's, whose decoder reads them a token later, and a masked language model's."""
    data = dataset()
    if name == "T5":
        data = [row | {"decoder_input_ids": row["input_ids"].roll(1)} for row in data]
    expected, expected_log = trained(built_in, tmp_path, model=aligned_model(name), data=data)
    found, log = trained(with_trainer_loss, tmp_path, model=aligned_model(name), data=data)
    assert losses(log, "loss") == pytest.approx(losses(expected_log, "loss"), rel=1e-5)
    assert losses(log, "eval_loss") == pytest.approx(losses(expected_log, "eval_loss"), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_compiled_trainer(tmp_path):
    expected, _ = trained(built_in, tmp_path, max_steps=1)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}
    model = tiny("Llama", dtype=torch.float32)
    trainer = with_mixin(model, arguments(tmp_path, **options), train_dataset=dataset())
    trainer.train()
    torch.testing.assert_close(weights(model), expected, rtol=1e-5, atol=1e-7)
    assert losses(trainer.state.log_history, "cross_entropy")


def test_evaluation_has_logits_where_they_are_asked_for(tmp_path):
    seen = []
    model = tiny("Llama", dtype=torch.float32)

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    trainer = with_mixin(model, arguments(tmp_path), eval_dataset=dataset(), compute_metrics=compute_metrics)
    trainer.evaluate()
    assert seen == [(8, N_TOKENS, V)]
    outputs = []
    model = tiny("Llama", dtype=torch.float32)
    trainer = with_mixin(model, arguments(tmp_path), eval_dataset=dataset())
    model.register_forward_hook(lambda *call: outputs.append(set(call[2])))
    trainer.evaluate()
    assert outputs and all("logits" not in output for output in outputs)


def test_the_log_has_the_parts_of_the_loss(tmp_path):
    """Per optimizer step they add up to the loss; metrics are means over all rows. One logs every 2 steps."""
    model = tiny("Mixtral", dtype=torch.float32, output_router_logits=True, router_aux_loss_coef=0.3)
    loss_fn = plain_loss(model, z_loss_weight=0.1, label_smoothing=0.1)
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 2, "eval_strategy": "steps"}
    trainer = UnifiedLossTrainer(
        model, arguments(tmp_path, **options), train_dataset=dataset(), eval_dataset=dataset(), loss_fn=loss_fn
    )
    trainer.train()
    log = trainer.state.log_history
    n_labels = sum(int((row["labels"][1:] != -100).sum()) for row in dataset())
    for prefix in ("", "eval_"):
        entries = [entry for entry in log if f"{prefix}loss" in entry]
        assert len(entries) == 2
        for entry in entries:
            parts = [entry[prefix + name] for name in ("main_loss", "z_loss", "model_aux_loss")]
            # an evaluation gives every batch of it the same weight, and the last of 8 rows in threes has 2
            assert sum(parts) == pytest.approx(entry[f"{prefix}loss"], rel=1e-5 if not prefix else 0.2)
            assert min(parts) > 0
            assert 0 < entry[f"{prefix}entropy"] < 5 and entry[f"{prefix}temperature"] == 1.0
            assert entry[f"{prefix}n_tokens"] == n_labels  # two steps of 4 rows, or all 8


def assert_parts_add_up(log, n_entries, prefix=""):
    entries = [entry for entry in log if prefix + "loss" in entry]
    assert len(entries) == n_entries
    for entry in entries:
        assert entry[prefix + "main_loss"] + entry[prefix + "z_loss"] == pytest.approx(entry[prefix + "loss"], rel=1e-5)


class RunsOutOfMemory(UnifiedLossTrainer):
    has_run = False

    def training_step(self, *arguments, **options):
        found = super().training_step(*arguments, **options)
        if self.state.global_step == 1 and not self.has_run:
            self.has_run = True
            raise RuntimeError("CUDA out of memory.")
        return found


@pytest.mark.parametrize("how", ["resumed", "again", "smaller batch"])
def test_each_training_begins_the_log_anew(how, tmp_path):
    options = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"auto_find_batch_size": how == "smaller batch"}

    def trainer():
        model = tiny("Llama", dtype=torch.float32)
        loss_fn = plain_loss(model, z_loss_weight=0.1)
        cls = RunsOutOfMemory if how == "smaller batch" else UnifiedLossTrainer
        return cls(model, arguments(tmp_path, **options), train_dataset=dataset(), loss_fn=loss_fn)

    first = trainer()
    first.train()
    last = trainer() if how == "resumed" else first
    if how != "smaller batch":
        last.train(**({"resume_from_checkpoint": str(tmp_path / "checkpoint-2")} if how == "resumed" else {}))
    assert_parts_add_up(last.state.log_history, 2)


def test_each_evaluation_has_its_own_parts(tmp_path):
    """Whatever was predicted or logged before; what evaluate() and predict() return has them, with their prefix."""

    class Logs(UnifiedLossTrainer):
        def compute_loss(self, *arguments, **options):
            self.log({"my_loss": 1.0})
            return super().compute_loss(*arguments, **options)

    model = tiny("Llama", dtype=torch.float32)
    args = arguments(tmp_path, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1, logging_steps=2)
    data = {"train_dataset": dataset(), "eval_dataset": dataset()}
    trainer = Logs(model, args, loss_fn=plain_loss(model, z_loss_weight=0.1), **data)
    expected = trainer.evaluate()
    found = trainer.predict(dataset()).metrics
    as_training = trainer.evaluate(metric_key_prefix="train")
    again = trainer.evaluate()
    for name in ("main_loss", "z_loss", "n_tokens", "entropy"):
        assert (
            again["eval_" + name] == found["test_" + name] == as_training["train_" + name] == expected["eval_" + name]
        )
    trainer.train()
    log = trainer.state.log_history
    assert_parts_add_up(log, 2, "eval_")
    assert_parts_add_up(log, 1)
    assert not [entry for entry in log if "my_main_loss" in entry]


class UnifiedLossSeq2SeqTrainer(UnifiedLossTrainerMixin, transformers.Seq2SeqTrainer):
    """Where it generates, it calls the model itself."""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_evaluation_that_generates_has_the_parts(tmp_path):
    model = tiny("Llama", dtype=torch.float32)
    model.generation_config.pad_token_id = model.config.pad_token_id = 0
    loss_fn = plain_loss(model, z_loss_weight=0.1)
    expected, found = (
        UnifiedLossSeq2SeqTrainer(
            model,
            arguments(tmp_path, transformers.Seq2SeqTrainingArguments, predict_with_generate=generates),
            eval_dataset=dataset(),
            compute_metrics=lambda prediction: {"width": prediction.predictions.shape[1]},
            loss_fn=loss_fn,
        ).evaluate()
        for generates in (False, True)
    )
    assert expected["eval_width"] == N_TOKENS < found["eval_width"]
    for name in ("loss", "main_loss", "z_loss", "n_tokens", "entropy"):
        assert found["eval_" + name] == pytest.approx(expected["eval_" + name], rel=1e-6)


def learning_trainer(name, folder, **options):
    """With what learns: temperature and heads of the loss's own, and load and bias of experts."""
    model = tiny(name, dtype=torch.float32)
    torch.manual_seed(5)
    has_experts = name == "DeepseekV3"
    learning = {"use_mtp": True, "num_future_tokens": 1, "use_moe_balancing": has_experts}
    loss_fn = UnifiedLoss.from_model(model, auto_step=False, process_group="world", **learning)
    fuse_lm_head(model, loss_fn)
    if has_experts:
        bind_expert_bias(model, loss_fn)
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 11} | options
    return UnifiedLossTrainer(
        model, arguments(folder, **options), train_dataset=dataset(), eval_dataset=dataset(), loss_fn=loss_fn
    )


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_is_bit_identical(tmp_path):
    """Weights, the loss's own heads, and the temperature, which moves from the 10th step on."""
    whole = learning_trainer("Llama", tmp_path / "whole", max_steps=22)
    whole.train()
    assert whole.loss_fn.temperature.value != 1.0
    expected = whole.model.state_dict()
    assert any(name.startswith("unified_loss.mtp.heads") for name in expected)
    # from a folder that is not this run's output_dir
    resumed = learning_trainer("Llama", tmp_path / "resumed", max_steps=22)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-11"))
    assert_equal(resumed.model.state_dict(), expected)


class LogsAtTheseTimes(transformers.TrainerCallback):
    """Of the same trainer: an evaluation while a checkpoint is saved, or something of one's own at the beginning."""

    def on_save(self, *arguments, **options):
        if self.time == "save":
            self.trainer.evaluate()

    def on_train_begin(self, *arguments, **options):
        if self.time == "begin":
            self.trainer.log({"n_parameters": 1.0})

    def on_step_begin(self, *arguments, **options):
        self.loss_at_step = copy.deepcopy(self.trainer.loss_fn).state_dict()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("time", ["save", "begin"])
@pytest.mark.parametrize("is_named", [False, True])
def test_resume_whatever_was_logged_at_the_checkpoint(time, is_named, tmp_path):
    def run(max_steps, *checkpoint):
        trainer = learning_trainer("Llama", tmp_path, max_steps=max_steps, save_steps=1)
        callback = LogsAtTheseTimes()
        callback.time, callback.trainer = time, trainer
        trainer.callback_handler.callbacks.insert(0, callback)  # before the loss is saved and loaded
        trainer.train(*checkpoint)
        return trainer.loss_fn.state_dict(), callback.loss_at_step

    saved, _ = run(1)
    _, found = run(2, str(tmp_path / "checkpoint-1") if is_named else True)
    assert_equal(found, saved)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_load_and_bias_of_experts_are_in_the_checkpoint(tmp_path):
    """The rest of such a model is Trainer's own affair: some versions do not load the experts' weights again."""
    whole = learning_trainer("DeepseekV3", tmp_path, max_steps=2, save_steps=2)
    whole.train()
    assert whole.loss_fn.moe_balancer.expert_bias.any()
    resumed = learning_trainer("DeepseekV3", tmp_path, max_steps=3)
    at_first = {}

    class Look(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **options):
            at_first.update(copy.deepcopy(resumed.model).state_dict())

    resumed.add_callback(Look())
    resumed.train(resume_from_checkpoint=True)
    of_loss = {
        name: value for name, value in whole.model.state_dict().items() if "loss" in name or "correction" in name
    }
    assert len(of_loss) > 10
    assert_equal({name: at_first[name] for name in of_loss}, of_loss)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["Llama", "DeepseekV3"])
def test_the_best_model_has_its_own_loss(name, tmp_path):
    """A step too long makes the last model worse than the best one."""
    options = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 3.0, "optim": "sgd"}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 4}
    trainer = learning_trainer(name, tmp_path, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-4")
    saved = torch.load(f"{best}/unified_loss.pt", weights_only=True)["loss"]
    assert_equal(trainer.loss_fn.state_dict(), saved)
    if name == "DeepseekV3":
        bias = saved["moe_balancer.expert_bias"]
        assert bias.any() and torch.equal(trainer.model.model.layers[1].mlp.gate.e_score_correction_bias, bias[0])


def test_what_a_callback_must_not_let_pass(tmp_path):
    model = tiny("Llama", dtype=torch.float32)
    with pytest.raises(ValueError, match="expected a loss with auto_step=False"):
        UnifiedLossCallback(UnifiedLoss.from_model(model))
    UnifiedLossCallback(plain_loss(model, auto_step=True))  # nothing to step
    outside = plain_loss(model, fused=False, use_mtp=True)  # heads that no optimizer would have
    trainer = built_in(
        model, arguments(tmp_path, max_steps=2), train_dataset=dataset(), callbacks=[UnifiedLossCallback(outside)]
    )
    with pytest.raises(ValueError, match="expected the optimizer to have the loss's parameters"):
        trainer.train()
    # a checkpoint of another run, in this run's folder
    for name in ("here", "there"):
        loss_fn = plain_loss(model, fused=False)
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "learning_rate": 0.1 + len(name)}
        trainer = transformers.Trainer(
            tiny("Llama", dtype=torch.float32),
            arguments(tmp_path / name, **options),
            train_dataset=dataset(),
            compute_loss_func=trainer_loss(loss_fn),
            callbacks=[UnifiedLossCallback(loss_fn)],
        )
        trainer.train()
    trainer.args.max_steps = 2
    with pytest.raises(FileNotFoundError, match="got none of this run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "here/checkpoint-1"))


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return torch.nn.functional.cross_entropy(model(**inputs).logits[:, :-1].mT, labels[:, 1:])


def test_the_callback_notices_a_trainer_that_leaves_the_loss_out(tmp_path):
    """Its own loss would be trained, and logged as `loss`."""
    model = tiny("Llama", dtype=torch.float32)
    loss_fn = plain_loss(model)
    options = {"train_dataset": dataset(), "callbacks": [UnifiedLossCallback(loss_fn)]}
    fuse_lm_head(model, loss_fn)
    before = weights(model)
    with pytest.raises(ValueError, match=r"got a step without it: .*SFTTrainer.*UnifiedLossTrainerMixin"):
        OwnLoss(model, arguments(tmp_path), **options).train()
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0, got 0\.1: label_smoothing is an option of the"):
        transformers.Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), **options).train()
    assert_equal(weights(model), before)
    transformers.Trainer(model, arguments(tmp_path), **options).train()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_callback_steps_once_per_optimizer_step(tmp_path):
    model = tiny("Llama", dtype=torch.float32)
    loss_fn = UnifiedLoss.from_model(model, fused=False, auto_step=False)
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 3}
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=dataset(),
        compute_loss_func=trainer_loss(loss_fn),
        callbacks=[UnifiedLossCallback(loss_fn)],
    )
    trainer.train()
    assert loss_fn.get_loss_statistics()["temperature"]["count"] == 3


def test_what_would_be_left_out_is_refused(tmp_path):
    model = tiny("Mixtral", dtype=torch.float32, output_router_logits=True)
    trainer = with_trainer_loss(model, arguments(tmp_path), train_dataset=dataset())
    with pytest.raises(ValueError, match="auxiliary loss, which Trainer would leave out"):
        trainer.train()
    with pytest.raises(ValueError, match="expected a loss without class_weights: Trainer divides by the number"):
        trainer_loss(plain_loss(model, class_weights=[1.0] * V))
    with pytest.raises(ValueError, match="expected a loss without pad_token_id: Trainer divides by the number"):
        trainer_loss(plain_loss(model, pad_token_id=0))
    trainer_loss(plain_loss(model, pad_token_id=2, eos_token_id=2))  # counts as any other label
    with pytest.raises(ValueError, match="use_auxiliary_loss=True needs the attention_mask"):
        trainer_loss(plain_loss(model, use_auxiliary_loss=True))
    for function in (trainer_loss, causal_lm_loss):
        with pytest.raises(ValueError, match=r"expected a loss without logit_softcap, got 30\.0"):
            function(UnifiedLoss(V, logit_softcap=30.0))
    with pytest.raises(ValueError, match="label_smoothing is an option of the loss"):
        with_mixin(tiny("Llama"), arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="expected no compute_loss_func"):
        with_mixin(tiny("Llama"), arguments(tmp_path), compute_loss_func=lambda *given: None)
    with pytest.raises(ValueError, match="ignore_index=-100 as the loss, got 7"):
        causal_lm_loss(plain_loss(model))(torch.zeros(1, 2, V), torch.zeros(1, 2, dtype=torch.long), ignore_index=7)


def test_n_is_that_of_the_loss(tmp_path):
    """Labels on padding, which attention_mask and pad_token_id leave out: Trainer's own count has them."""
    data = dataset()
    for row in data:
        row["labels"] = row["input_ids"].clone()
        row["attention_mask"][-3:] = 0
    model = tiny("Llama", dtype=torch.float32)
    options = {"gradient_accumulation_steps": 2}
    _, log = trained(with_mixin, tmp_path, model=model, data=data, **options)
    assert losses(log, "loss")[0] == pytest.approx(losses(log, "cross_entropy")[0], rel=1e-5)
    assert losses(log, "n_tokens")[0] == 4 * (N_TOKENS - 4)


def of_three(rows):
    """Texts of three tokens, packed."""
    return (torch.arange(N_TOKENS) % 3).expand(len(rows["labels"]), N_TOKENS)


WHAT_DECIDES = {
    "segments": lambda rows: {"loss_inputs": {"segment_ids": torch.arange(N_TOKENS)[None] // 3}},
    "weights": lambda rows: {"loss_inputs": {"token_weights": torch.full(rows["labels"].shape, 0.25)}},
    "positions": lambda rows: {"position_ids": of_three(rows)},
    "positions of all": lambda rows: {"position_ids": of_three(rows)[:1]},
    "shifted": lambda rows: {"shift_labels": torch.nn.functional.pad(rows["labels"][:, 1:], (0, 1), value=-100)},
}


@pytest.mark.parametrize("what", WHAT_DECIDES)
def test_n_is_that_of_the_loss_whatever_decides_it(what, tmp_path):
    """Each loss is the mean over the rows of both micro-batches that count."""
    data = dataset()
    for row in data:
        row["labels"] = row["input_ids"].clone()
        row["attention_mask"][-3:] = 0

    def collated(rows):
        rows = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return rows | WHAT_DECIDES[what](rows)

    make = functools.partial(with_mixin, data_collator=collated)
    _, log = trained(make, tmp_path, data=data, gradient_accumulation_steps=2)
    for prefix in ("", "eval_"):
        loss, cross_entropy = (losses(log, prefix + name) for name in ("main_loss", "cross_entropy"))
        assert loss == pytest.approx(cross_entropy, rel=1e-5 if not prefix else 0.2)


CLASS_WEIGHTS = [0.1 + token % 3 for token in range(V)]


def with_class_weights(model, args, **options):
    return UnifiedLossTrainer(model, args, loss_fn=plain_loss(model, class_weights=CLASS_WEIGHTS), **options)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_n_is_the_sum_of_class_weights(accumulation, tmp_path):
    model, data = tiny("Llama", dtype=torch.float32), dataset(4)
    rows = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    loss_fn = plain_loss(model, fused=False, class_weights=CLASS_WEIGHTS)
    expected = loss_fn(model(rows["input_ids"], rows["attention_mask"]), rows["labels"], rows["attention_mask"]).item()
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    _, log = trained(with_class_weights, tmp_path, model=model, data=data, **options)
    assert losses(log, "loss")[0] == pytest.approx(expected, rel=1e-4)


TWO_PROCESSES = [with_trainer_loss, with_mixin, with_class_weights]


def train_on_rank(rank, folder):
    forget_accelerate()
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    of_own_n = {"average_tokens_across_devices": False, "per_device_eval_batch_size": 2}  # batches of one size
    own_n = trained(with_mixin, folder, **of_own_n, **options)[1]
    return [trained(make, folder, **options) for make in TWO_PROCESSES], own_n


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_train_as_one(tmp_path):
    """2 ranks x 2 micro-batches of 1 = 1 batch of 4; every rank logs the metrics of all of them."""
    expected = [trained(make, tmp_path, per_device_train_batch_size=4) for make in TWO_PROCESSES]
    for rank, own_n in on_new_ranks(2, train_on_rank, tmp_path):
        for prefix in ("", "eval_"):  # where each rank has an N of its own, the log has the mean of the ranks' losses
            assert losses(own_n, prefix + "main_loss") == pytest.approx(losses(own_n, prefix + "loss"), rel=1e-5)
        for (found, log), (expected_weights, expected_log) in zip(rank, expected, strict=True):
            torch.testing.assert_close(found, expected_weights, rtol=1e-5, atol=1e-7)
            for name in ("loss", "cross_entropy", "n_tokens"):
                assert losses(log, name) == pytest.approx(losses(expected_log, name), rel=1e-5)
