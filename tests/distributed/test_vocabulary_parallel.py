"""Logits whose columns are spread over ranks give what the whole logits give: values, terms and gradients."""

from unittest.mock import patch

import pytest
import torch
from support.processes import on_ranks
from torch.utils.checkpoint import checkpoint

from ava_ext import UnifiedLoss
from ava_ext.distributed import ShardedLogits
from ava_ext.ops import LinearLogits, RowFlags, linear_rows, row_loss, row_options, softmax_statistics, token_log_probs
from ava_ext.ops.linear_logits import rows_of_a_chunk
from ava_ext.ops.row_fields import TAIL_ID, Candidates

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

EVERY_TERM = (
    RowFlags.CROSS_ENTROPY
    | RowFlags.FOCAL
    | RowFlags.LABEL_SMOOTHING
    | RowFlags.Z_LOSS
    | RowFlags.CONFIDENCE_PENALTY
    | RowFlags.ENTROPY
)
OPTIONS = {
    "temperature": 0.7, "label_smoothing": 0.1, "focal_alpha": 0.5, "focal_gamma": 1.5, "z_loss_weight": 0.3,
    "confidence_penalty_weight": 0.2, "logit_softcap": 3.0,
}  # fmt: skip
# each by itself, and all together in either convention of smoothing: a term may hide an error of another
FLAGS = {
    "plain": RowFlags.CROSS_ENTROPY | RowFlags.ENTROPY,
    "all": EVERY_TERM,
    "capped": EVERY_TERM | RowFlags.SOFTCAP,
    "excluding": EVERY_TERM | RowFlags.EXCLUDE_TARGET,
    "confidence": RowFlags.CONFIDENCE_PENALTY | RowFlags.ENTROPY,
    "tail": RowFlags.CROSS_ENTROPY | RowFlags.ENTROPY | RowFlags.SOFT_TARGETS | RowFlags.TAIL,
}
# columns of each rank, and how many are real: even, uneven, padding that cuts a shard, a shard of padding, no columns
SPLITS = {
    "even": ((8, 8), 16),
    "uneven": ((5, 11), 16),
    "padded": ((8, 8), 13),
    "all padding": ((8, 8), 7),
    "empty": ((9, 0), 9),
    "four": ((4, 4, 4, 4), 15),
}
N_ROWS, HIDDEN_SIZE = 12, 5


