"""Where a gradient lies: its rows begin where the logits' do, modulo 16 bytes, wherever that is cheap; fakes too."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ava_ext.ops.row_fields import row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.softmax_statistics import softmax_statistics

ops = torch.ops.ava_ext
N = 37  # columns: odd


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# name: logits of a base, and whether rows begin alike
LAYOUTS = {
    "contiguous": (lambda: rows(3, 4, N), True),
    "all but the last token": (lambda: rows(3, 12, N)[:, :-1], True),
    "all but the first token": (lambda: rows(3, 12, N)[:, 1:], True),
    "of one text": (lambda: rows(1, 12, N)[:, 1:], True),
    "one row": (lambda: rows(12, N)[5], True),
    "transposed": (lambda: rows(4, 3, N + 3)[..., :N].transpose(0, 1), True),
    "columns of a wider matrix": (lambda: rows(6, N + 2)[:, 1 : N + 1], True),
    "columns of a padded matrix": (lambda: rows(6, N + 3)[:, :N], True),
    "multiples of 16 bytes": (lambda: rows(3, 12, 40)[:, 1:], True),
    "one token of many": (lambda: rows(3, 12, N)[:, :1], False),
    "all but the last of a few tokens": (lambda: rows(3, 4, N)[:, :-1], False),
    "few columns of a wide matrix": (lambda: rows(6, 3 * N)[:, :N], False),
    "expanded": (lambda: rows(4, N).expand(3, 4, N), False),
    "expanded rows": (lambda: rows(3, 1, N).expand(3, 4, N), False),
    "overlapping": (lambda: rows(40 * N).as_strided((30, N), (N - 1, 1)), False),
    "no rows": (lambda: rows(3, 12, N)[:0, :-1], True),
    "one column": (lambda: rows(5, 7)[:, 3:4], False),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def logits_of(name, dtype):
    """In this type, with the same strides and offset."""
    logits = LAYOUTS[name][0]()
    storage = logits.new_empty(0).set_(logits.untyped_storage())
    return storage.to(dtype).as_strided(logits.shape, logits.stride(), logits.storage_offset())


def arguments_of(logits):
    targets = torch.arange(logits[..., 0].numel()).reshape(logits.shape[:-1]) % logits.shape[-1]
    options = row_options(logits, label_smoothing=0.1)
    return targets, options, None, None, None, [], 5, logits.shape[-1], -100


def gradients_of(logits):
    """From each operator that makes one: row_loss and row_gradient."""
    targets, options, *_ = arguments = arguments_of(logits)
    fused = ops.row_loss(logits, *arguments, True, False)[2]
    *_, statistics, coefficients = ops.row_loss(logits, *arguments, False, True)
    return fused, ops.row_gradient(logits, statistics, coefficients, targets[..., None], options, 5, logits.shape[-1])


def place_of(tensor):
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def beginnings(tensor):
    """Where each row begins in the storage, in bytes modulo 16."""
    indices = torch.cartesian_prod(torch.tensor([0]), *(torch.arange(n) for n in tensor.shape[:-1]))
    offsets = indices.reshape(-1, tensor.dim()) @ torch.tensor([0, *tensor.stride()[:-1]])
    return ((tensor.storage_offset() + offsets) * tensor.itemsize % 16).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_begin_where_those_of_the_logits_do(name, dtype):
    logits = logits_of(name, dtype)
    for gradient, expected in zip(gradients_of(logits), gradients_of(logits.contiguous().clone()), strict=True):
        torch.testing.assert_close(gradient, expected)  # a sum's order depends on where a row begins
        assert gradient.untyped_storage().nbytes() <= 16 + gradient.nbytes * 9 // 8
        assert gradient.untyped_storage().data_ptr() % 16 == 0
        if LAYOUTS[name][1]:
            assert beginnings(gradient) == beginnings(logits)
        else:
            assert gradient.is_contiguous()


def test_contiguous_where_that_is_as_good():
    for name in ("contiguous", "multiples of 16 bytes"):
        for gradient in gradients_of(logits_of(name, torch.float32)):
            assert gradient.is_contiguous()
    for gradient in gradients_of(logits_of("contiguous", torch.float32)):
        assert gradient.storage_offset() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_fakes_lie_there_too(name, dtype):
    logits = logits_of(name, dtype)
    with FakeTensorMode() as mode:
        fakes = gradients_of(mode.from_tensor(logits))
    assert [place_of(fake) for fake in fakes] == [place_of(gradient) for gradient in gradients_of(logits)]


@pytest.mark.parametrize("name", ["all but the first token", "of one text"])
@pytest.mark.devices("cpu")
def test_opcheck(name):
    logits = logits_of(name, torch.float32)
    *_, statistics, coefficients = ops.row_loss(logits, *arguments_of(logits), False, True)
    arguments = (logits, statistics, coefficients[..., :4], None, arguments_of(logits)[1], 5, N)
    torch.library.opcheck(ops.row_gradient.default, arguments)
    leaf = logits.detach().requires_grad_()
    torch.library.opcheck(ops.row_loss.default, (leaf, *arguments_of(leaf), True, False))


def loss_of(logits):
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    return row_loss(logits, targets, row_options(logits)).loss.mean() + softmax_statistics(logits, None).entropy.sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.devices("cpu")
def test_slices_of_a_compiled_graph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda base, first: loss_of((base * 2)[:, first:]), fullgraph=True, backend=backend)
    for n_tokens, first in ((12, 0), (12, 1), (14, 1), (21, 1)):
        base = rows(2, n_tokens, N).requires_grad_()
        expected = torch.autograd.grad(loss_of((base * 2)[:, first:]), base)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(base, first), base)[0], expected)


@pytest.mark.parametrize("name", ["all but the first token", "of one text", "one row"])
@pytest.mark.devices("cpu")
def test_slices_given_to_a_compiled_graph(name):
    """Also of other offsets than that it was traced with."""
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="inductor" if name == "of one text" else "aot_eager")
    logits = logits_of(name, torch.float32)
    for offset in (0, 1, 2):
        moved = torch.zeros(logits.untyped_storage().nbytes() // 4 + 2)
        moved = moved.as_strided(logits.shape, logits.stride(), logits.storage_offset() + offset)
        moved = moved.copy_(logits).requires_grad_()
        expected = torch.autograd.grad(loss_of(moved), moved)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(moved), moved)[0], expected)


@pytest.mark.devices("cpu")
def test_traced_without_knowing_the_number_of_rows():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def of_chosen(base, chosen):
        logits = base[chosen.nonzero().squeeze(-1)]
        return loss_of(logits) + loss_of(logits[:, :-1])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for n in (9, 4):
            base, chosen = rows(12, N).requires_grad_(), torch.arange(12) < n
            logits = base[chosen]
            expected = torch.autograd.grad(loss_of(logits) + loss_of(logits[:, :-1]), base)[0]
            torch.testing.assert_close(torch.autograd.grad(of_chosen(base, chosen), base)[0], expected)


@pytest.mark.parametrize("name", ["all but the last token", "all but the first token", "transposed"])
def test_what_autograd_does_with_it(name):
    """A leaf with these strides, twice; a hook; a graph that is kept; other users; gradients added up and in place."""
    logits = logits_of(name, torch.float32)
    dense = logits.contiguous().clone()
    expected = torch.autograd.grad(loss_of(dense.requires_grad_()), dense)[0]
    leaf = logits.detach().requires_grad_()
    seen = []
    leaf.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    for times in (2, 4):
        loss_of(leaf).backward()
        torch.testing.assert_close(leaf.grad, times * expected)
        torch.testing.assert_close(seen[-1], expected)
    loss = loss_of(leaf)
    for factor in (1, 3):
        gradient = torch.autograd.grad(factor * loss, leaf, retain_graph=True)[0]
        torch.testing.assert_close(gradient, 2 * factor * expected)
    x = logits.detach().requires_grad_()
    (loss_of(x * 1) + (x * 1).sum()).backward()
    torch.testing.assert_close(x.grad, expected + 1)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    y = (x.detach() * 1).requires_grad_()
    z = torch.zeros_like(logits).copy_(logits).requires_grad_()
    for leaf, inplace in ((y, False), (z, True)):
        row_loss(leaf * 1, targets, row_options(leaf), inplace_gradient=inplace).loss.sum().backward()
    torch.testing.assert_close(y.grad, z.grad)
