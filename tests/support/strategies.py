"""Random configurations of UnifiedLoss and arguments that fit them (tiny: the reference is slow); random rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses import CANDIDATES, PARTS
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_fields import Candidates, RowFlags, accumulation_dtype, row_options

F64 = torch.float64
HIDDEN_SIZE = 4

seeds = st.integers(0, 2**31 - 1)


@st.composite
def configurations(draw, **fixed) -> UnifiedLossConfig:
    """Any subset of the components, each with options of its own; `fixed` options are taken as they are."""
    vocab_size = draw(st.integers(4, 8))
    token = st.integers(0, vocab_size - 1)
    reduction = fixed.get("reduction", draw(st.sampled_from(["mean", "mean", "sum", "none"])))
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "primary_loss_type": draw(st.sampled_from(["standard", "deepseek", "adaptive_mtp"])),
        "reduction": reduction,
        "labels_are_shifted": draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([-100, -100, -1, 0])),
        "pad_token_id": draw(st.none() | token),
        "eos_token_id": draw(st.none() | token | st.lists(token, min_size=1, max_size=2, unique=True).map(tuple)),
        "initial_temperature": draw(st.sampled_from([1.0, 0.7, 1.9])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "smoothing_mode": draw(st.sampled_from(["uniform", "exclude_target"])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.6])),
        "logit_softcap": draw(st.sampled_from([None, 3.0])),
        "z_loss_weight": draw(st.sampled_from([0.0, 0.3])),
        "confidence_penalty_weight": draw(st.sampled_from([0.0, 0.2])),
        "use_focal_loss": draw(st.booleans()),
        "focal_alpha": draw(st.sampled_from([1.0, 0.25])),
        "focal_gamma": draw(st.sampled_from([0.0, 0.5, 2.0])),
        "token_reweighting": draw(st.sampled_from([None, "dft", "eaft"])),
        "reweighting_exponent": draw(st.sampled_from([1.0, 0.4])),
        "distillation_weight": draw(st.sampled_from([1.0, 1.0, 0.6, 0.0])),
        "distillation_temperature": draw(st.sampled_from([1.0, 2.0])),
        "distillation_tail": draw(st.booleans()),
        "repetition_allow_list": draw(st.lists(token, max_size=1).map(tuple)),
        "min_sequence_length": draw(st.integers(0, 5)),
        "eos_penalty_weight": draw(st.sampled_from([0.0, 0.7])),
        "negatives_need_target": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options |= {
            "use_ngram_penalty": True,
            "ngram_size": draw(st.integers(1, 3)),
            "ngram_penalty_weight": 0.9,
            "ngram_window_size": draw(st.none() | st.integers(1, 5)),
            "ngram_slots": draw(st.integers(1, 3)),
        }
    if draw(st.booleans()):
        options |= {
            "use_immediate_repetition_penalty": True,
            "immediate_repetition_threshold": draw(st.integers(1, 2)),
            "immediate_repetition_growth": draw(st.sampled_from([1.0, 1.5, 3.0])),
        }
    mtp_type = draw(st.sampled_from(["deepseek", "adaptive", "hidden_states"]))
    options |= {
        "use_mtp": draw(st.booleans()),
        "num_future_tokens": draw(st.integers(1, 3)),
        "mtp_weight": 0.4,
        "mtp_type": mtp_type,
        "mtp_own_denominator": draw(st.booleans()),
        "mtp_share_head": (share := mtp_type != "hidden_states" and draw(st.booleans())),
        "mtp_detach_head": share and draw(st.booleans()),
        "use_confidence_weighting": draw(st.booleans()),
        "confidence_reg_strength": draw(st.sampled_from([0.0, 0.6])),
        "accuracy_top_k": draw(st.sampled_from([(), (), (2,), (1, 3)])),
        "linear_chunk_bytes": draw(st.sampled_from([None, 100])),
    }
    if reduction != "none":
        n_experts = draw(st.integers(2, 4))
        options |= {
            "num_experts": n_experts,
            "num_experts_per_token": draw(st.integers(1, 2)),
            "num_moe_layers": draw(st.integers(1, 2)),
            "use_moe_balancing": draw(st.booleans()),
            "moe_momentum": draw(st.sampled_from([0.0, 0.9])),
            "expert_bias_rate": draw(st.sampled_from([0.0, 0.001])),
            "use_auxiliary_loss": draw(st.booleans()),
            "load_balancing_weight": 0.2,
            "router_z_weight": 0.3,
            "load_balancing_convention": (convention := draw(st.sampled_from(["switch", "huggingface"]))),
            "load_balancing_per_sequence": convention == "switch" and draw(st.booleans()),
            "expert_bias_centered": draw(st.booleans()),
            "router_score": draw(st.sampled_from(["softmax", "sigmoid"])),
            "use_diversity_loss": draw(st.booleans()),
            "diversity_weight": 0.3,
            "use_contrastive_loss": draw(st.booleans()),
        }
    if draw(st.sampled_from([False, False, True])):
        options["class_weights"] = tuple(draw(st.sampled_from([1.0, 0.5, 2.5, 0.0])) for _ in range(vocab_size))
    return UnifiedLossConfig(**options | fixed)


class Numbers:
    """Random float64 tensors of one call; those with a name are leaves that want a gradient."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, scale=1.0):
        return torch.randn(shape, dtype=F64, generator=self.generator) * scale

    def leaf(self, *shape, scale=1.0):
        return self.normal(*shape, scale=scale).requires_grad_()

    def uniform(self, *shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(shape, dtype=F64, generator=self.generator)

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def true(self, probability, *shape):
        return torch.rand(shape, generator=self.generator) < probability


def needs_sequences(config: UnifiedLossConfig) -> bool:
    """Whether rows without order would be refused."""
    on = [component.from_config(config) for component in (*CANDIDATES, *PARTS)]
    needing = any(component is not None and component.needs_sequences for component in on)
    return needing or config.use_contrastive_loss or not config.labels_are_shifted


@st.composite
def arguments(draw, config: UnifiedLossConfig) -> dict[str, Any]:
    """Arguments of forward() for this configuration, without return_detailed."""
    numbers = Numbers(draw(seeds))
    vocab_size = config.vocab_size
    batch_size, n_tokens = draw(st.integers(1, 3)), draw(st.integers(2, 7))
    is_flat = draw(st.sampled_from([False, False, True]))
    if is_flat:
        batch_size = 1
    shape = (n_tokens,) if is_flat else (batch_size, n_tokens)
    targets = numbers.integers(0, min(vocab_size, draw(st.integers(2, 8))), *shape)  # few different tokens: repetitions
    targets = torch.where(numbers.true(draw(st.sampled_from([0.0, 0.3])), *shape), config.ignore_index, targets)
    given: dict[str, Any] = {"targets": targets}
    given |= draw(masks(shape, numbers)) | draw(segments(shape, is_flat and needs_sequences(config)))
    given |= draw(logits(config, shape, numbers, given))

    given["token_weights"] = draw(st.sampled_from([None, numbers.uniform(*shape, low=0.1, high=2.0)]))
    is_mean = config.reduction == "mean"
    n_items = draw(st.sampled_from([None, None, 5, 7.5, "tensor"])) if is_mean else None
    given["num_items_in_batch"] = torch.tensor(6) if n_items == "tensor" else n_items
    if draw(st.booleans()):
        given["input_ids"] = numbers.integers(0, 3, *shape)
        given["input_ids"][..., 0] = draw(st.sampled_from([-200, 0, vocab_size + 3]))  # a placeholder of an image
    if draw(st.booleans()):
        given["negative_ids"] = numbers.integers(-1, vocab_size, *shape, 2)
        given["negative_ids"][numbers.true(0.3, *shape)] = -1
        given["negative_weights"] = draw(st.sampled_from([None, numbers.uniform(*shape, 2)]))
    if config.distillation_weight > 0 and draw(st.booleans()):
        given["soft_target_ids"] = numbers.integers(-1, vocab_size, *shape, 3)
        given["soft_target_weights"] = numbers.uniform(*shape, 3).where(numbers.true(0.8, *shape, 3), 0)
        given["soft_target_weights"] /= draw(st.sampled_from([1, 3]))  # with a tail where they leave something
        if "logits" in given or "primary_logits" in given:  # of a masked column the term is infinite
            given["soft_target_ids"].masked_fill_(given["soft_target_ids"] == vocab_size - 1, 0)
    one_target = config.use_focal_loss or config.token_reweighting or config.class_weights
    if not one_target and config.smoothing_mode == "uniform" and draw(st.sampled_from([False, False, True])):
        probabilities = numbers.uniform(*shape, vocab_size).where(numbers.true(0.8, *shape, vocab_size), 0)
        if "logits" in given or "primary_logits" in given:
            probabilities[..., -1] = 0
        given["target_probabilities"] = probabilities.requires_grad_(draw(st.booleans()))
    given |= draw(further_heads(config, shape, numbers, given))
    given |= draw(experts(config, shape, numbers))
    if config.use_contrastive_loss:
        if draw(st.booleans()):
            given["contrastive_pair"] = (numbers.leaf(3, HIDDEN_SIZE), numbers.leaf(3, HIDDEN_SIZE))
        elif given.get("hidden_states") is None:
            given["hidden_states"] = numbers.leaf(*shape, HIDDEN_SIZE)
    return {name: value for name, value in given.items() if value is not None}


@st.composite
def masks(draw, shape, numbers) -> dict[str, Any]:
    """No mask, or one with padding anywhere, at the left, at the right or everywhere."""
    kind = draw(st.sampled_from(["none", "none", "any", "left", "right", "empty"]))
    if kind == "none":
        return {}
    positions = torch.arange(shape[-1]).expand(shape)
    mask = {
        "any": numbers.true(0.7, *shape),
        "left": positions >= numbers.integers(0, shape[-1], *shape[:-1], 1),
        "right": positions < numbers.integers(1, shape[-1] + 1, *shape[:-1], 1),
        "empty": torch.zeros(shape, dtype=torch.bool),
    }[kind]
    return {"attention_mask": mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))}


