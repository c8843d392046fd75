"""How well do the balancing losses balance? A small mixture of experts, each way of balancing, three seeds.

    python studies/moe_balance.py              ten minutes on an idle core; goes on where it stopped
    python studies/moe_balance.py --quick      half a minute: does everything run?
    python studies/moe_balance.py --steering 0.01 0.1      these weights of the steering term alone

Writes results/moe_balance.json; docs/figures.py draws it. The text is the standard library's documentation. The model
has two layers of attention, each followed by 16 experts, of which the router (softmax) takes two for each token.

MaxVio = load of the busiest expert / mean load - 1 (Wang et al. 2024), of a layer; here the mean of both layers, on
the training batch, and at the end on held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from text_corpus import Corpus, standard_library_documentation

from ava_ext import UnifiedLoss

RESULTS = Path(__file__).parent / "results" / "moe_balance.json"
WIDTH, N_LAYERS, N_EXPERTS, EXPERTS_PER_TOKEN, CONTEXT, BATCH_SIZE = 64, 2, 16, 2, 64, 8
LEARNING_RATE = 2e-3

# a run has hundreds of steps, not 100,000: the bias of the loss-free rule moves ten times as far per step as by default
STEERING = {"use_moe_balancing": True, "gradient_balance_weight": 0.01, "expert_bias_rate": 0.0}
BIAS = {"use_moe_balancing": True, "gradient_balance_weight": 0.0, "expert_bias_rate": 0.01}
SWITCH = {"use_auxiliary_loss": True, "load_balancing_weight": 0.01, "router_z_weight": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "Switch": SWITCH,
    "steering": STEERING,
    "steering, weight 0.1": {**STEERING, "gradient_balance_weight": 0.1},
    "loss-free bias": BIAS,
    "Switch + bias": {**SWITCH, **BIAS},
    "steering + bias": {**STEERING, "expert_bias_rate": 0.01},
    "Switch + steering": {**SWITCH, **STEERING},
}


class Experts(nn.Module):
    """A router and its experts: sum over the chosen experts of their share times what they make of a token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, N_EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(N_EXPERTS, WIDTH, 2 * WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(N_EXPERTS, 2 * WIDTH, WIDTH) / (2 * WIDTH) ** 0.5 / 4)

    def forward(
        self,
        hidden: Tensor,  # [n_rows, width]
        expert_bias: Tensor | None,  # [n_experts], added before the top-k and nowhere else
    ) -> tuple[Tensor, Tensor, Tensor]:  # [n_rows, width], gate_logits [n_rows, n_experts], expert_indices [n_rows, k]
        gate_logits = self.router(hidden)
        scores = gate_logits.softmax(-1)
        choice = scores if expert_bias is None else scores + expert_bias
        indices = choice.topk(EXPERTS_PER_TOKEN).indices
        shares = scores.gather(-1, indices)
        shares = shares / shares.sum(-1, keepdim=True)
        output = torch.zeros_like(hidden)
        for expert in range(N_EXPERTS):
            rows, slots = (indices == expert).nonzero(as_tuple=True)
            made = F.gelu(hidden[rows] @ self.up[expert]) @ self.down[expert]
            output = output.index_add(0, rows, shares[rows, slots].unsqueeze(-1) * made)
        return output, gate_logits, indices


