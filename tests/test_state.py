"""State of UnifiedLoss: its names in a checkpoint, loading into another configuration, casts, copies, statistics."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from support.strategies import HIDDEN_SIZE, Numbers

from ava_ext import AuxiliaryLoss, LossMeter, UnifiedLoss, reference
from ava_ext.losses.moe import MoEBalancer

V, E = 6, 3
OWN_HEADS = {"use_mtp": True, "num_future_tokens": 2}
MOE = {"num_experts": E, "num_experts_per_token": 1, "num_moe_layers": 2, "use_moe_balancing": True}
MOE |= {"router_score": "sigmoid"}  # whose choices need not be given
ADAPTIVE = {"primary_loss_type": "adaptive_mtp", "num_future_tokens": 2}
CONFIGURATIONS = {
    "plain": {},
    "own heads": OWN_HEADS,
    "experts": MOE,
    "adaptive": ADAPTIVE,
    "both": {**OWN_HEADS, **MOE},
}


def build(name, **options):
    return UnifiedLoss(V, HIDDEN_SIZE, **CONFIGURATIONS[name], **options)


def train(loss_fn, n_steps=12, seed=0):
    """A few training calls; returns the last detailed dict."""
    numbers = Numbers(seed)
    for step in range(n_steps):
        values = {
            "logits": numbers.normal(2, 4, V, scale=1.0 + 3 * (step % 2)),
            "hidden_states": numbers.normal(2, 4, HIDDEN_SIZE).to(next(loss_fn.parameters(), torch.zeros(1)).dtype),
            "additional_logits": numbers.normal(2, 2, 4, V),
            "confidence_scores": numbers.uniform(2, 4),
            "gate_logits": numbers.normal(2, 8, E),
        }
        result = loss_fn(targets=numbers.integers(0, V, 2, 4), **values, return_detailed=True)
    return result


# -- checkpoints


def test_names_in_a_checkpoint():
    names = set(build("both").state_dict())
    assert names >= {"temperature.value", "temperature.history", "temperature.count"}
    assert names >= {"moe_balancer.expert_load", "moe_balancer.expert_counts", "moe_balancer.expert_bias"}
    assert names >= {"mtp.norm.weight", "mtp.heads.0.weight", "mtp.heads.1.weight", "mtp.heads.1.bias"}
    assert {name.split(".")[0] for name in names} == {"temperature", "mtp", "moe_balancer"}


@pytest.mark.parametrize(("nested", "assign"), [(False, True), (True, False)])
@pytest.mark.parametrize("source", CONFIGURATIONS)
@pytest.mark.parametrize("destination", CONFIGURATIONS)
def test_strict_loading_with_a_component_more_or_less(source, destination, assign, nested):
    saved, loaded = build(source), build(destination)
    train(saved)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    checkpoint = {name: value.clone() for name, value in saved.state_dict().items()}
    if nested:
        parent = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2), "loss": loaded})
        checkpoint = {f"loss.{name}": value for name, value in checkpoint.items()}
        checkpoint |= {f"model.{name}": value for name, value in parent["model"].state_dict().items()}
        names = list(checkpoint)
        parent.load_state_dict(checkpoint, assign=assign)
    else:
        names = list(checkpoint)
        loaded.load_state_dict(checkpoint, assign=assign)
    assert list(checkpoint) == names  # the caller's
    for name, value in loaded.state_dict().items():
        expected = saved.state_dict().get(name, before[name])
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)
    assert all(
        isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad for parameter in loaded.parameters()
    )


@pytest.mark.parametrize("wrong", ["temperature.values", "mtp.heads.7.weight", "unknown"])
def test_names_that_are_wrong_are_still_refused(wrong):
    loaded = build("own heads")
    checkpoint = dict(loaded.state_dict())
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{wrong}"'):
        loaded.load_state_dict({**checkpoint, wrong: torch.zeros(())})
    del checkpoint["mtp.heads.0.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"mtp.heads.0.weight"'):
        loaded.load_state_dict(checkpoint)


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped():
    whole, first, second = (build("both") for _ in range(3))
    first.load_state_dict(whole.state_dict())
    train(whole, 5)
    expected = train(whole, 8, seed=1)
    train(first, 5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    torch.testing.assert_close(train(second, 8, seed=1), expected, rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_checkpoint_discards_what_calls_have_learned_since_the_last_step(name, assign):
    rolled_back, untouched = (build(name, auto_step=False) for _ in range(2))
    checkpoint = copy.deepcopy(untouched.state_dict())
    train(rolled_back, 3)  # a bad batch, of which no step comes
    rolled_back.load_state_dict(checkpoint, assign=assign)
    for loss_fn in (rolled_back, untouched):
        train(loss_fn, 2, seed=1)
        loss_fn.step()
    torch.testing.assert_close(rolled_back.state_dict(), untouched.state_dict(), rtol=0, atol=0)


# -- casts and copies


@pytest.mark.parametrize(
    "cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_buffers_keep_their_precision(name, cast):
    loss_fn = build(name)
    train(loss_fn)
    before = {name: buffer.clone() for name, buffer in loss_fn.named_buffers()}
    cast(torch.nn.Sequential(loss_fn))
    torch.testing.assert_close(dict(loss_fn.named_buffers()), before, rtol=0, atol=0)
    assert all(parameter.dtype != torch.float32 for parameter in loss_fn.parameters())
    train(loss_fn)  # and still works


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_copies_are_equal_and_independent(name, duplicate):
    loss_fn = build(name)
    train(loss_fn, 10)
    other = duplicate(loss_fn)
    assert other.config == loss_fn.config
    expected = train(loss_fn, 3)
    state = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    torch.testing.assert_close(train(other, 3), expected, rtol=0, atol=0)
    train(other, 2)
    torch.testing.assert_close(dict(loss_fn.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_buffers_keep_their_precision_in_a_checkpoint_that_lost_it(name, assign, dtype):
    saved, loaded, expected = (build(name) for _ in range(3))
    train(saved)
    checkpoint = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in saved.state_dict().items()
    }
    buffers = [name for name, _ in saved.named_buffers(remove_duplicate=False) if name in checkpoint]
    kept = {name: checkpoint[name].clone() for name in buffers}
    loaded.load_state_dict(checkpoint, assign=assign)
    assert {name: checkpoint[name].dtype for name in buffers} == {name: kept[name].dtype for name in buffers}
    expected.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in
                              checkpoint.items()})  # fmt: skip
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == expected.get_buffer(name).dtype, name
        torch.testing.assert_close(buffer, expected.get_buffer(name), rtol=0, atol=0)
    if assign:
        assert all(parameter.dtype == dtype for parameter in loaded.parameters())  # as ever
        loaded.float()
    torch.testing.assert_close(train(loaded, 12, seed=5), train(expected, 12, seed=5), rtol=1e-5, atol=1e-6)


def test_the_bias_moves_on_from_a_checkpoint_of_bfloat16():
    loss_fn = UnifiedLoss(V, **MOE | {"num_moe_layers": 1})
    state = {name: value.bfloat16() if value.is_floating_point() else value for name, value in
             loss_fn.state_dict().items()}  # fmt: skip
    loss_fn.load_state_dict(state, assign=True)
    gates = torch.tensor([[3.0, 0.0, -3.0]]).expand(4, E)
    for _ in range(400):
        loss_fn(
            torch.zeros(1, 4, V), torch.zeros(1, 4).long(), gate_logits=gates, expert_indices=torch.zeros(4, 1).long()
        )
    # in bfloat16 a step of 1e-3 no longer moves 0.5
    torch.testing.assert_close(loss_fn.moe_balancer.expert_bias, torch.tensor([[-0.4, 0.4, 0.4]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_average_of_all_buffers(name):
    """AveragedModel subtracts them, constants too: Lightning's WeightAveraging does so by default."""
    loss_fn = build(name)
    averaged = torch.optim.swa_utils.AveragedModel(loss_fn, use_buffers=True)
    for seed in range(3):
        train(loss_fn, 12, seed)
        averaged.update_parameters(loss_fn)
    constants, expected = (dict(module.row_pass.named_buffers()) for module in (averaged.module, loss_fn))
    torch.testing.assert_close(constants, expected, rtol=0, atol=0)
    train(averaged.module)


