"""One batch at once, in micro-batches, over ranks, and with its vocabulary, sequence, weights or layers spread over
them: the same gradients."""

import contextlib

import pytest
import torch
from support.processes import on_ranks

from ava_ext import LossMeter, UnifiedLoss
from ava_ext.distributed import FusedHead, pipeline_loss

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

if torch.distributed.is_available():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleavedZeroBubble
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

BATCH_SIZE, N_TOKENS, VOCAB_SIZE, HIDDEN_SIZE, N_EXPERTS = 8, 6, 11, 4, 3
PARTS = {
    "primary_loss_type": "standard", "initial_temperature": 0.8, "z_loss_weight": 0.1, "confidence_penalty_weight": 0.2,
    "logit_softcap": 5.0, "logit_scale": 1.5, "use_ngram_penalty": True, "ngram_size": 2,
    "use_immediate_repetition_penalty": True, "eos_token_id": 1, "distillation_weight": 0.5, "distillation_tail": True,
    "use_mtp": True,
    "num_future_tokens": 2, "mtp_share_head": True, "num_experts": N_EXPERTS, "num_experts_per_token": 1,
    "num_moe_layers": 1, "use_moe_balancing": True, "use_auxiliary_loss": True, "load_balancing_weight": 0.0,
    "router_z_weight": 0.1, "router_score": "sigmoid", "auto_step": False, "pad_token_id": 0,
}  # fmt: skip
# row terms that exclude each other
TERMS = {
    "smooth": {"label_smoothing": 0.1, "use_focal_loss": True},
    "weighted": {"class_weights": [0.5 + 0.1 * number for number in range(VOCAB_SIZE)], "token_reweighting": "eaft"},
}
# further arguments of the loss, aligned with the rows
OF_ROWS = ("negative_ids", "negative_weights", "soft_target_ids", "soft_target_weights", "token_weights")


class Model(torch.nn.Module):
    """Embedding, a layer, a router and a head, with the loss of what they give."""

    def __init__(self, terms="smooth", **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.layer = torch.nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.router = torch.nn.Linear(HIDDEN_SIZE, N_EXPERTS)
        head = torch.nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
        self.head = FusedHead(head, UnifiedLoss(VOCAB_SIZE, HIDDEN_SIZE, **PARTS | TERMS[terms] | options))
        self.double()
        for parameter in self.head.loss_fn.parameters():  # a residual block begins as the identity
            torch.nn.init.normal_(parameter, std=0.3)
        # out of balance, or its term is 0
        self.head.loss_fn.moe_balancer.expert_load.copy_(torch.tensor([[0.5, 0.3, 0.2]]))

    def trunk(self, input_ids):
        return self.layer(self.embedding(input_ids)).tanh()

    def forward(self, input_ids, targets, n_items, **of_rows):
        states = self.trunk(input_ids)
        gate_logits = self.router(states).flatten(0, 1)
        return self.head(states, targets, num_items_in_batch=n_items, gate_logits=gate_logits, **of_rows)


def batch(padding="texts"):
    """Arguments of the model, their n_items included. padding: what a rank may have nothing but."""
    generator = torch.Generator().manual_seed(1)
    input_ids, targets = torch.randint(5, (2, BATCH_SIZE, N_TOKENS), generator=generator)
    # padding: what the router's terms leave out too, so that they are means over the rows that count
    if padding == "texts":  # one of four ranks or micro-batches
        targets[:2] = 0
    elif padding == "half":  # one of two
        targets[:4] = 0
    else:  # a half of every text
        targets[:, :3] = 0
    targets[4, 4:] = targets[5, :4] = 0

    def random(*shape):
        return torch.rand((BATCH_SIZE, N_TOKENS, *shape), generator=generator, dtype=torch.float64)

    return {
        "input_ids": input_ids,
        "targets": targets,
        "negative_ids": torch.randint(-1, VOCAB_SIZE, (BATCH_SIZE, N_TOKENS, 2), generator=generator),
        "negative_weights": random(2),
        "soft_target_ids": torch.randint(VOCAB_SIZE, (BATCH_SIZE, N_TOKENS, 3), generator=generator),
        "soft_target_weights": random(3) / 3,
        "token_weights": 0.5 + random(),
        "n_items": (targets != 0).sum(),
    }


def part_of(given, n, index, dim=0):
    """One of n parts of a batch."""
    return {name: value if name == "n_items" else value.chunk(n, dim)[index] for name, value in given.items()}


def gradients(model):
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()
    }


def expected(padding="texts", **options):
    model = Model(**options)
    loss = model(**batch(padding))
    loss.backward()
    return loss.detach(), gradients(model)


