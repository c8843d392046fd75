"""One batch at once, in micro-batches, over ranks, and with its vocabulary, sequence, weights or layers spread over
them: the same gradients."""

import pytest
import torch
from processes import on_ranks

from ava_ext import LossMeter, UnifiedLoss
from ava_ext.distributed import FusedHead, pipeline_loss

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

if torch.distributed.is_available():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

BATCH_SIZE, N_TOKENS, VOCAB_SIZE, HIDDEN_SIZE, N_EXPERTS = 8, 6, 11, 4, 3
OPTIONS = {
    "primary_loss_type": "standard", "initial_temperature": 0.8, "label_smoothing": 0.1, "use_focal_loss": True,
    "z_loss_weight": 0.1, "confidence_penalty_weight": 0.2, "logit_softcap": 5.0, "use_ngram_penalty": True,
    "ngram_size": 2, "use_immediate_repetition_penalty": True, "eos_token_id": 1, "use_mtp": True,
    "num_future_tokens": 2, "mtp_share_head": True, "num_experts": N_EXPERTS, "num_experts_per_token": 1,
    "use_moe_balancing": True, "use_auxiliary_loss": True, "load_balancing_weight": 0.0, "router_z_weight": 0.1,
    "router_score": "sigmoid", "auto_step": False, "pad_token_id": 0,
}  # fmt: skip