# -- process groups


@pytest.fixture
def world(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_copy_refers_to_the_same_group(name, world):
    loss_fn = build(name, process_group=world)
    train(loss_fn, 3)
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Sequential(loss_fn))
    for other in (copy.deepcopy(loss_fn), averaged.module[0], copy.deepcopy(averaged).module[0]):
        assert other.process_group is world
        train(other, 3, seed=1)
        other.step()
    assert copy.deepcopy(AuxiliaryLoss(1, process_group=world)).group.process_group is world
    assert copy.deepcopy(LossMeter(world)).group.process_group is world


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_a_pickled_loss_leaves_its_group_out_and_says_so(world):
    loss_fn = build("both", process_group=world)
    train(loss_fn, 3)
    with pytest.warns(UserWarning, match="ava_ext: a process group cannot be pickled and is left out"):
        data = pickle.dumps(loss_fn)
    other = pickle.loads(data)
    assert other.process_group is None
    assert loss_fn.process_group is world
    torch.testing.assert_close(train(other, 3, seed=1), train(loss_fn, 3, seed=1), rtol=0, atol=0)
    file = io.BytesIO()
    with pytest.warns(UserWarning, match="is left out"):
        torch.save(loss_fn, file)
    with pytest.warns(UserWarning, match="ava_ext: a process group cannot be pickled and is left out"):
        assert pickle.loads(pickle.dumps(AuxiliaryLoss(1, process_group=world))).group.process_group is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kept in (None, "world"):
            assert pickle.loads(pickle.dumps(build("both", process_group=kept))).process_group == kept
            assert pickle.loads(pickle.dumps(LossMeter(kept))).group.process_group == kept


