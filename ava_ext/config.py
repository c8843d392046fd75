"""Every option of UnifiedLoss: name, default, range and one line of documentation, in one place."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from ava_ext.ops.arguments import GREATEST, POSITIVE, is_positive
from ava_ext.process_group import picklable


class _Range(NamedTuple):
    """The values that an option may have."""

    expected: str  # for the message: "expected <option> to be <expected>, got ..."
    holds: Callable[[Any], bool]


def _is_integer(value: object) -> bool:
    """Whether it is one, of numpy too, that the operators take."""
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= value < 2**63  # type: ignore[operator]


def _is_number(value: object) -> bool:
    """Whether it is one, and finite in the kernels' float32."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= GREATEST  # type: ignore[operator]


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))


def _is_group(value: object) -> bool:
    distributed = torch.distributed
    if isinstance(value, str) or not distributed.is_available():
        return value == "world"
    # new_group() gives the latter to a rank that is not in the group
    return isinstance(value, distributed.ProcessGroup) or value == distributed.GroupMember.NON_GROUP_MEMBER


def _at_least(least: int) -> _Range:
    return _Range(f"an integer >= {least}", lambda v: _is_integer(v) and v >= least)


def _one_of(*allowed: str) -> _Range:
    return _Range("one of " + ", ".join(map(repr, allowed)), lambda v: v in allowed)


_FLAG = _Range("True or False", lambda v: isinstance(v, bool))
_POSITIVE = _Range(POSITIVE, lambda v: _is_number(v) and is_positive(v))
_NOT_NEGATIVE = _Range("a number >= 0 in the range of float32", lambda v: _is_number(v) and v >= 0)
_NOT_BELOW_ONE = _Range("a number >= 1 in the range of float32", lambda v: _is_number(v) and v >= 1)
_SHARE = _Range("a number in [0, 1]", lambda v: _is_number(v) and 0 <= v <= 1)
_BELOW_ONE = _Range("a number in [0, 1)", lambda v: _is_number(v) and 0 <= v < 1)
_TOKEN = _Range("a token id (an integer)", _is_integer)
_TOKENS = _Range("a sequence of token ids (integers)", lambda v: isinstance(v, tuple) and all(map(_is_integer, v)))
_TOKEN_OR_TOKENS = _Range("token ids (integers)", lambda v: _TOKEN.holds(v) or _TOKENS.holds(v))
_BOUNDS = _Range(
    "two numbers, 0 < low <= high, in the range of float32",
    lambda v: _is_pair(v) and all(map(is_positive, v)) and v[0] <= v[1],
)
_NUMBERS = _Range(
    "numbers in the range of float32, one for each class", lambda v: isinstance(v, tuple) and all(map(_is_number, v))
)
_RANKS = _Range(
    "different integers >= 1", lambda v: _TOKENS.holds(v) and all(k >= 1 for k in v) and len(set(v)) == len(v)
)
_GROUP = _Range('a process group, or "world"', _is_group)

# names that torch, Liger and others have for an option, where the nearest name here is that of another option
_ELSEWHERE = {
    "weight": "class_weights", "temperature": "initial_temperature", "smoothing": "label_smoothing",
    "lse_square_scale": "z_loss_weight", "shift_labels": "labels_are_shifted",
}  # fmt: skip


def _option(default: Any, values: _Range, doc: str) -> Any:
    """An option. If its default is None, None is allowed as well as the range."""
    return dataclasses.field(default=default, metadata={"values": values, "doc": doc})