@st.composite
def segments(draw, shape, is_required) -> dict[str, Any]:
    """None, or one of the three ways to say where texts begin."""
    kinds = ["segment_ids", "position_ids", "cu_seqlens"]
    kind = draw(st.sampled_from(kinds if is_required else ["none", "none", *kinds]))
    if kind == "none":
        return {}
    n_rows = math.prod(shape)
    if kind == "cu_seqlens":
        inner = draw(st.lists(st.integers(1, n_rows - 1), max_size=3, unique=True).map(sorted))
        return {kind: torch.tensor([0, *inner, n_rows], dtype=draw(st.sampled_from([torch.int32, torch.int64])))}
    given_shape = draw(st.sampled_from([shape, (1, shape[-1])]))
    lengths = st.lists(st.integers(1, 4), min_size=shape[-1], max_size=shape[-1])
    rows = []
    for _ in range(math.prod(given_shape[:-1])):
        texts = [(number % 2, position) for number, length in enumerate(draw(lengths)) for position in range(length)]
        rows.append([text[kind == "position_ids"] for text in texts[: shape[-1]]])
    return {kind: torch.tensor(rows).reshape(given_shape)}


@st.composite
def logits(draw, config, shape, numbers, given) -> dict[str, Any]:
    """logits, primary_logits, or hidden_states and lm_head_weight; padded and masked columns, wild ignored rows."""
    n_columns = config.vocab_size + draw(st.integers(0, 2))
    if draw(st.sampled_from([False, False, True])):
        return {
            "hidden_states": numbers.leaf(*shape, HIDDEN_SIZE),
            "lm_head_weight": numbers.leaf(n_columns, HIDDEN_SIZE),
            "lm_head_bias": draw(st.sampled_from([None, numbers.leaf(n_columns)])),
        }
    values = numbers.normal(*shape, n_columns, scale=draw(st.sampled_from([1.0, 6.0])))
    values[..., config.vocab_size :] = draw(st.sampled_from([0.0, 1e3, math.nan]))
    if draw(st.booleans()):  # a masked column that is never a target
        values[..., config.vocab_size - 1] = -math.inf
        given["targets"].masked_fill_(given["targets"] == config.vocab_size - 1, 1)
    if config.labels_are_shifted and config.negatives_need_target:
        values[given["targets"] == config.ignore_index] = draw(st.sampled_from([0.0, math.nan, math.inf]))
    name = "logits"
    if config.primary_loss_type == "adaptive_mtp":
        name = draw(st.sampled_from(["logits", "primary_logits"]))
    return {name: values.requires_grad_()}


