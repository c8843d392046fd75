"""Vocabulary parallelism with what it is used beside: FSDP2 over another dimension of the mesh, torch.compile."""

import pytest
import torch
from support.processes import on_ranks

from ava_ext import UnifiedLoss
from ava_ext.distributed import FusedHead, ShardedLogits
from ava_ext.losses.auxiliary import load_balancing_loss
from ava_ext.ops import router_statistics

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

if torch.distributed.is_available():
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

BATCH_SIZE, N_TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 4, 6, 11, 4
TERMS = {"primary_loss_type": "standard", "z_loss_weight": 0.1, "label_smoothing": 0.1, "use_ngram_penalty": True}


def inputs():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(BATCH_SIZE, N_TOKENS, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (BATCH_SIZE, N_TOKENS), generator=generator)
    return states, targets


def make_head():
    torch.manual_seed(1)
    return FusedHead(torch.nn.Linear(HIDDEN_SIZE, VOCAB_SIZE), UnifiedLoss(VOCAB_SIZE, ngram_size=1, **TERMS)).double()


def two_dimensional_worker(rank, head_is_a_unit):
    """Two groups of two ranks: the groups have different texts, the ranks of a group different columns of them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    head, (states, targets) = make_head(), inputs()
    parallelize_module(head.lm_head, mesh["tp"], ColwiseParallel())
    fully_shard(head if head_is_a_unit else head.lm_head, mesh=mesh["dp"])
    group = mesh.get_local_rank("dp")
    local = states.chunk(2)[group].clone().requires_grad_()
    spread = DTensor.from_local(local, mesh["tp"], [Replicate()])
    loss = head(spread, targets.chunk(2)[group], num_items_in_batch=targets.numel())
    (2 * loss).backward()  # FSDP2 averages over the groups
    parameters = head.lm_head.weight, head.lm_head.bias
    return loss.detach(), local.grad / 2, *(parameter.grad.full_tensor() for parameter in parameters)


@pytest.mark.parametrize("head_is_a_unit", [True, False])
def test_fully_sharded_and_tensor_parallel(head_is_a_unit):
    head, (states, targets) = make_head(), inputs()
    states.requires_grad_()
    loss = head(states, targets)
    expected = torch.autograd.grad(loss, (states, head.lm_head.weight, head.lm_head.bias))
    found = on_ranks(4, two_dimensional_worker, head_is_a_unit)
    torch.testing.assert_close(found[0][0] + found[2][0], loss.detach(), rtol=1e-12, atol=1e-12)
    for rank, (rank_loss, of_states, *of_head) in enumerate(found):
        torch.testing.assert_close(rank_loss, found[rank // 2 * 2][0], rtol=1e-14, atol=0)
        torch.testing.assert_close(of_states, expected[0].chunk(2)[rank // 2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tuple(of_head), expected[1:], rtol=1e-12, atol=1e-12)


def sharded_head_worker(rank):
    """The head's gradient where the loss is given the layer that fully_shard has made of it, and where its weight."""
    states, targets = (values.chunk(2)[rank] for values in inputs())
    found = []
    for given in ("layer", "weight"):
        linear = fully_shard(make_head().lm_head, mesh=init_device_mesh("cpu", (2,)))
        head = {"lm_head_weight": linear}
        if given == "weight":
            head = {"lm_head_weight": linear.weight, "lm_head_bias": linear.bias}
        UnifiedLoss(VOCAB_SIZE, ngram_size=1, **TERMS)(targets=targets, hidden_states=states, **head).backward()
        found.append((linear.weight.grad.full_tensor(), linear.bias.grad.full_tensor()))
    return found


def test_a_fully_sharded_layer_as_the_heads_weight():
    for of_layer, of_weight in on_ranks(2, sharded_head_worker):
        torch.testing.assert_close(of_layer, of_weight, rtol=0, atol=0)


