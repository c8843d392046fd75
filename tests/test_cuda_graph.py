"""A training step captured in a CUDA graph and replayed on other inputs gives what eager gives on those.

Capture also proves that nothing waits for the device. "recorded on the CPU" is the same test around a stand-in for the
graph, so that the test itself runs where there is no GPU.
"""

import pytest
import torch

from ava_ext import AuxiliaryLoss, UnifiedLoss, repetition_candidates, softmax_statistics
from ava_ext.ops import row_loss, row_options

PLACES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
BATCH, TOKENS, VOCAB = 2, 40, 1031
EVERY_TERM = {
    "label_smoothing": 0.1,
    "use_focal_loss": True,
    "z_loss_weight": 1e-3,
    "confidence_penalty_weight": 0.1,
    "use_immediate_repetition_penalty": True,
    "use_ngram_penalty": True,
    "ngram_size": 2,
    "eos_token_id": 0,
}


class CpuGraph:
    """Replays by running the step again: where inputs and outputs are the same memory, a graph does no other."""

    def capture(self, step):
        self.step, self.outputs = step, step()
        return self.outputs

    def replay(self):
        for output, again in zip(self.outputs, self.step(), strict=True):
            output.copy_(again)


class CudaGraph:
    """torch.cuda.graph, with the warm-up it asks for."""

    def capture(self, step):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            return step()

    def replay(self):
        self.graph.replay()


def inputs(place, seed, dtype=torch.bfloat16):
    """Logits, targets of a text that repeats itself, hidden states, a head, and logits of a router."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, VOCAB, (5,), generator=generator)
    targets = words[torch.randint(5, (BATCH, TOKENS), generator=generator)]
    targets[0, seed % TOKENS] = -100
    tensors = {
        "logits": (torch.randn(BATCH, TOKENS, VOCAB, generator=generator) * 3).to(dtype),
        "hidden_states": torch.randn(BATCH, TOKENS, 32, generator=generator).to(dtype),
        "weight": (torch.randn(VOCAB, 32, generator=generator) / 3).to(dtype),
        "gate_logits": torch.randn(3, BATCH * TOKENS, 8, generator=generator).to(dtype),
    }
    return {"targets": targets.to(place)} | {name: tensor.to(place) for name, tensor in tensors.items()}


def unified(options, upstream=1.0):
    """The loss and its gradient; twice with an upstream gradient that is not 1."""

    def make(place):
        loss_fn = UnifiedLoss(VOCAB, auto_step=False, **options).to(place)

        def step(given):
            logits = given["logits"].detach().requires_grad_()
            loss = loss_fn(logits * 1, given["targets"])
            return loss.detach(), torch.autograd.grad(loss * upstream, logits)[0]

        return step

    return make


def fused_linear(place):
    loss_fn = UnifiedLoss(VOCAB, primary_loss_type="standard", linear_chunk_bytes=17 * VOCAB * 2).to(place)

    def step(given):
        leaves = [given[name].detach().requires_grad_() for name in ("hidden_states", "weight")]
        loss = loss_fn(targets=given["targets"], hidden_states=leaves[0], lm_head_weight=leaves[1])
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


def row_operators(place):
    """row_loss with candidates found in the graph, by upstream gradients per row; softmax_statistics."""
    coefficients = row_options(torch.empty(0, dtype=torch.bfloat16, device=place))
    weights = torch.tensor([0.5, 1.0, 0.05, 0.1], device=place)
    factors = torch.linspace(-1, 2, BATCH * TOKENS, device=place).view(BATCH, TOKENS)

    def step(given):
        logits, targets = given["logits"].detach().requires_grad_(), given["targets"]
        found = repetition_candidates(
            targets, targets, weights=weights, vocab_size=VOCAB, use_ngram_penalty=True, ngram_size=2
        )
        rows = row_loss(logits, targets, coefficients, candidates=found).loss
        statistics = softmax_statistics(logits, found[0])
        gradients = torch.autograd.grad([rows, statistics.entropy], logits, [factors, factors])
        return rows.detach(), statistics.log_probs.detach(), *gradients

    return step


def router(place):
    loss_fn = AuxiliaryLoss(2, load_balancing_weight=1.0, router_z_weight=0.1)

    def step(given):
        gate_logits = given["gate_logits"].detach().requires_grad_()
        loss = loss_fn(gate_logits)
        return loss.detach(), torch.autograd.grad(loss, gate_logits)[0]

    return step


STEPS = {
    "cross-entropy": unified({"primary_loss_type": "standard"}),
    "every term": unified({"primary_loss_type": "standard", **EVERY_TERM}),
    "every term, upstream gradient": unified({"primary_loss_type": "standard", **EVERY_TERM}, upstream=3.0),
    "in place": unified({"primary_loss_type": "standard", "inplace_gradient": True, "logit_softcap": 20.0}),
    "fused linear": fused_linear,
    "row operators": row_operators,
    "router": router,
}
# the same bits, but where cuBLAS may sum in another order
TOLERANCES = {"fused linear": {"rtol": 2e-2, "atol": 1e-4}}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", STEPS)
def test_replay_with_new_inputs_equals_eager(name, place):
    step = STEPS[name](place)
    static = inputs(place, seed=0)
    graph = CudaGraph() if place == "cuda" else CpuGraph()
    outputs = graph.capture(lambda: step(static))
    results = []
    for seed in (1, 2):
        for tensor, fresh in zip(static.values(), inputs(place, seed).values(), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        expected = step(inputs(place, seed))
        for output, value in zip(outputs, expected, strict=True):
            assert value.isfinite().all() and value.count_nonzero() > 0
            torch.testing.assert_close(output, value, **TOLERANCES.get(name, {"rtol": 0, "atol": 0}))
        results.append(outputs[0].clone())
    assert not torch.equal(*results)  # the replay did read the new inputs


@pytest.mark.parametrize("place", PLACES)
def test_adaptive_temperature_moves_within_a_graph(place):
    """step() commits on the device: replays go through the temperatures that eager calls go through."""
    temperatures = {}
    for mode in ("graph", "eager"):
        loss_fn = UnifiedLoss(VOCAB).to(place)
        static = inputs(place, seed=0)

        def step(loss_fn=loss_fn, static=static):
            logits = static["logits"].detach().requires_grad_()
            loss = loss_fn(logits, static["targets"])
            return loss.detach(), torch.autograd.grad(loss, logits)[0]

        graph = CudaGraph() if place == "cuda" else CpuGraph()
        if mode == "graph":
            graph.capture(step)
        for buffer, initial in zip(loss_fn.buffers(), UnifiedLoss(VOCAB).to(place).buffers(), strict=True):
            buffer.copy_(initial)  # what warming up and capturing recorded
        values = []
        for seed in range(1, 15):
            static["logits"].copy_(inputs(place, seed)["logits"] * seed)
            if mode == "graph":
                graph.replay()
            else:
                step()
            values.append(loss_fn.temperature.value.clone())
        temperatures[mode] = torch.stack(values)
    assert temperatures["eager"].unique().numel() > 3
    torch.testing.assert_close(temperatures["graph"], temperatures["eager"], rtol=0, atol=0)