@st.composite
def further_heads(draw, config, shape, numbers, given) -> dict[str, Any]:
    """What multi-token prediction of either kind reads."""
    further: dict[str, Any] = {}
    if config.mtp_heads is None:
        return further
    further["mtp_active"] = draw(st.sampled_from([None, None, True, False, "all", "per sequence"]))
    if isinstance(further["mtp_active"], str):
        batch_size = 1 if len(shape) == 1 else shape[0]
        of_call = numbers.true(0.5, *([] if further["mtp_active"] == "all" else [batch_size]))
        further["mtp_active"] = of_call.to(draw(st.sampled_from([torch.bool, torch.int64, torch.uint8])))
    further["mtp_depth_weights"] = draw(st.sampled_from([None, numbers.uniform(config.num_future_tokens)]))
    if config.mtp_heads == "own":
        if "hidden_states" not in given:
            further["hidden_states"] = numbers.leaf(*shape, HIDDEN_SIZE)
        if config.mtp_share_head and "lm_head_weight" not in given:
            further["lm_head_weight"] = numbers.leaf(config.vocab_size + 1, HIDDEN_SIZE)
        return further
    if config.mtp_heads == "hidden_states" and draw(st.sampled_from([False, True, True])):
        if "lm_head_weight" not in given:
            further["lm_head_weight"] = numbers.leaf(config.vocab_size + 1, HIDDEN_SIZE)
        depths = [numbers.leaf(*shape, HIDDEN_SIZE) for _ in range(config.num_future_tokens)]
        further["mtp_hidden_states"] = draw(st.sampled_from([depths, numbers.leaf(len(depths), *shape, HIDDEN_SIZE)]))
        return further
    n_columns = config.vocab_size + draw(st.integers(0, 1))
    if draw(st.booleans()):
        further["additional_logits"] = [
            numbers.leaf(*shape, n_columns, scale=2.0) for _ in range(config.num_future_tokens)
        ]
    else:
        heads = [
            (numbers.leaf(n_columns, 3), draw(st.sampled_from([None, numbers.leaf(n_columns)])))
            for _ in range(config.num_future_tokens)
        ]
        if draw(st.booleans()):  # the last shares the weight of the first
            heads[-1] = heads[0]
        further["additional_logits"] = [LinearLogits(numbers.leaf(*shape, 3), *head) for head in heads]
    if config.mtp_heads == "adaptive" and config.use_confidence_weighting:
        per_row = [shape, (*shape, 1)]
        per_sequence = [(1,), (1, 1)] if len(shape) == 1 else [shape[:1], (shape[0], 1)]
        scores = numbers.uniform(*draw(st.sampled_from(per_row + per_sequence)), low=0.02, high=0.98)
        further["confidence_scores"] = scores.requires_grad_()
    return further