# -- experts


def test_load_counts_and_bias_of_the_experts():
    loss_fn = UnifiedLoss(
        V, **MOE | {"num_experts_per_token": 2}, auto_step=False, moe_momentum=0.75, expert_bias_rate=0.01
    )
    numbers, balancer = Numbers(2), loss_fn.moe_balancer
    load, bias, counts = torch.full((2, E), 1 / E), torch.zeros(2, E), torch.zeros(2, E)
    for _ in range(3):
        pending = torch.zeros(2, E)
        for n_rows in (8, 5):  # micro-steps
            gates = numbers.normal(2, n_rows, E)
            chosen = gates.topk(2, dim=-1).indices
            pending += torch.nn.functional.one_hot(chosen, E).sum((1, 2))
            loss_fn(numbers.normal(2, 4, V), numbers.integers(0, V, 2, 4), gate_logits=gates, expert_indices=chosen)
            torch.testing.assert_close(balancer.expert_load, load, rtol=0, atol=0)  # until the step
        loss_fn.step()
        counts += pending
        for layer in range(2):
            load[layer] = reference.updated_expert_load(load[layer], pending[layer], 0.75)
            bias[layer] = reference.updated_expert_bias(bias[layer], pending[layer], 0.01)
        torch.testing.assert_close(balancer.expert_load, load)
        torch.testing.assert_close(balancer.expert_bias, bias)
        torch.testing.assert_close(balancer.expert_counts, counts)
    assert bias.abs().sum() > 0


def test_evaluation_changes_no_state():
    loss_fn = build("both")
    before = {name: value.clone() for name, value in loss_fn.named_buffers()}
    train(loss_fn.eval())
    with torch.no_grad():
        train(loss_fn.train())
    torch.testing.assert_close(dict(loss_fn.named_buffers()), before, rtol=0, atol=0)


# -- statistics


def test_statistics_of_every_component_that_keeps_some():
    loss_fn = build("experts")
    result = train(loss_fn, 3)
    statistics = loss_fn.get_loss_statistics()
    assert set(statistics) == {"temperature", "moe_balancing"}
    routing = statistics["moe_balancing"]
    assert set(routing) == {"expert_counts", "expert_scores", "total_tokens", "max_violation"}
    assert routing["total_tokens"] == 24
    assert routing["expert_counts"].sum() == 2 * 24
    assert routing["expert_scores"].sum(-1).tolist() == pytest.approx([1, 1])
    assert result["moe_max_violation"] >= 0

    loss_fn = build("adaptive")
    calls = [train(loss_fn, 1, seed) for seed in range(3)]
    averages = loss_fn.get_loss_statistics()["adaptive_mtp"]
    assert averages["count"] == 3
    for name in ("mtp_loss", "confidence_regularization"):
        torch.testing.assert_close(
            averages[name].double(), torch.stack([c[name] for c in calls]).mean(), rtol=1e-6, atol=0
        )
    assert set(build("plain").get_loss_statistics()) == {"temperature"}


def test_reset_clears_statistics_but_not_the_bias():
    loss_fn = build("both")
    train(loss_fn)
    bias = loss_fn.moe_balancer.expert_bias.clone()
    statistics = loss_fn.get_loss_statistics()
    kept = copy.deepcopy(statistics)
    loss_fn.reset_statistics()
    torch.testing.assert_close(statistics, kept, rtol=0, atol=0)  # what was returned does not change
    fresh = dict(build("both").named_buffers())
    fresh["moe_balancer.expert_bias"] = bias
    assert bias.abs().sum() > 0
    torch.testing.assert_close(dict(loss_fn.named_buffers()), fresh, rtol=0, atol=0)


# -- devices


