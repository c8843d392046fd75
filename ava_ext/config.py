"""Every option of UnifiedLoss: name, default and one line of documentation, in one place."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from typing import Any


def _option(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class UnifiedLossConfig:
    """The options of `UnifiedLoss`, checked when it is made.

    Raises:
        ValueError: an option out of its range, or two that contradict each other; the message names them.

    Example:
        >>> config = UnifiedLossConfig(vocab_size=32000, primary_loss_type="standard", label_smoothing=0.1)
        >>> UnifiedLossConfig.from_json(config.to_json()) == config
        True
    """

    vocab_size: int = _option(dataclasses.MISSING, "real columns of the logits; columns beyond it are padding")
    hidden_size: int | None = _option(None, "width of hidden_states, for the heads of multi-token prediction")
    primary_loss_type: str = _option("deepseek", '"standard", "deepseek" (adaptive temperature) or "adaptive_mtp"')

    # which rows count, and what the sum is divided by
    ignore_index: int = _option(-100, "target of a row that does not count")
    pad_token_id: int | None = _option(None, "rows with this target do not count, unless it is an EOS id")
    eos_token_id: int | tuple[int, ...] | None = _option(None, "one id or several; turns the early-EOS penalty on")
    reduction: str = _option("mean", '"mean", "sum" or "none"')
    labels_are_shifted: bool = _option(True, "False: targets[:, t] is the token read at t, as Hugging Face gives them")
    inplace_gradient: bool = _option(False, "backward writes the gradient over the logits")
    process_group: Any = _option(None, "torch.distributed group over which step() averages its statistics")
    linear_chunk_bytes: int | None = _option(
        None, "bytes of a chunk of logits from hidden_states; None: 64 MB, on CUDA 1 GB"
    )

    # the logits row
    initial_temperature: float = _option(1.0, "T0: the logits are divided by the temperature")
    adaptive_temperature: bool | None = _option(None, 'let step() set the temperature; None: on for "deepseek"')
    temperature_bounds: tuple[float, float] = _option((0.5, 2.0), "least and greatest adaptive temperature")
    temperature_gain: float = _option(1.0, "how strongly volatility moves the temperature")
    auto_step: bool = _option(True, "every training forward with grad enabled is followed by step()")
    label_smoothing: float = _option(0.0, "probability mass spread over the vocabulary")
    smoothing_mode: str = _option("uniform", '"uniform" (PyTorch\'s e/V) or "exclude_target" (e/(V-1) on the others)')
    logit_softcap: float | None = _option(None, "c: logits become c tanh(logits / c)")
    z_loss_weight: float = _option(0.0, "weight of lse^2")
    confidence_penalty_weight: float = _option(0.0, "weight of 1 - entropy / log V")
    use_focal_loss: bool = _option(False, "modulate the cross-entropy by (1 - p_target)^gamma")
    focal_alpha: float = _option(1.0, "factor of the focal term")
    focal_gamma: float = _option(2.0, "exponent of the focal term, >= 0")

    # multi-token prediction
    use_mtp: bool = _option(False, "predict the tokens after the next one as well")
    num_future_tokens: int = _option(3, "depths of multi-token prediction")
    mtp_weight: float = _option(0.1, "weight of the multi-token term")
    mtp_type: str = _option("deepseek", '"deepseek" (heads of its own) or "adaptive" (additional_logits, confidence)')
    mtp_share_head: bool = _option(False, "depths use the given lm_head_weight behind a residual block")
    mtp_detach_head: bool = _option(False, "the shared head gets no gradient from the depths")
    use_confidence_weighting: bool = _option(True, "adaptive: weight each row by the given confidence")
    confidence_reg_strength: float = _option(0.01, "adaptive: weight of the term that calibrates the confidence")

    # repetition
    use_ngram_penalty: bool = _option(False, "push down tokens that would repeat an n-gram")
    ngram_size: int = _option(4, "n; 1 is token-level unlikelihood")
    ngram_penalty_weight: float = _option(0.1, "weight of each n-gram candidate")
    ngram_window_size: int | None = _option(None, "only followers among the last W context tokens")
    ngram_slots: int = _option(8, "candidates per row, most recent first")
    use_immediate_repetition_penalty: bool = _option(False, "push down the previous token")
    immediate_repetition_weight: float = _option(0.5, "weight of the previous token")
    immediate_repetition_threshold: int = _option(1, "only once the run has this length")
    immediate_repetition_growth: float = _option(1.0, "factor per further token of the run, at most 4 in all")
    repetition_allow_list: tuple[int, ...] = _option((), "ids that may repeat")
    min_sequence_length: int = _option(20, "EOS is early while fewer counted targets of the segment precede it")
    eos_penalty_weight: float = _option(0.05, "weight of an early EOS")

    # mixture of experts
    num_experts: int | None = _option(None, "experts of each layer")
    num_experts_per_token: int = _option(1, "k of the router's top-k")
    num_moe_layers: int = _option(1, "layers with a router")
    use_moe_balancing: bool = _option(False, "steer the router against its running load; keep expert_bias")
    gradient_balance_weight: float = _option(0.1, "weight of the steering term")
    moe_momentum: float = _option(0.9, "momentum of the running load")
    expert_bias_rate: float = _option(1e-3, "step of the loss-free bias, once per optimizer step")
    use_diversity_loss: bool = _option(False, "mean pairwise cosine similarity of expert_outputs")
    diversity_weight: float = _option(0.01, "weight of the diversity term")
    use_auxiliary_loss: bool = _option(False, "load balancing and router z-loss on gate_logits")
    load_balancing_weight: float = _option(1e-4, "weight of the load balancing term")
    router_z_weight: float = _option(1e-3, "weight of the router's mean lse^2")
    load_balancing_convention: str = _option(
        "switch", '"switch" or "huggingface" (k times larger, layers concatenated)'
    )
    router_score: str = _option("softmax", '"softmax" or "sigmoid" (normalised)')

    use_contrastive_loss: bool = _option(False, "InfoNCE of contrastive_pair, or SimCTG of hidden_states")
    contrastive_weight: float = _option(0.1, "weight of the contrastive term")
    contrastive_temperature: float = _option(0.07, "temperature of InfoNCE")

    def __post_init__(self) -> None:
        for name in ("eos_token_id", "temperature_bounds", "repetition_allow_list"):
            value = getattr(self, name)  # JSON knows lists only
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        self._check_choices()
        self._check_contradictions()

    # name -> smallest allowed value
    _INTEGERS = {
        "vocab_size": 1, "hidden_size": 1, "linear_chunk_bytes": 1, "num_future_tokens": 1, "ngram_size": 1,
        "ngram_window_size": 1, "ngram_slots": 1, "immediate_repetition_threshold": 1, "min_sequence_length": 0,
        "num_experts": 1, "num_experts_per_token": 1, "num_moe_layers": 1,
    }  # fmt: skip
    # name -> interval as text, and test
    _NUMBERS = {
        "initial_temperature": ("> 0", lambda v: v > 0),
        "logit_softcap": ("> 0", lambda v: v > 0),
        "label_smoothing": ("in [0, 1]", lambda v: 0 <= v <= 1),
        "moe_momentum": ("in [0, 1)", lambda v: 0 <= v < 1),
        "contrastive_temperature": ("> 0", lambda v: v > 0),
        "immediate_repetition_growth": (">= 1", lambda v: v >= 1),
    } | {
        name: (">= 0", lambda v: v >= 0)
        for name in (
            "temperature_gain", "z_loss_weight", "confidence_penalty_weight", "focal_alpha", "focal_gamma",
            "mtp_weight", "confidence_reg_strength", "ngram_penalty_weight", "immediate_repetition_weight",
            "eos_penalty_weight", "gradient_balance_weight", "expert_bias_rate", "diversity_weight",
            "load_balancing_weight", "router_z_weight", "contrastive_weight",
        )
    }  # fmt: skip
    _CHOICES = {
        "primary_loss_type": ("standard", "deepseek", "adaptive_mtp"),
        "reduction": ("mean", "sum", "none"),
        "smoothing_mode": ("uniform", "exclude_target"),
        "mtp_type": ("deepseek", "adaptive"),
        "load_balancing_convention": ("switch", "huggingface"),
        "router_score": ("softmax", "sigmoid"),
    }

    def _check_numbers(self) -> None:
        for name, least in self._INTEGERS.items():
            value = getattr(self, name)
            optional = self._defaults().get(name, 0) is None
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise _bad(name, f"an integer >= {least}" + (" or None" if optional else ""), value)
        for name, (interval, holds) in self._NUMBERS.items():
            value = getattr(self, name)
            if value is None and self._defaults()[name] is None:
                continue
            if not _is_number(value) or not holds(value):
                raise _bad(name, f"a number {interval}", value)
        if not isinstance(self.repetition_allow_list, tuple):
            raise _bad("repetition_allow_list", "a sequence of token ids", self.repetition_allow_list)
        for name in ("eos_token_id", "pad_token_id", "ignore_index", "repetition_allow_list"):
            value = getattr(self, name)
            is_none = value is None and self._defaults()[name] is None
            ids = value if isinstance(value, tuple) else () if is_none else (value,)
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, int):
                    raise _bad(name, "token ids (integers)", value)
                if name == "eos_token_id" and not 0 <= token < self.vocab_size:
                    raise _bad(name, f"token ids in [0, vocab_size = {self.vocab_size})", value)
        low_high = self.temperature_bounds
        is_pair = isinstance(low_high, tuple) and len(low_high) == 2 and all(map(_is_number, low_high))
        if not is_pair or not 0 < low_high[0] <= low_high[1]:
            raise _bad("temperature_bounds", "two numbers, 0 < low <= high", low_high)

    def _check_choices(self) -> None:
        for name, allowed in self._CHOICES.items():
            if getattr(self, name) not in allowed:
                raise _bad(name, "one of " + ", ".join(map(repr, allowed)), getattr(self, name))
        for option in dataclasses.fields(self):
            is_flag = isinstance(option.default, bool) or option.name == "adaptive_temperature"
            value = getattr(self, option.name)
            if is_flag and not isinstance(value, bool) and not (value is None and option.default is None):
                raise _bad(option.name, "True or False", value)

    def _check_contradictions(self) -> None:
        owns_heads = self.use_mtp and self.mtp_type == "deepseek"
        if owns_heads and self.hidden_size is None:
            raise ValueError("unified_loss: use_mtp=True with mtp_type='deepseek' needs hidden_size, got None")
        if self.num_experts is None and self.use_moe_balancing:
            raise ValueError("unified_loss: use_moe_balancing=True needs num_experts, got None")
        if self.num_experts is not None and self.num_experts_per_token > self.num_experts:
            raise _bad("num_experts_per_token", f"at most num_experts = {self.num_experts}", self.num_experts_per_token)
        if self.mtp_detach_head and not self.mtp_share_head:
            raise ValueError("unified_loss: mtp_detach_head=True needs mtp_share_head=True, got False")
        if self.temperature_adapts and not (
            self.temperature_bounds[0] <= self.initial_temperature <= self.temperature_bounds[1]
        ):
            raise _bad(
                "initial_temperature", f"within temperature_bounds {self.temperature_bounds}", self.initial_temperature
            )
        if self.reduction == "none":
            for name in ("use_moe_balancing", "use_diversity_loss", "use_auxiliary_loss", "use_contrastive_loss"):
                if getattr(self, name):
                    raise ValueError(
                        f"unified_loss: {name}=True is a batch-level term and needs reduction 'mean' or 'sum', "
                        f"got 'none'"
                    )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """eos_token_id as a tuple: empty, one or several ids."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def temperature_adapts(self) -> bool:
        """adaptive_temperature, with its default resolved."""
        if self.adaptive_temperature is None:
            return self.primary_loss_type == "deepseek"
        return self.adaptive_temperature

    def changed_options(self) -> str:
        """The options that differ from their defaults, as name=value."""
        defaults = self._defaults()
        return ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items() if value != defaults[name])

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {option.name: option.default for option in dataclasses.fields(cls)}

    @classmethod
    def check_names(cls, options: dict[str, Any], owner: str = "unified_loss") -> None:
        """Raises TypeError for a name that is no option, with the nearest one that is."""
        known = [option.name for option in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise TypeError(f"{owner}: unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> UnifiedLossConfig:
        """The configuration with these options; unknown names raise TypeError."""
        cls.check_names(options)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value. process_group cannot be stored and is left out."""
        return {o.name: getattr(self, o.name) for o in dataclasses.fields(self) if o.name != "process_group"}

    @classmethod
    def from_json(cls, text: str) -> UnifiedLossConfig:
        """The inverse of to_json."""
        return cls.from_dict(json.loads(text))

    def to_json(self) -> str:
        """to_dict as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _bad(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"unified_loss: expected {name} to be {expected}, got {got!r}")
