"""Multi-token prediction against one cross-entropy per row, depth by depth."""

import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm, linear, rms_norm, silu
from torch.nn.utils import prune

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.mtp import MultiTokenPrediction
from ava_ext.ops.row_fields import N_TERMS, TERM_NAMES, RowFlags, RowLoss, accumulation_dtype, row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.sequences import shift_left

BATCH, LENGTH, HIDDEN, VOCAB, DEPTHS = 2, 7, 5, 11, 3


def token_loss(logits, targets):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(logits / 0.8, targets, ignore_index=-100, label_smoothing=0.1, reduction="none")


def head_loss_of(per_row=False, chunk_rows=3):
    """token_loss without logits."""

    def head_loss(logits, targets, row_weights):
        real = accumulation_dtype(logits.dtype)
        return row_loss(
            logits,
            targets,
            row_options(torch.empty(0, dtype=logits.dtype), temperature=0.8, label_smoothing=0.1),
            flags=int(RowFlags.CROSS_ENTROPY | RowFlags.LABEL_SMOOTHING),
            row_weights=row_weights.to(real),
            reduction="none" if per_row else "sum",
            chunk_bytes=chunk_rows * VOCAB * logits.dtype.itemsize,
        )

    return head_loss


head_loss = head_loss_of()


def dense_head_loss(logits, targets, row_weights):
    losses = token_loss(linear(*logits).flatten(0, -2), targets.flatten()).view(targets.shape)
    correct = (linear(*logits).argmax(-1) == targets).to(losses.dtype)
    terms = torch.zeros(N_TERMS, *losses.shape, dtype=losses.dtype)
    terms[TERM_NAMES.index("main_loss")], terms[TERM_NAMES.index("correct")] = losses.detach(), correct
    return RowLoss((losses * row_weights).sum(), terms)


def make_mtp(dtype=torch.float64, seed=3, **options):
    torch.manual_seed(seed)
    options = {"num_future_tokens": DEPTHS, "use_mtp": True, "mtp_weight": 0.3} | options
    mtp = MultiTokenPrediction.from_config(UnifiedLossConfig(vocab_size=VOCAB, hidden_size=HIDDEN, **options)).double()
    with torch.no_grad():
        for parameter in mtp.parameters():  # the norms' ones and the residual blocks' zeros would hide mistakes
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return mtp.to(dtype)


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    targets[0, 4], targets[1, 6] = -100, -100
    weights = torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64) * (targets != -100)
    return {
        "hidden_states": torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, dtype=torch.float64),
        "targets": targets,
        "row_weights": weights,
        "segments": torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]),
    }


def head_logits(mtp, hidden, k, lm_head_weight, lm_head_bias):
    head = mtp.heads[k - 1]
    if lm_head_weight is None:
        return linear(layer_norm(hidden, (HIDDEN,), mtp.norm.weight, mtp.norm.bias), head.weight, head.bias)
    block = linear(rms_norm(hidden, (HIDDEN,), head.norm.weight), head.linear.weight, head.linear.bias)
    return linear(hidden + silu(block), lm_head_weight, lm_head_bias)


def one_row_at_a_time(mtp, hidden_states, targets, row_weights, segments, lm_head_weight=None, lm_head_bias=None):
    rows = torch.zeros(BATCH, LENGTH, dtype=torch.float64)
    depth_losses = []
    for k in range(1, DEPTHS + 1):
        losses = []
        for b in range(BATCH):
            for t in range(LENGTH - k):
                same_segment = segments is None or segments[b, t] == segments[b, t + k]
                if row_weights[b, t + k] == 0 or not same_segment:
                    continue
                logits = head_logits(mtp, hidden_states[b, t], k, lm_head_weight, lm_head_bias)
                loss = token_loss(logits[None], targets[b, t + k, None])[0]
                losses.append(loss)
                rows[b, t] = rows[b, t] + 0.3 * row_weights[b, t + k] * loss / DEPTHS
        depth_losses.append(sum(losses) / max(len(losses), 1))
    return rows, torch.stack(depth_losses).detach()


