"""What does not fit says so on every rank: what was expected, what came, what to call instead. No rank waits."""

import pytest
import torch
from support.processes import on_ranks
from torch.nn.utils import prune

from ava_ext import ConsistencyLoss, LinearLogits, PerplexityLoss, UnifiedLoss, router_statistics
from ava_ext.distributed import FusedHead, ShardedLogits

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

V, H = 10, 4


def placements_worker(rank):
    mesh = init_device_mesh("cpu", (2,))
    loss_fn = UnifiedLoss(V, H, primary_loss_type="standard")
    torch.manual_seed(0)  # distribute_tensor spreads what rank 0 has: each rank has to have the same
    logits, states, weight, bias = (torch.randn(shape) for shape in ((2, 6, V), (2, 6, H), (V, H), (V,)))
    targets = torch.ones(2, 6, dtype=torch.int64)

    def spread(tensor, placement):
        return distribute_tensor(tensor, mesh, [placement])

    with pytest.raises(ValueError, match=r"logits in placements Replicate or Shard, got P.*: call logits.redistribute"):
        loss_fn(DTensor.from_local(logits, mesh, [Partial()]), targets)
    flat = spread(logits, Shard(1)).flatten(0, 1), spread(states, Shard(1)).flatten(0, 1)
    with pytest.raises(ValueError, match=r"logits in placements Replicate or Shard, got .* as it was before flatten"):
        loss_fn(flat[0], targets.flatten())
    with pytest.raises(ValueError, match=r"hidden_states in placements .* as it was before flatten"):
        of_head = {"hidden_states": flat[1], "lm_head_weight": spread(weight, Replicate())}
        loss_fn(targets=targets.flatten(), **of_head)
    with pytest.raises(ValueError, match=r"expected targets as a torch.Tensor .* pass targets.to_local\(\)"):
        loss_fn(logits, spread(targets, Shard(0)))
    assert loss_fn(logits, spread(targets, Replicate())) == loss_fn(logits, targets)
    with pytest.raises(ValueError, match=r"expected targets of shape \[2, 6\], got \[1, 6\]"):
        loss_fn(spread(logits, Shard(0)), targets[:1])  # this rank's rows, where those of all are wanted
    with pytest.raises(ValueError, match=r"expected the weight as a DTensor .* DTensor.from_local\(weight"):
        loss_fn(targets=targets, hidden_states=spread(states, Shard(1)), lm_head_weight=weight)
    with pytest.raises(ValueError, match=r"weight and bias to be DTensors or torch.Tensors both"):
        loss_fn(
            targets=targets, hidden_states=spread(states, Shard(1)), lm_head_weight=spread(weight, Replicate()),
            lm_head_bias=bias,
        )  # fmt: skip
    of_states = {"hidden_states": spread(states, Replicate()), "lm_head_weight": weight}  # nothing is spread
    plain = {"hidden_states": states, "lm_head_weight": weight}
    torch.testing.assert_close(loss_fn(targets=targets, **of_states), loss_fn(targets=targets, **plain))

    q = torch.rand(2, 6, V, generator=torch.Generator().manual_seed(0))
    beside = {"target_probabilities": q}
    with pytest.raises(NotImplementedError, match=r"target_probabilities beside logits whose columns are spread"):
        loss_fn(spread(logits, Shard(2)), targets, **beside)
    smoothed = UnifiedLoss(V, primary_loss_type="standard", class_weights=(0.5,) * V, label_smoothing=0.1)
    with pytest.raises(NotImplementedError, match=r"smoothing_weights beside logits whose columns are spread"):
        smoothed(spread(logits, Shard(2)), targets)
    with pytest.raises(
        NotImplementedError, match=r"a gradient of target_probabilities beside logits spread over ranks"
    ):
        loss_fn(spread(logits, Shard(1)), targets, target_probabilities=q.clone().requires_grad_())
    row_loss = UnifiedLoss(V, primary_loss_type="standard", reduction="none")
    rows = slice(3 * rank, 3 * rank + 3)
    of_rank = row_loss(spread(logits, Shard(1)), targets, **beside)[:, rows]
    torch.testing.assert_close(of_rank, row_loss(logits, targets, **beside)[:, rows])

    own_heads = UnifiedLoss(V, H, primary_loss_type="standard", use_mtp=True)
    with pytest.raises(ValueError, match=r"hidden_states as a DTensor beside logits whose rows are spread"):
        own_heads(spread(logits, Shard(1)), targets, hidden_states=states)
    with pytest.raises(ValueError, match=r"hidden_states as a torch.Tensor beside logits that are one"):
        own_heads(logits, targets, hidden_states=spread(states, Shard(1)))
    adaptive = UnifiedLoss(V, H, primary_loss_type="adaptive_mtp", use_confidence_weighting=False)
    with pytest.raises(ValueError, match=r"every rank has all rows beside adaptive heads"):
        adaptive(spread(logits, Shard(0)), targets, additional_logits=[spread(logits, Shard(0))] * 3)
    router = UnifiedLoss(V, use_auxiliary_loss=True, num_experts=3, num_experts_per_token=1)
    gate_logits = torch.randn(12, 3)
    with pytest.raises(ValueError, match=r"gate_logits of this rank's rows .* pass its to_local\(\)"):
        router(logits, targets, gate_logits=[spread(gate_logits, Shard(0))])
    with pytest.raises(ValueError, match=r"segment_ids as a torch.Tensor .* in placements \(Shard\(dim=1\)"):
        router_statistics(gate_logits.unsqueeze(0), k=1, segment_ids=spread(targets, Shard(1)), n_segments=2)
    with pytest.raises(ValueError, match=r"at least vocab_size = 10 columns, got shape \[2, 6, 8\]"):
        loss_fn(ShardedLogits(logits[..., :4], "world"), targets)
    perplexity = PerplexityLoss()
    for placement in (Shard(0), Shard(1)):  # exp of a rank's share is no share of the perplexity
        with pytest.raises(ValueError, match=r"logits of which every rank has all rows, got placements"):
            perplexity(spread(logits, placement), targets)
    for placement in (Replicate(), Shard(2)):
        torch.testing.assert_close(perplexity(spread(logits, placement), targets), perplexity(logits, targets))
    mask, given = (targets != 0).float(), [spread(values, Shard(0)) for values in (logits, logits.sin())]
    consistency = ConsistencyLoss()(*given, spread(mask, Shard(0))).full_tensor()
    torch.testing.assert_close(consistency, ConsistencyLoss()(logits, logits.sin(), mask))
    with pytest.raises(ValueError, match=r"consistency_loss: expected attention_mask .* got numbers below 0"):
        ConsistencyLoss()(*given, spread(mask - 1.5, Shard(0)))