def check(found, padding="texts", **options):
    """found: loss and gradients of each rank, complete."""
    loss, whole = expected(padding, **options)
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


@pytest.mark.parametrize("terms", TERMS)
def test_micro_batches(terms):
    given, model = batch(), Model(terms)
    losses = [model(**part_of(given, 4, index)) for index in range(4)]
    for loss in losses:
        loss.backward()
    check([(sum(loss.detach() for loss in losses), gradients(model))], terms=terms)


def ranks_worker(rank, world_size, padding, terms):
    model = Model(terms)
    loss = model(**part_of(batch(padding), world_size, rank))
    loss.backward()
    return summed(loss.detach(), model)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("world_size", "padding"), [(2, "half"), (4, "texts")])
def test_ranks(world_size, padding, terms):
    check(on_ranks(world_size, ranks_worker, world_size, padding, terms), padding, terms=terms)


def data_parallel_worker(rank, way):
    """DistributedDataParallel averages, too. The first step of a static graph is another than the rest."""
    model = torch.nn.parallel.DistributedDataParallel(Model(), static_graph=way == "static_graph")
    given = part_of(batch("half"), 2, rank)
    parts = [part_of(given, 2, index) for index in range(2)] if way == "no_sync" else [given]
    for _ in range(2):
        model.zero_grad()
        losses = []
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] else model.no_sync():
                loss = model(**part)
                (2 * loss).backward()
            losses.append(loss.detach())
    loss = sum(losses)
    torch.distributed.all_reduce(loss)
    return loss, gradients(model.module)


@pytest.mark.parametrize("way", ["as it is", "static_graph", "no_sync"])
def test_distributed_data_parallel(way):
    """Uneven numbers of rows that count, and a rank without any."""
    check(on_ranks(2, data_parallel_worker, way), "half")


def of_all_rows(given):
    return {name: given[name] for name in (*OF_ROWS, "targets")} | {"num_items_in_batch": given["n_items"]}


def tensor_parallel_worker(rank, is_fused, terms):
    """The head's rows are spread; everything else is the same on every rank, as under Megatron."""
    mesh = init_device_mesh("cpu", (2,))
    given, model = batch(), Model(terms, mtp_share_head=is_fused)
    head = model.head.lm_head
    states = model.trunk(given["input_ids"])
    arguments = of_all_rows(given) | {"gate_logits": model.router(states).flatten(0, 1)}
    if is_fused:
        weight, bias = (distribute_tensor(p.detach(), mesh, [Shard(0)]) for p in (head.weight, head.bias))
        head.weight, head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        loss = model.head(DTensor.from_local(states, mesh, [Replicate()]), **arguments)
    else:
        parallelize_module(head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
        loss = model.head.loss_fn(head(states), hidden_states=DTensor.from_local(states, mesh), **arguments)
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("is_fused", [False, True])
def test_tensor_parallel(is_fused, terms):
    check(on_ranks(2, tensor_parallel_worker, is_fused, terms), mtp_share_head=is_fused, terms=terms)


def sequence_parallel_worker(rank, is_fused, padding, terms):
    """Each rank has half of every text. The parameters are whole; what they get of the rows is added up."""
    mesh = init_device_mesh("cpu", (2,))
    given, model = batch(padding), Model(terms, mtp_share_head=is_fused)
    head, loss_fn = model.head.lm_head, model.head.loss_fn
    local = model.trunk(given["input_ids"].chunk(2, 1)[rank])
    gate_logits = model.router(local).flatten(0, 1)
    states = DTensor.from_local(local, mesh, [Shard(1)])
    arguments = of_all_rows(given) | {"hidden_states": states, "gate_logits": gate_logits}
    if is_fused:
        weight, bias = (distribute_tensor(p.detach(), mesh, [Replicate()]) for p in (head.weight, head.bias))
        head.weight, head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        loss = loss_fn(lm_head_weight=head.weight, lm_head_bias=head.bias, **arguments)
    else:
        loss = loss_fn(DTensor.from_local(head(local), mesh, [Shard(1)]), **arguments)
    loss.backward()
    loss, found = summed(loss.detach(), model)
    if is_fused:  # DTensors have added them up already
        found |= {name: gradient / 2 for name, gradient in found.items() if "lm_head" in name}
    return loss, found


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("is_fused", "padding"), [(False, "texts"), (True, "texts"), (False, "of each")])
def test_sequence_parallel(is_fused, padding, terms):
    found = on_ranks(2, sequence_parallel_worker, is_fused, padding, terms)
    check(found, padding, mtp_share_head=is_fused, terms=terms)