def flat_parameters_worker(rank, options):
    """The loss of this rank's texts, where FSDP1 has made one flat parameter of all."""
    states, targets = inputs()
    torch.manual_seed(1)
    loss_fn = UnifiedLoss(VOCAB_SIZE, HIDDEN_SIZE, primary_loss_type="standard", use_mtp=True, **options)
    head = FusedHead(torch.nn.Linear(HIDDEN_SIZE, VOCAB_SIZE), loss_fn).double()
    n_items, of_rank = targets.numel(), (states.chunk(2)[rank], targets.chunk(2)[rank])
    expected = head(*of_rank, num_items_in_batch=n_items).detach()
    sharded = FullyShardedDataParallel(head, use_orig_params=False, device_id=torch.device("cpu"))
    loss = sharded(*of_rank, num_items_in_batch=n_items)
    loss.backward()
    assert all(parameter.grad is not None for parameter in sharded.parameters())
    return loss.detach(), expected


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mtp_share_head", [True, False])
def test_heads_of_the_loss_in_a_flat_parameter(mtp_share_head):
    for loss, expected in on_ranks(2, flat_parameters_worker, {"mtp_share_head": mtp_share_head}):
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def buffer_dtype_worker(rank, options):
    """Losses, state and constants where FSDP1 has cast every buffer to bfloat16, and where it has not."""
    found, targets = [], inputs()[1].chunk(2)[rank]
    logits = torch.randn(*targets.shape, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    gate_logits = logits[..., :3].contiguous()
    for buffer_dtype in (torch.bfloat16, None):
        torch.manual_seed(1)
        layer, loss_fn = torch.nn.Linear(VOCAB_SIZE, VOCAB_SIZE), UnifiedLoss(VOCAB_SIZE, **options)
        precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=buffer_dtype)
        model = FullyShardedDataParallel(
            Sequence(layer, loss_fn), mixed_precision=precision, device_id=torch.device("cpu")
        )
        losses = [model(logits, targets, gate_logits=gate_logits).detach() for _ in range(3)]
        found.append((losses, dict(loss_fn.named_buffers())))
    return found


class Sequence(torch.nn.Module):
    def __init__(self, layer, loss_fn):
        super().__init__()
        self.layer, self.loss_fn = layer, loss_fn

    def forward(self, logits, targets, **arguments):
        return self.loss_fn(self.layer(logits), targets, **arguments)


EXPERTS = {"num_experts": 3, "num_experts_per_token": 1, "router_score": "sigmoid", "use_moe_balancing": True}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("options", "rtol"),
    # a load of 1/3 has been rounded before the first call
    [(TERMS | {"class_weights": tuple(0.1 + n / 7 for n in range(VOCAB_SIZE))}, 1e-6), (EXPERTS, 2**-8)],
    ids=["constants", "state"],
)
def test_buffers_that_a_wrapper_casts_are_float32_again(options, rtol):
    for of_bfloat16, of_float32 in on_ranks(2, buffer_dtype_worker, options):
        torch.testing.assert_close(of_bfloat16, of_float32, rtol=rtol, atol=0)


def compiled_worker(rank):
    generator = torch.Generator().manual_seed(rank)
    leaf = torch.randn(BATCH_SIZE, N_TOKENS, VOCAB_SIZE, generator=generator, requires_grad=True)
    loss_fn, targets = UnifiedLoss(2 * VOCAB_SIZE - 1, ngram_size=1, **TERMS), inputs()[1]

    def loss_of(logits):
        return loss_fn(ShardedLogits(logits * 1.5, "world"), targets)

    found = []
    for function in (loss_of, torch.compile(loss_of, backend="aot_eager")):
        loss = function(leaf)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    return found


def test_compiled():
    for eager, compiled in on_ranks(2, compiled_worker):
        torch.testing.assert_close(compiled, eager)


def compiled_dtensors_worker(rank):
    """Loss and gradients of DTensors, as they are and in one compiled graph, of logits, of a head and of a router in
    each place."""
    mesh, (states, targets), found = init_device_mesh("cpu", (2,)), inputs(), []
    weight, loss_fn = make_head().lm_head.weight, UnifiedLoss(VOCAB_SIZE, primary_loss_type="standard")

    def of_logits(states, weight):
        return loss_fn(torch.nn.functional.linear(states, weight), targets)

    def of_head(states, weight):
        return loss_fn(targets=targets, hidden_states=states, lm_head_weight=weight)

    def of_flat_logits(states, weight):
        return loss_fn(torch.nn.functional.linear(states, weight).flatten(0, 1), targets.flatten())

    def of_router(states, weight):
        statistics = router_statistics(torch.nn.functional.linear(states, weight).flatten(0, 1), k=2)
        return load_balancing_loss(statistics, k=2).redistribute(placements=[Replicate()])

    for loss_of, of_states, of_weight in (
        (of_logits, Replicate(), Shard(0)),
        (of_logits, Shard(1), Replicate()),
        (of_flat_logits, Shard(0), Replicate()),
        (of_router, Shard(0), Replicate()),
        (of_head, Shard(0), Replicate()),
        (of_head, Replicate(), Shard(0)),
    ):
        leaves = (
            distribute_tensor(states, mesh, [of_states]).requires_grad_(),
            distribute_tensor(weight.detach(), mesh, [of_weight]).requires_grad_(),
        )
        results = []
        for function in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True)):
            loss = function(*leaves)
            gradients = torch.autograd.grad(loss, leaves)
            results.append([loss.detach(), *(gradient.full_tensor() for gradient in gradients)])
        found.append(results)
    return found


def test_dtensors_in_one_compiled_graph():
    for rank in on_ranks(2, compiled_dtensors_worker):
        for eager, compiled in rank:
            torch.testing.assert_close(compiled, eager)
