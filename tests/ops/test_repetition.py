"""repetition_candidates against an oracle that searches every context anew, and worked examples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import emulated_cuda

from ava_ext.ops.repetition import repetition_candidates

IGNORED = -100


def four_weights():
    """On the device of the test."""
    return torch.tensor([0.5, 1.5, 0.05, 0.1], dtype=torch.float64)


def oracle(
    tokens, targets, *, weights, vocab_size, segments=None, tokens_include_row=False, ignore_index=IGNORED,
    use_immediate_repetition_penalty=False, immediate_repetition_threshold=1, use_ngram_penalty=False, ngram_size=4,
    ngram_window_size=None, ngram_slots=8, eos_token_id=None, min_sequence_length=20, repetition_allow_list=(),
):  # fmt: skip
    """Slot by slot as the definition says, with Python lists."""
    eos_ids = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    immediate_weight, growth, eos_weight, ngram_weight = weights.double().tolist()
    segment_rows = (
        [[0] * tokens.shape[1]] * len(tokens) if segments is None else segments.expand(len(tokens), -1).tolist()
    )
    ids, candidate_weights = [], []
    for text, row_targets, marks in zip(tokens.tolist(), targets.tolist(), segment_rows, strict=True):
        for row, target in enumerate(row_targets):
            start = row
            while start > 0 and marks[start - 1] == marks[row]:
                start -= 1
            context = text[start : row + 1 if tokens_include_row else row]
            n_counted = sum(t != ignore_index for t in row_targets[start:row])
            never = {target, ignore_index, *repetition_allow_list}
            slots = []
            if use_immediate_repetition_penalty:
                run = 0
                while run < len(context) and context[-1 - run] == context[-1] != ignore_index:
                    run += 1
                if run >= immediate_repetition_threshold and context[-1] not in never and 0 <= context[-1] < vocab_size:
                    slots.append((context[-1], immediate_weight * min(growth ** (run - 1), 4)))
                else:
                    slots.append((-1, 0.0))
            early = n_counted < min_sequence_length and target not in eos_ids
            slots += [(eos, eos_weight) if early else (-1, 0.0) for eos in eos_ids]
            if use_ngram_penalty:
                key = context[len(context) - (ngram_size - 1) :] if ngram_size - 1 <= len(context) else [ignore_index]
                found = []
                for place in reversed(range(len(context))):
                    if ngram_window_size is not None and place < len(context) - ngram_window_size:
                        break
                    before = context[place - (ngram_size - 1) : place] if place >= ngram_size - 1 else None
                    follower = context[place]
                    matches = before == key and ignore_index not in key
                    if matches and follower not in never and 0 <= follower < vocab_size and follower not in found:
                        found.append(follower)
                found = found[:ngram_slots]
                slots += [(f, ngram_weight) for f in found] + [(-1, 0.0)] * (ngram_slots - len(found))
            if target == ignore_index:
                slots = [(-1, 0.0)] * len(slots)
            ids.append([slot[0] for slot in slots])
            candidate_weights.append([slot[1] for slot in slots])
    groups = tuple(
        n for n in (int(use_immediate_repetition_penalty), len(eos_ids), ngram_slots * use_ngram_penalty) if n
    )
    shape = (*tokens.shape, sum(groups))
    return (
        torch.tensor(ids, dtype=torch.int32).view(shape),
        torch.tensor(candidate_weights, dtype=torch.float64).view(shape),
        groups,
    )


def assert_agrees(tokens, targets, **options):
    ids, candidate_weights, groups = repetition_candidates(tokens, targets, **options)
    expected_ids, expected_weights, expected_groups = oracle(tokens, targets, **options)
    assert groups == expected_groups
    assert ids.dtype == torch.int32 and candidate_weights.dtype == options["weights"].dtype
    torch.testing.assert_close(ids, expected_ids, rtol=0, atol=0)
    rtol = 1e-13 if candidate_weights.dtype == torch.float64 else 1e-7
    torch.testing.assert_close(candidate_weights.double(), expected_weights, rtol=rtol, atol=0)


@st.composite
def problems(draw):
    """Few distinct tokens, so that everything repeats; -1 and vocab_size are ids outside the vocabulary."""
    vocab_size = draw(st.integers(1, 6))
    batch_size, n_tokens = draw(st.integers(0, 3)), draw(st.integers(0, 40))
    token = st.sampled_from([*range(vocab_size), vocab_size, -1] + [IGNORED] * draw(st.integers(0, 1)))
    if draw(st.booleans()):  # mostly runs and periods
        token = st.sampled_from([0, 0, 0, draw(token)])

    def rows(element, n_rows=batch_size):
        flat = draw(st.lists(element, min_size=n_rows * n_tokens, max_size=n_rows * n_tokens))
        return torch.tensor(
            flat, dtype=draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]))
        ).view(n_rows, n_tokens)

    tokens_include_row = draw(st.booleans())
    targets = rows(st.sampled_from([*range(vocab_size), IGNORED]))
    tokens = rows(token) if draw(st.booleans()) else targets
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    segments = draw(st.sampled_from([None, 1, batch_size]))
    options = dict(
        weights=torch.tensor([0.5, draw(st.sampled_from([1.0, 1.3, 2.0])), 0.25, 0.125], dtype=dtype),
        vocab_size=vocab_size,
        segments=None if segments is None else rows(st.sampled_from([0, 0, 0, 0, 1]), segments),
        tokens_include_row=tokens_include_row,
        repetition_allow_list=draw(st.lists(st.integers(-1, vocab_size), max_size=3)),
        use_immediate_repetition_penalty=draw(st.booleans()),
        immediate_repetition_threshold=draw(st.integers(1, 3)),
        use_ngram_penalty=draw(st.booleans()),
        ngram_size=draw(st.integers(1, 5)),
        ngram_window_size=draw(st.none() | st.integers(1, 12)),
        ngram_slots=draw(st.integers(1, 4)),
        eos_token_id=draw(
            st.none() | st.integers(0, vocab_size - 1) | st.lists(st.integers(0, vocab_size - 1), max_size=2)
        ),
        min_sequence_length=draw(st.integers(0, 10)),
    )
    return tokens, targets, options


@settings(max_examples=400, deadline=None)
@given(problems())
def test_agrees_with_the_definition(problem):
    tokens, targets, options = problem
    assert_agrees(tokens, targets, **options)


@pytest.mark.parametrize("ngram_size", [1, 2, 4])
@pytest.mark.parametrize("tokens_include_row", [False, True])
def test_long_text(ngram_size, tokens_include_row):
    # hash tables of several sizes, lists longer than the slots, packed texts that repeat one another
    generator = torch.Generator().manual_seed(ngram_size)
    text = torch.randint(12, (2, 150), generator=generator).repeat(1, 3)
    segments = (torch.arange(450) // 150).expand(2, -1)
    options = dict(
        weights=four_weights(), vocab_size=12, tokens_include_row=tokens_include_row, repetition_allow_list=[3],
        use_immediate_repetition_penalty=True, use_ngram_penalty=True, ngram_size=ngram_size, ngram_slots=3,
        eos_token_id=[0], min_sequence_length=20,
    )  # fmt: skip
    assert_agrees(text, text.roll(-1, 1), **options)
    assert_agrees(text, text.roll(-1, 1), segments=segments, ngram_window_size=40, **options)


@settings(max_examples=150, deadline=None)
@given(problems())
@pytest.mark.devices("cuda-emulated")
def test_many_tokens_agree_with_the_definition(problem):
    """What CUDA does where rows would read too many tokens one by one, with few of them."""
    tokens, targets, options = problem
    with emulated_cuda.device_limits(n_multiprocessors=0):
        assert_agrees(tokens, targets, **options)


def ngrams_in_order(text, size, n_slots):
    """What oracle finds for targets = tokens = text, fast enough for many tokens: lists that followers move in."""
    followers, rows = {}, []
    for row, target in enumerate(text):
        key = tuple(text[row - size + 1 : row]) if row >= size - 1 else None
        found = followers.setdefault(key, [])
        kept = [token for token in found[: n_slots + 1] if token != target][:n_slots]
        rows.append(kept + [-1] * (n_slots - len(kept)))
        if target in found:
            found.remove(target)
        if key is not None:
            found.insert(0, target)
    return rows


@pytest.mark.devices("cpu", "cuda-emulated", "cuda")
@pytest.mark.parametrize("kind", ["constant", "two", "periodic", "random", "late"])
@pytest.mark.parametrize("n_slots", [3, 40])
def test_many_tokens(kind, n_slots):
    """So many that no row may read its context: of any text, and with more slots than a warp has lanes."""
    n_tokens = 7000 if n_slots < 32 else 700
    random = torch.Generator().manual_seed(0)
    text = {
        "constant": torch.ones(n_tokens, dtype=torch.int64),
        "two": torch.randint(2, (n_tokens,), generator=random),
        "periodic": torch.arange(n_tokens) % 37,
        "random": torch.randint(50, (n_tokens,), generator=random),
        "late": torch.cat([torch.arange(50), torch.randint(2, (n_tokens - 50,), generator=random)]),
    }[kind]
    text = torch.stack([text, text.flip(0)])
    for ngram_size in (1, 2, 4):
        ids = repetition_candidates(
            text, text, weights=four_weights(), vocab_size=50, use_ngram_penalty=True, ngram_size=ngram_size,
            ngram_slots=n_slots, use_immediate_repetition_penalty=True,
        ).ids  # fmt: skip
        expected = torch.tensor([ngrams_in_order(row, ngram_size, n_slots) for row in text.tolist()])
        assert torch.equal(ids[..., 1:].cpu().long(), expected.cpu())


@pytest.mark.parametrize("threshold", [1, 40, 90])
@pytest.mark.parametrize("growth", [0.0, 1e-9, 0.5, 1.0, 1.02, 1.5])
def test_long_runs(growth, threshold):
    """A run is not read to its end once its weight stays."""
    text, targets = torch.tensor([[3] * 5 + [2] * 150]), torch.tensor([[1] * 155])
    weights = torch.tensor([0.5, growth, 0.05, 0.1], dtype=torch.float64)
    options = dict(use_immediate_repetition_penalty=True, immediate_repetition_threshold=threshold)
    assert_agrees(text, targets, weights=weights, vocab_size=6, tokens_include_row=True, **options)


def ngram_ids(text, targets=None, **options):
    text = torch.tensor([text])
    targets = text if targets is None else torch.tensor([targets])
    ids = repetition_candidates(
        text, targets, weights=four_weights(), vocab_size=10, use_ngram_penalty=True, **options
    ).ids
    return ids[0].tolist()


def test_ngrams_are_distinct_and_most_recent_first():
    # followers of 1 in order: 2, 3, 2, 4; the last row's own target would be 4
    text = [1, 2, 1, 3, 1, 2, 1, 4, 1, 5]
    assert ngram_ids(text, ngram_size=2, ngram_slots=3)[-1] == [4, 2, 3]
    assert ngram_ids(text, ngram_size=2, ngram_slots=2)[-1] == [4, 2]
    # the row's own target is left out before the cut to the slots, not after
    assert ngram_ids([*text[:-1], 4], ngram_size=2, ngram_slots=2)[-1] == [2, 3]
    assert ngram_ids(text, ngram_size=2, ngram_slots=2, repetition_allow_list=[2])[-1] == [4, 3]
    # followers at 7, 5, 3, 1 of a context of 9 tokens
    assert ngram_ids(text, ngram_size=2, ngram_slots=3, ngram_window_size=4)[-1] == [4, 2, -1]
    assert ngram_ids(text, ngram_size=2, ngram_slots=3, ngram_window_size=1)[-1] == [-1, -1, -1]


def test_unigrams_are_the_whole_context():
    assert ngram_ids([3, 4, 3, 5, 9], ngram_size=1, ngram_slots=4) == [
        [-1, -1, -1, -1],
        [3, -1, -1, -1],
        [4, -1, -1, -1],  # 3 is the target
        [3, 4, -1, -1],
        [5, 3, 4, -1],
    ]


def test_tokens_that_were_read():
    # the row reads 1 2 3 1 2 and predicts 9: "1 2" was followed by 3
    text, targets = [1, 2, 3, 1, 2], [2, 3, 1, 2, 9]
    ids = ngram_ids(
        text, targets, tokens_include_row=True, ngram_size=3, ngram_slots=1, use_immediate_repetition_penalty=True
    )
    assert ids == [[1, -1], [2, -1], [3, -1], [1, -1], [2, 3]]
    # as context of the targets themselves, the last row's context is 2 3 1 2: no "1 2" before
    assert ngram_ids(targets, ngram_size=3, ngram_slots=1)[-1] == [-1]


def test_masks_match_nothing_and_outside_ids_only_match():
    masked = [1, 2, IGNORED, 3, 1, 2, 4]
    targets = [9] * 7
    assert ngram_ids(masked, targets, ngram_size=3, ngram_slots=2)[-1] == [-1, -1]
    outside = [1, 99, 3, 1, 99, 4]
    assert ngram_ids(outside, [9] * 6, ngram_size=3, ngram_slots=2)[-1] == [3, -1]
    assert ngram_ids(outside, [9] * 6, ngram_size=2, ngram_slots=2)[4] == [-1, -1]


def test_immediate_repetition_grows_with_the_run():
    text = torch.tensor([[2, 2, 2, 2, 2, 2, IGNORED, 2, 2, 3]])
    targets = torch.full_like(text, 5)
    ids, weights, _ = repetition_candidates(
        text,
        targets,
        weights=torch.tensor([0.5, 1.5, 0, 0]),
        vocab_size=9,
        use_immediate_repetition_penalty=True,
        immediate_repetition_threshold=2,
    )
    assert ids[0, :, 0].tolist() == [-1, -1, 2, 2, 2, 2, 2, -1, -1, 2]
    expected = torch.tensor([0, 0, 0.75, 1.125, 0.5 * 1.5**3, 2, 2, 0, 0, 0.75])
    torch.testing.assert_close(weights[0, :, 0], expected, rtol=1e-7, atol=0)


def test_early_eos_counts_targets_of_the_segment():
    # left padding and a prompt do not count; the second text starts anew; a true EOS is not penalised
    targets = torch.tensor([[IGNORED, IGNORED, 4, 5, 6, 7, 4, 5, 1, 6]])
    segments = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
    ids, weights, _ = repetition_candidates(
        targets,
        targets,
        weights=four_weights(),
        vocab_size=9,
        segments=segments,
        eos_token_id=[1, 0],
        min_sequence_length=3,
    )
    here, absent = [1, 0], [-1, -1]
    assert ids[0].tolist() == [absent, absent, here, here, here, absent, here, here, absent, absent]
    torch.testing.assert_close(weights, (ids >= 0) * four_weights()[2], rtol=0, atol=0)


def test_nothing_leaks_between_rows_or_segments():
    text = torch.tensor([[1, 2, 3, 1, 2, 9], [1, 2, 4, 1, 2, 9]])
    options = dict(
        weights=four_weights(),
        vocab_size=10,
        use_ngram_penalty=True,
        ngram_size=3,
        ngram_slots=2,
        use_immediate_repetition_penalty=True,
    )
    ids, *_ = repetition_candidates(text, text, **options)
    assert ids[:, -1].tolist() == [[2, 3, -1], [2, 4, -1]]
    ids, *_ = repetition_candidates(text, text, segments=torch.tensor([[7, 7, 7, 8, 8, 8]]), **options)
    assert ids[:, -1].tolist() == [[2, -1, -1]] * 2
    assert ids[:, 3].tolist() == [[-1, -1, -1]] * 2
    # a value that comes back later is a new segment
    ids, *_ = repetition_candidates(text, text, segments=torch.tensor([[7, 7, 7, 8, 7, 7]]), **options)
    assert ids[:, -1].tolist() == [[2, -1, -1]] * 2


def full_options(**changes):
    options = dict(
        weights=four_weights(),
        vocab_size=6,
        use_immediate_repetition_penalty=True,
        use_ngram_penalty=True,
        ngram_size=3,
        ngram_slots=2,
        eos_token_id=[1],
        min_sequence_length=5,
    )
    return options | changes


def test_strides_and_integer_types_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(6, (4, 80), generator=generator)
    segments = torch.randint(2, (1, 40), generator=generator)
    dense = wide[:, ::2].contiguous()
    expected = repetition_candidates(dense, dense, segments=segments.expand(4, -1).contiguous(), **full_options())
    assert not wide[:, ::2].is_contiguous() and not dense.t().contiguous().t().is_contiguous()
    weights = torch.stack([four_weights(), four_weights() + 1], 1)[:, 0]
    for tokens in (wide[:, ::2], dense.t().contiguous().t(), dense.int(), wide.int()[:, ::2], dense.to(torch.uint8)):
        for marks in (segments, segments.expand(4, -1), segments.int(), segments.expand(4, -1).int()):
            got = repetition_candidates(tokens, tokens, segments=marks, **full_options(weights=weights))
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    one_row = torch.randint(6, (1, 40), generator=generator).expand(4, -1)
    torch.testing.assert_close(
        repetition_candidates(one_row, one_row, **full_options()),
        repetition_candidates(one_row.contiguous(), one_row.contiguous(), **full_options()),
        rtol=0,
        atol=0,
    )


def test_rows_do_not_depend_on_the_batch_or_the_threads():
    # 2048 tokens are the least that a thread takes
    text = torch.randint(6, (5, 3000), generator=torch.Generator().manual_seed(1))
    whole = repetition_candidates(text, text, **full_options())
    for row in range(5):
        alone = repetition_candidates(text[row : row + 1], text[row : row + 1], **full_options())
        torch.testing.assert_close(alone[:2], tuple(t[row : row + 1] for t in whole[:2]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(shape):
    empty = torch.zeros(shape, dtype=torch.int64)
    ids, weights, _ = repetition_candidates(empty, empty, segments=empty, **full_options())
    assert ids.shape == weights.shape == (*shape, 4)


def test_no_slots():
    text = torch.tensor([[1, 1, 1]])
    ids, weights, groups = repetition_candidates(text, text, weights=four_weights(), vocab_size=5)
    assert ids.shape == weights.shape == (1, 3, 0) and groups == ()


def op_arguments(**changes):
    options = dict(
        tokens_include_row=False, vocab_size=6, ignore_index=IGNORED, repetition_allow_list=[2],
        use_immediate_repetition_penalty=True, immediate_repetition_threshold=1, ngram_size=3, ngram_window_size=0,
        ngram_slots=2, eos_ids=[1], min_sequence_length=5,
    )  # fmt: skip
    return options | changes


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(with_segments, dtype):
    segments = torch.zeros(1, 9, dtype=torch.int64).expand(3, -1) if with_segments else None
    text = torch.randint(6, (9, 3), generator=torch.Generator().manual_seed(2)).t()
    op = torch.ops.ava_ext.repetition_candidates.default
    for changes in ({}, {"ngram_size": 0}, {"use_immediate_repetition_penalty": False, "eos_ids": [], "ngram_size": 1}):
        torch.library.opcheck(op, (text, text.int(), segments, four_weights().to(dtype)), op_arguments(**changes))


def test_not_differentiable():
    text = torch.tensor([[1, 2, 1, 2]])
    with pytest.raises(ValueError, match="expected weights without requires_grad"):
        repetition_candidates(text, text, weights=torch.ones(4, requires_grad=True), vocab_size=5)
    ids, weights = torch.ops.ava_ext.repetition_candidates(
        text, text, None, torch.ones(4, requires_grad=True), **op_arguments()
    )
    assert not ids.requires_grad and not weights.requires_grad


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("inductor", True)])
def test_compile_in_one_graph(backend, dynamic):
    def penalised(logits, text, weights):
        ids, candidate_weights, _ = repetition_candidates(text, text, **full_options(weights=weights))
        return (logits.gather(-1, ids.clamp(min=0).long()) * candidate_weights).sum(), ids

    compiled = torch.compile(penalised, fullgraph=True, dynamic=dynamic, backend=backend)
    generator = torch.Generator().manual_seed(3)
    for shape in ((2, 9), (3, 14)):
        logits = torch.randn(*shape, 6, dtype=torch.float64, generator=generator, requires_grad=True)
        text = torch.randint(6, shape, generator=generator)
        results = []
        for function in (penalised, compiled):
            value, ids = function(logits, text, four_weights())
            results.append((value, ids, *torch.autograd.grad(value, logits)))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.devices("cpu")
def test_a_schedule_of_weights_does_not_recompile():
    n_compiled = 0

    def counting_backend(graph, _):
        nonlocal n_compiled
        n_compiled += 1
        return graph

    text = torch.tensor([[1, 2, 1, 2, 1]])
    compiled = torch.compile(
        lambda weights: repetition_candidates(text, text, **full_options(weights=weights))[1].sum(),
        fullgraph=True,
        backend=counting_backend,
    )
    values = {compiled(four_weights() * step).item() for step in (1, 2, 3)}
    assert n_compiled == 1 and len(values) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": lambda text: text.float()}, "expected tokens to be integers .*, got float32"),
        ({"targets": lambda text: text.to(torch.uint64)}, "expected targets to be integers .*, got uint64"),
        ({"tokens": lambda text: text[0]}, r"expected tokens of shape \[batch_size, n_tokens\], got \[5\]"),
        ({"targets": lambda text: text[:, :4]}, r"expected targets of shape \[2, 5\], got \[2, 4\]"),
        ({"segments": lambda text: text[:, :4]}, r"expected segments of shape \[2, 5\], got \[2, 4\]"),
        ({"segments": lambda text: text.bool()}, "expected segments .*, got bool"),
        (
            {"weights": lambda _: four_weights()[:3]},
            r"expected weights .* shape \[4\], got torch.float64 of shape \[3\]",
        ),
        ({"weights": lambda _: four_weights().half()}, r"expected weights of float32 or float64 .*, got torch.float16"),
        ({"vocab_size": 0}, "expected vocab_size in .*, got 0, 1, 4, 8 and None"),
        ({"vocab_size": 2**31}, "expected vocab_size in"),
        ({"immediate_repetition_threshold": 0}, "immediate_repetition_threshold >= 1"),
        ({"use_ngram_penalty": True, "ngram_size": 0}, "ngram_size >= 1"),
        ({"ngram_window_size": 0}, "ngram_window_size >= 1"),
        ({"use_ngram_penalty": True, "ngram_slots": 0}, "ngram_slots >= 1"),
        ({"eos_token_id": [1, 6]}, r"expected eos_token_id in \[0, vocab_size = 6\), got 6"),
    ],
)
def test_messages(changes, message):
    text = torch.zeros(2, 5, dtype=torch.int64)
    changes = {name: value(text) if callable(value) else value for name, value in changes.items()}
    arguments = dict(tokens=text, targets=text, weights=four_weights(), vocab_size=6) | changes
    with pytest.raises(ValueError, match=message):
        repetition_candidates(**arguments)


def test_the_operator_checks_too():
    op, text = torch.ops.ava_ext.repetition_candidates, torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"expected targets of shape \[2, 5\], got \[2, 4\]"):
        op(text, text[:, :4], None, four_weights(), **op_arguments())
    with pytest.raises(RuntimeError, match=r"expected eos_ids in \[0, vocab_size = 6\), got 9"):
        op(text, text, None, four_weights(), **op_arguments(eos_ids=[9]))