def fsdp_worker(rank, world_size, head_is_a_unit):
    """FSDP2 averages gradients: the loss is multiplied by the number of ranks, as documented."""
    mesh = init_device_mesh("cpu", (world_size,))
    given, model = part_of(batch(), world_size, rank), Model()
    fully_shard(model.layer, mesh=mesh)
    if head_is_a_unit:
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:  # the weight of a module whose forward does not run: a DTensor
        fully_shard(model.head.lm_head, mesh=mesh)
    loss = model(**given)
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
    given, model = part_of(batch(), 2, rank), Model()
    fully_shard(model.head.lm_head, mesh=mesh)
    states = model.trunk(given["input_ids"])
    head = {f"lm_head_{name}": getattr(model.head.lm_head, name).full_tensor() for name in ("weight", "bias")}
    gate_logits = model.router(states).flatten(0, 1)
    loss = model.head.loss_fn(hidden_states=states, gate_logits=gate_logits, **head, **of_all_rows(given))
    (2 * loss).backward()
    return gradients(model)["head.lm_head.weight"]


def test_a_weight_gathered_by_hand_gets_the_gradient_of_one_rank():
    # what the loss does not do, and why users should give it the DTensor itself
    found = on_ranks(2, full_tensor_worker)[0]
    whole = expected()[1]["head.lm_head.weight"]
    assert (found - whole).norm() > 0.5 * whole.norm()


class FirstStage(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.embedding = model.embedding

    def forward(self, input_ids):
        return self.embedding(input_ids)


class LastStage(torch.nn.Module):
    """Gives what the loss reads: logits, hidden states, router logits, and what it was given for the loss."""

    def __init__(self, model, is_fused):
        super().__init__()
        self.layer, self.router, self.lm_head = model.layer, model.router, model.head.lm_head
        self.loss_fn = model.head.loss_fn  # whose heads a zero-bubble schedule would leave out elsewhere
        self.is_fused = is_fused

    def forward(self, given, **of_rows):
        states = self.layer(given).tanh()
        made = (states, self.router(states), *of_rows.values())
        return made if self.is_fused else (self.lm_head(states), *made)


def pipeline_worker(rank, n_micro_batches, is_fused, terms, zero_bubble):
    given, model = batch(), Model(terms, mtp_share_head=is_fused)
    head = model.head.lm_head
    module = FirstStage(model) if rank == 0 else LastStage(model, is_fused)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    held = torch.zeros((), dtype=torch.int64)
    meter = LossMeter("world")
    outputs = ["hidden_states", "gate_logits", *OF_ROWS]
    arguments = {"lm_head_weight": head.weight, "lm_head_bias": head.bias} if is_fused else {}
    outputs = outputs if is_fused else ["logits", *outputs]
    n_items = (lambda: held) if n_micro_batches == 4 else held
    loss_fn = pipeline_loss(model.head.loss_fn, n_items, meter, outputs, **arguments)
    kind, stages = (ScheduleInterleavedZeroBubble, [stage]) if zero_bubble else (ScheduleGPipe, stage)
    schedule = kind(stages, n_micro_batches, loss_fn=loss_fn, scale_grads=False)
    held.copy_(given["n_items"])
    losses = []
    if rank == 0:
        schedule.step(given["input_ids"])
    else:
        schedule.step(target=given["targets"], losses=losses, **{name: given[name] for name in OF_ROWS})
    found = {name: gradient for name, gradient in gradients(model).items() if gradient is not None}
    return sum(loss.detach() for loss in losses) if losses else None, found, meter.compute()


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(
    ("n_micro_batches", "is_fused", "zero_bubble"),
    [(2, False, False), (4, False, True), (4, False, False), (2, True, True)],
)
def test_pipeline(n_micro_batches, is_fused, terms, zero_bubble):
    first, last = on_ranks(2, pipeline_worker, n_micro_batches, is_fused, terms, zero_bubble)
    check([(last[0], first[1] | last[1])], mtp_share_head=is_fused, terms=terms)
    assert first[2] == last[2]  # read on a rank that has computed no loss too
    assert first[2]["n_tokens"] == batch()["n_items"]  # the schedule's call for shapes is none
    assert first[2]["total_loss"] == pytest.approx(last[0].item(), rel=1e-12)


def test_pipeline_outputs_that_are_not_named():
    share = pipeline_loss(UnifiedLoss(5, primary_loss_type="standard"), 3)
    logits, targets = torch.randn(1, 3, 5), torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(share(logits, targets), torch.nn.functional.cross_entropy(logits[0], targets[0]))
    with pytest.raises(ValueError, match=r"expected 1 outputs of the last stage, \('logits',\), got 2"):
        share((logits, logits), targets)
