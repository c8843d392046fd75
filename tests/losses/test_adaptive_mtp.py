"""Adaptive multi-token prediction against a loop over heads and rows."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils._pytree import tree_leaves

from ava_ext import UnifiedLoss
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.adaptive_mtp import AdaptiveMTP, adaptive_mtp_terms
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_fields import TERM_NAMES, RowLoss
from ava_ext.sequences import shift_left

BATCH, LENGTH, VOCAB, HEADS = 2, 6, 9, 3
CONFIG, CONFIG_OF_ROWS = (
    UnifiedLossConfig(VOCAB, primary_loss_type="adaptive_mtp", num_future_tokens=HEADS, reduction=reduction)
    for reduction in ("mean", "none")
)


def token_loss(logits, targets):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(logits / 0.7, targets, ignore_index=-100, reduction="none")


def head_loss_of(per_row):
    def head_loss(logits, targets, row_weights):
        if isinstance(logits, LinearLogits):
            logits = linear(*logits)
        losses = token_loss(logits.flatten(0, 1), targets.flatten()).view(targets.shape)
        of_rows = losses * row_weights
        # main_loss and cross_entropy are what is read
        return RowLoss(of_rows if per_row else of_rows.sum(), losses.detach().expand(len(TERM_NAMES), *targets.shape))

    return head_loss


head_loss, head_loss_of_rows = head_loss_of(False), head_loss_of(True)


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    targets[0, 3], targets[1, 0] = -100, -100
    weights = torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64) * (targets != -100)
    return {
        "heads": torch.randn(HEADS, BATCH, LENGTH, VOCAB, generator=generator, dtype=torch.float64),
        "targets": targets,
        "row_weights": weights,
        "segments": torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]),
        "confidence_scores": torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64),
    }


def one_row_at_a_time(heads, targets, row_weights, segments, confidence_scores):
    confidence = (
        torch.ones(BATCH, LENGTH).double() if confidence_scores is None else confidence_scores.reshape(BATCH, -1)
    )
    confidence = confidence.expand(BATCH, LENGTH)
    loss = torch.zeros(BATCH, LENGTH, dtype=torch.float64)
    regularization = torch.zeros(BATCH, LENGTH, dtype=torch.float64)
    for k in range(1, HEADS + 1):
        for b in range(BATCH):
            for t in range(LENGTH - k):
                if targets[b, t + k] == -100 or (segments is not None and segments[b, t] != segments[b, t + k]):
                    continue
                logits, target = heads[k - 1][b, t], targets[b, t + k]
                c = confidence[b, t].detach()
                ce = -(logits / 0.7).log_softmax(-1)[target]
                loss[b, t] = loss[b, t] + 0.1 * row_weights[b, t + k] * c * ce / HEADS
                if k == 1 and confidence_scores is not None:
                    q, c = (logits.detach() / 0.7).softmax(-1)[target], confidence[b, t]
                    bce = -(q * c.log() + (1 - q) * (1 - c).log())
                    regularization[b, t] = regularization[b, t] + 0.01 * row_weights[b, t + 1] * bce
    return loss, regularization


@pytest.mark.parametrize("form", ["[B]", "[B, 1]", "[B, T]", "[B, T, 1]", "none"])
@pytest.mark.parametrize("packed", [False, True])
def test_against_one_row_at_a_time(form, packed):
    inputs = make_inputs()
    scores = inputs["confidence_scores"]
    forms = {
        "[B]": scores[:, 0],
        "[B, 1]": scores[:, :1],
        "[B, T]": scores,
        "[B, T, 1]": scores.unsqueeze(-1),
        "none": None,
    }
    inputs["confidence_scores"] = forms[form]
    if not packed:
        inputs["segments"] = None
    expected = one_row_at_a_time(**inputs)
    for logits in (inputs["heads"], list(inputs["heads"])):
        terms = adaptive_mtp_terms(CONFIG, **(inputs | {"heads": logits}), head_loss=head_loss)
        rows = adaptive_mtp_terms(CONFIG_OF_ROWS, **(inputs | {"heads": logits}), head_loss=head_loss_of_rows)
        for got, per_row, value in zip(terms, rows, expected, strict=False):
            torch.testing.assert_close(got, value.sum(), rtol=1e-12, atol=0)
            torch.testing.assert_close(per_row, value, rtol=1e-12, atol=1e-18)


def test_metrics():
    inputs = make_inputs()
    terms = adaptive_mtp_terms(CONFIG, **inputs, head_loss=head_loss)
    rows = [(0, 0), (0, 1), (0, 4), (1, 0), (1, 1), (1, 3), (1, 4)]  # head 1 has a counted target in the same segment
    losses, probabilities = [], []
    for b, t in rows:
        logits, target = inputs["heads"][0, b, t], inputs["targets"][b, t + 1]
        losses.append(token_loss(logits[None], target[None])[0])
        probabilities.append((logits / 0.7).softmax(-1)[target])
    torch.testing.assert_close(terms.depths.losses[0], torch.stack(losses).mean())
    torch.testing.assert_close(terms.mean_target_probability, torch.stack(probabilities).mean())
    confidence = torch.stack([inputs["confidence_scores"][row] for row in rows]).mean()
    torch.testing.assert_close(terms.mean_confidence, confidence)


def test_gradcheck():
    inputs = make_inputs()
    logits = inputs.pop("heads").requires_grad_()

    def mtp_loss(logits):
        return adaptive_mtp_terms(CONFIG, logits, **inputs, head_loss=head_loss).mtp_loss

    assert torch.autograd.gradcheck(mtp_loss, logits, fast_mode=True)
    confidence = inputs.pop("confidence_scores").requires_grad_()

    def regularization(confidence):
        return adaptive_mtp_terms(CONFIG, logits, **inputs, head_loss=head_loss, confidence_scores=confidence)[1]

    assert torch.autograd.gradcheck(regularization, confidence)


def test_confidence_and_heads_do_not_learn_from_each_other():
    inputs = make_inputs()
    logits, confidence = (inputs[name].requires_grad_() for name in ("heads", "confidence_scores"))
    terms = adaptive_mtp_terms(CONFIG, **inputs, head_loss=head_loss)
    assert torch.autograd.grad(terms.mtp_loss, confidence, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(terms.confidence_regularization, logits, allow_unused=True)[0] is None


def test_the_optimum_is_calibrated_and_the_ends_are_finite():
    inputs = make_inputs()
    inputs["segments"] = None
    first = (inputs["heads"][0, :, :-1] / 0.7).softmax(-1)
    q = first.gather(-1, inputs["targets"][:, 1:, None].clamp_min(0))[..., 0]
    confidence = torch.cat([q, torch.full((BATCH, 1), 0.5)], 1).requires_grad_()
    terms = adaptive_mtp_terms(CONFIG, **(inputs | {"confidence_scores": confidence}), head_loss=head_loss)
    assert torch.autograd.grad(terms.confidence_regularization, confidence)[0].abs().max() < 1e-15
    for end in (0.0, 1.0):
        logit = torch.full((BATCH, LENGTH), math.copysign(40.0, end - 0.5), requires_grad=True)
        sure = torch.full((BATCH, LENGTH), end, requires_grad=True)
        for value, leaf in ((sure, sure), (logit.sigmoid(), logit)):
            terms = adaptive_mtp_terms(CONFIG, **(inputs | {"confidence_scores": value}), head_loss=head_loss)
            assert terms.confidence_regularization.isfinite()
            assert torch.autograd.grad(terms.confidence_regularization, leaf)[0].isfinite().all()


def test_switched_off():
    inputs = make_inputs()
    leaves = [inputs[name].requires_grad_() for name in ("heads", "confidence_scores")]
    with torch.no_grad():
        leaves[0][0, 0, 0, 0] = torch.nan  # a head that is off may hold anything
    options = {"primary_loss_type": "adaptive_mtp", "num_future_tokens": HEADS}
    given = dict(zip(("additional_logits", "confidence_scores"), leaves, strict=True))
    for reduction in ("mean", "none"):
        loss_fn = UnifiedLoss(VOCAB, **options, reduction=reduction)
        main = (torch.randn(BATCH, LENGTH, VOCAB), inputs["targets"])
        parts = loss_fn(*main, **given, mtp_active=False, return_detailed=True)
        assert parts["mtp_loss"].shape == ((BATCH, LENGTH) if reduction == "none" else ())
        assert all((parts[name] == 0).all() for name in ("mtp_loss", "confidence_regularization"))
        gradients = torch.autograd.grad(parts["total_loss"].sum(), leaves)
        assert all((gradient == 0).all() for gradient in gradients)
        assert parts[f"mtp_loss_depth_{HEADS}"] == 0


def test_switched_by_a_tensor():
    inputs = make_inputs()
    on = adaptive_mtp_terms(CONFIG_OF_ROWS, **inputs, head_loss=head_loss_of_rows)
    for active in (torch.tensor(True), torch.tensor(False), torch.tensor([False, True])):
        got = adaptive_mtp_terms(CONFIG_OF_ROWS, **inputs, head_loss=head_loss_of_rows, mtp_active=active)
        for term, value in zip(got[:2], on[:2], strict=True):
            torch.testing.assert_close(term, value * active.reshape(-1, 1), rtol=1e-12, atol=1e-18)


NOTHING_COUNTS = {"row_weights": torch.zeros(BATCH, LENGTH), "targets": torch.full((BATCH, LENGTH), -100)}


def test_no_counted_row():
    inputs = make_inputs()
    inputs |= NOTHING_COUNTS
    leaves = [inputs[name].requires_grad_() for name in ("heads", "confidence_scores")]
    terms = adaptive_mtp_terms(CONFIG, **inputs, head_loss=head_loss)
    assert all((value == 0).all() for value in tree_leaves(terms))
    gradients = torch.autograd.grad(terms.mtp_loss + terms.confidence_regularization, leaves)
    assert all((gradient == 0).all() for gradient in gradients)


def test_low_precision_is_summed_in_float32():
    inputs = make_inputs()
    inputs["heads"] = inputs["heads"].bfloat16()
    exact = inputs | {"heads": inputs["heads"].double()}
    terms = adaptive_mtp_terms(CONFIG, **inputs, head_loss=head_loss)
    for got, value in zip(terms, one_row_at_a_time(**exact), strict=False):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), value.sum(), rtol=1e-5, atol=0)


def make_module():
    return AdaptiveMTP.from_config(CONFIG)


def learn(adaptive, heads, **inputs):
    """The terms of a call, which are added to the averages."""
    terms = adaptive_mtp_terms(CONFIG, heads, **inputs, head_loss=head_loss)
    adaptive.record_averages(True, terms)
    return terms


def test_running_averages():
    adaptive = make_module().bfloat16()
    seen = [learn(adaptive, **make_inputs(seed)) for seed in range(3)]
    learn(adaptive, **make_inputs(7), mtp_active=torch.tensor(False))
    learn(adaptive, **(make_inputs(7) | NOTHING_COUNTS))
    one_token = {name: value[..., :1] for name, value in make_inputs(7).items() if name != "heads"}
    one_token["heads"] = make_inputs(7)["heads"][:, :, :1]
    learn(adaptive, **one_token)  # head 1 has no target in it
    learn(adaptive, **(make_inputs(7) | {"heads": torch.full((HEADS, BATCH, LENGTH, VOCAB), torch.nan)}))
    assert adaptive.statistics()["count"] == 0  # nothing is committed yet
    adaptive.step()
    statistics = adaptive.statistics()
    assert statistics["count"] == 3
    for name in adaptive.AVERAGES:
        average = torch.stack([getattr(terms, name) for terms in seen]).mean().float()
        torch.testing.assert_close(statistics[name], average)
    adaptive.reset_statistics()
    assert all(value == 0 for value in adaptive.statistics().values())


def test_compiles_without_a_graph_break():
    eager, adaptive = make_module(), make_module()
    inputs = make_inputs()
    logits = inputs.pop("heads").requires_grad_()

    def call(adaptive, logits, inputs):
        terms = learn(adaptive, logits, **inputs)
        return terms.mtp_loss + terms.confidence_regularization

    losses = [
        torch.compile(call, fullgraph=True, backend="aot_eager")(adaptive, logits, inputs),
        call(eager, logits, inputs),
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-16)
    for module in (adaptive, eager):
        module.step()
    torch.testing.assert_close(adaptive.sums, eager.sums)
    assert adaptive.count == 1


def test_only_training_calls_are_averaged():
    loss_fn = UnifiedLoss(VOCAB, primary_loss_type="adaptive_mtp", num_future_tokens=1, auto_step=False)
    logits, targets = torch.randn(BATCH, LENGTH, VOCAB), torch.randint(VOCAB, (BATCH, LENGTH))
    heads = {"additional_logits": [logits], "confidence_scores": torch.rand(BATCH, LENGTH)}
    loss_fn(logits, targets, **heads)
    loss_fn(logits, targets, **heads, mtp_active=False)
    with torch.no_grad():
        loss_fn(logits, targets, **heads)
    loss_fn.eval()(logits, targets, **heads)
    loss_fn.step()
    assert loss_fn.adaptive_mtp.count == 1


def test_bad_input_is_named():
    inputs = make_inputs()
    for change, message in (
        ({"confidence_scores": torch.zeros(2, 5)}, r"confidence_scores of shape .* got \[2, 5\]"),
        ({"mtp_active": torch.ones(3)}, r"mtp_active of shape .* got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            adaptive_mtp_terms(CONFIG, **(inputs | change), head_loss=head_loss)


@pytest.mark.parametrize("logit", [-14.0, 12.0, 14.0])
def test_a_confidence_that_is_too_sure_is_corrected(logit):
    inputs, leaf = make_inputs(), torch.zeros(BATCH, LENGTH, dtype=torch.float64, requires_grad=True)

    def gradient(logits):
        terms = adaptive_mtp_terms(CONFIG, **inputs | {"confidence_scores": logits.sigmoid()}, head_loss=head_loss)
        return torch.autograd.grad(terms.confidence_regularization, leaf)[0]

    ahead = shift_left(inputs["row_weights"], 0, segments=inputs["segments"])
    weights = UnifiedLossConfig.confidence_reg_strength * ahead
    weighted_probability = 0.5 * weights - gradient(leaf)  # at a confidence of 1/2 it is weight (1/2 - q)
    confidence = torch.tensor(logit, dtype=torch.float64).sigmoid()
    bounded = confidence.clamp(1e-6, 1 - 1e-6)
    slope = confidence * (1 - confidence) / (bounded * (1 - bounded))  # of sigmoid, which goes on, over its bound's
    got = gradient(leaf + logit)
    torch.testing.assert_close(got, (bounded * weights - weighted_probability) * slope, rtol=1e-9, atol=1e-15)
    assert (got[weights > 0] != 0).all()


def test_a_confidence_of_no_shape_is_named():
    loss_fn = UnifiedLoss(VOCAB, primary_loss_type="adaptive_mtp", num_future_tokens=1)
    logits, targets = torch.zeros(4, VOCAB), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected confidence_scores of shape .*, got \[\]"):
        loss_fn(
            logits,
            targets,
            additional_logits=[logits],
            confidence_scores=torch.tensor(0.5),
            segment_ids=torch.zeros(4, dtype=torch.int64),
        )