def test_placements_that_do_not_fit():
    on_ranks(2, placements_worker)


def meshes_worker(rank):
    loss_fn = UnifiedLoss(V, primary_loss_type="standard")
    states = distribute_tensor(torch.randn(2, 6, H), init_device_mesh("cpu", (4,)), [Shard(1)])
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    weight = distribute_tensor(torch.randn(V, H), other, [Shard(0), Replicate()])
    targets = torch.ones(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected the weight on the mesh of the hidden states"):
        loss_fn(targets=targets, hidden_states=states, lm_head_weight=weight)
    logits = distribute_tensor(torch.randn(2, 6, V), other, [Shard(2), Shard(2)])
    with pytest.raises(ValueError, match="columns are spread over one dimension of the mesh"):
        loss_fn(logits, targets)


def test_meshes_that_do_not_fit():
    on_ranks(4, meshes_worker)


def test_a_weight_whose_values_are_elsewhere():
    loss_fn, targets = UnifiedLoss(V, primary_loss_type="standard"), torch.ones(2, 6, dtype=torch.int64)
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_shape = torch.Size([V, H])  # what DeepSpeed ZeRO 3 leaves behind
    message = r"got an empty tensor \(whole: \[10, 4\]\).*deepspeed.zero.GatheredParameters"
    with pytest.raises(ValueError, match=message):
        loss_fn(targets=targets, hidden_states=torch.randn(2, 6, H), lm_head_weight=weight)


class ScaledLinear(torch.nn.Linear):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def test_fused_head_wants_a_linear_layer():
    with pytest.raises(TypeError, match=r"lm_head to be a torch.nn.Linear, got Sequential"):
        FusedHead(torch.nn.Sequential(torch.nn.Linear(H, V)), UnifiedLoss(V))
    with pytest.raises(TypeError, match=r"lm_head to be a torch.nn.Linear, got ScaledLinear, which may do more"):
        FusedHead(ScaledLinear(H, V), UnifiedLoss(V))
    with pytest.raises(TypeError, match=r"got Linear, which may do more .* or whose weight a hook makes"):
        FusedHead(prune.identity(torch.nn.Linear(H, V), "weight"), UnifiedLoss(V))
    with pytest.raises(TypeError, match=r"fused_head: expected loss_fn to be a UnifiedLoss, got str"):
        FusedHead(torch.nn.Linear(H, V), "x")
    head = FusedHead(torch.nn.Linear(H, V), UnifiedLoss(V, primary_loss_type="standard"))
    states = torch.randn(3, H)
    torch.testing.assert_close(head(states), head.lm_head(states))
    targets = torch.tensor([1, 2, 3])
    expected = head.loss_fn(LinearLogits(states, head.lm_head.weight, head.lm_head.bias), targets)
    torch.testing.assert_close(head(states, targets), expected)