class Model(nn.Module):
    """Token ids -> logits, and for each layer the router's logits and choices."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.attention = nn.ModuleList(nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(N_LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * N_LAYERS + 1))
        self.experts = nn.ModuleList(Experts() for _ in range(N_LAYERS))
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.normal_(self.positions.weight, std=0.05)

    def forward(
        self,
        ids: Tensor,  # [batch_size, n_tokens]
        expert_bias: Tensor | None = None,  # [n_layers, n_experts]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [.., vocab_size], [n_layers, n_rows, n_experts], [n_layers, n_rows, k]
        n_tokens = ids.shape[1]
        hidden = self.embedding(ids) + self.positions.weight[:n_tokens]
        mask = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
        gates, choices = [], []
        for layer in range(N_LAYERS):
            normed = self.norms[2 * layer](hidden)
            hidden = hidden + self.attention[layer](normed, normed, normed, attn_mask=mask, need_weights=False)[0]
            rows = self.norms[2 * layer + 1](hidden).flatten(0, 1)
            bias = None if expert_bias is None else expert_bias[layer]
            made, gate_logits, indices = self.experts[layer](rows, bias)
            hidden = hidden + made.view_as(hidden)
            gates.append(gate_logits)
            choices.append(indices)
        return F.linear(self.norms[-1](hidden), self.embedding.weight), torch.stack(gates), torch.stack(choices)


def max_violation(expert_indices: Tensor) -> float:  # [n_layers, n_rows, k]
    """Mean over the layers of max load / mean load - 1."""
    counts = torch.stack([layer.flatten().bincount(minlength=N_EXPERTS) for layer in expert_indices]).double()
    return float((counts.amax(-1) / counts.mean(-1) - 1).mean())


@torch.no_grad()
def held_out(model: Model, corpus: Corpus, bias: Tensor | None, n_windows: int) -> dict[str, float]:
    inputs, targets = (part[:n_windows] for part in corpus.validation_windows())
    logits, _, choices = model(inputs, bias)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return {"held_out_loss": float(loss), "held_out_max_violation": max_violation(choices)}


def run(corpus: Corpus, options: dict[str, Any], seed: int, n_steps: int, title: str) -> dict[str, Any]:
    """One arm with one seed: losses and MaxVio of every tenth step, and the end on held-out text."""
    torch.manual_seed(seed)
    model = Model(corpus.vocab_size)
    loss_fn = UnifiedLoss(
        corpus.vocab_size,
        primary_loss_type="standard",
        num_experts=N_EXPERTS,
        num_experts_per_token=EXPERTS_PER_TOKEN,
        num_moe_layers=N_LAYERS,
        **options,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    has_bias = options.get("expert_bias_rate", 0) > 0
    has_router_loss = bool(options)
    result: dict[str, Any] = {"steps": [], "loss": [], "max_violation": []}
    for step in tqdm(range(n_steps), desc=title, unit="step", dynamic_ncols=True, leave=False):
        inputs, targets, _ = corpus.random_batch(BATCH_SIZE, generator)
        bias = loss_fn.moe_balancer.expert_bias if has_bias else None
        logits, gate_logits, choices = model(inputs, bias)
        router = {"gate_logits": gate_logits, "expert_indices": choices} if has_router_loss else {}
        losses = loss_fn(logits, targets, return_detailed=True, **router)
        optimizer.zero_grad()
        losses["total_loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 or step == n_steps - 1:
            result["steps"].append(step)
            result["loss"].append(float(losses["cross_entropy"]))
            result["max_violation"].append(max_violation(choices))
    model.eval()
    bias = loss_fn.moe_balancer.expert_bias if has_bias else None
    return {**result, **held_out(model, corpus, bias, n_windows=8 if n_steps < 50 else 96)}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="12 steps, one seed, three arms")
    parser.add_argument(
        "--steering", type=float, nargs="+", metavar="WEIGHT", help="the steering term with these weights"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    arms = ARMS
    if options.steering:
        arms = {
            f"steering, weight {weight:g}": {**STEERING, "gradient_balance_weight": weight}
            for weight in options.steering
        }
    if options.output is None:
        options.output = RESULTS.with_name("moe_balance_steering.json") if options.steering else RESULTS
    if options.quick:
        options.steps, options.seeds = 12, 1
        arms = {name: ARMS[name] for name in ("none", "Switch", "steering + bias")}
    torch.set_num_threads(1)  # the tensors are small: a second thread would wait more than it works
    documentation = standard_library_documentation()
    if options.quick:
        documentation = documentation[::20]
    corpus = Corpus.from_texts(documentation, CONTEXT, vocab_size=2048)
    setting = {"steps": options.steps, "seeds": options.seeds, "n_experts": N_EXPERTS, "k": EXPERTS_PER_TOKEN}
    results: dict[str, Any] = {"setting": setting, "options": arms, "arms": {name: {} for name in arms}}
    if options.output.exists():
        stored = json.loads(options.output.read_text())
        if stored["setting"] == setting and stored["options"] == json.loads(json.dumps(arms)):
            results = stored
    for seed in range(options.seeds):
        for name, loss_options in arms.items():
            if str(seed) not in results["arms"][name]:
                title = f"{name}, seed {seed}"
                results["arms"][name][str(seed)] = run(corpus, loss_options, seed, options.steps, title)
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(results) + "\n")
    print(table(results), end="")


def table(results: dict[str, Any]) -> str:
    """Mean ± standard deviation over the seeds, in Markdown."""
    lines = ["| balancing | MaxVio, training, last 100 steps | MaxVio, held out | loss, held out |"]
    lines.append("| --- | --- | --- | --- |")
    for name, seeds in results["arms"].items():
        runs = list(seeds.values())
        if not runs:
            continue
        training = [sum(run["max_violation"][-10:]) / len(run["max_violation"][-10:]) for run in runs]
        columns = [training, *([run[key] for run in runs] for key in ("held_out_max_violation", "held_out_loss"))]
        lines.append(f"| {name} | " + " | ".join(_spread(values) for values in columns) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
