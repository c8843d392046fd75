"""UnifiedLoss of DTensors gives what it gives of the whole tensors, in every placement."""

import itertools

import pytest
import torch
from support.processes import on_ranks

from ava_ext import METRICS, UnifiedLoss
from ava_ext.ops import token_log_probs

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

# odd sizes: no dimension is cut into equal parts
BATCH_SIZE, N_TOKENS, VOCAB_SIZE, N_COLUMNS, HIDDEN_SIZE = 3, 7, 10, 11, 5
EVERY_TERM = {
    "primary_loss_type": "standard", "initial_temperature": 0.8, "label_smoothing": 0.1, "use_focal_loss": True,
    "z_loss_weight": 0.1, "confidence_penalty_weight": 0.2, "logit_softcap": 5.0, "use_ngram_penalty": True,
    "ngram_size": 2, "use_immediate_repetition_penalty": True, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SHARED_HEADS = {"use_mtp": True, "num_future_tokens": 2, "mtp_share_head": True}
OWN_HEADS = {"use_mtp": True, "num_future_tokens": 2}
DEPTH_MODULES = {"use_mtp": True, "mtp_type": "hidden_states", "num_future_tokens": 2}


def inputs():
    """Logits, hidden states, weight and bias of a head, and arguments of all rows."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(4, (BATCH_SIZE, N_TOKENS), generator=generator)
    targets[0, 2:] = -100  # another number of rows in each text
    arguments = {
        "targets": targets,
        "token_weights": torch.rand(targets.shape, generator=generator, dtype=torch.float64),
        "negative_ids": torch.randint(-1, VOCAB_SIZE, (*targets.shape, 2), generator=generator),
    }
    leaves = {
        "logits": normal(BATCH_SIZE, N_TOKENS, N_COLUMNS),
        "hidden_states": normal(BATCH_SIZE, N_TOKENS, HIDDEN_SIZE),
        "lm_head_weight": normal(N_COLUMNS, HIDDEN_SIZE),
        "lm_head_bias": normal(N_COLUMNS),
        "mtp_hidden_states": normal(2, BATCH_SIZE, N_TOKENS, HIDDEN_SIZE),
    }
    return leaves, arguments


def make_loss(options):
    torch.manual_seed(2)
    loss_fn = UnifiedLoss(VOCAB_SIZE, HIDDEN_SIZE, **EVERY_TERM | options).double()
    for parameter in loss_fn.parameters():  # a residual block begins as the identity
        torch.nn.init.normal_(parameter, std=0.3)
    return loss_fn


def run(loss_fn, leaves, arguments):
    """The detailed dict, gradients of the leaves and of the loss's own parameters."""
    detailed = loss_fn(**leaves, **arguments, return_detailed=True)
    detailed["total_loss"].backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    own = {name: parameter.grad for name, parameter in loss_fn.named_parameters()}
    return {name: value.detach() for name, value in detailed.items()}, gradients, own


def run_whole(options, names):
    leaves, arguments = inputs()
    return run(make_loss(options), {name: leaves[name].requires_grad_() for name in names}, arguments)


def worker(rank, mesh_shape, placements, options, in_loss_parallel=False, targets_placements=None):
    mesh = init_device_mesh("cpu", mesh_shape)
    leaves, arguments = inputs()
    spread = {
        name: distribute_tensor(leaves[name], mesh, placed).detach().requires_grad_()
        for name, placed in placements.items()
    }
    if targets_placements is not None:
        arguments = {name: distribute_tensor(given, mesh, targets_placements) for name, given in arguments.items()}
    if not in_loss_parallel:
        return run(make_loss(options), spread, arguments)
    with loss_parallel():
        return run(make_loss(options), spread, arguments)


def check(found, expected, is_share):
    """is_share: every rank has a part of the loss, and the parts add up; else every rank has all of it."""
    for rank in found:
        assert rank[0].keys() == expected[0].keys()
        torch.testing.assert_close(rank[1], expected[1], rtol=1e-12, atol=1e-12)  # full_tensor() on every rank
    keys = [key for key in expected[0] if key not in METRICS]
    if not is_share:
        for rank in found:
            torch.testing.assert_close(rank[0], expected[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(rank[2], expected[2], rtol=1e-12, atol=1e-12)
        return
    for key in keys:
        total = sum(rank[0][key] for rank in found)
        torch.testing.assert_close(total, expected[0][key], rtol=1e-12, atol=1e-12)
    assert sum(rank[0]["n_tokens"] for rank in found) == expected[0]["n_tokens"]
    mean = sum(rank[0]["cross_entropy"] * rank[0]["n_tokens"] for rank in found) / expected[0]["n_tokens"]
    torch.testing.assert_close(mean, expected[0]["cross_entropy"], rtol=1e-12, atol=1e-12)
    for name, gradient in expected[2].items():
        total = sum(rank[2][name] for rank in found)
        torch.testing.assert_close(total, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_loss_parallel", [False, True])
@pytest.mark.parametrize("dimension", [None, 0, 1, 2, -1])
def test_logits(dimension, in_loss_parallel):
    placements = {"logits": [Replicate() if dimension is None else Shard(dimension)]}
    found = on_ranks(2, worker, (2,), placements, {}, in_loss_parallel)
    check(found, run_whole({}, ["logits"]), is_share=dimension in (0, 1))


@pytest.mark.parametrize("dimension", [0, 1])
def test_targets_that_are_a_dtensor(dimension):
    placements = {"logits": [Shard(dimension)]}
    found = on_ranks(2, worker, (2,), placements, {}, False, [Shard(dimension)])
    check(found, run_whole({}, ["logits"]), is_share=True)


@pytest.mark.parametrize(
    "placements",
    [(Shard(1), Shard(2)) if torch.distributed.is_available() else (), (Shard(2), Shard(0)), (Shard(0), Shard(1))],
)
def test_two_dimensions_of_a_mesh(placements):
    found = on_ranks(4, worker, (2, 2), {"logits": placements}, {})
    is_columns = [placement.dim == 2 for placement in placements]
    if any(is_columns):  # two ranks with the columns of the same rows
        along = is_columns.index(True)
        for pair in ((0, 2), (1, 3)) if along == 0 else ((0, 1), (2, 3)):
            torch.testing.assert_close(found[pair[0]][0], found[pair[1]][0], rtol=1e-14, atol=0)
        found = [found[0], found[1 if along == 0 else 2]]
    check(found, run_whole({}, ["logits"]), is_share=True)


@pytest.mark.parametrize(("of_states", "of_weight"), list(itertools.product([None, 0, 1, 2], [None, 0, 1])), ids=str)
def test_a_head(of_states, of_weight):
    def placed(dimension):
        return [Replicate() if dimension is None else Shard(dimension)]

    bias = placed(0 if of_weight == 0 else None)
    placements = {"hidden_states": placed(of_states), "lm_head_weight": placed(of_weight), "lm_head_bias": bias}
    options = SHARED_HEADS if of_weight == 0 or of_states == 1 else OWN_HEADS
    found = on_ranks(2, worker, (2,), placements, options)
    check(found, run_whole(options, list(placements)), is_share=of_states in (0, 1) and of_weight != 0)


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_a_term_of_all_hidden_states(dimension):
    placements = {
        "logits": [Shard(dimension)],
        "hidden_states": [Shard(1) if dimension == 2 else Shard(dimension)],  # sequence beside tensor parallel
    }
    options = {"use_contrastive_loss": True} | OWN_HEADS
    found = on_ranks(2, worker, (2,), placements, options)
    check(found, run_whole(options, list(placements)), is_share=dimension < 2)


@pytest.mark.parametrize(("of_rows", "of_weight"), [(None, None), (0, None), (1, None), (2, 0), (None, 0)], ids=str)
def test_depth_modules_beside_logits(of_rows, of_weight):
    def placed(dimension):
        return [Replicate() if dimension is None else Shard(dimension)]

    placements = {
        "logits": placed(of_rows),
        "lm_head_weight": placed(of_weight),
        "lm_head_bias": placed(of_weight),
        "mtp_hidden_states": placed(of_rows + 1 if of_rows in (0, 1) else None),
    }
    found = on_ranks(2, worker, (2,), placements, DEPTH_MODULES)
    check(found, run_whole(DEPTH_MODULES, list(placements)), is_share=of_rows in (0, 1))


@pytest.mark.parametrize("of_depths", [None, 1])
def test_depth_modules_beside_a_term_of_all_hidden_states(of_depths):
    placements = {
        "logits": [Shard(0)],
        "hidden_states": [Shard(0)],
        "lm_head_weight": [Replicate()],
        "mtp_hidden_states": [Replicate() if of_depths is None else Shard(of_depths)],
    }
    options = {"use_contrastive_loss": True} | DEPTH_MODULES
    found = on_ranks(2, worker, (2,), placements, options)
    check(found, run_whole(options, list(placements)), is_share=True)


def depth_metrics_worker(rank, options):
    """Metrics of the depths on this rank's texts, which are DTensors, and by themselves."""
    mesh, (leaves, arguments) = init_device_mesh("cpu", (2,)), inputs()
    loss_fn, weight, targets = make_loss(options), leaves["lm_head_weight"], arguments["targets"]
    of_all = {name: leaves[name] for name in ("logits", "hidden_states")}
    if options == DEPTH_MODULES:
        of_all["mtp_hidden_states"] = leaves["mtp_hidden_states"]
    own = {name: values.chunk(2, values.dim() - 3)[rank] for name, values in of_all.items()}
    spread = {name: distribute_tensor(values, mesh, [Shard(values.dim() - 3)]) for name, values in of_all.items()}
    found, expected = (
        loss_fn(targets=t, lm_head_weight=head, **values, return_detailed=True)
        for t, head, values in (
            (targets, distribute_tensor(weight, mesh, [Replicate()]), spread),
            (targets.chunk(2)[rank], weight, own),
        )
    )
    return [{key: value for key, value in detailed.items() if "_depth_" in key} for detailed in (found, expected)]


@pytest.mark.parametrize("options", [SHARED_HEADS, DEPTH_MODULES], ids=["heads of the loss", "depth modules"])
def test_metrics_of_depths_are_those_of_the_rows_of_a_rank(options):
    for found, expected in on_ranks(2, depth_metrics_worker, options):
        assert len(found) == 6
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def counting_worker(rank):
    """N of targets that are a DTensor, and the loss divided by an N that is one: a sum over ranks."""
    mesh, (leaves, arguments) = init_device_mesh("cpu", (2,)), inputs()
    loss_fn, targets = make_loss({"class_weights": (0.5,) * VOCAB_SIZE}), arguments["targets"]
    given = [targets, arguments["token_weights"]]
    expected = loss_fn.count_items(given[0], token_weights=given[1])
    spread = [distribute_tensor(values, mesh, [Shard(1)]) for values in given]
    found = loss_fn.count_items(spread[0], token_weights=spread[1])
    n_items = DTensor.from_local(expected / 2, mesh, [Partial()])
    losses = [loss_fn(leaves["logits"], targets, num_items_in_batch=n) for n in (n_items, expected)]
    return (found, losses[0].detach()), (expected, losses[1].detach())


def test_n_of_dtensors():
    for found, expected in on_ranks(2, counting_worker):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def inplace_worker(rank):
    mesh, (leaves, arguments), found = init_device_mesh("cpu", (2,)), inputs(), []
    loss_fn = make_loss({"inplace_gradient": True})
    for placement in (Replicate(), Shard(0), Shard(1), Shard(-1)):
        logits = distribute_tensor(leaves["logits"].clone(), mesh, [placement]).detach().requires_grad_()
        loss_fn(logits, arguments["targets"]).backward()
        found.append((logits.detach().full_tensor(), leaves["logits"]))
    return found


def test_inplace_gradient_writes_over_no_dtensor():
    for found in on_ranks(2, inplace_worker):
        for logits, as_given in found:
            assert torch.equal(logits, as_given)


def unshifted_labels_worker(rank, placement, n_behind):
    """What the loss says of this rank's router, and what its tokens that are not padding say.

    n_behind: the rows behind the last label of each text, which the router leaves out.
    """
    mesh, (leaves, arguments) = init_device_mesh("cpu", (2,)), inputs()
    options = {"labels_are_shifted": False, "pad_token_id": 0, "num_experts": 3, "num_experts_per_token": 1}
    loss_fn = UnifiedLoss(VOCAB_SIZE, primary_loss_type="standard", use_auxiliary_loss=True, **options).double()
    labels = arguments["targets"].clone()
    labels[:, -2:] = 0
    gate_logits, keep = leaves["hidden_states"][..., :3], labels != 0
    if n_behind:
        gate_logits, keep = gate_logits[:, :-1], keep[:, 1:]
    if placement in (Shard(0), Shard(1)):
        gate_logits, keep = (values.chunk(2, placement.dim)[rank] for values in (gate_logits, keep))
    spread = distribute_tensor(leaves["logits"], mesh, [placement])
    found = loss_fn(spread, labels, gate_logits=gate_logits.flatten(0, 1), return_detailed=True)
    counts = torch.bincount(gate_logits[keep].argmax(-1), minlength=3).double()
    return found["moe_max_violation"], counts.max() * 3 / counts.sum() - 1


# a part of a text has no row behind its last label
@pytest.mark.parametrize(
    ("placement", "n_behind"), [("0", 0), ("1", 0), ("0", 1), ("-1", 0), ("-1", 1), ("replicate", 0), ("replicate", 1)]
)
def test_padding_of_a_router_beside_unshifted_labels(placement, n_behind):
    place = Replicate() if placement == "replicate" else Shard(int(placement))
    for found, expected in on_ranks(2, unshifted_labels_worker, place, n_behind):
        torch.testing.assert_close(found, expected)


def shorter_router_worker(rank, cut):
    """Whether a router without the row behind the last label raises beside texts that are spread over the ranks."""
    mesh, (leaves, arguments) = init_device_mesh("cpu", (2,)), inputs()
    options = {"labels_are_shifted": False, "pad_token_id": 0, "num_experts": 3, "num_experts_per_token": 1}
    loss_fn = UnifiedLoss(VOCAB_SIZE, primary_loss_type="standard", use_auxiliary_loss=True, **options)
    gate_logits = leaves["hidden_states"][..., :3]
    if cut == "before":
        gate_logits = gate_logits[:, :-1].chunk(2, 1)[rank]
    else:
        gate_logits = gate_logits.chunk(2, 1)[rank]
        gate_logits = gate_logits[:, :-1] if rank == 1 or cut == "each" else gate_logits
    spread = distribute_tensor(leaves["logits"], mesh, [Shard(1)])
    try:
        loss_fn(spread, arguments["targets"], gate_logits=gate_logits.flatten(0, 1))
    except ValueError as error:
        return str(error)
    return ""


# the ranks have logits of 4 + 3 tokens, and the router has 3 + 3, 3 + 2 and 4 + 2 of them
@pytest.mark.parametrize(
    ("cut", "raises"), [("before", (True, False)), ("each", (True, True)), ("last", (False, True))]
)
def test_a_router_without_the_last_row_raises_beside_a_part_of_a_text(cut, raises):
    errors = on_ranks(2, shorter_router_worker, cut)
    assert [error.startswith("unified_loss: expected gate_logits or") for error in errors] == list(raises)


def texts_worker(rank):
    """Load balancing of each text by itself, of texts that are spread over the ranks: the sum of the shares."""
    mesh, (leaves, arguments) = init_device_mesh("cpu", (2,)), inputs()
    options = {"num_experts": 3, "num_experts_per_token": 1, "use_auxiliary_loss": True, "load_balancing_weight": 1.0}
    loss_fn = UnifiedLoss(VOCAB_SIZE, primary_loss_type="standard", load_balancing_per_sequence=True, **options)
    logits, gates, targets = leaves["logits"], leaves["hidden_states"][..., :3], arguments["targets"].clamp_min(0)
    packed = (torch.arange(N_TOKENS) > 2).long().expand(targets.shape)
    found = []
    for segment_ids in (None, packed):
        given = {"targets": targets, "segment_ids": segment_ids, "return_detailed": True}
        whole = loss_fn(logits, gate_logits=gates, **given)["aux_load_balancing"]
        spread = distribute_tensor(logits, mesh, [Shard(0)])
        share = loss_fn(spread, gate_logits=gates.chunk(2)[rank], **given)["aux_load_balancing"]
        torch.distributed.all_reduce(share)
        found.append((share, whole))
    with pytest.raises(ValueError, match=r"texts are whole on every rank, got placements"):
        spread = distribute_tensor(logits, mesh, [Shard(1)])
        loss_fn(spread, targets, gate_logits=gates.chunk(2, 1)[rank])
    return found


def test_texts_that_are_balanced_by_themselves():
    for found in on_ranks(2, texts_worker):
        for share, whole in found:
            assert whole > 0
            torch.testing.assert_close(share, whole)


def log_probs_of(logits, targets):
    log_probs = token_log_probs(logits, targets)[0]
    return -(log_probs.full_tensor() if isinstance(log_probs, DTensor) else log_probs).sum()


def arriving_worker(rank, placement):
    """Gradients below logits and hidden states that a collective is still bringing, and those of the whole."""
    mesh, (leaves, arguments), found = init_device_mesh("cpu", (2,)), inputs(), []
    targets, weight = arguments["targets"], leaves["lm_head_weight"]
    replicated = distribute_tensor(weight, mesh, [Replicate()])
    loss_fn = make_loss({})
    for name, of_one, of_parts in (
        ("logits", loss_fn, loss_fn),
        ("logits", log_probs_of, log_probs_of),
        (
            "hidden_states",
            lambda states, t: loss_fn(hidden_states=states, lm_head_weight=weight, targets=t),
            lambda states, t: loss_fn(hidden_states=states, lm_head_weight=replicated, targets=t),
        ),
    ):
        whole = leaves[name].clone().requires_grad_()
        of_one(whole, targets).backward()
        below = DTensor.from_local(leaves[name] / 2, mesh, [Partial()]).requires_grad_()
        of_parts(below.redistribute(placements=[placement], async_op=True), targets).backward()
        found.append((below.grad.full_tensor(), whole.grad))
    return found


@pytest.mark.parametrize("dimension", [None, 1])
def test_what_is_still_on_its_way(dimension):
    for found in on_ranks(2, arriving_worker, Replicate() if dimension is None else Shard(dimension)):
        for gradient, expected in found:
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