@st.composite
def experts(draw, config, shape, numbers) -> dict[str, Any]:
    """What routers and experts give: as many rows as there are tokens, or others."""
    given: dict[str, Any] = {}
    n_tokens = math.prod(shape)
    n_rows = draw(st.sampled_from([n_tokens, n_tokens, n_tokens - 1, n_tokens - math.prod(shape[:-1]), 11]))
    if config.use_auxiliary_loss and config.load_balancing_per_sequence:
        n_rows = n_tokens
    if config.use_moe_balancing or config.use_auxiliary_loss:
        n_layers, n_experts, k = config.num_moe_layers, config.num_experts, config.num_experts_per_token
        layers = [numbers.leaf(n_rows, n_experts) for _ in range(n_layers)]
        as_tensor = numbers.leaf(*([n_layers] if n_layers > 1 else []), n_rows, n_experts)
        given["gate_logits"] = draw(st.sampled_from([layers, as_tensor]))
        if config.use_auxiliary_loss and not config.load_balancing_per_sequence and draw(st.booleans()):
            given["global_expert_counts"] = k * numbers.integers(0, 9, n_layers, n_experts)  # k for each row
        # of a softmax router's choices, the top-k of its logits is only a guess
        guesses = config.use_moe_balancing and config.router_score == "softmax" and config.expert_bias_rate > 0
        if guesses or draw(st.booleans()):
            order = numbers.uniform(n_layers, n_rows, n_experts).argsort(-1)[..., :k]
            given["expert_indices"] = draw(st.sampled_from([list(order), order[0] if n_layers == 1 else order]))
    if config.use_diversity_loss:
        outputs = [numbers.leaf(n_rows, HIDDEN_SIZE) for _ in range(config.num_experts)]
        given["expert_outputs"] = draw(st.sampled_from([outputs, numbers.leaf(3, n_rows, HIDDEN_SIZE)]))
    return given