@dataclasses.dataclass(frozen=True)
class UnifiedLossConfig:
    """The options of `UnifiedLoss`, checked on construction.

    Raises:
        ValueError: an option is out of its range, or two contradict each other; the message names them.

    Example:
        >>> config = UnifiedLossConfig(vocab_size=32000, primary_loss_type="standard", label_smoothing=0.1)
        >>> UnifiedLossConfig.from_json(config.to_json()) == config
        True
    """

    vocab_size: int = _option(
        dataclasses.MISSING, _at_least(1), "size of the vocabulary; columns of the logits beyond it are padding"
    )
    hidden_size: int | None = _option(
        None, _at_least(1), "width of hidden_states; needed if the loss owns heads of multi-token prediction"
    )
    primary_loss_type: str = _option(
        "deepseek",
        _one_of("standard", "deepseek", "adaptive_mtp"),
        '"standard" (cross-entropy), "deepseek" (with adaptive temperature) or "adaptive_mtp" (heads of the model)',
    )

    # which rows count, and what the sum is divided by
    ignore_index: int = _option(-100, _TOKEN, "target of a row that does not count")
    pad_token_id: int | None = _option(None, _TOKEN, "rows with this target do not count, unless it is also an EOS id")
    eos_token_id: int | tuple[int, ...] | None = _option(
        None, _TOKEN_OR_TOKENS, "one id or several; turns on the penalty on an early EOS"
    )
    reduction: str = _option("mean", _one_of("mean", "sum", "none"), '"mean", "sum" or "none"')
    labels_are_shifted: bool = _option(
        True, _FLAG, "False: targets[:, t] is the token read at t, as in Hugging Face, and the loss shifts them"
    )
    inplace_gradient: bool = _option(False, _FLAG, "backward writes the gradient over the logits, except a DTensor's")
    process_group: Any = _option(
        None, _GROUP, 'the group over which step() sums what the loss has learned; "world": the default group'
    )
    accuracy_top_k: tuple[int, ...] = _option(
        (), _RANKS, "for each k, return_detailed adds how often fewer than k tokens are likelier than the target"
    )
    linear_chunk_bytes: int | None = _option(
        None, _at_least(1), "bytes of a chunk of logits computed from hidden_states; None: 64 MB, on CUDA 1 GB"
    )

    # the logits row
    initial_temperature: float = _option(1.0, _POSITIVE, "T0: the logits are divided by the temperature")
    adaptive_temperature: bool | None = _option(None, _FLAG, 'let step() set the temperature; None: on for "deepseek"')
    temperature_bounds: tuple[float, float] = _option((0.5, 2.0), _BOUNDS, "lowest and highest adaptive temperature")
    temperature_gain: float = _option(
        1.0, _NOT_NEGATIVE, "how strongly the spread of recent losses moves the temperature"
    )
    auto_step: bool = _option(True, _FLAG, "call step() after every training forward with grad enabled")
    label_smoothing: float = _option(0.0, _SHARE, "probability mass spread over the vocabulary")
    smoothing_mode: str = _option(
        "uniform",
        _one_of("uniform", "exclude_target"),
        '"uniform" (PyTorch\'s e/V) or "exclude_target" (e/(V-1) on the others)',
    )
    logit_scale: float = _option(1.0, _POSITIVE, "factor of the logits, before the soft cap (Cohere, Granite)")
    logit_softcap: float | None = _option(None, _POSITIVE, "c: logits become c tanh(logits / c)")
    z_loss_weight: float = _option(0.0, _NOT_NEGATIVE, "weight of lse^2, lse = log sum exp(logits)")
    confidence_penalty_weight: float = _option(0.0, _NOT_NEGATIVE, "weight of 1 - entropy / log V")
    use_focal_loss: bool = _option(False, _FLAG, "modulate the cross-entropy by (1 - p_target)^gamma")
    focal_alpha: float = _option(1.0, _NOT_NEGATIVE, "factor of the focal term")
    focal_gamma: float = _option(2.0, _NOT_NEGATIVE, "exponent of the focal term")

    class_weights: tuple[float, ...] | None = _option(
        None,
        _NUMBERS,
        "weight of each class, in label smoothing too; N is then the sum of the targets' weights, which also divides "
        "the other terms: scale the weights to a mean of 1 over your data",
    )
    token_reweighting: str | None = _option(
        None,
        _one_of("dft", "eaft"),
        "multiply the target's term by p_target (dft) or by entropy / log V (eaft), detached",
    )
    reweighting_exponent: float = _option(1.0, _NOT_NEGATIVE, "exponent of the factor of token_reweighting")

    # soft targets
    distillation_weight: float = _option(1.0, _NOT_NEGATIVE, "weight of the term of soft_target_ids")
    distillation_temperature: float = _option(
        1.0, _POSITIVE, "Td: soft targets are compared with softmax(z / Td), and their term is multiplied by Td^2"
    )
    distillation_tail: bool = _option(
        False, _FLAG, "also compare the rest that soft targets leave, 1 - sum q, with 1 - sum p"
    )

    # multi-token prediction
    use_mtp: bool = _option(False, _FLAG, "also predict the tokens after the next one")
    num_future_tokens: int = _option(3, _at_least(1), "how many further tokens are predicted")
    mtp_weight: float = _option(0.1, _NOT_NEGATIVE, "weight of the multi-token term")
    mtp_type: str = _option(
        "deepseek",
        _one_of("deepseek", "adaptive", "hidden_states"),
        '"deepseek" (heads of the loss), "adaptive" (additional_logits with a confidence) or "hidden_states" (depth '
        "modules of the model)",
    )
    mtp_share_head: bool = _option(False, _FLAG, "each depth is a residual block in front of the given lm_head_weight")
    mtp_detach_head: bool = _option(False, _FLAG, "the head gets no gradient from the depths that share it")
    mtp_own_denominator: bool = _option(
        False,
        _FLAG,
        "divide each depth by the number of its own rows in this call; the losses of micro-batches then do not add up "
        "to the loss of the batch",
    )
    use_confidence_weighting: bool = _option(True, _FLAG, "adaptive heads: weight each row by the given confidence")
    confidence_reg_strength: float = _option(
        0.01, _NOT_NEGATIVE, "adaptive heads: weight of the term that calibrates the confidence"
    )

    # repetition
    use_ngram_penalty: bool = _option(False, _FLAG, "push down tokens that would repeat an n-gram")
    ngram_size: int = _option(4, _at_least(1), "n; 1 is token-level unlikelihood")
    ngram_penalty_weight: float = _option(0.1, _NOT_NEGATIVE, "weight of each n-gram candidate")
    ngram_window_size: int | None = _option(
        None, _at_least(1), "only candidates among the last W tokens of the context"
    )
    ngram_slots: int = _option(8, _at_least(1), "how many n-gram candidates a row may have; the most recent are kept")
    use_immediate_repetition_penalty: bool = _option(False, _FLAG, "push down the previous token")
    immediate_repetition_weight: float = _option(0.5, _NOT_NEGATIVE, "weight of the penalty on the previous token")
    immediate_repetition_threshold: int = _option(1, _at_least(1), "penalise only runs of at least this length")
    immediate_repetition_growth: float = _option(
        1.0, _NOT_BELOW_ONE, "factor by which each further token of the run raises that weight, to at most 4 times"
    )
    repetition_allow_list: tuple[int, ...] = _option((), _TOKENS, "ids that may repeat")
    negatives_need_target: bool = _option(
        True,
        _FLAG,
        "False: negative_ids count even in a row whose target does not; they are divided by the number of rows that "
        "have any, and the losses of micro-batches do not add up to the loss of the batch",
    )
    min_sequence_length: int = _option(
        20, _at_least(0), "an EOS is early if fewer counted targets of its text precede it"
    )
    eos_penalty_weight: float = _option(0.05, _NOT_NEGATIVE, "weight of an early EOS")

    # mixture of experts
    num_experts: int | None = _option(None, _at_least(1), "experts in each layer")
    num_experts_per_token: int | None = _option(
        None, _at_least(1), "k of the router's top-k; None: the last size of expert_indices"
    )
    num_moe_layers: int = _option(1, _at_least(1), "how many layers have a router")
    use_moe_balancing: bool = _option(False, _FLAG, "steer the router against its running load, and keep expert_bias")
    gradient_balance_weight: float = _option(0.01, _NOT_NEGATIVE, "weight of the steering term")
    moe_momentum: float = _option(0.9, _BELOW_ONE, "momentum of the running load")
    expert_bias_rate: float = _option(1e-3, _NOT_NEGATIVE, "step size of the loss-free bias; it moves once per step()")
    expert_bias_update: str = _option(
        "sign",
        _one_of("sign", "quantile"),
        '"sign" (a step of expert_bias_rate) or "quantile" (the bias that would have given each expert an equal share '
        "of the rows)",
    )
    expert_bias_centered: bool = _option(False, _FLAG, "step() moves the mean of each layer's expert_bias to 0")
    use_diversity_loss: bool = _option(False, _FLAG, "mean pairwise cosine similarity of expert_outputs")
    diversity_weight: float = _option(0.01, _NOT_NEGATIVE, "weight of the diversity term")
    use_auxiliary_loss: bool = _option(False, _FLAG, "load balancing and router z-loss on gate_logits")
    load_balancing_weight: float = _option(1e-4, _NOT_NEGATIVE, "weight of the load balancing term")
    router_z_weight: float = _option(1e-3, _NOT_NEGATIVE, "weight of the router's mean lse^2")
    load_balancing_convention: str = _option(
        "switch", _one_of("switch", "huggingface"), '"switch" or "huggingface" (k times larger, layers concatenated)'
    )
    load_balancing_per_sequence: bool = _option(
        False, _FLAG, "balance each text separately, then average; gate_logits need a row for each target"
    )
    router_score: str = _option("softmax", _one_of("softmax", "sigmoid"), '"softmax" or "sigmoid" (normalised)')

    use_contrastive_loss: bool = _option(False, _FLAG, "InfoNCE of contrastive_pair, or SimCTG of hidden_states")
    contrastive_weight: float = _option(0.1, _NOT_NEGATIVE, "weight of the contrastive term")
    contrastive_temperature: float = _option(0.07, _POSITIVE, "temperature of InfoNCE")

    def __post_init__(self) -> None:
        given = {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}
        for name, value in self.checked("unified_loss", **given).items():
            object.__setattr__(self, name, value)
        self._check_contradictions()

    @classmethod
    def checked(cls, owner: str, **options: Any) -> dict[str, Any]:
        """These options in Python's own types; ValueError, in the name of owner, for one that is out of its range."""
        fields = {option.name: option for option in dataclasses.fields(cls)}
        found = {}
        for name, given in options.items():
            values, is_optional = fields[name].metadata["values"], fields[name].default is None
            expected = values.expected + (" or None" if is_optional else "")
            if getattr(given, "requires_grad", False):
                raise _bad(name, f"{expected}, read once", "a tensor that requires grad", owner)
            if getattr(given, "is_meta", False):
                raise _bad(name, expected, "a tensor on meta", owner)
            value = found[name] = plain(given)
            if not (value is None and is_optional) and not values.holds(value):
                raise _bad(name, expected, value, owner)
        return found

    def _check_contradictions(self) -> None:
        if not all(0 <= token < self.vocab_size for token in self.eos_ids):
            raise _bad("eos_token_id", f"token ids in [0, vocab_size = {self.vocab_size})", self.eos_token_id)
        if self.mtp_heads == "own" and self.hidden_size is None:
            raise ValueError("unified_loss: use_mtp=True with mtp_type='deepseek' needs hidden_size, got None")
        if self.num_experts is None and self.use_moe_balancing:
            raise ValueError("unified_loss: use_moe_balancing=True needs num_experts, got None")
        n_experts, k = self.num_experts, self.num_experts_per_token
        if n_experts is not None and k is not None and k > n_experts:
            raise _bad("num_experts_per_token", f"at most num_experts = {n_experts}", k)
        if self.expert_bias_update == "quantile" and self.router_score != "sigmoid":
            raise ValueError(
                "unified_loss: expert_bias_update='quantile' needs router_score='sigmoid', got 'softmax': the "
                "scores of many experts would lie in one bin"
            )
        if self.expert_bias_update == "quantile" and n_experts is not None and k == n_experts:
            raise _bad("num_experts_per_token", f"below num_experts = {n_experts} with quantile balancing", k)
        if self.mtp_share_head and self.mtp_heads == "hidden_states":
            raise ValueError(
                "unified_loss: mtp_type='hidden_states' shares the head anyway: expected no mtp_share_head"
            )
        if self.mtp_detach_head and not self.mtp_share_head and self.mtp_heads != "hidden_states":
            raise ValueError("unified_loss: mtp_detach_head=True needs mtp_share_head=True, got False")
        if self.load_balancing_per_sequence and self.load_balancing_convention != "switch":
            raise ValueError(
                "unified_loss: load_balancing_per_sequence=True needs load_balancing_convention='switch', got "
                f"{self.load_balancing_convention!r}"
            )
        if self.inplace_gradient and not self.negatives_need_target:
            raise ValueError(
                "unified_loss: negatives_need_target=False reads the logits a second time: "
                "expected inplace_gradient=False"
            )
        if self.class_weights is not None and len(self.class_weights) != self.vocab_size:
            raise _bad("class_weights", f"vocab_size = {self.vocab_size} numbers", len(self.class_weights))
        if self.inplace_gradient and self.distillation_temperature != 1:
            raise ValueError(
                "unified_loss: distillation_temperature other than 1 reads the logits twice: expected "
                f"inplace_gradient=False with it, got True and {self.distillation_temperature}"
            )
        low, high = self.temperature_bounds
        if self.temperature_adapts and not low <= self.initial_temperature <= high:
            raise _bad("initial_temperature", f"within temperature_bounds {(low, high)}", self.initial_temperature)
        if self.reduction == "none":
            for name in ("use_moe_balancing", "use_diversity_loss", "use_auxiliary_loss", "use_contrastive_loss"):
                if getattr(self, name):
                    raise ValueError(
                        f"unified_loss: {name}=True is a batch-level term and needs reduction 'mean' or 'sum', "
                        "got 'none'"
                    )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """eos_token_id as a tuple of any length, each id once."""
        if self.eos_token_id is None:
            return ()
        return tuple(dict.fromkeys(self.eos_token_id)) if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def padding_id(self) -> int | None:
        """pad_token_id if it identifies padding, else None: it is not given, or also an EOS id."""
        return None if self.pad_token_id in self.eos_ids else self.pad_token_id

    @property
    def temperature_adapts(self) -> bool:
        """adaptive_temperature, with the default resolved."""
        if self.adaptive_temperature is None:
            return self.primary_loss_type == "deepseek"
        return self.adaptive_temperature

    @property
    def mtp_heads(self) -> str | None:
        """Which heads predict further tokens: "adaptive" (additional_logits), "own" (of the loss), "hidden_states" (the
        main head behind modules of the model), or None.
        """
        if self.primary_loss_type == "adaptive_mtp":
            return "adaptive"
        if not self.use_mtp:
            return None
        return "own" if self.mtp_type == "deepseek" else self.mtp_type

    @property
    def needs_one_target(self) -> str | None:
        """What of these options needs one target for each row, not probabilities of the classes; None: nothing."""
        if self.label_smoothing > 0 and self.smoothing_mode == "exclude_target":
            return "smoothing_mode='exclude_target'"
        return next((n for n in ("use_focal_loss", "token_reweighting", "class_weights") if getattr(self, n)), None)

    def changed_options(self) -> str:
        """The options that differ from their defaults, as name=value."""
        options = [(option, getattr(self, option.name)) for option in dataclasses.fields(self)]
        return ", ".join(f"{option.name}={_short(value)}" for option, value in options if value != option.default)

    @classmethod
    def check_names(cls, options: Mapping[str, Any], owner: str = "unified_loss") -> None:
        """Raises TypeError for a name that is not an option, and suggests the nearest one."""
        known = [option.name for option in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, known, n=1)
                raise TypeError(f"{owner}: unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> UnifiedLossConfig:
        """The configuration with these options; unknown names raise TypeError."""
        cls.check_names(options)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value. A process group cannot be stored and is left out; "world" can."""
        stored = {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}
        if not isinstance(self.process_group, str):
            del stored["process_group"]
        return stored

    @classmethod
    def from_json(cls, text: str) -> UnifiedLossConfig:
        """The configuration that to_json stored."""
        return cls.from_dict(json.loads(text))

    def to_json(self) -> str:
        """to_dict as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> UnifiedLossConfig:
        return self  # nothing in it changes, and a process group cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process_group": picklable(self.process_group)}


def check_weights(owner: str, **weights: Any) -> None:
    """Raises ValueError for a number that is not >= 0: a weight, a margin. A tensor may be learned, and is not read."""
    for name, weight in weights.items():
        if not (isinstance(weight, torch.Tensor) or _NOT_NEGATIVE.holds(plain(weight))):
            raise _bad(name, _NOT_NEGATIVE.expected, weight, owner)


def _short(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 16:
        return f"({value[0]!r}, ..., {value[-1]!r})"
    return repr(value)


def plain(value: Any) -> Any:
    """value as Python's own bool, int, float and tuple: numpy and torch give others, and JSON knows lists only."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))  # OmegaConf's is no subclass of list
    return tuple(map(plain, value)) if is_list else value


def _bad(name: str, expected: str, got: object, owner: str = "unified_loss") -> ValueError:
    return ValueError(f"{owner}: expected {name} to be {expected}, got {_short(got)}")


if UnifiedLossConfig.__doc__:  # python -OO has none
    _lines = [f"        {option.name}: {option.metadata['doc']}\n" for option in dataclasses.fields(UnifiedLossConfig)]
    UnifiedLossConfig.__doc__ = UnifiedLossConfig.__doc__.replace(
        "    Raises:", f"    Args:\n{''.join(_lines)}\n    Raises:"
    )
