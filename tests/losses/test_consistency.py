"""Consistency against F.kl_div and against explicit mixtures."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from ava_ext.losses.consistency import ConsistencyLoss


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run on matrices."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() > 1:
            self.names.add(function.overloadpacket.__name__)
        return result


def random_pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 for _ in range(2)]


def oracle(logits, targets, divergence, temperature):
    p, q = (targets / temperature).softmax(-1), (logits / temperature).softmax(-1)
    if divergence == "kl":
        rows = kl_div(q.log(), p, reduction="none").sum(-1)
    else:
        m = (p + q) / 2
        rows = (kl_div(m.log(), p, reduction="none") + kl_div(m.log(), q, reduction="none")).sum(-1) / 2
    return temperature**2 * rows.mean()


@pytest.mark.parametrize("divergence", ["kl", "js"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient(divergence, temperature):
    logits, targets = (x.requires_grad_() for x in random_pair(2, 3, 7))
    loss_fn = ConsistencyLoss(divergence, temperature)
    torch.testing.assert_close(
        loss_fn(logits, targets), oracle(logits, targets, divergence, temperature), rtol=1e-12, atol=0
    )
    assert torch.autograd.gradcheck(loss_fn, (logits, targets))


def test_hand_worked_values():
    same = torch.randn(3, 5)
    far = torch.tensor([[200.0, 0]]), torch.tensor([[0, 200.0]])
    assert ConsistencyLoss("kl")(same, same) == 0
    assert ConsistencyLoss("js")(*far).item() == pytest.approx(math.log(2))
    assert ConsistencyLoss("kl")(*far).item() == pytest.approx(200)


@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_masked_columns_and_rows(divergence):
    logits, targets = random_pair(4, 7)
    mask = torch.tensor([1, 0, 1, 1])
    keep = mask.bool()
    expected = oracle(logits[keep][:, :5], targets[keep][:, :5], divergence, 1.0)
    for x in (logits, targets):
        x[:, 5:] = -torch.inf
        x[1] = torch.nan
        x.requires_grad_()
    loss = ConsistencyLoss(divergence)(logits, targets, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    for x in (logits, targets):
        assert x.grad.isfinite().all() and (x.grad[1] == 0).all() and (x.grad[:, 5:] == 0).all()
        assert x.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("divergence", "is_masked"), [("kl", "both"), ("js", "both"), ("js", "logits"), ("js", "targets")]
)
def test_second_derivative_beside_masked_columns(divergence, is_masked):
    """logaddexp has none at -inf."""
    logits, targets = (x.requires_grad_() for x in random_pair(2, 5))
    masks = [torch.zeros(2, 5, dtype=torch.float64) for _ in range(2)]
    for mask, name in zip(masks, ("logits", "targets"), strict=True):
        if is_masked in ("both", name):
            mask[:, 3] = mask[0, 4] = -torch.inf

    def loss(logits, targets):
        return ConsistencyLoss(divergence)(logits + masks[0], targets + masks[1])

    if is_masked != "both":  # of which the oracle makes nan
        expected = oracle(logits + masks[0], targets + masks[1], divergence, 1.0)
        torch.testing.assert_close(loss(logits, targets), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(loss, (logits, targets))
    assert torch.autograd.gradgradcheck(loss, (logits, targets))


@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_one_masked_row_among_nan(divergence):
    """Whether columns are masked is asked of all rows: a nan must not hide them."""
    for first, second in [(0, 1), (1, 0)]:
        logits, targets = random_pair(2, 7)
        expected = oracle(logits[first, :5], targets[first, :5], divergence, 1.0)
        logits[first, 5:] = targets[first, 5:] = -torch.inf
        logits[second] = torch.nan
        logits.requires_grad_()
        ConsistencyLoss(divergence)(logits, targets).backward()
        assert logits.grad[first].isfinite().all() and not logits.grad[second].isfinite().any()
        torch.testing.assert_close(
            ConsistencyLoss(divergence)(logits[first:][:1], targets[first:][:1]), expected, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_transformed_and_of_fake_tensors(divergence):
    """Where the host cannot look at the numbers."""
    logits, targets = random_pair(3, 7)
    logits[:, 5:] = targets[:, 5:] = -torch.inf
    loss_fn = ConsistencyLoss(divergence)
    expected = torch.stack([loss_fn(*rows) for rows in zip(logits, targets, strict=True)])
    torch.testing.assert_close(torch.vmap(loss_fn)(logits, targets), expected)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(leaf, targets), leaf)
    torch.testing.assert_close(torch.func.grad(loss_fn)(logits, targets), gradient)
    for pre_dispatch in (False, True):
        traced = make_fx(loss_fn, pre_dispatch=pre_dispatch)(*random_pair(3, 7))
        torch.testing.assert_close(traced(logits, targets), loss_fn(logits, targets))
    with FakeTensorMode() as mode:
        assert loss_fn(mode.from_tensor(logits), mode.from_tensor(targets)).shape == ()


@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_nothing_is_chosen_where_no_column_is_masked(divergence):
    """On the CPU each such pass takes the time of a log_softmax."""
    logits, targets = (x.requires_grad_() for x in random_pair(3, 7))
    with Operators() as seen:
        ConsistencyLoss(divergence)(logits, targets).backward()
    assert not seen.names & {"where", "masked_fill", "eq"}


@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_no_counted_row(divergence):
    logits = torch.full((3, 4), torch.nan, requires_grad=True)
    loss = ConsistencyLoss(divergence)(logits, logits.detach(), torch.zeros(3))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
    assert ConsistencyLoss(divergence)(logits[:0], logits[:0]) == 0


def test_detached_targets_and_details():
    logits, targets = (x.bfloat16().requires_grad_() for x in random_pair(3, 4))
    got = ConsistencyLoss("js", detach_targets=True)(logits, targets, return_detailed=True)
    got["total_loss"].backward()
    assert targets.grad is None and logits.grad.abs().max() > 0
    assert got["total_loss"].dtype == torch.float32 and not got["consistency_loss"].requires_grad


def test_compiles_without_a_graph_break():
    logits, targets = random_pair(3, 4)
    compiled = torch.compile(ConsistencyLoss("js"), fullgraph=True, backend="aot_eager")
    mask = torch.tensor([1, 1, 0])
    torch.testing.assert_close(
        compiled(logits, targets, mask), ConsistencyLoss("js")(logits, targets, mask), rtol=1e-12, atol=0
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"targets of shape \[3, 4\], got \[3, 5\]"):
        ConsistencyLoss()(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"attention_mask of shape \[3\], got \[4\]"):
        ConsistencyLoss()(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="consistency_loss: expected logits of real numbers, got complex64"):
        ConsistencyLoss()(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="got 'tv'"):
        ConsistencyLoss("tv")