@st.composite
def cases(draw, **fixed) -> tuple[UnifiedLossConfig, dict[str, Any]]:
    """A configuration and arguments for it."""
    config = draw(configurations(**fixed))
    return config, draw(arguments(config))


# -- Rows of logits

IGNORED = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass
class RowProblem:
    """The arguments of `row_loss`; the logits are a view of a base whose other elements are nan."""

    base: Tensor  # what holds the logits
    view: Callable[[Tensor], Tensor]  # base -> logits [..., n_columns]
    targets: Tensor  # [...]
    options: Tensor  # [N_OPTIONS]
    flags: int
    row_weights: Tensor | None  # [...]
    candidates: Candidates | None
    vocab_size: int
    ignore_index: int = IGNORED

    @property
    def logits(self):
        return self.view(self.base)

    @property
    def arguments(self):
        """The arguments of the op row_loss behind the logits."""
        ids, weights, groups = self.candidates or (None, None, ())
        return (
            self.targets, self.options, self.row_weights, ids, weights, list(groups), self.flags, self.vocab_size,
            self.ignore_index,
        )  # fmt: skip

    @property
    def keywords(self):
        """The keyword arguments of the public function behind logits, targets and options."""
        return dict(
            flags=self.flags,
            row_weights=self.row_weights,
            candidates=self.candidates,
            vocab_size=self.vocab_size,
            ignore_index=self.ignore_index,
        )

    @property
    def is_expanded(self):
        return any(
            stride == 0 and size > 1 for size, stride in zip(self.logits.shape, self.logits.stride(), strict=True)
        )

    def in_dtype(self, dtype):
        """The same numbers in another dtype, as far as it holds them."""
        real = accumulation_dtype(dtype)
        candidates = self.candidates and self.candidates._replace(weights=self.candidates.weights.to(real))
        return replace(
            self,
            base=self.base.to(dtype),
            options=self.options.to(real),
            row_weights=None if self.row_weights is None else self.row_weights.to(real),
            candidates=candidates,
        )


# name: shape of the rows and of the base for n columns, and the view of the base. Few rows: the reference is slow
LAYOUTS = {
    "contiguous": lambda n: ((5,), (5, n), lambda base: base),
    "one row": lambda n: ((), (n,), lambda base: base),
    "no rows": lambda n: ((2, 0), (2, 0, n), lambda base: base),
    "without the last token": lambda n: ((2, 3), (2, 4, n), lambda base: base[:, :-1]),
    "transposed": lambda n: ((3, 2), (2, 3, n), lambda base: base.transpose(0, 1)),
    "columns of a wider tensor": lambda n: ((4,), (4, n + 8), lambda base: base[:, 3 : n + 3]),
    "every other row": lambda n: ((3,), (6, n), lambda base: base[1::2]),
    "expanded": lambda n: ((2, 3), (3, n), lambda base: base.expand(2, *base.shape)),
    "many dimensions": lambda n: (
        (2, 1, 2, 2),
        (2, 3, 2, n + 1),
        lambda base: base.transpose(0, 2)[:, None, 1:, :, 1:],
    ),
}
# one block of columns is 256, 512 or 1024 wide; before and behind whole registers are heads and tails
VOCABULARIES = [1, 2, 3, 7, 16, 31, 33, 64, 100, 255, 513, 1023, 1024, 1025, 1500, 2500]


@st.composite
def row_flags(draw):
    """Any subset of the terms, but for the tail of soft targets: on CUDA its rows take another kernel."""
    terms = [int(flag) for flag in RowFlags if flag != RowFlags.TAIL]
    return sum(draw(st.lists(st.sampled_from(terms), unique=True)))


