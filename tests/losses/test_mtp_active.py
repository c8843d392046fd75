"""Heads of every kind that a call switches off: for all rows, or for some sequences on the device."""

import numpy as np
import pytest
import torch
from support.processes import on_ranks
from support.strategies import Numbers

from ava_ext import LinearLogits, UnifiedLoss

BATCH, LENGTH, HIDDEN, VOCAB, DEPTHS = 4, 4, 8, 11, 2


@pytest.fixture(scope="module", autouse=True)
def _no_graphs_are_left():
    yield
    torch._dynamo.reset()


OPTIONS = {
    "own": {},
    "shared": {"mtp_share_head": True},
    "hidden_states": {"mtp_type": "hidden_states"},
    "logits beside hidden_states": {"mtp_type": "hidden_states"},
    "adaptive": {"mtp_type": "adaptive"},
    "adaptive, LinearLogits": {"mtp_type": "adaptive"},
}
KINDS = list(OPTIONS)


def make_loss(kind, **options):
    torch.manual_seed(1)
    options = {"num_future_tokens": DEPTHS, "mtp_weight": 1.0, **OPTIONS[kind]} | options
    return UnifiedLoss(VOCAB, HIDDEN, primary_loss_type="standard", use_mtp=True, **options).double()


def make_inputs(kind, seed=0):
    """What the main term reads, and what the heads read beside it: leaves."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    targets = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    targets[1, 2] = -100
    main = {"logits": leaf(BATCH, LENGTH, VOCAB), "targets": targets}
    states = [leaf(BATCH, LENGTH, HIDDEN) for _ in range(DEPTHS)]
    if kind == "own":
        return main, {"hidden_states": states[0]}
    if kind == "shared":
        return main, {"hidden_states": states[0], "lm_head_weight": leaf(VOCAB, HIDDEN), "lm_head_bias": leaf(VOCAB)}
    if kind == "hidden_states":
        return main, {"mtp_hidden_states": states, "lm_head_weight": leaf(VOCAB, HIDDEN)}
    heads = [leaf(BATCH, LENGTH, VOCAB) for _ in range(DEPTHS)]
    if kind == "adaptive, LinearLogits":
        heads = [LinearLogits(hidden_states, leaf(VOCAB, HIDDEN), leaf(VOCAB)) for hidden_states in states]
    confidence = torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64).requires_grad_()
    return main, {"additional_logits": heads} | ({"confidence_scores": confidence} if "adaptive" in kind else {})


def tensors(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [value] if isinstance(value, torch.Tensor) else [leaf for part in value for leaf in tensors(part)]


def fill_with_nan(given, rows):
    """Rows of what the heads read; weights are left as they are."""
    with torch.no_grad():
        for leaf in tensors(given):
            if leaf.shape[:2] == (BATCH, LENGTH):
                leaf[rows] = torch.nan


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [(torch.bool, "none")] + [(dtype, "mean") for dtype in (torch.bool, torch.int64, torch.uint8, torch.float32)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_switches_sequences(kind, reduction, dtype):
    """Those that are off count as rows that predict nothing, and N stays that of all rows."""
    main, given = make_inputs(kind)
    loss_fn = make_loss(kind, reduction=reduction)
    by_row = make_loss(kind, reduction="none")(**main, **given, return_detailed=True)
    n = 1 if reduction == "none" else int((main["targets"] != -100).sum())
    for active in ([True, False, False, True], [False] * BATCH, [True] * BATCH, True, False):
        mask = torch.tensor(active)
        parts = loss_fn(**main, **given, mtp_active=mask.to(dtype), return_detailed=True)
        assert parts["total_loss"].shape == parts["main_loss"].shape
        for name in ("mtp_loss", "confidence_regularization"):
            if name in parts:
                expected = torch.where(mask.view(-1, 1), by_row[name], 0.0)
                expected = expected if reduction == "none" else expected.sum() / n
                torch.testing.assert_close(parts[name], expected, rtol=1e-12, atol=1e-15)
        some = loss_fn(
            **main | {"targets": torch.where(mask.view(-1, 1), main["targets"], -100)}, **given, return_detailed=True
        )
        for name in [name for name in parts if "_depth_" in name]:
            torch.testing.assert_close(parts[name], some[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("own_denominator", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_of_sequences_that_are_off_reaches_nothing(kind, own_denominator):
    loss_fn = make_loss(kind, mtp_own_denominator=own_denominator)
    for active in (torch.tensor([True, False, False, True]), torch.tensor(False)):
        found = []
        for value in ("clean", "nan"):
            main, given = make_inputs(kind)
            if value == "nan":
                fill_with_nan(given, ~active if active.dim() else slice(None))
            loss_fn.zero_grad()
            loss = loss_fn(**main, **given, mtp_active=active)
            loss.backward()
            leaves = [*tensors(given), *loss_fn.parameters()]
            found.append((loss.detach(), [leaf.grad.clone() for leaf in leaves]))
        torch.testing.assert_close(*found, rtol=0, atol=0)
        assert active.any() == any(gradient.any() for gradient in found[0][1])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_of_rows_that_predict_nothing_reaches_nothing(kind):
    loss_fn, found = make_loss(kind), []
    predict_nothing = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    predict_nothing[:, -1] = True
    for value in ("clean", "nan"):
        main, given = make_inputs(kind)
        if value == "nan":
            fill_with_nan(given, predict_nothing)
        loss_fn.zero_grad()
        loss = loss_fn(**main, **given)
        loss.backward()
        found.append((loss.detach(), [leaf.grad.clone() for leaf in [*tensors(given), *loss_fn.parameters()]]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(("reduction", "is_compiled"), [("mean", False), ("none", False), ("mean", True)])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_off_stay_in_the_graph(kind, reduction, is_compiled):
    """DistributedDataParallel raises at the next step where a parameter of its module got no gradient."""
    main, given = make_inputs(kind)
    fill_with_nan(given, slice(None))
    loss_fn = make_loss(kind, reduction=reduction)
    torch._dynamo.reset()  # each kind is a graph of its own, and so many count as a function that never settles
    called = torch.compile(loss_fn, fullgraph=True, backend="aot_eager") if is_compiled else loss_fn
    parts = called(**main, **given, mtp_active=False, return_detailed=True)
    parts["total_loss"].sum().backward()
    alone = UnifiedLoss(VOCAB, primary_loss_type="standard", reduction=reduction)(**main)
    torch.testing.assert_close(parts["total_loss"], alone, rtol=0, atol=0)
    for leaf in [*tensors(given), *loss_fn.parameters()]:
        assert leaf.grad is not None
        assert not leaf.grad.any()
    assert all(parts[f"mtp_loss_depth_{k}"] == 0 for k in range(1, DEPTHS + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_off_need_not_be_given(kind):
    main, _ = make_inputs(kind)
    loss_fn = make_loss(kind)
    loss_fn(**main, mtp_active=False).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in loss_fn.parameters())


class Model(torch.nn.Module):
    """Embedding, head, further heads or depth modules, and the loss: what DistributedDataParallel wraps."""

    def __init__(self, mtp_type):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCAB)
        self.loss_fn = UnifiedLoss(VOCAB, HIDDEN, use_mtp=True, mtp_type=mtp_type, num_future_tokens=1)
        self.confidence, self.further = None, None
        if mtp_type == "adaptive":
            self.confidence, self.further = torch.nn.Linear(HIDDEN, 1), torch.nn.Linear(HIDDEN, VOCAB)
        if mtp_type == "hidden_states":
            self.further = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, tokens, mtp_active):
        hidden_states = self.embedding(tokens)
        given = {"hidden_states": hidden_states}
        if self.confidence is not None:
            given["additional_logits"] = [self.further(hidden_states)]
            given["confidence_scores"] = self.confidence(hidden_states).sigmoid()
        elif self.further is not None:
            given |= {"mtp_hidden_states": [self.further(hidden_states)], "lm_head_weight": self.head.weight}
        return self.loss_fn(self.head(hidden_states), tokens, mtp_active=mtp_active, **given)


def data_parallel_worker(rank, mtp_type):
    model = torch.nn.parallel.DistributedDataParallel(Model(mtp_type))
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % VOCAB
    for active in (None, False, torch.tensor([1, 0, 0, 1]), False, None):  # after a parameter that is missed, it raises
        model(tokens, active).backward()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("mtp_type", ["deepseek", "adaptive", "hidden_states"])
def test_data_parallel_goes_on(mtp_type):
    on_ranks(2, data_parallel_worker, mtp_type)


def dtensor_worker(rank, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    main, given = make_inputs("hidden_states")
    of_rows = [distribute_tensor(value.detach(), mesh, [Shard(0)]) for value in given["mtp_hidden_states"]]
    weight = distribute_tensor(given["lm_head_weight"].detach(), mesh, [Replicate()]).requires_grad_()
    hidden_states = of_rows[0].requires_grad_()
    further = {"mtp_hidden_states": [depth.requires_grad_() for depth in of_rows]} if kind == "hidden_states" else {}
    loss_fn = make_loss(kind)
    loss = loss_fn(
        targets=main["targets"], hidden_states=hidden_states, lm_head_weight=weight, mtp_active=False, **further
    )
    loss.backward()
    assert hidden_states.grad.full_tensor().any()  # of the main term
    assert not further or not of_rows[1].grad.full_tensor().any()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in loss_fn.parameters())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("kind", ["own", "shared", "hidden_states"])
def test_rows_of_several_ranks(kind):
    on_ranks(2, dtensor_worker, kind)


def test_detached_shared_head_is_left_alone_by_heads_that_are_off():
    main, given = make_inputs("shared")
    make_loss("shared", mtp_detach_head=True)(**main, **given, mtp_active=False).backward()
    assert given["hidden_states"].grad is not None
    assert given["lm_head_weight"].grad is None


@pytest.mark.parametrize("active", [torch.tensor(0), torch.tensor([False]), torch.tensor([1])])
@pytest.mark.parametrize("kind", KINDS)
def test_flat_rows_are_one_sequence(kind, active):
    main, given = make_inputs(kind)
    loss_fn = make_loss(kind)
    flat = {name: value[0] for name, value in main.items()}
    sequences = {name: value[:1] for name, value in main.items()}
    of_flat, of_sequences = dict(given), dict(given)
    for name, value in given.items():
        if name in ("mtp_hidden_states", "additional_logits"):
            for to, first in ((of_flat, 0), (of_sequences, slice(1))):
                to[name] = [
                    LinearLogits(head.hidden_states[first], *head[1:])
                    if isinstance(head, LinearLogits)
                    else head[first]
                    for head in value
                ]
        elif name in ("hidden_states", "confidence_scores"):
            of_flat[name], of_sequences[name] = value[0], value[:1]
    got = loss_fn(**flat, segment_ids=torch.zeros(LENGTH, dtype=torch.int64), **of_flat, mtp_active=active)
    torch.testing.assert_close(got, loss_fn(**sequences, **of_sequences, mtp_active=active), rtol=1e-12, atol=0)


def test_averages_leave_out_sequences_that_are_off():
    """A call whose only sequence with counted rows is off teaches the averages nothing."""
    main, given = make_inputs("adaptive")
    loss_fn = make_loss("adaptive")
    main["targets"][1:] = -100
    for active, n_seen in (([0, 1, 1, 1], 0), ([1, 0, 0, 0], 1)):
        loss_fn(**main, **given, mtp_active=torch.tensor(active, dtype=torch.uint8))
        loss_fn.step()
        assert loss_fn.adaptive_mtp.statistics()["count"] == n_seen


@pytest.mark.parametrize("shape", [(3,), (BATCH, 1), (BATCH, LENGTH), (1,)])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_shape_is_named(kind, shape):
    main, given = make_inputs(kind)
    with pytest.raises(ValueError, match=r"expected mtp_active of shape \[\] or \[4\], got \[" + str(shape[0])):
        make_loss(kind)(**main, **given, mtp_active=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("active", [0, 1, 0.0, "no"])
def test_what_only_looks_like_a_flag_is_refused(active):
    loss_fn = UnifiedLoss(11, 8, primary_loss_type="standard", use_mtp=True, num_future_tokens=1)
    logits, targets = torch.randn(2, 4, 11), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(TypeError, match="expected mtp_active to be a bool"):
        loss_fn(logits, targets, hidden_states=torch.randn(2, 4, 8), mtp_active=active)


def test_a_flag_may_be_numpys():
    loss_fn = UnifiedLoss(11, 8, primary_loss_type="standard", use_mtp=True, num_future_tokens=1)
    logits, labels, hidden_states = torch.randn(2, 4, 11), torch.randint(11, (2, 4)), torch.randn(2, 4, 8)
    for is_on in (True, False):
        expected = loss_fn(logits, labels, hidden_states=hidden_states, mtp_active=is_on, labels_are_shifted=is_on)
        flags = {"mtp_active": np.bool_(is_on), "labels_are_shifted": np.bool_(is_on)}
        torch.testing.assert_close(loss_fn(logits, labels, hidden_states=hidden_states, **flags), expected)


@pytest.mark.parametrize("mtp_type", ["deepseek", "adaptive", "hidden_states"])
def test_metrics_count_rows_of_weight_0(mtp_type):
    """As cross_entropy does: means over rows are unweighted."""
    numbers = Numbers(0)
    options = {"mtp_type": mtp_type, "use_confidence_weighting": False, "num_future_tokens": 1}
    loss_fn = UnifiedLoss(7, 4, primary_loss_type="standard", use_mtp=True, **options).double()
    given = {"logits": numbers.normal(1, 5, 7), "targets": numbers.integers(0, 7, 1, 5)}
    if mtp_type == "deepseek":
        given["hidden_states"] = numbers.normal(1, 5, 4)
    else:
        given["additional_logits"] = [numbers.normal(1, 5, 7)]
    weights = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    plain, weighted = (loss_fn(**given, token_weights=w, return_detailed=True) for w in (None, weights))
    for name in ("n_tokens", "cross_entropy", "mtp_loss_depth_1", "mtp_accuracy_depth_1", "mtp_acceptance_depth_1"):
        torch.testing.assert_close(weighted[name], plain[name], msg=name)
    assert weighted["mtp_loss"] != plain["mtp_loss"]