def shared_head():
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    return {"lm_head_weight": weight, "lm_head_bias": torch.randn(VOCAB, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_against_one_row_at_a_time(share, packed, chunk_rows):
    mtp = make_mtp(mtp_share_head=share)
    inputs = make_inputs() | (shared_head() if share else {})
    if not packed:
        inputs["segments"] = None
    expected, depth_losses = one_row_at_a_time(mtp, **inputs)
    got = mtp(**inputs, head_loss=head_loss_of(chunk_rows=chunk_rows))
    torch.testing.assert_close(got.loss, expected.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got, mtp(**inputs, head_loss=dense_head_loss), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.depths.losses, depth_losses, rtol=1e-12, atol=0)
    assert not got.depths.losses.requires_grad
    per_row = mtp(**inputs, head_loss=head_loss_of(per_row=True, chunk_rows=chunk_rows)).loss
    torch.testing.assert_close(per_row, expected, rtol=1e-12, atol=0)
    parameters = list(mtp.parameters())
    gradients = (torch.autograd.grad(loss, parameters) for loss in (got.loss, expected.sum()))
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("share", [False, True])
def test_gradcheck(share):
    mtp = make_mtp(mtp_share_head=share)
    inputs = make_inputs()
    hidden_states = inputs.pop("hidden_states").requires_grad_()
    head = [value.requires_grad_() for value in shared_head().values()] if share else []

    def loss(hidden_states, *head):
        return mtp(
            hidden_states,
            **inputs,
            head_loss=head_loss,
            **dict(zip(("lm_head_weight", "lm_head_bias"), head, strict=False)),
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden_states, *head), fast_mode=True)


@pytest.mark.parametrize("share", [False, True])
def test_functional_call_has_the_gradient_of_the_parameters_it_was_given(share):
    """Not of the module's own, which are back when backward computes a block again."""
    mtp, other = make_mtp(mtp_share_head=share), make_mtp(mtp_share_head=share, seed=4)
    inputs = make_inputs() | (shared_head() if share else {}) | {"head_loss": head_loss}
    inputs["hidden_states"].requires_grad_()
    given = dict(other.named_parameters())
    called = torch.func.functional_call(mtp, given, kwargs=inputs).loss, other(**inputs).loss
    gradients = [torch.autograd.grad(loss, (inputs["hidden_states"], *given.values())) for loss in called]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [False, True])
