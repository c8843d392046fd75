"""A causal language model of transformers whose forward computes UnifiedLoss.

The model's own forward runs as it is, whatever it does between its inputs and its loss function; only the head may be
held back, and the loss function. The class of the instance changes, not the class itself: copies, pickles, and whatever
wraps forward (DistributedDataParallel, torch.compile, accelerate) then work as with any model.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ava_ext.integrations.deferred_logits import DeferredLogits
from ava_ext.integrations.heads import logits_of_lora, n_columns_of, weight_and_bias
from ava_ext.integrations.loss_functions import check_ignore_index, check_same_logits, loss_of_logits
from ava_ext.model_config import check_router_logits, text_config
from ava_ext.ops.arguments import has_shape
from ava_ext.ops.dtensors import is_dtensor
from ava_ext.ops.row_fields import accumulation_dtype
from ava_ext.reduction import items_of
from ava_ext.unified_loss import UnifiedLoss

# arguments of forward that are the loss's alone; the model's own forward does not see them
_OF_LOSS = ("num_items_in_batch", "shift_labels", "skip_logits", "loss_inputs")

# of a model or its configuration: what it multiplies its own load balancing by
_AUX_LOSS_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")

# arguments of the loss that decide which rows count
DECIDE_ROWS = ("targets", "labels_are_shifted", "attention_mask", "position_ids", "segment_ids", "cu_seqlens")


class _Record:
    """What a forward with labels hears from the head and from the model, while it runs."""

    def __init__(self, model: LossInForward, head: RecordsInput) -> None:
        self.model = model
        self.head = head
        self.hidden_states: Tensor | None = None  # [..., hidden_size]: the head's input
        # what the model gave to its loss function, and the zero that it got
        self.logits: Any = None  # [batch_size, n_tokens, n_columns]
        self.labels: Any = None  # [batch_size, n_tokens]
        self.shift_labels: Any = None  # [batch_size, n_tokens]; None: the labels are not shifted
        self.zero: Tensor | None = None  # []; None: the model has not called its loss function


class _Thread(threading.local):
    """What belongs to a thread: several may use one model."""

    record: _Record | None = None  # of the forward that is running


_thread = _Thread()


class RecordsInput(nn.Module):
    """A head, first in the bases of a class made for it, that keeps what it was given, or gives no logits yet."""

    class_before_loss: ClassVar[type[nn.Module]]
    owner: str = ""
    n_columns: int | None = None  # its out_features when the loss was put into the model

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:  # [..., hidden_size]
        record = _thread.record
        if record is None or record.head is not self:
            return super().forward(hidden_states, *arguments, **options)
        record.hidden_states = hidden_states
        if not record.model.is_fused:
            return super().forward(hidden_states, *arguments, **options)
        if arguments or options:  # such as the adapter of each text, of peft
            raise TypeError(
                f"fuse_lm_head: expected {self.owner} to call its head with hidden states alone, got "
                f"{[*map(type, arguments), *options]} too: use attach_loss"
            )
        return DeferredLogits(hidden_states, self.owner, n_columns_of(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made_of, (RecordsInput, self.class_before_loss), self.__dict__


class LossInForward(nn.Module):
    """A causal language model, first in the bases of a class made for it, whose forward computes `unified_loss`.

    Attributes:
        unified_loss: the loss.
        report_parts: whether to keep what the loss is made of, in loss_parts.
        loss_parts: of the last call with labels, the dict of return_detailed without graph, and model_aux_loss where
            the model added something; None where report_parts is False.
        has_computed_loss: set by each call with labels; whoever asks has to clear it.
    """

    class_before_loss: ClassVar[type[nn.Module]]
    is_fused: ClassVar[bool]
    accepts_loss_kwargs = True  # for Trainer: num_items_in_batch is what the loss is divided by
    unified_loss: UnifiedLoss
    trained_when_put: dict[str, bool]  # names of the loss's parameters, and whether they required grad
    loss_parts: dict[str, Tensor] | None = None
    report_parts: bool = False
    config: Any  # of the model
    has_computed_loss: bool = False
    expert_bias_binding: Any = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.__class__ = self.class_before_loss  # type: ignore[assignment]  # made anew, by from_pretrained: without a loss
        self.register_load_state_dict_pre_hook(_leave_loss_out)  # for type(model)(config).load_state_dict(...)

    @property
    def loss_function(self) -> Any:
        """While forward runs, takes what the loss is computed of; otherwise the loss of logits."""
        model = _original_of(self)
        if _thread.record is not None and _thread.record.model is model:
            return functools.partial(model._record, _thread.record)
        return functools.partial(loss_of_logits, model.unified_loss)

    def _record(
        self, record: _Record, logits: Any = None, labels: Any = None, *arguments: Any, **options: Any
    ) -> Tensor:
        """Stands for the model's loss function; gives a zero, to which the model may add."""
        if record.zero is not None:
            raise TypeError(
                f"{self._owner}: expected {type(self).__name__} to call self.loss_function once, got a second call: "
                "compute the loss from its outputs"
            )
        check_ignore_index(self._owner, self.unified_loss.config, options.get("ignore_index"))
        record.logits, record.labels, record.shift_labels = logits, labels, options.get("shift_labels")
        record.zero = torch.zeros((), dtype=accumulation_dtype(logits.dtype), device=logits.device)
        return record.zero

    def _with_loss(self, runs: Any, names: tuple[str, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The model's own forward, whose positional arguments have these names, with the loss in its output.

        Args:
            runs: the model itself, or a copy of it that runs in its place.
        """
        forward = functools.partial(self.class_before_loss.forward, runs)
        options = {**dict(zip(names, arguments, strict=False)), **options}
        of_loss = {name: options.pop(name, None) for name in _OF_LOSS}
        labels, shifted = options.get("labels"), of_loss["shift_labels"]
        if labels is None and shifted is None:
            return forward(**options)
        return_dict = options.pop("return_dict", None)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        options["labels"] = shifted if labels is None else labels  # the model asks only whether there are any
        needs_router = self._needs_router
        adds_router = needs_router and self.expert_bias_binding is None and not self._router_logits_wanted(options)
        if adds_router:
            options["output_router_logits"] = True
        record, around = _Record(self, self._head()), _thread.record
        _thread.record = record
        try:
            output = forward(**options, return_dict=True)
        finally:  # a forward that raises, of too little memory, keeps none of it
            _thread.record = around
        if record.zero is None:
            raise TypeError(
                f"{self._owner}: expected {type(self).__name__} to compute its loss by self.loss_function, which it "
                "did not call: compute the loss from its outputs; Trainer takes compute_loss_func=trainer_loss(loss_fn)"
            )
        self.has_computed_loss = True
        given = self._inputs_of_loss(record, self._targets(record, shifted), options, of_loss)
        if needs_router:
            given |= self._router(output)
        # a model that is spread over devices (device_map) ends on another than it begins
        given = {name: _brought_to(record.zero.device, value) for name, value in given.items()}
        fields = {name: _without_deferred(value) for name, value in output.items() if name not in ("loss", "logits")}
        added = None if adds_router else output["loss"]
        if adds_router:  # asked for by the loss alone, which weighs it itself
            fields.pop("aux_loss", None)
            fields.pop("router_logits", None)
        if added is record.zero and "aux_loss" not in fields:  # else it was added in place
            added = None
        fields["loss"] = self._loss(given, added)
        if not self.is_fused:
            fields["logits"] = record.logits
        elif not runs.training if of_loss["skip_logits"] is None else not of_loss["skip_logits"]:
            fields["logits"] = record.logits.compute(record.head)
        result = type(output)(**fields)
        return result if return_dict else result.to_tuple()

    def _router_logits_wanted(self, options: dict[str, Any]) -> bool:
        """Whether the model itself gives router logits, and then its own load balancing."""
        wanted = options.get("output_router_logits")
        of_text = text_config(self)
        wanted = bool(getattr(of_text, "output_router_logits", False) if wanted is None else wanted)
        weights = [getattr(holder, name, None) for holder in (self, of_text) for name in _AUX_LOSS_WEIGHTS]
        if wanted and self.unified_loss.config.use_auxiliary_loss and any(weights):
            raise ValueError(
                "unified_loss: expected the load balancing of the loss or that of the model, got both: set "
                "use_auxiliary_loss=False, or model.config.output_router_logits=False (router_aux_loss_coef=0.0 of "
                "SFTConfig)"
            )
        return wanted

    def _head(self) -> RecordsInput:
        head = self.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, RecordsInput) or n_columns_of(head) != head.n_columns:
            raise TypeError(
                f"fuse_lm_head: the head of {type(self).__name__} is now another {type(head).__name__} than when the "
                "loss was put into the model: call unfuse(model) first, then change the head (get_peft_model, "
                "resize_token_embeddings), then fuse again"
            )
        return head

    @property
    def _owner(self) -> str:
        return "fuse_lm_head" if self.is_fused else "attach_loss"

    @property
    def _needs_router(self) -> bool:
        return self.unified_loss.config.use_auxiliary_loss or self.unified_loss.config.use_moe_balancing

    @property
    def _is_masked_lm(self) -> bool:
        return "ForMaskedLM" in (getattr(self, "loss_type", None) or type(self).__name__)

    def _targets(
        self,
        record: _Record,
        shifted: Any,  # [batch_size, n_tokens], which the caller gave
    ) -> Any:  # [batch_size, n_tokens]
        """What the rows are compared with: what the caller says is shifted, or what the model makes of the labels."""
        if shifted is not None:
            return shifted
        if record.shift_labels is not None or self._is_masked_lm:
            raise TypeError(
                f"{self._owner}: expected {type(self).__name__} to predict the token after each row, but its labels "
                "are those of the rows themselves: give them as shift_labels, too"
            )
        return record.labels

    def rows_of_call(
        self,
        labels: Tensor,  # [batch_size, n_tokens]
        labels_are_shifted: bool,
        options: Any,  # a mapping
        loss_inputs: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Arguments of the loss that forward's say: the targets, what decides which of them count, and loss_inputs."""
        given: dict[str, Any] = {"targets": labels, "labels_are_shifted": labels_are_shifted}
        of_encoder = getattr(self.config, "is_encoder_decoder", False)
        if of_encoder:
            options = {}
        batch_size, n_tokens = labels.shape[0], labels.shape[-1]
        mask = options.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == batch_size and mask.shape[1] >= n_tokens:
            mask = mask[:, mask.shape[1] - n_tokens :]  # a cache or a prefix of peft is before them
            if labels_are_shifted and not (self._is_masked_lm or self._needs_router):
                # that of each row's target, the token after it; a masked language model and routers want that of tokens
                mask = torch.cat([mask[:, 1:], mask[:, -1:]], 1)
            given["attention_mask"] = mask
        # where packed texts begin: any of these, as DataCollatorWithFlattening gives them
        of_tokens = (batch_size, n_tokens), (1, n_tokens)
        positions, segments, starts = (options.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
        if isinstance(positions, Tensor) and has_shape(positions, *of_tokens):
            given["position_ids"] = positions
        elif isinstance(segments, Tensor) and has_shape(segments, *of_tokens):
            given["segment_ids"] = segments
        elif isinstance(starts, Tensor) and starts.dim() == 1:
            given["cu_seqlens"] = starts
        return given | (loss_inputs or {})

    def _inputs_of_loss(
        self,
        record: _Record,
        labels: Tensor,  # [batch_size, n_tokens]
        options: dict[str, Any],
        of_loss: dict[str, Any],
    ) -> dict[str, Any]:
        """Arguments of the loss."""
        name, config = type(self).__name__, self.unified_loss.config
        head, logits, hidden_states = record.head, record.logits, record.hidden_states
        given: dict[str, Any] = {"num_items_in_batch": of_loss["num_items_in_batch"]}
        if self.is_fused:
            if not isinstance(logits, DeferredLogits):
                raise TypeError(
                    f"fuse_lm_head: expected {name} to give what its head makes to self.loss_function, got a "
                    f"{type(logits).__name__} from elsewhere: use attach_loss"
                )
            check_same_logits(name, config, logits.softcap, logits.scale)
            logits = logits_of_lora(head, logits.hidden_states)
        given |= {"logits": logits, "hidden_states": hidden_states}
        if logits is None or config.mtp_share_head or config.mtp_heads == "hidden_states":
            weight, bias = weight_and_bias(head)
            if hidden_states is not None and is_dtensor(weight):  # FSDP2 casts it in the head's own forward alone
                weight = weight.to(hidden_states.dtype)
                bias = None if bias is None else bias.to(hidden_states.dtype)
            given |= {"lm_head_weight": weight, "lm_head_bias": bias}
        return given | self.rows_of_call(labels, of_loss["shift_labels"] is not None, options, of_loss["loss_inputs"])

    def _router(self, output: Any) -> dict[str, Any]:
        binding = self.expert_bias_binding
        given = self._router_logits(output) if binding is None else binding.take()
        config = self.unified_loss.config
        trains_router = torch.is_grad_enabled() and (config.use_auxiliary_loss or config.gradient_balance_weight)
        has_gradient = all(logits is None or logits.requires_grad for logits in given["gate_logits"])
        if trains_router and not has_gradient and any(map(_is_checkpointed_reentrantly, self.modules())):
            raise ValueError(
                "unified_loss: expected router logits with a gradient, got some without one from layers under gradient "
                "checkpointing with use_reentrant=True, which first runs them without grad: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return given

    def _router_logits(self, output: Any) -> dict[str, Any]:
        router_logits = output.get("router_logits")
        if router_logits is None:
            raise ValueError(
                f"unified_loss: use_auxiliary_loss and use_moe_balancing need router logits, and {type(self).__name__} "
                "gives none: turn them off, or bind_expert_bias where its routers have a correction bias"
            )
        check_router_logits(text_config(self))
        return {"gate_logits": router_logits}

    def _loss(
        self,
        given: dict[str, Any],
        added: Tensor | None,  # []
    ) -> Tensor:  # []
        """The loss, and what the model itself added to its own; None: nothing."""
        n_items = given["num_items_in_batch"]
        loss_fn = self.unified_loss
        parts = loss_fn(**given, return_detailed=True) if self.report_parts else None
        loss = loss_fn(**given) if parts is None else parts["total_loss"]
        if added is not None:
            if n_items is not None:  # a mean of this call: its share of the whole batch
                # not token_weights: terms of a whole batch are shared by rows, and those may be advantages
                n_tokens = loss_fn.count_items(**{name: given[name] for name in DECIDE_ROWS if name in given})
                added = added * (n_tokens.to(loss.dtype) / items_of(n_items, loss.device, loss.dtype))
            loss = loss + added.to(loss.dtype)
        if parts is not None:
            if added is not None:
                parts["model_aux_loss"] = added
            parts["total_loss"] = loss
            self.loss_parts = {name: part.detach() for name, part in parts.items()}
        return loss

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made_of, (LossInForward, self.class_before_loss, self.is_fused), self.__dict__


def _original_of(model: Any) -> Any:
    """What accelerate's regional compilation has made a shallow copy of, to run in its place; or the model itself.

    The copy has the head and the loss in another form, and whoever reads loss_parts looks at the original.
    """
    return vars(model).get("_orig_mod", model)


def _is_checkpointed_reentrantly(module: Any) -> bool:
    """Whether transformers runs this module, or layers of it, by torch.utils.checkpoint with use_reentrant=True."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(options.get("use_reentrant", True))


def _brought_to(device: torch.device, value: Any) -> Any:
    """A tensor, or each of a list or tuple of them."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    return type(value)(_brought_to(device, part) for part in value) if type(value) in (tuple, list) else value


def _leave_loss_out(model: Any, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """Drops what a model without a loss has no place for."""
    if not isinstance(model, LossInForward):
        for name in [name for name in state_dict if name.startswith(f"{prefix}unified_loss.")]:
            del state_dict[name]


def _without_deferred(value: Any) -> Any:
    """A field of an output; the output of a model within (InstructBLIP) without logits that are not there."""
    if not isinstance(value, dict) or not isinstance(value.get("logits"), DeferredLogits):
        return value
    return type(value)(**{name: part for name, part in value.items() if name != "logits"})


def _make_class(mixin: Any, cls: Any, is_fused: bool) -> Any:
    """A class of the same name as cls, with mixin before it."""
    contents: dict[str, Any] = {
        "class_before_loss": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    if mixin is LossInForward:
        contents |= {"is_fused": is_fused, "forward": _forward_of(cls)}
        if hasattr(cls, "generate"):
            contents["generate"] = _generate_of(cls)
    return type(cls.__name__, (mixin, cls), contents)


# one for each, so that copies are of the same class
class_with: Callable[[Any, Any, bool], Any] = functools.cache(_make_class)


def _forward_of(cls: Any) -> Callable[..., Any]:
    """A forward with the signature of cls.forward, which others look at, that computes the loss."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(cls.forward)
    parameters = list(signature.parameters.values())[1:]
    names = tuple(parameter.name for parameter in parameters if parameter.kind in kinds)

    @functools.wraps(cls.forward)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(self, LossInForward):  # after unfuse, where accelerate kept the forward of the instance
            return cls.forward(self, *arguments, **options)
        return _original_of(self)._with_loss(self, names, arguments, options)

    # accelerate.unwrap_model unwraps a forward as far as it can, and would find the model's own, without the loss
    del forward.__wrapped__
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _generate_of(cls: Any) -> Callable[..., Any]:
    """cls.generate, without what is the loss's alone: Seq2SeqTrainer hands over whole batches, and it refuses that."""

    @functools.wraps(cls.generate)
    def generate(self: Any, *arguments: Any, **options: Any) -> Any:
        return cls.generate(self, *arguments, **{name: options[name] for name in options if name not in _OF_LOSS})

    return generate


def _made_of(mixin: Any, cls: Any, is_fused: bool = False) -> Any:
    """An empty instance, for copy and pickle."""
    made = class_with(mixin, cls, is_fused)
    return made.__new__(made)
