"""Every operator on a device that has no kernels, against the CPU's kernels. Prints the names of what agrees.

test_without_kernels.py runs it in a process of its own."""

import torch
from support.python_device import to_cpu, to_toy
from torch.utils._pytree import tree_leaves, tree_map

from ava_ext.ops.softmax_rows import row_loss

OPTIONS = torch.tensor([0.8, 0.1, 0.75, 2.0, 0.1, 0.2, 9.0, 0.7])
ALL_FLAGS = 255 + 512 + 1024 + 2048  # with an id of -1 absent


def copied(value, copy):
    return tree_map(lambda leaf: copy(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)


def check(name, *arguments, **options):
    """The same results, and the same values written over the arguments."""
    operator = getattr(torch.ops.ava_ext, name)
    on_cpu, on_toy = copied(arguments, torch.clone), copied(arguments, to_toy)
    expected, got = [operator(*on_cpu, **options), on_cpu], [operator(*on_toy, **options), on_toy]
    for one, other in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        if isinstance(one, torch.Tensor):
            assert other.device.type == "toy", name
            torch.testing.assert_close(to_cpu(other), one, rtol=1e-5, atol=1e-6)
    print(name)


def check_front_end():
    """Forward and backward as a user calls them."""
    x, targets = torch.randn(4, 7), torch.tensor([1, 2, -100, 0])
    options = to_toy(torch.tensor([1.0, 0, 1, 2, 0, 0, 0, 1]))
    logits = to_toy(x).requires_grad_()
    loss = row_loss(logits, to_toy(targets), options).loss.sum()
    loss.backward()
    x.requires_grad_()
    expected = torch.nn.functional.cross_entropy(x, targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(to_cpu(loss.detach()), expected.detach())
    torch.testing.assert_close(to_cpu(logits.grad), x.grad)
    print("cross_entropy")


torch.manual_seed(0)
logits, targets = torch.randn(4, 7), torch.tensor([1, 2, -100, 0])
ids, weights = torch.tensor([[1, 3], [2, -1], [3, 0], [-1, 5]], dtype=torch.int32), torch.rand(4, 2)
check("row_loss", logits, targets, OPTIONS, torch.rand(4), ids, weights, [1, 1], ALL_FLAGS, 6, -100, True, False)
check("row_loss", logits, targets, OPTIONS, None, None, None, [], ALL_FLAGS, 6, -100, False, True)
check("row_loss_", logits, targets, OPTIONS, None, ids, weights, [2], ALL_FLAGS, 6, -100)
check("scale_rows_", logits, torch.rand(4))
check("row_statistics", logits, ids, torch.tensor([True, True, False, True]), OPTIONS, ALL_FLAGS, 7)
statistics = torch.ops.ava_ext.row_statistics(logits, None, None, OPTIONS, ALL_FLAGS, 7)[0]
for name in ("row_gradient", "row_gradient_"):
    check(name, logits, statistics, torch.randn(4, 6), ids, OPTIONS, ALL_FLAGS, 7)
state = [torch.ones(()), torch.rand(100), torch.tensor(30), torch.tensor(2.0), torch.tensor(3.0)]
given_too = (torch.tensor([True, True, True, False]), torch.rand(4), torch.rand(5), torch.tensor(3.0))
check("count_rows", targets, *given_too, -100, True, False)
check("temperature_step_", *state, 1.0, 1.0, 0.5, 2.0)
text = torch.tensor([[1, 1, 2, 1, 1, 3, 1, 1, 2, 1]])
check(
    "repetition_candidates", text, text.roll(-1), text // 3, torch.tensor([0.5, 1.5, 0.1, 0.1]),
    tokens_include_row=True, vocab_size=9, ignore_index=-100, repetition_allow_list=[4],
    use_immediate_repetition_penalty=True, immediate_repetition_threshold=1, ngram_size=2, ngram_window_size=0,
    ngram_slots=2, eos_ids=[7], min_sequence_length=3,
)  # fmt: skip
gates = [torch.randn(2, 5, 4)]
check("router_statistics", gates, None, None, torch.tensor([0, 1, 0, -1, 1]), None, 2, 2, True)
chosen = torch.randint(4, (2, 5, 2))
check(
    "router_gradient", gates, chosen, None, None, None, torch.rand(2, 4), torch.rand(2, 4), *torch.rand(2, 2), 1, False
)
check_front_end()