@pytest.mark.parametrize("options", [{}, {"use_moe_balancing": True, "num_experts": 3, "router_score": "sigmoid"}])
@pytest.mark.parametrize("training", [True, False])
def test_state_on_another_device_than_the_logits_is_named(options, training):
    """meta stands for an accelerator: the loss was left on the CPU."""
    loss_fn = UnifiedLoss(5, **options).train(training)
    given = {"logits": torch.randn(2, 3, 5, device="meta"), "targets": torch.ones(2, 3, device="meta").long()}
    with pytest.raises(
        ValueError, match=r"^unified_loss: expected the state of temperature on meta as the logits, got cpu"
    ):
        loss_fn(**given, gate_logits=torch.randn(6, 3, device="meta"))
    assert loss_fn.temperature.pending_rows.device.type == "cpu"
    plain = UnifiedLoss(5, primary_loss_type="standard")  # reads no state
    assert plain(**given).is_meta


def test_a_balancer_on_another_device_than_the_router_is_named():
    with pytest.raises(
        ValueError, match=r"^moe_balancer: expected the state of moe_balancing on meta as the logits, got"
    ):
        MoEBalancer(3, 1, router_score="sigmoid")(torch.randn(6, 3, device="meta"))


def test_what_is_pending_follows_buffers_that_are_moved_one_by_one():
    with torch.device("meta"):
        loss_fn = UnifiedLoss(5, temperature_gain=3.0, auto_step=False)
    other = UnifiedLoss(5, temperature_gain=3.0, auto_step=False)
    for name, buffer in other.named_buffers():
        owner, _, key = name.rpartition(".")
        loss_fn.get_submodule(owner)._buffers[key] = buffer.clone()
    assert loss_fn.temperature.pending_rows.is_meta
    with torch.inference_mode():  # a check before training
        loss_fn(torch.zeros(2, 3, 5), torch.ones(2, 3).long())
        other(torch.zeros(2, 3, 5), torch.ones(2, 3).long())
    for seed in range(12):
        logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        losses = [each(logits.requires_grad_(), torch.ones(2, 3).long()) for each in (loss_fn, other)]
        assert losses[0] == losses[1]
        loss_fn.step(), other.step()
    assert loss_fn.temperature.value == other.temperature.value != 1
    assert loss_fn.temperature.previous_value == other.temperature.previous_value == 1  # a tensor of its own


@pytest.mark.parametrize("update", ["sign", "quantile"])
def test_a_call_that_raises_teaches_nothing(update):
    options = {"use_moe_balancing": True, "num_experts": 4, "num_experts_per_token": 2, "router_score": "sigmoid"}
    options |= {"expert_bias_update": update, "use_contrastive_loss": True, "auto_step": False, "use_mtp": True}
    loss_fn = UnifiedLoss(6, primary_loss_type="standard", mtp_type="adaptive", num_future_tokens=1, **options)
    numbers = Numbers(0)
    logits, targets = numbers.normal(1, 8, 6), numbers.integers(0, 6, 1, 8)
    given = {"gate_logits": numbers.normal(8, 4), "additional_logits": [logits]}
    given["confidence_scores"] = numbers.uniform(1, 8)
    for _ in range(2):
        with pytest.raises(ValueError, match="use_contrastive_loss needs contrastive_pair or hidden_states"):
            loss_fn(logits, targets, **given)
    loss_fn(logits, targets, **given, hidden_states=numbers.normal(1, 8, 3))
    if update == "quantile":
        assert loss_fn.moe_balancer.pending_required_bias.sum() == 8 * 4
    loss_fn.step()
    statistics = loss_fn.get_loss_statistics()
    assert statistics["moe_balancing"]["total_tokens"] == 8
    assert statistics["adaptive_mtp"]["count"] == 1


@pytest.mark.parametrize("options", [{}, {"auto_step": False}, ADAPTIVE | {"num_future_tokens": 1}])
def test_torch_func_is_refused_where_a_call_would_be_learned_from(options):
    """What it gives belongs to the transform. In evaluation, and without what learns, it works."""
    loss_fn = UnifiedLoss(V, **options)
    numbers = Numbers(0)
    logits, targets = numbers.normal(2, 4, V), numbers.integers(0, V, 2, 4)
    given = {"additional_logits": [numbers.normal(2, 4, V)], "confidence_scores": numbers.uniform(2, 4)}

    def of_logits(x):
        return loss_fn(x, targets, **given)

    in_transforms = (
        lambda: torch.func.grad(of_logits)(logits),
        lambda: torch.func.jvp(of_logits, (logits,), (logits,)),
        lambda: torch.func.vmap(of_logits)(torch.stack([logits, logits])),
    )
    for transformed in in_transforms:
        with pytest.raises(NotImplementedError, match=r"cannot learn within torch.func; expected eval\(\)"):
            transformed()
    loss_fn.eval()
    leaf = logits.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(of_logits)(logits), torch.autograd.grad(of_logits(leaf), leaf)[0])
    assert loss_fn.temperature.count == 0