def test_parameters_modified_between_forward_and_backward_are_noticed(share):
    mtp = make_mtp(mtp_share_head=share)
    loss = mtp(**make_inputs(), **(shared_head() if share else {}), head_loss=head_loss).loss
    with torch.no_grad():
        for parameter in mtp.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Adapted(torch.nn.Module):
    """A layer with an adapter, as peft makes it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.adapter = layer, torch.nn.Linear(*reversed(layer.weight.shape), bias=False).double()
        self.weight = layer.weight

    def forward(self, values):
        return self.layer(values) + self.adapter(values)


@pytest.mark.parametrize("way", ["replaced", "hook"])
def test_layers_of_a_block_that_do_more_are_called(way):
    mtp = make_mtp(mtp_share_head=True)
    merged = make_mtp(mtp_share_head=True)
    for block, other in zip(mtp.heads, merged.heads, strict=True):
        adapted = Adapted(block.linear)
        if way == "replaced":
            block.linear = adapted
        else:
            block.linear.register_forward_hook(lambda _, given, output, a=adapted: output + a.adapter(*given))
        with torch.no_grad():
            other.linear.weight += adapted.adapter.weight
    found, expected = (each(**make_inputs(), **shared_head(), head_loss=head_loss).loss for each in (mtp, merged))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(found, mtp.heads[0].norm.weight)
    expected_gradients = torch.autograd.grad(expected, merged.heads[0].norm.weight)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=0)


def test_heads_that_do_more_than_a_weight_are_called():
    mtp, merged = make_mtp(), make_mtp()
    for number, other in enumerate(merged.heads):
        mtp.heads[number] = Adapted(mtp.heads[number])
        with torch.no_grad():
            other.weight += mtp.heads[number].adapter.weight
    found, expected = (each(**make_inputs(), head_loss=head_loss) for each in (mtp, merged))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(found.loss, [head.adapter.weight for head in mtp.heads])
    expected_gradients = torch.autograd.grad(expected.loss, [head.weight for head in merged.heads])
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-15)


def test_pruned_heads_follow_their_weights():
    """The hook of torch.nn.utils.prune makes the weight before each call, not when it is read."""
    mtp, merged = make_mtp(), make_mtp()
    for head in mtp.heads:
        prune.random_unstructured(head, "weight", 0.5)
    for _ in range(2):
        with torch.no_grad():
            for head, other in zip(mtp.heads, merged.heads, strict=True):
                head.weight_orig.mul_(1.5)
                other.weight.copy_(head.weight_orig * head.weight_mask)
        found, expected = (each(**make_inputs(), head_loss=head_loss).loss for each in (mtp, merged))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        found.backward()


def test_detached_head_gets_no_gradient():
    inputs = make_inputs() | {name: value.requires_grad_() for name, value in shared_head().items()}
    values, gradients = [], []
    for detach in (False, True):
        mtp = make_mtp(mtp_share_head=True, mtp_detach_head=detach)
        values.append(mtp(**inputs, head_loss=head_loss).loss)
        leaves = [mtp.heads[0].linear.weight, inputs["lm_head_weight"], inputs["lm_head_bias"]]
        gradients.append(torch.autograd.grad(values[-1], leaves, allow_unused=True))
    assert torch.equal(*values)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert None not in gradients[0] and gradients[1][1:] == (None, None)


def test_residual_blocks_start_as_the_identity_and_learn():
    mtp = MultiTokenPrediction.from_config(
        UnifiedLossConfig(vocab_size=VOCAB, hidden_size=HIDDEN, use_mtp=True, mtp_share_head=True)
    )
    hidden_states = torch.randn(2, HIDDEN)
    assert torch.equal(mtp.heads[1](hidden_states), hidden_states)
    mtp.heads[1](hidden_states).square().sum().backward()
    assert mtp.heads[1].linear.weight.grad.abs().max() > 0
    assert not list(mtp.norm.parameters())


def test_shift_left():
    targets, segments = torch.tensor([[5, 6, -1, 8, 9]]), torch.tensor([[0, 0, 0, 0, 1]])
    assert shift_left(targets, -1).tolist() == [[6, -1, 8, 9, -1]]
    assert shift_left(targets, -1, 1, segments).tolist() == [[6, -1, 8, -1, -1]]
    assert shift_left(targets, -1, 3, segments).tolist() == [[8, -1, -1, -1, -1]]
    beyond = 2**53 + 1  # no float64
    for k in (5, 9):
        assert shift_left(targets, beyond, k).tolist() == [[beyond] * 5]
    assert shift_left(torch.tensor([[0.5, 0.25, 1.0]]), 0, 1, torch.tensor([[0, 0, 1]])).tolist() == [[0.25, 0, 0]]


def test_nothing_leaks_across_segments_and_padding():
    mtp, inputs = make_mtp(), make_inputs()
    inputs["hidden_states"].requires_grad_()
    mtp(**inputs, head_loss=head_loss).loss.backward()
    reached = inputs["hidden_states"].grad.abs().sum(-1) > 0
    # row 0: its targets 0-3, then 4 (ignored) to 6; row 1: 0-1, then 2 to 5, 6 ignored
    assert reached.tolist() == [[True] * 3 + [False, True, True, False], [True, False, True, True, True, False, False]]


def test_no_counted_row():
    mtp, inputs = make_mtp(), make_inputs()
    inputs["hidden_states"].requires_grad_()
    inputs["row_weights"] = torch.zeros(BATCH, LENGTH)
    inputs["targets"] = torch.full((BATCH, LENGTH), mtp.config.ignore_index)
    got = mtp(**inputs, head_loss=head_loss)
    got.loss.backward()
    assert got.loss == 0 and (got.depths.losses == 0).all()
    assert all((p.grad == 0).all() for p in [inputs["hidden_states"], *mtp.parameters()])


def test_fewer_positions_than_depths():
    mtp, inputs = make_mtp(), make_inputs()
    short = {name: value[:, :1] for name, value in inputs.items()}
    assert mtp(**short, head_loss=head_loss).loss == 0
    empty = {name: value[:0] for name, value in inputs.items()}
    assert mtp(**empty, head_loss=head_loss).loss == 0


@pytest.mark.parametrize("share", [False, True])
def test_backward_keeps_no_logits(share):
    mtp, inputs = make_mtp(mtp_share_head=share), make_inputs() | (shared_head() if share else {})
    inputs["hidden_states"].requires_grad_()
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mtp(**inputs, head_loss=head_loss).loss.backward()
    # of vocab_size there are the heads' own gradients only
    assert any(VOCAB in tensor.shape for tensor in saved) or share
    assert all(tensor.shape in ((VOCAB, HIDDEN), (VOCAB,)) for tensor in saved if VOCAB in tensor.shape)


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [False, True])
def test_dtypes_of_model_and_heads_may_differ(model, heads, share):
    inputs = make_inputs() | (shared_head() if share else {})
    inputs = {name: value.to(model) if value.is_floating_point() else value for name, value in inputs.items()}
    inputs["row_weights"] = inputs["row_weights"].float()
    got = make_mtp(heads, mtp_share_head=share)(**inputs, head_loss=head_loss)
    expected = one_row_at_a_time(
        make_mtp(torch.float64, mtp_share_head=share), **(make_inputs() | (shared_head() if share else {}))
    )
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(
        got.loss.double(), expected[0].sum(), rtol=1e-5 if model == heads == torch.float32 else 0.05, atol=0
    )


def test_compiles_without_a_graph_break():
    for share in (False, True):
        mtp = make_mtp(mtp_share_head=share)
        inputs = make_inputs() | (shared_head() if share else {})

        def call(inputs, mtp=mtp):
            return mtp(**inputs, head_loss=head_loss).loss

        compiled, eager = torch.compile(call, fullgraph=True, backend="aot_eager")(inputs), call(inputs)
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(loss, list(mtp.parameters())) for loss in (compiled, eager)]
        for gradient, other in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-14)


def test_state_dict_names():
    assert set(make_mtp(num_future_tokens=2).state_dict()) == {
        "norm.weight", "norm.bias", "heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias",
    }  # fmt: skip


def test_bad_input_is_named():
    mtp, inputs = make_mtp(), make_inputs()
    for name, value, message in (
        ("hidden_states", torch.zeros(BATCH, LENGTH, 4), r"hidden_states of shape \[2, 7, 5\], got \[2, 7, 4\]"),
        ("hidden_states", torch.zeros(BATCH, LENGTH, 5) * 1j, "hidden_states of real numbers, got complex64"),
        ("targets", torch.zeros(14), r"targets \[batch_size, n_tokens\], got \[14\]"),
        ("row_weights", torch.zeros(BATCH, 6), r"row_weights of shape \[2, 7\], got \[2, 6\]"),
        ("segments", torch.zeros(1, LENGTH), r"segments of shape \[2, 7\], got \[1, 7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mtp(**(inputs | {name: value}), head_loss=head_loss)
    shared = make_mtp(mtp_share_head=True)
    with pytest.raises(ValueError, match="mtp_share_head=True needs lm_head_weight"):
        shared(**inputs, head_loss=head_loss)
    with pytest.raises(ValueError, match=r"lm_head_weight of shape \[11, 5\], got \[5, 11\]"):
        shared(**inputs, head_loss=head_loss, lm_head_weight=torch.zeros(5, 11))
    with pytest.raises(TypeError, match=r"lm_head_weight to be a torch.Tensor, got list"):
        shared(**inputs, head_loss=head_loss, lm_head_weight=[[0.0] * 5] * 11)