def draw_logits(draw, generator, shape, temperature):
    """float64 values of many kinds: flat, wide, far from 0, peaked, rising or falling from block to block."""
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.0, 0.2, 1.0, 6.0]))
    logits += torch.linspace(0, draw(st.sampled_from([0.0, 0.0, 200.0, -200.0])), shape[-1], dtype=torch.float64)
    logits += draw(st.sampled_from([0.0, 0.0, -30.0, 300.0]))
    peak = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
    gap = temperature * draw(st.sampled_from([0.0, 0.0, 3.0, 20.0, 60.0]))
    if gap:
        logits.scatter_(-1, peak, logits.amax(-1, keepdim=True) + gap)
    return logits


@st.composite
def row_problems(draw, dtypes=DTYPES, layouts=tuple(LAYOUTS), vocabularies=VOCABULARIES):
    """Problems for which float32 can be right: candidates are never further than 75 from each other in z."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random_ids(bound, shape):
        return torch.randint(bound, shape, generator=generator)

    dtype, flags = draw(st.sampled_from(dtypes)), draw(row_flags())
    real = accumulation_dtype(dtype)
    vocab_size = draw(st.sampled_from(vocabularies))
    n_columns = vocab_size + draw(st.sampled_from([0, 0, 1, 40]))
    layout = draw(st.sampled_from(layouts))
    rows, base_shape, view = LAYOUTS[layout](n_columns)
    temperature = draw(st.sampled_from([1.0, 1.0, 0.4, 2.7]))
    options = row_options(
        torch.empty(0, dtype=dtype),
        temperature=temperature,
        label_smoothing=draw(st.sampled_from([0.1, 0.5, 1.0])),
        focal_alpha=draw(st.sampled_from([1.0, 0.25])),
        focal_gamma=draw(st.sampled_from([0.0, 0.5, 2.0])),
        z_loss_weight=draw(st.sampled_from([1e-3, 0.5])),
        confidence_penalty_weight=draw(st.sampled_from([0.1, 1.0])),
        logit_softcap=draw(st.sampled_from([5.0, 30.0])),
        reweighting_exponent=draw(st.sampled_from([1.0, 0.0, 0.5])),
    )

    base = torch.full(base_shape, math.nan, dtype=dtype)
    stored = view(base)[0] if layout == "expanded" else view(base)
    logits = draw_logits(draw, generator, (*stored.shape[:-1], vocab_size), temperature)
    n_candidates = draw(st.sampled_from([0, 0, 1, 3, 7]))
    if n_candidates and logits.numel():
        logits = torch.maximum(logits, logits.amax(-1, keepdim=True) - 75 * temperature)
    if draw(st.integers(0, 9)) == 0:
        logits = logits.round()  # many equal columns
    targets = random_ids(vocab_size, rows)
    # rows are never masked altogether; one time in six the target may be
    kept = targets if draw(st.integers(0, 5)) else random_ids(vocab_size, rows)
    masked = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.3, 0.97]))
    kept = kept[0] if layout == "expanded" else kept
    stored[..., :vocab_size] = logits.masked_fill(masked.scatter(-1, kept.unsqueeze(-1), False), -math.inf)
    ignored = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    if layout not in ("expanded", "one row"):
        stored[ignored] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1.0]))

    candidates = None
    if n_candidates:
        most_likely = logits.argmax(-1).expand(rows)
        choices = torch.stack([random_ids(vocab_size, rows), most_likely, targets, torch.full(rows, -1)], -1)
        ids = choices.gather(-1, random_ids(4, (*rows, n_candidates))).to(torch.int32)
        weights = (torch.rand(ids.shape, generator=generator, dtype=real) * 2).masked_fill(
            random_ids(5, ids.shape) == 0, 0
        )
        groups = (1, n_candidates - 1) if draw(st.booleans()) else (n_candidates,)
        candidates = Candidates(ids, weights, groups)
    if flags & RowFlags.TARGET_WEIGHTS:
        if candidates is None:
            flags -= RowFlags.TARGET_WEIGHTS
        else:
            ids[..., 0] = -1
            candidates = candidates._replace(groups=(1, n_candidates - 1))
    row_weights = torch.rand(rows, generator=generator, dtype=real) * 3 - 1 if draw(st.booleans()) else None
    ignore_index = draw(st.sampled_from([IGNORED, -1, vocab_size - 1]))
    if ignore_index >= 0:
        ignored |= targets == ignore_index
    targets = targets.masked_fill(ignored, ignore_index)
    return RowProblem(base, view, targets, options, flags, row_weights, candidates, vocab_size, ignore_index)
