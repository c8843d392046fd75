"""The PTX of repetition candidates, row weights and the adaptive temperature against their definitions."""

import math

import pytest
import torch
from cuda_operators import H100, on_device
from support.emulated_cuda import DeviceLimits
from test_repetition import assert_agrees
from test_row_weights import definition

from ava_ext.ops.row_weights import count_rows

IGNORED = -100


@pytest.mark.parametrize(
    ("ngram_size", "n_tokens", "dtype"),
    [(0, 75, "int64"), (1, 75, "int64"), (2, 100, "int32"), (4, 75, "int64"), (3, 31, "int64"), (2, 110, "int64")],
)
def test_repetition(ngram_size, n_tokens, dtype):
    random = torch.Generator().manual_seed(n_tokens + ngram_size)

    def tokens():
        ids = torch.randint(5, (2, n_tokens), generator=random)
        return ids.masked_fill_(torch.rand(ids.shape, generator=random) < 1 / 12, IGNORED).to(getattr(torch, dtype))

    text = tokens()
    targets = text if ngram_size < 2 else tokens()
    segments = (torch.rand(text.shape, generator=random) < 0.03).cumsum(1)
    for real in (torch.float32, torch.float64):
        with on_device(H100, seed=ngram_size or None) as device:
            assert_agrees(
                text,
                targets,
                weights=torch.tensor([0.5, 1.5, 0.05, 0.1], dtype=real),
                vocab_size=5,
                segments=segments if n_tokens != 75 else None,
                tokens_include_row=n_tokens == 100,
                repetition_allow_list=[2],
                use_immediate_repetition_penalty=True,
                immediate_repetition_threshold=1 + ngram_size % 2,
                use_ngram_penalty=ngram_size > 0,
                ngram_size=max(ngram_size, 1),
                ngram_window_size=50 if n_tokens == 110 else None,
                ngram_slots=3,
                eos_token_id=[0],
                min_sequence_length=40,
            )
        device.require_no_findings()


@pytest.mark.parametrize(("ngram_size", "n_tokens", "includes_row"), [(0, 75, False), (1, 75, True), (3, 300, True)])
def test_repetition_of_many_tokens(ngram_size, n_tokens, includes_row):
    """In linear time, as on a device so small that no row may read its context."""
    random = torch.Generator().manual_seed(n_tokens + ngram_size)
    text = torch.randint(3, (2, n_tokens), generator=random)
    text[:, n_tokens // 2 :] = 1
    text[1, 5] = IGNORED
    with on_device(DeviceLimits(0, 228 * 1024, 227 * 1024, 1024, 8), seed=ngram_size) as device:
        assert_agrees(
            text,
            text.roll(-1, 1),
            weights=torch.tensor([0.5, 1.5, 0.05, 0.1]),
            vocab_size=5,
            segments=(torch.arange(n_tokens) > 20).long()[None],
            tokens_include_row=includes_row,
            use_immediate_repetition_penalty=True,
            use_ngram_penalty=ngram_size > 0,
            ngram_size=max(ngram_size, 1),
            ngram_slots=3,
            eos_token_id=[0],
            min_sequence_length=40,
        )
    device.require_no_findings()


@pytest.mark.parametrize("count", [0, 8, 9, 57, 99, 100, 317])
def test_temperature(count):
    history = 2 + 0.3 * torch.randn(100, generator=torch.Generator().manual_seed(count))
    state = [torch.ones(()), history.clone(), torch.tensor(count), torch.tensor(6.5), torch.tensor(3.0)]
    with on_device(H100) as device:
        torch.ops.ava_ext.temperature_step_(*state, 1.0, 1.5, 0.5, 2.0)
    device.require_no_findings()
    history[count % 100] = torch.tensor(6.5) / torch.tensor(3.0)
    known = history[: count + 1].double()
    expected = 1 + 1.5 * (known.std(correction=0) / known.mean() - 0.075) if count >= 9 else torch.tensor(1.0)
    assert math.isclose(state[0], expected.clamp(0.5, 2.0), rel_tol=1e-6)
    assert [value.item() for value in state[2:]] == [count + 1, 0, 0]
    assert torch.equal(state[1], history)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch_size", "n_tokens"), [(2, 9), (3, 401)])
def test_row_weights(batch_size, n_tokens, dtype):
    random = torch.Generator().manual_seed(n_tokens)
    targets = torch.randint(-1, 5, (batch_size, n_tokens), generator=random)
    keep = torch.rand(targets.shape, generator=random) < 0.8
    token_weights = torch.rand(targets.shape, generator=random, dtype=dtype)
    class_weights = torch.rand(5, generator=random, dtype=dtype)
    with on_device(H100) as device:
        got = count_rows(targets, keep, token_weights, class_weights, None, -1, True, dtype)
    device.require_no_findings()
    lists = [tensor.tolist() for tensor in (targets, keep, token_weights, class_weights)]
    counted, n_counted, weights = definition(*lists, None, -1, True)
    assert got[0].tolist() == counted
    assert got[1].item() == n_counted
    rtol = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(got[2], torch.tensor(weights, dtype=dtype), rtol=rtol, atol=0)