def rows(n_columns, vocab_size, dtype=torch.float64):
    """Logits with masked columns, a sure row, an ignored row of nan; targets, weights and candidates."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(N_ROWS, n_columns, generator=generator, dtype=torch.float64) * 2
    targets = torch.randint(vocab_size, (N_ROWS,), generator=generator)
    ids = torch.randint(-1, vocab_size, (N_ROWS, 6), generator=generator, dtype=torch.int32)
    logits[0, 1] = logits[1, -1] = logits[2, : vocab_size // 2] = -torch.inf
    targets[2] = vocab_size - 1
    logits[3, targets[3]] = logits[4, vocab_size - 1] = 60.0  # sure: 1 - p is beyond the digits of p
    ids[4, 0] = vocab_size - 1
    ids[5, :2] = targets[5]  # the target and a repeated candidate are counted as they come
    ids[6, :2] = ids[6, 2]
    logits[7] = torch.nan
    targets[7] = targets[8] = -100
    logits[9, 0] = logits[9, vocab_size - 1] = 9.0  # two maxima, of different ranks
    weights = torch.rand(N_ROWS, 6, generator=generator, dtype=torch.float64)
    row_weights = torch.rand(N_ROWS, generator=generator, dtype=torch.float64)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    candidates = Candidates(ids, weights.to(real), (4, 2))
    return logits.to(dtype), targets, row_weights.to(real), candidates


def columns_of(rank, sizes):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def loss_and_gradient(logits, leaf, flags, vocab_size, reduction, with_candidates):
    _, targets, row_weights, candidates = rows(vocab_size, vocab_size, logits.dtype)
    if flags & RowFlags.TAIL:  # the last group begins with it, in rows that have one
        ids = candidates.ids.clone()
        ids[1:, 4] = TAIL_ID
        candidates = candidates._replace(ids=ids)
    output = row_loss(
        logits,
        targets,
        row_options(torch.empty(0, dtype=logits.dtype), **OPTIONS),
        flags=int(flags),
        row_weights=row_weights,
        candidates=candidates if with_candidates else None,
        vocab_size=vocab_size,
        reduction=reduction,
    )
    upstream = torch.linspace(0.5, 2.0, output.loss.numel(), dtype=output.loss.dtype).view(output.loss.shape)
    return (output.loss.detach(), output.terms, *torch.autograd.grad((output.loss * upstream).sum(), leaf))


def sharded(rank, sizes, local):
    uneven = len(set(sizes)) > 1
    place = (columns_of(rank, sizes).start, sum(sizes)) if uneven else (None, None)
    return ShardedLogits(local, torch.distributed.group.WORLD, *place)


def dense_worker(rank, sizes, flags, vocab_size, reduction, with_candidates, dtype=torch.float64):
    logits = rows(sum(sizes), vocab_size, dtype)[0][:, columns_of(rank, sizes)].clone().requires_grad_()
    return loss_and_gradient(sharded(rank, sizes, logits), (logits,), flags, vocab_size, reduction, with_candidates)


@pytest.mark.parametrize(
    ("flags", "split", "reduction", "with_candidates"),
    [(flags, "uneven", "none", True) for flags in FLAGS] + [("capped", split, "sum", True) for split in SPLITS]
    + [("plain", "even", "sum", False), ("tail", "four", "sum", True), ("tail", "all padding", "none", True)],
)  # fmt: skip
def test_loss_terms_and_gradient_are_those_of_the_whole_logits(flags, split, reduction, with_candidates):
    sizes, vocab_size = SPLITS[split]
    arguments = (FLAGS[flags], vocab_size, reduction, with_candidates)
    whole = rows(sum(sizes), vocab_size)[0].requires_grad_()
    loss, terms, gradient = loss_and_gradient(whole, (whole,), *arguments)
    assert gradient.abs().sum() > 0 and gradient.isfinite().all()
    found = on_ranks(len(sizes), dense_worker, sizes, *arguments)
    for rank_loss, rank_terms, _ in found:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank_terms, terms, rtol=1e-12, atol=1e-12)
    assembled = torch.cat([rank_gradient for *_, rank_gradient in found], -1)
    torch.testing.assert_close(assembled, gradient, rtol=1e-12, atol=1e-12)


def surest_rows(logits, leaf):
    candidates = Candidates(torch.tensor([[-1], [5], [-1]]), torch.full((3, 1), 1e3), (1,))
    flags = int(RowFlags.CROSS_ENTROPY | RowFlags.FOCAL | RowFlags.ENTROPY)
    options = row_options(torch.empty(0), temperature=0.5, focal_gamma=1.5)
    output = row_loss(logits, torch.tensor([0, 1, 7]), options, flags=flags, candidates=candidates)
    return output.loss.detach(), output.terms, torch.autograd.grad(output.loss.sum(), leaf)[0]


def surest_worker(rank, logits):
    local = logits[:, columns_of(rank, (4, 4))].clone().requires_grad_()
    return surest_rows(ShardedLogits(local, "world"), local)


def test_rows_that_are_sure_beyond_the_range_of_exp():
    """Of the target, of a candidate whose coefficient is beyond float32, and from one end of the range to the other."""
    logits = torch.zeros(3, 8)
    logits[0, 0] = logits[1, 5] = 100
    logits[2] = -1e38
    logits[2, 7] = 1e38
    whole = logits.clone().requires_grad_()
    loss, terms, gradient = surest_rows(whole, whole)
    assert gradient.isfinite().all()
    found = on_ranks(2, surest_worker, logits)
    for rank_loss, rank_terms, _ in found:
        torch.testing.assert_close(rank_loss, loss)
        torch.testing.assert_close(rank_terms, terms)
    torch.testing.assert_close(torch.cat([rank_gradient for *_, rank_gradient in found], -1), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    sizes, vocab_size = SPLITS["uneven"]
    arguments = (FLAGS["all"], vocab_size, "none", True)
    whole = rows(sum(sizes), vocab_size, dtype)[0].requires_grad_()
    loss, terms, gradient = loss_and_gradient(whole, (whole,), *arguments)
    found = on_ranks(2, dense_worker, sizes, *arguments, dtype)
    torch.testing.assert_close(found[1][0], loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found[1][1], terms, rtol=2e-6, atol=1e-6)
    assembled = torch.cat([rank_gradient for *_, rank_gradient in found], -1)
    assert assembled.dtype == dtype
    eps = torch.finfo(dtype).eps  # one rounding, which may fall to either side
    torch.testing.assert_close(assembled, gradient, rtol=max(2 * eps, 4e-6), atol=1e-7)


def head(n_columns):
    generator = torch.Generator().manual_seed(5)
    shapes = ((N_ROWS, HIDDEN_SIZE), (n_columns, HIDDEN_SIZE), (n_columns,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def linear_worker(rank, sizes, vocab_size, reduction):
    states, weight, bias = head(sum(sizes))
    columns = columns_of(rank, sizes)
    parts = [part.clone().requires_grad_() for part in (states, weight[columns], bias[columns])]
    logits = sharded(rank, sizes, LinearLogits(*parts))
    return loss_and_gradient(logits, parts, FLAGS["capped"], vocab_size, reduction, True)


@pytest.mark.parametrize(("split", "reduction"), [("uneven", "none"), ("uneven", "sum"), ("all padding", "sum")])
def test_a_sharded_head(split, reduction):
    sizes, vocab_size = SPLITS[split]
    parts = [part.requires_grad_() for part in head(sum(sizes))]
    expected = loss_and_gradient(LinearLogits(*parts), parts, FLAGS["capped"], vocab_size, reduction, True)
    found = on_ranks(2, linear_worker, sizes, vocab_size, reduction)
    for rank in found:  # hidden states are everywhere, and so is their gradient
        torch.testing.assert_close(rank[:3], expected[:3], rtol=1e-12, atol=1e-12)
    for index in (3, 4):
        assembled = torch.cat([rank[index] for rank in found])
        torch.testing.assert_close(assembled, expected[index], rtol=1e-12, atol=1e-12)


def statistics_and_gradient(logits, leaf, vocab_size):
    _, targets, _, candidates = rows(vocab_size, vocab_size)
    options = {"temperature": 0.7, "logit_softcap": 3.0, "vocab_size": vocab_size}
    mask = targets != -100
    given = softmax_statistics(logits, candidates.ids, row_mask=mask, **options)
    log_prob, entropy = token_log_probs(logits, targets, **options)
    loss = log_prob.sum() + 0.1 * entropy.square().sum()
    for power, value in enumerate(given):
        loss = loss + (value.clamp_min(-20) * (1 + power)).square().sum()
    return (*(value.detach() for value in given), log_prob.detach(), *torch.autograd.grad(loss, leaf))


def statistics_worker(rank, sizes, vocab_size):
    logits = rows(sum(sizes), vocab_size)[0][:, columns_of(rank, sizes)].clone().requires_grad_()
    return statistics_and_gradient(sharded(rank, sizes, logits), (logits,), vocab_size)


@pytest.mark.parametrize("split", ["uneven", "padded", "all padding"])
def test_open_statistics(split):
    sizes, vocab_size = SPLITS[split]
    whole = rows(sum(sizes), vocab_size)[0].requires_grad_()
    expected = statistics_and_gradient(whole, (whole,), vocab_size)
    found = on_ranks(2, statistics_worker, sizes, vocab_size)
    for rank in found:
        torch.testing.assert_close(rank[:-1], expected[:-1], rtol=1e-12, atol=1e-12)
    assembled = torch.cat([rank[-1] for rank in found], -1)
    torch.testing.assert_close(assembled, expected[-1], rtol=1e-12, atol=1e-12)


def sure_worker(rank, logits, ids):
    local = logits.chunk(2, -1)[rank].clone().requires_grad_()
    options = row_options(local)
    targets = torch.zeros(len(ids), dtype=torch.int64)
    candidates = Candidates(ids, torch.ones(ids.shape), (ids.shape[1],))
    loss = row_loss(ShardedLogits(local, "world"), targets, options, candidates=candidates).loss
    return loss.detach(), *torch.autograd.grad(loss.sum(), local)


def test_sure_rows_keep_their_digits():
    # 1 - p of the maximum is 1e-7 and less, down to where a float32 has no digits: R carries it over the ranks
    gaps = torch.tensor([4.0, 16.0, 40.0, 80.0])
    logits = torch.zeros(4, 6)
    logits[:, 4] = gaps
    ids = torch.tensor([[4, 1]] * 4, dtype=torch.int32)
    found = on_ranks(2, sure_worker, logits, ids)
    exact = logits.double().requires_grad_()
    p = exact.softmax(-1)
    rest = torch.cat([exact[:, :4], exact[:, 5:]], -1).exp().sum(-1)
    others = -(rest / (rest + exact[:, 4].exp())).log() - torch.log1p(-p[:, 1])
    loss = exact.logsumexp(-1) - exact[:, 0] + others
    (gradient,) = torch.autograd.grad(loss.sum(), exact)
    assembled = torch.cat([rank[1] for rank in found], -1).double()
    torch.testing.assert_close(found[0][0].double(), loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(assembled, gradient, rtol=1e-5, atol=1e-6)


def counting_worker(rank, n_candidates):
    """Bytes of the collectives of forward, then of backward."""
    distributed, sent = torch.distributed, []
    name_of_gather = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(distributed, n))
    gather = getattr(distributed, name_of_gather)

    def counted(output, given, group=None):
        sent.append(given.numel() * given.element_size())
        return gather(output, given, group=group)

    def refused(*arguments, **keywords):
        raise AssertionError("expected no other collective")

    logits = torch.randn(100, 20, requires_grad=True)
    ids = torch.randint(40, (100, n_candidates), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    candidates = Candidates(ids, torch.ones(ids.shape), (n_candidates,)) if n_candidates else None
    options, targets = row_options(logits, **OPTIONS), torch.arange(100) % 40
    arguments = {"flags": int(FLAGS["capped"]), "candidates": candidates}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, name_of_gather, counted)
        for name in ("all_reduce", "broadcast", "all_gather", "all_to_all", "reduce_scatter_tensor", "barrier"):
            patch.setattr(distributed, name, refused)
        output = row_loss(ShardedLogits(logits, "world"), targets, options, **arguments)
        forward = list(sent)
        output.loss.sum().backward()
    return forward, sent[len(forward) :]


@pytest.mark.parametrize("n_candidates", [0, 10])
def test_forward_gathers_a_few_numbers_once_and_backward_nothing(n_candidates):
    for forward, backward in on_ranks(2, counting_worker, n_candidates):
        assert len(forward) == 1 and not backward
        assert forward[0] < 100 * 100 * (1 + n_candidates / 5)


def inplace_worker(rank):
    leaf = rows(16, 16)[0].chunk(2, -1)[rank].clone().requires_grad_()
    logits = leaf * 1.0
    targets = rows(16, 16)[1]
    sharded_logits, options = ShardedLogits(logits, "world"), row_options(logits, **OPTIONS)
    arguments = {"flags": int(FLAGS["capped"]), "reduction": "sum"}
    loss = row_loss(sharded_logits, targets, options, inplace_gradient=True, **arguments).loss
    loss.backward(retain_graph=True)
    assert logits.detach()[0].equal(leaf.grad[0])  # written over them
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="inplace_gradient=True would write over a leaf"):
        row_loss(ShardedLogits(leaf, "world"), targets, options, inplace_gradient=True, **arguments)
    found = leaf.grad.clone()
    loss = row_loss(ShardedLogits(leaf, "world"), targets, options, **arguments).loss
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert gradient.equal(found)
    (again,) = torch.autograd.grad(loss, leaf, create_graph=True)  # a kept graph gives the same again
    assert again.equal(gradient)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        again.square().sum().backward()
    with torch.autograd.graph.save_on_cpu():  # which would not tell that they were written over: they are not
        loss = row_loss(ShardedLogits(leaf * 1.0, "world"), targets, options, inplace_gradient=True, **arguments).loss
    for _ in range(2):
        assert torch.autograd.grad(loss, leaf, retain_graph=True)[0].equal(found)
    statistics = softmax_statistics(ShardedLogits(leaf, "world"), None)
    for value in (row_loss(ShardedLogits(leaf, "world"), targets, options, **arguments).loss, statistics.lse.sum()):
        upstream = torch.ones((), dtype=value.dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(value, leaf, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(gradient.sum(), upstream)


def test_inplace_gradient_second_backward_and_double_backward():
    on_ranks(2, inplace_worker)


def checkpointed_worker(rank):
    """Gradients of a checkpointed loss, and those of a plain one."""
    whole, targets = rows(16, 16)[:2]
    logits = whole.nan_to_num(0.0).clamp_min(-9.0).chunk(2, -1)[rank]
    options = row_options(logits, **OPTIONS)
    leaves = (logits[:, :HIDDEN_SIZE].clone().requires_grad_(), logits[:4, :HIDDEN_SIZE].clone().requires_grad_())

    def loss_of(states, weight):
        found = []
        for local in (states, LinearLogits(states, weight)):
            sharded_logits = ShardedLogits(local, "world")
            found += [
                row_loss(sharded_logits, targets % 8, options).loss.sum(),
                token_log_probs(sharded_logits, targets % 8)[0].square().sum(),
            ]
        return sum(found)

    gradients = torch.autograd.grad(loss_of(*leaves), leaves)
    return gradients, torch.autograd.grad(checkpoint(loss_of, *leaves, use_reentrant=False), leaves)


def test_activation_checkpointing():
    for gradients, checkpointed in on_ranks(2, checkpointed_worker):
        torch.testing.assert_close(checkpointed, gradients, rtol=1e-12, atol=1e-12)


def empty_worker(rank):
    logits, targets = torch.zeros(0, 5, 4, requires_grad=True), torch.zeros(0, 5).long()
    weight, hidden_states = torch.ones(4, 3, requires_grad=True), torch.zeros(0, 5, 3, requires_grad=True)
    for local in (logits, LinearLogits(hidden_states, weight)):
        sharded_logits = ShardedLogits(local, "world")
        row_loss(sharded_logits, targets, row_options(logits), reduction="sum").loss.backward()
        token_log_probs(sharded_logits, targets)[0].sum().backward()
    assert logits.grad.shape == logits.shape and hidden_states.grad.shape == hidden_states.shape
    assert weight.grad.eq(0).all()
    softmax_statistics(ShardedLogits(logits, "world"), None).entropy.sum().backward()


def test_no_rows():
    on_ranks(2, empty_worker)


def errors_worker(rank):
    """Every error comes on every rank: none is left waiting for the others."""
    logits, targets = torch.randn(3, 8), torch.tensor([1, 2, 3])
    options = row_options(logits)
    with pytest.raises(ValueError, match=r"process group that holds the other columns, got None"):
        row_loss(ShardedLogits(logits, None), targets, options)
    with pytest.raises(ValueError, match=r"the 8 columns from 5 on to lie within n_columns = 12"):
        row_loss(ShardedLogits(logits, "world", 5, 12), targets, options)
    uneven = torch.randn(3, 5 + rank)
    with pytest.raises(ValueError, match=r"lie behind each other .* got columns \[0, 5\), \[6, 12\)"):
        row_loss(ShardedLogits(uneven, "world"), targets, options)
    with pytest.raises(ValueError, match=r"vocab_size in \[1, 16\], got 17"):
        row_loss(ShardedLogits(logits, "world"), targets, options, vocab_size=17)
    with pytest.raises(IndexError, match=r"targets in \[0, 16\), got 16 at position 1"):
        row_loss(ShardedLogits(logits, "world"), torch.tensor([1, 16, 2]), options)
    with pytest.raises(ValueError, match=r"targets of shape \[3\], got \[2\]"):
        row_loss(ShardedLogits(logits, "world"), targets[:2], options)
    ids = torch.tensor([[1], [2], [-2]], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"candidate_ids in \[0, 16\), got -2 at position 2"):
        row_loss(ShardedLogits(logits, "world"), targets, options, candidates=Candidates(ids, torch.ones(3, 1), (1,)))
    ids = torch.zeros(3, 2, dtype=torch.int64)
    for shape in ((4,), (1, 3), (3, 1), (2,)):  # broadcast or reshaped, they would be other rows'
        with pytest.raises(ValueError, match=r"expected row_weights of shape \[3\], got"):
            row_loss(ShardedLogits(logits, "world"), targets, options, row_weights=torch.ones(shape))
        candidates = Candidates(torch.zeros(*shape, 2).long(), torch.ones(*shape, 2), (2,))
        with pytest.raises(ValueError, match=r"expected candidate_ids of shape \[3, n_candidates\], got"):
            row_loss(ShardedLogits(logits, "world"), targets, options, candidates=candidates)
        with pytest.raises(ValueError, match=r"expected candidate_weights of shape \[3, 2\], got"):
            row_loss(ShardedLogits(logits, "world"), targets, options, candidates=candidates._replace(ids=ids))
    for shape in ((2, 2), (1, 2), (3, 1, 2)):
        with pytest.raises(ValueError, match=r"softmax_statistics: expected ids of shape \[3, n_ids\], got"):
            softmax_statistics(ShardedLogits(logits, "world"), torch.zeros(shape).long())
    alone = torch.distributed.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="with this rank in it"):
            row_loss(ShardedLogits(logits, alone), targets, options)


def test_errors():
    on_ranks(2, errors_worker)


def rows_that_do_not_count_worker(rank, logits, targets, candidates):
    options = row_options(logits)
    return row_loss(ShardedLogits(logits.chunk(2, -1)[rank], "world"), targets, options, candidates=candidates).loss


def test_candidates_of_rows_that_do_not_count_are_not_looked_at():
    logits, targets = torch.randn(3, 16), torch.tensor([3, -100, -100])
    ids = torch.tensor([[5], [999_999], [-7]])
    candidates = Candidates(ids, torch.tensor([[1.0], [1.0], [torch.nan]]), (1,))
    expected = row_loss(logits, targets, row_options(logits), candidates=candidates).loss
    for found in on_ranks(2, rows_that_do_not_count_worker, logits, targets, candidates):
        torch.testing.assert_close(found, expected)


def terms_worker(rank, logits, targets):
    part, flags = ShardedLogits(logits.chunk(2, -1)[rank], "world"), int(FLAGS["plain"])
    return row_loss(part, targets, row_options(logits), flags=flags).terms


def test_a_shard_of_nothing_but_nan_never_has_the_maximum():
    nan, inf = torch.nan, torch.inf
    parts = torch.tensor([[3.0, 2.0, 1.0], [nan, nan, nan], [nan, nan, -inf], [nan, inf, 1.0], [-inf, -inf, -inf]])
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    logits = parts[pairs].flatten(1).repeat_interleave(6, 0)
    targets = torch.arange(6).repeat(len(pairs))
    expected = row_loss(logits, targets, row_options(logits), flags=int(FLAGS["plain"])).terms
    for found in on_ranks(2, terms_worker, logits, targets):
        torch.testing.assert_close(found, expected, equal_nan=True)


def chunk_worker(rank, states, weight, chunk_bytes):
    """How many rows a chunk has, in forward and in backward."""
    planned = []

    def plan(*arguments):
        planned.append(rows_of_a_chunk(*arguments))
        return planned[-1]

    with patch.object(linear_rows, "rows_of_a_chunk", plan):
        logits = ShardedLogits(LinearLogits(states, weight.chunk(2)[rank]), "world")
        targets = torch.zeros(len(states), dtype=torch.int64)
        row_loss(logits, targets, row_options(states), reduction="sum", chunk_bytes=chunk_bytes).loss.backward()
    return planned


def test_a_chunk_of_a_shard_has_as_many_rows_as_its_bytes_allow():
    states, weight = torch.randn(12, 5, requires_grad=True), torch.randn(16, 5)
    for chunk_bytes, n_rows in ((None, 12), (4 * 8 * 4, 4)):  # rows, columns of a shard, float32
        assert on_ranks(2, chunk_worker, states, weight, chunk_bytes) == [[n_rows] * 2] * 2


def single_row_worker(rank, states, weight, target, candidates):
    """Of one row without a dimension of rows: loss, statistics and gradients, of logits and of a head."""
    found = []
    for is_linear in (False, True):
        local, own = weight.chunk(2)[rank], states.clone().requires_grad_()
        logits = LinearLogits(own, local) if is_linear else own @ local.T
        spread, options = ShardedLogits(logits, "world"), row_options(states, **OPTIONS)
        weights = torch.tensor(0.5, dtype=torch.float64)
        loss = row_loss(spread, target, options, row_weights=weights, candidates=candidates).loss
        log_prob, entropy = token_log_probs(spread, target)
        statistics = softmax_statistics(spread, candidates.ids)
        total = loss + log_prob + entropy + statistics.log_probs.sum() + statistics.lse
        (gradient,) = torch.autograd.grad(total, own)
        if not is_linear:  # a rank's columns have a part of it each
            torch.distributed.all_reduce(gradient)
        found.append([value.detach() for value in (loss, log_prob, entropy, *statistics, gradient)])
    return found


def test_a_row_alone():
    generator = torch.Generator().manual_seed(6)
    states, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5,), (16, 5)))
    candidates = Candidates(torch.tensor([3, 9]), torch.tensor([0.5, 1.0], dtype=torch.float64), (2,))
    target, own = torch.tensor(12), states.clone().requires_grad_()
    for logits in (own @ weight.T, LinearLogits(own, weight)):
        options, row_weights = row_options(states, **OPTIONS), torch.tensor(0.5, dtype=torch.float64)
        loss = row_loss(logits, target, options, row_weights=row_weights, candidates=candidates).loss
        log_prob, entropy = token_log_probs(logits, target)
        statistics = softmax_statistics(logits, candidates.ids)
        total = loss + log_prob + entropy + statistics.log_probs.sum() + statistics.lse
        expected = [loss, log_prob, entropy, *statistics, *torch.autograd.grad(total, own)]
        for rank in on_ranks(2, single_row_worker, states, weight, target, candidates):
            for found in rank:
                torch.testing.assert_close(found, [value.detach() for value in expected], rtol=1e-12, atol=1e-12)


def test_a_group_that_is_not_there():
    with pytest.raises(ValueError, match=r"before torch.distributed.init_process_group"):
        row_loss(ShardedLogits(torch.randn(3, 8), "world"), torch.zeros(3).long(), row_options(torch.empty(0)))


HEADS = {
    "heads of the model": {"mtp_type": "adaptive"},
    "depth modules": {"mtp_type": "hidden_states"},
}


def run_heads(options, active, place):
    """Loss and gradients of main logits and two heads, the second of hidden states. place: what a rank has of them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    whole = [normal(2, 5, 8), normal(2, 5, 8), normal(2, 5, HIDDEN_SIZE), normal(8, HIDDEN_SIZE)]
    targets, confidence = torch.arange(10).view(2, 5) % 8, torch.rand(2, 5, generator=generator, dtype=torch.float64)
    logits, head, states, weight = leaves = [
        part.chunk(2, dim)[place].clone().requires_grad_() if place is not None and dim is not None
        else part.clone().requires_grad_()
        for part, dim in zip(whole, (-1, -1, None, 0), strict=True)
    ]  # fmt: skip
    placed = [logits, head, LinearLogits(states, weight)]
    if place is not None:
        placed = [ShardedLogits(local, "world") for local in placed]
    loss_fn = UnifiedLoss(8, primary_loss_type="standard", use_mtp=True, num_future_tokens=2, **options)
    loss = loss_fn(placed[0], targets, additional_logits=placed[1:], confidence_scores=confidence, mtp_active=active)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def heads_worker(rank, options, active):
    return run_heads(options, active, rank)


@pytest.mark.parametrize("active", [None, False])
@pytest.mark.parametrize("name", HEADS)
def test_sharded_heads(name, active):
    loss, gradients = run_heads(HEADS[name], active, None)
    found = on_ranks(2, heads_worker, HEADS[name], active)
    for rank_loss, (*_, of_states, _) in found:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(of_states, gradients[2], rtol=1e-12, atol=1e-12)
    for number, dim in ((0, -1), (1, -1), (3, 0)):
        assembled = torch.cat([of_rank[number] for _, of_rank in found], dim)
        torch.testing.assert_close(assembled, gradients[number], rtol=1e-12, atol=1e-12)