class Model(torch.nn.Module):
    """Embedding, a layer, a router and a head, with the loss of what they give."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.layer = torch.nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.router = torch.nn.Linear(HIDDEN_SIZE, N_EXPERTS)
        head = torch.nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
        self.head = FusedHead(head, UnifiedLoss(VOCAB_SIZE, HIDDEN_SIZE, **OPTIONS | options))
        self.double()
        for parameter in self.head.loss_fn.parameters():  # a residual block begins as the identity
            torch.nn.init.normal_(parameter, std=0.3)
        if self.head.loss_fn.moe_balancer is not None:  # out of balance, or its term is 0
            self.head.loss_fn.moe_balancer.expert_load.copy_(torch.tensor([[0.5, 0.3, 0.2]]))

    def trunk(self, input_ids):
        return self.layer(self.embedding(input_ids)).tanh()

    def forward(self, input_ids, targets, n_items):
        states = self.trunk(input_ids)
        gate_logits = self.router(states).flatten(0, 1)
        return self.head(states, targets, num_items_in_batch=n_items, gate_logits=gate_logits)


def batch():
    generator = torch.Generator().manual_seed(1)
    input_ids, targets = torch.randint(5, (2, BATCH_SIZE, N_TOKENS), generator=generator)
    # padding: what the router's terms leave out too, so that they are means over the rows that count
    targets[:2] = 0  # of four ranks or micro-batches one has no row that counts
    targets[2, 1:] = targets[5, :4] = 0
    return input_ids, targets, (targets != 0).sum()


def gradients(model):
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()
    }


def expected(options):
    model = Model(**options)
    loss = model(*batch())
    loss.backward()
    return loss.detach(), gradients(model)


def check(found, options=None):
    """found: loss and gradients of each rank, complete."""
    loss, whole = expected(options or {})
    for rank_loss, rank in found:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=1e-12)
        assert rank.keys() == whole.keys()
        for name, gradient in whole.items():
            assert gradient.abs().sum() > 0, name
            torch.testing.assert_close(rank[name], gradient, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def summed(loss, model, factor=1.0):
    """Loss and gradients, added up over ranks."""
    found = {name: gradient * factor for name, gradient in gradients(model).items()}
    for value in (loss, *found.values()):
        torch.distributed.all_reduce(value)
    return loss, found


def test_micro_batches():
    input_ids, targets, n_items = batch()
    model = Model()
    losses = [model(*part, n_items) for part in zip(input_ids.chunk(4), targets.chunk(4), strict=True)]
    for loss in losses:
        loss.backward()
    check([(sum(loss.detach() for loss in losses), gradients(model))])


def ranks_worker(rank, world_size):
    input_ids, targets, n_items = batch()
    model = Model()
    loss = model(input_ids.chunk(world_size)[rank], targets.chunk(world_size)[rank], n_items)
    loss.backward()
    return summed(loss.detach(), model)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks(world_size):
    check(on_ranks(world_size, ranks_worker, world_size))


def tensor_parallel_worker(rank, is_fused):
    """The head's rows are spread; everything else is the same on every rank, as under Megatron."""
    mesh = init_device_mesh("cpu", (2,))
    input_ids, targets, n_items = batch()
    model = Model(mtp_share_head=is_fused)
    head = model.head.lm_head
    states = model.trunk(input_ids)
    gate_logits = model.router(states).flatten(0, 1)
    arguments = {"num_items_in_batch": n_items, "gate_logits": gate_logits}
    if is_fused:
        weight, bias = (distribute_tensor(p.detach(), mesh, [Shard(0)]) for p in (head.weight, head.bias))
        head.weight, head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        loss = model.head(DTensor.from_local(states, mesh, [Replicate()]), targets, **arguments)
    else:
        parallelize_module(head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
        loss = model.head.loss_fn(head(states), targets, hidden_states=DTensor.from_local(states, mesh), **arguments)
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("is_fused", [False, True])
def test_tensor_parallel(is_fused):
    check(on_ranks(2, tensor_parallel_worker, is_fused), {"mtp_share_head": is_fused})


def sequence_parallel_worker(rank, is_fused):
    """Each rank has half of every text. The parameters are whole; what they get of the rows is added up."""
    mesh = init_device_mesh("cpu", (2,))
    input_ids, targets, n_items = batch()
    model = Model(mtp_share_head=is_fused)
    head, loss_fn = model.head.lm_head, model.head.loss_fn
    local = model.trunk(input_ids.chunk(2, 1)[rank])
    gate_logits = model.router(local).flatten(0, 1)
    states = DTensor.from_local(local, mesh, [Shard(1)])
    arguments = {"hidden_states": states, "num_items_in_batch": n_items, "gate_logits": gate_logits}
    if is_fused:
        weight, bias = (distribute_tensor(p.detach(), mesh, [Replicate()]) for p in (head.weight, head.bias))
        head.weight, head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        loss = loss_fn(targets=targets, lm_head_weight=head.weight, lm_head_bias=head.bias, **arguments)
    else:
        loss = loss_fn(DTensor.from_local(head(local), mesh, [Shard(1)]), targets, **arguments)
    loss.backward()
    loss, found = summed(loss.detach(), model)
    if is_fused:  # DTensors have added them up already
        found |= {name: gradient / 2 for name, gradient in found.items() if "lm_head" in name}
    return loss, found


@pytest.mark.parametrize("is_fused", [False, True])
def test_sequence_parallel(is_fused):
    check(on_ranks(2, sequence_parallel_worker, is_fused), {"mtp_share_head": is_fused})


def fsdp_worker(rank, world_size, head_is_a_unit):
    """FSDP2 averages gradients: the loss is multiplied by the number of ranks, as documented."""
    mesh = init_device_mesh("cpu", (world_size,))
    input_ids, targets, n_items = batch()
    input_ids, targets = input_ids.chunk(world_size)[rank], targets.chunk(world_size)[rank]
    model = Model()
    fully_shard(model.layer, mesh=mesh)
    if head_is_a_unit:
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = model(input_ids, targets, n_items)
    else:  # the weight of a module whose forward does not run: a DTensor
        fully_shard(model.head.lm_head, mesh=mesh)
        loss = model(input_ids, targets, n_items)
    (world_size * loss).backward()
    loss = loss.detach()
    torch.distributed.all_reduce(loss)
    found = gradients(model)
    if not head_is_a_unit:  # the rest is not wrapped
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                torch.distributed.all_reduce(found[name])
                found[name] /= world_size
    return loss, found


@pytest.mark.parametrize(("world_size", "head_is_a_unit"), [(2, True), (4, True), (2, False)])
def test_fsdp(world_size, head_is_a_unit):
    check(on_ranks(world_size, fsdp_worker, world_size, head_is_a_unit))


def full_tensor_worker(rank):
    mesh = init_device_mesh("cpu", (2,))
    input_ids, targets, n_items = batch()
    model = Model()
    fully_shard(model.head.lm_head, mesh=mesh)
    states = model.trunk(input_ids.chunk(2)[rank])
    weight = model.head.lm_head.weight.full_tensor()
    bias = model.head.lm_head.bias.full_tensor()
    gate_logits = model.router(states).flatten(0, 1)
    loss = model.head.loss_fn(
        targets=targets.chunk(2)[rank], hidden_states=states, lm_head_weight=weight, lm_head_bias=bias,
        num_items_in_batch=n_items, gate_logits=gate_logits,
    )  # fmt: skip
    (2 * loss).backward()
    return gradients(model)["head.lm_head.weight"]


def test_a_weight_gathered_by_hand_gets_the_gradient_of_one_rank():
    # what the loss does not do, and why users should give it the DTensor itself
    found = on_ranks(2, full_tensor_worker)[0]
    whole = expected({})[1]["head.lm_head.weight"]
    assert (found - whole).norm() > 0.5 * whole.norm()


class Stage(torch.nn.Module):
    def __init__(self, model, is_last):
        super().__init__()
        self.layers = torch.nn.Sequential(
            *([model.layer, torch.nn.Tanh(), model.head.lm_head] if is_last else [model.embedding])
        )

    def forward(self, given):
        return self.layers(given)


def pipeline_worker(rank, n_micro_batches):
    input_ids, targets, n_items = batch()
    model = Model(use_mtp=False, use_moe_balancing=False, use_auxiliary_loss=False)
    stage = PipelineStage(Stage(model, rank == 1), rank, 2, torch.device("cpu"))
    held = torch.zeros((), dtype=torch.int64)
    meter = LossMeter("world")
    loss_fn = pipeline_loss(model.head.loss_fn, (lambda: held) if n_micro_batches == 4 else held, meter)
    schedule = ScheduleGPipe(stage, n_micro_batches, loss_fn=loss_fn, scale_grads=False)
    held.copy_(n_items)
    losses = []
    if rank == 0:
        schedule.step(input_ids)
    else:
        schedule.step(target=targets, losses=losses)
    found = {name: g for name, g in gradients(model).items() if g is not None}
    return sum(loss.detach() for loss in losses) if losses else None, found, meter.compute()


@pytest.mark.parametrize("n_micro_batches", [2, 4])
def test_pipeline(n_micro_batches):
    first, last = on_ranks(2, pipeline_worker, n_micro_batches)
    options = {"use_mtp": False, "use_moe_balancing": False, "use_auxiliary_loss": False}
    loss, whole = expected(options)
    torch.testing.assert_close(last[0], loss, rtol=1e-12, atol=1e-12)
    assert first[2] == last[2]  # read on a rank that has computed no loss too
    assert first[2]["n_tokens"] == batch()[2]  # the schedule's call for shapes is none
    assert first[2]["total_loss"] == pytest.approx(loss.item(), rel=1e-12)
    found = first[1] | last[1]
    for name, gradient in whole.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-13)
