"""UnifiedLoss: the weighted sum of every component that a configuration turns on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ava_ext.call import Call, Heads
from ava_ext.config import UnifiedLossConfig
from ava_ext.losses import CANDIDATES, PARTS, ROW_TERMS, TOP_K_ACCURACY
from ava_ext.losses.component import Part
from ava_ext.losses.learned_state import LearnedState
from ava_ext.losses.temperature import AdaptiveTemperature
from ava_ext.model_config import options_of
from ava_ext.ops.dtensors import whole
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.sharded_logits import ShardedLogits
from ava_ext.process_group import resolve
from ava_ext.reduction import classes_of
from ava_ext.row_pass import CROSS_ENTROPY, RowPass, RowPassOutput


class UnifiedLoss(nn.Module):
    """The weighted sum of all loss components that the configuration turns on.

        total = main (focal-modulated where focal is on) + z + confidence + immediate + eos + ngram + negative
              + distillation + mtp + moe + diversity + auxiliary + contrastive

    A row is the logits of one position. One pass over it computes all of its terms and their gradient.
    `UnifiedLoss(V, primary_loss_type="standard")` equals torch.nn.functional.cross_entropy, except that a batch in
    which no row counts gives 0 instead of nan, and that the loss of logits in half precision is float32. Each component
    is a module of `ava_ext.losses`, and `ava_ext/losses/__init__.py` lists them.

    Every term of a row is divided by the same N, the number of rows that count (or the sum of their weights). If
    something averages gradients over ranks, count num_items_in_batch over all ranks and multiply the loss by the world
    size.

    Some losses learn: those with the adaptive temperature, the balancing of experts, adaptive heads or a schedule. What
    they learn takes effect at `step()`, once per optimizer step. With auto_step=True, every training forward with grad
    enabled calls it at its end. A forward reads the state of the last step, and counts once, also under activation
    checkpointing (see `losses.learned_state`).

    You can read every option as an attribute, such as `loss_fn.vocab_size`. For another value, make a new loss.

    Args:
        vocab_size: size of the vocabulary; columns beyond it are padding.
        hidden_size: width of hidden_states; needed if the loss owns heads of multi-token prediction.
        options: `UnifiedLossConfig` documents each.

    Raises:
        TypeError: there is no such option.
        ValueError: an option is out of range, or two contradict each other.

    Example:
        >>> loss_fn = UnifiedLoss(32000, primary_loss_type="standard", use_ngram_penalty=True)
        >>> loss = loss_fn(model(input_ids), targets)
        >>> loss.backward()
    """

    # what a loss of this class is made of; see ava_ext.losses
    ROW_TERMS: ClassVar[Sequence[Any]] = ROW_TERMS
    CANDIDATES: ClassVar[Sequence[Any]] = CANDIDATES
    PARTS: ClassVar[Sequence[type[Part]]] = PARTS

    temperature: AdaptiveTemperature

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # options and parts; to nn.Module's stubs they are Tensor | Module

    def __init__(self, vocab_size: int, hidden_size: int | None = None, **options: Any) -> None:
        super().__init__()
        UnifiedLossConfig.check_names(options)
        self.config = config = UnifiedLossConfig(vocab_size=vocab_size, hidden_size=hidden_size, **options)
        self.temperature = AdaptiveTemperature.from_config(config)
        row_terms = [term for module in self.ROW_TERMS if (term := module.from_config(config)) is not None]
        sources = [source for module in self.CANDIDATES if (source := module.from_config(config)) is not None]
        self.row_pass = RowPass(config, row_terms, sources)
        for part in self.PARTS:
            if hasattr(self, part.name):  # an option would hide the part
                raise ValueError(
                    f"unified_loss: expected {part.__name__} to have a name of its own, got {part.name!r}, which is an "
                    "option, another part or another attribute of the loss"
                )
            setattr(self, part.name, part.from_config(config))
        self._part_names = tuple(part.name for part in self.PARTS if getattr(self, part.name) is not None)
        self._find_states()
        self.register_load_state_dict_post_hook(_constants_follow)
        parts = [getattr(self, name) for name in self._part_names]
        keys = [term.key for term in row_terms if term.key] + [source.key for source in sources]
        self._keys = tuple(dict.fromkeys(keys + [key for part in parts for key in part.keys]))
        self._main_metrics = tuple(term.metric for term in row_terms if term.metric)
        self._sequence_keys = tuple(source.key for source in sources if source.needs_sequences) + tuple(
            part.keys[0] for part in parts if part.needs_sequences
        )

    def _find_states(self) -> None:
        """Once all components are there."""
        states = {name: child for name, child in self.named_children() if isinstance(child, LearnedState)}
        for state in states.values():
            state.auto_step = self.config.auto_step
        self._state_names = tuple(states)
        self._learns = self.config.temperature_adapts or len(states) > 1

    @classmethod
    def from_model(cls, model_or_config: Any, *, fused: bool = True, **options: Any) -> UnifiedLoss:
        """The loss of a causal language model, with options from its configuration; see `model_config.options_of`.

        Args:
            model_or_config: a model of transformers, or its configuration.
            fused: True, for a loss that gets hidden states and the head's weight: it also applies the model's soft cap
                and scale of the logits. False, for a loss that gets the model's logits, which are already capped and
                scaled; to those of depths that share the head it then applies neither.
            options: any option; they override those of the model.

        Raises:
            ValueError: the configuration has no vocab_size, or needs an option that does not exist.

        Example:
            >>> from types import SimpleNamespace
            >>> configuration = SimpleNamespace(vocab_size=50, hidden_size=16)  # or the model
            >>> UnifiedLoss.from_model(configuration, primary_loss_type="standard").vocab_size
            50
        """
        return cls(**options_of(model_or_config, fused, **options))

    @torch.no_grad()
    def count_items(
        self,
        targets: Tensor,  # [batch_size, n_tokens] or [n_rows]
        attention_mask: Tensor | None = None,  # as targets
        group: Any = None,
        *,
        position_ids: Tensor | None = None,  # as targets, or [1, n_tokens]
        segment_ids: Tensor | None = None,  # as targets, or [1, n_tokens]
        cu_seqlens: Tensor | None = None,  # [n_segments + 1]
        token_weights: Tensor | None = None,  # as targets
        labels_are_shifted: bool | None = None,
    ) -> Tensor:  # [] int64; with token_weights or class_weights float32
        """N of this very loss: how many rows of these targets count, or the sum of their weights.

        Add up the counts of all micro-batches, and pass the sum as num_items_in_batch. Nothing waits for the device.
        N is 0 if no row counts, or if all rows that count have classes of weight 0. (A call with only such rows and
        without num_items_in_batch divides by their number.) Rows that count only for their negatives
        (negatives_need_target=False) have an N of their own and are not counted.

        Args:
            targets, attention_mask, position_ids, segment_ids, cu_seqlens, token_weights: as you pass them to forward.
            labels_are_shifted: overrides the option of this name.
            group: process group over which to add up; "world": the default one; None: only this process.

        Example:
            >>> loss_fn = UnifiedLoss(50, primary_loss_type="standard", labels_are_shifted=False)
            >>> loss_fn.count_items(torch.tensor([[7, 8, -100, 9]]))
            tensor(2)
        """
        of_rows: dict[str, Any] = {
            "targets": targets,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "segment_ids": segment_ids,
            "cu_seqlens": cu_seqlens,
            "token_weights": token_weights,
            "labels_are_shifted": labels_are_shifted,
        }
        # every rank has the whole of DTensors, as in the call: nothing here is beside logits
        of_rows = {name: whole("count_items", name, given, True) for name, given in of_rows.items()}
        # the call itself decides, so that this and the loss cannot differ; its logits are a single number, repeated
        like = of_rows["targets"] if isinstance(targets, Tensor) else torch.empty(())
        logits = like.new_empty(1, dtype=torch.float32).expand(*like.shape, self.config.vocab_size)
        divisor = 1 if self.config.reduction == "mean" else None
        rows = Call(self.config, (), logits, **of_rows, num_items_in_batch=divisor).rows
        n_items = rows.weights.count_nonzero() if token_weights is None else rows.weights.sum()
        if self.row_pass.class_weights is not None:
            n_items = (rows.weights * classes_of(rows.targets, self.row_pass.class_weights)).sum()
        if resolve(group) is not None:
            torch.distributed.all_reduce(n_items, group=resolve(group))
        return n_items

    def forward(
        self,
        # [batch_size, n_tokens, n_columns] or [n_rows, n_columns]
        logits: Tensor | LinearLogits | ShardedLogits | None = None,
        targets: Tensor | None = None,  # [batch_size, n_tokens] or [n_rows]
        attention_mask: Tensor | None = None,  # as targets
        hidden_states: Tensor | None = None,  # [batch_size, n_tokens, hidden_size] or [n_rows, hidden_size]
        primary_logits: Tensor | LinearLogits | None = None,  # as logits
        additional_logits: Heads = None,  # num_future_tokens of logits' shape
        confidence_scores: Tensor | None = None,  # [batch_size], [batch_size, 1], [batch_size, n_tokens] or with 1
        mtp_active: bool | Tensor | None = None,
        gate_logits: Tensor | Sequence[Tensor | None] | None = None,  # [n, n_experts] per layer
        expert_indices: Tensor | Sequence[Tensor | None] | None = None,  # [n, k] per layer
        expert_outputs: Tensor | Sequence[Tensor] | None = None,  # [n_experts, n, hidden_size]
        return_detailed: bool = False,
        *,
        lm_head_weight: Tensor | nn.Linear | None = None,  # [n_columns, hidden_size]
        lm_head_bias: Tensor | None = None,  # [n_columns]
        token_weights: Tensor | None = None,  # as targets
        input_ids: Tensor | None = None,  # as targets
        prefix_ids: Tensor | None = None,  # [batch_size, n_prefix], or [n_prefix]
        position_ids: Tensor | None = None,  # as targets, or [1, n_tokens]
        segment_ids: Tensor | None = None,  # as targets, or [1, n_tokens]
        cu_seqlens: Tensor | None = None,  # [n_segments + 1]
        num_items_in_batch: float | Tensor | None = None,
        global_expert_counts: Tensor | None = None,  # [n_layers, n_experts]
        mtp_hidden_states: Tensor | Sequence[Tensor] | None = None,  # num_future_tokens of hidden_states' shape
        mtp_depth_weights: Tensor | None = None,  # [num_future_tokens]
        negative_ids: Tensor | None = None,  # as targets, and [n_negatives]
        negative_weights: Tensor | None = None,  # as negative_ids
        soft_target_ids: Tensor | None = None,  # as targets, and [n_soft_targets]
        soft_target_weights: Tensor | None = None,  # as soft_target_ids
        contrastive_pair: tuple[Tensor, Tensor] | None = None,  # two of [n_pairs, hidden_size]
        max_counted_rows: int | None = None,
        labels_are_shifted: bool | None = None,
        target_probabilities: Tensor | None = None,  # as targets, and [vocab_size]
    ) -> Tensor | dict[str, Tensor]:
        """The loss; with return_detailed, a dict of the loss and its parts.

        Args:
            logits: row t predicts targets[t]. You may also pass LinearLogits, or a model's output that has .logits.
                Instead of logits, pass hidden_states and lm_head_weight, or primary_logits. All of these may be
                DTensors, and logits may be ShardedLogits: see `ava_ext.distributed` for what each rank passes.
            targets: the token that each row predicts; with labels_are_shifted=False, the token read at that row.
            attention_mask: rows where it is 0 do not count. (With labels_are_shifted=False it belongs to the labels.)
            hidden_states, lm_head_weight, lm_head_bias: logits = hidden_states @ weight.T + bias, computed a chunk of
                rows at a time, never as a whole. If hidden_states is a tuple of all layers, the last is used.
                lm_head_weight may be nn.Linear. Multi-token prediction reads hidden_states too, and so does the
                contrastive term without contrastive_pair.
            primary_logits: for adaptive heads; may be LinearLogits. With primary_loss_type="adaptive_mtp" the main term
                reads them; with mtp_type="adaptive" only if there are no logits.
            additional_logits, confidence_scores: adaptive multi-token prediction, see `losses.adaptive_mtp`. Each head
                may be LinearLogits or ShardedLogits.
            mtp_active: False switches heads of any kind off for this call; a tensor, [] or [batch_size], does so on the
                device, for all or per sequence; None uses the heads that are given.
            mtp_hidden_states: the outputs of the model's depth modules (mtp_type="hidden_states"), to which
                lm_head_weight is applied. If the depths have heads of their own, pass additional_logits instead. See
                `losses.mtp_hidden_states`.
            mtp_depth_weights: factor of each depth of multi-token prediction, of any kind; gets no gradient. The host
                does not read the values, so a schedule may change them.
            gate_logits, expert_indices, expert_outputs: mixture of experts, see `losses.moe`, `losses.auxiliary` and
                `losses.diversity`. Padding is left out if they have as many rows as the targets. None among the layers
                stands for a layer without a router.
            global_expert_counts: how often each expert was chosen in all micro-batches and ranks of a global batch.
                Load balancing is then this call's share of the global batch's; see
                `losses.auxiliary.global_load_balancing_loss`.
            token_weights: multiply every token term of their row; must not require grad.
            input_ids: the tokens that the model read. The context of row t is then input_ids[:, : t + 1], not
                targets[:, :t].
            prefix_ids: what came before, if the rows continue a text that other calls have begun (a sequence spread
                over ranks): the targets of the rows before, or with input_ids the tokens read before. ignore_index
                stands where a row did not count or there is none; every other entry counts for min_sequence_length.
            segment_ids, position_ids, cu_seqlens: which tokens belong to one text, where several are packed into a
                batch row. Nothing leaks across texts. cu_seqlens ascend from 0 to the number of rows, which is not
                checked: that would wait for the device.
            num_items_in_batch: N, if the batch is one of several micro-batches: a number, or a tensor of one element,
                whose value the host does not read. Only with reduction="mean".
            negative_ids, negative_weights: further tokens to push down (-1: absent), and how strongly (default 1).
            soft_target_ids, soft_target_weights: tokens (-1: absent) and their probabilities, such as the most likely
                ones of a teacher; see `losses.distillation`. With distillation_tail, the rest is one more target.
            target_probabilities: q of every token, for each row of the logits. The main term and the metric
                cross_entropy are then sum_c q_c (-log p_c). targets still say which rows count, and accuracy,
                repetition and multi-token prediction read them. q may require grad.
            contrastive_pair: two views of the same things, for InfoNCE.
            max_counted_rows: an upper bound on how many rows count (`count_items` counts them). With hidden_states,
                rows that do not count are left out of the matrix products; on a GPU only if you pass this number.
            labels_are_shifted: overrides the option of this name for this call.

        Returns:
            A scalar; with reduction="none", a tensor of the shape of targets (without the last column if labels are not
            shifted). With return_detailed a dict: total_loss, with its graph; the components that are on, weighted and
            detached, which add up to it; and the metrics named in `METRICS`, most of them means over the rows of this
            call. `LossMeter` adds up such dicts over micro-batches and ranks.

        Raises:
            ValueError: an input is missing, has the wrong shape, or contradicts another. Shapes and values of inputs of
                a component that is off are not checked, except those of hidden_states and primary_logits.
            TypeError: an input is not a tensor.
            IndexError: a counted target is out of range (CPU).
        """
        row_pass = self.row_pass
        if row_pass._buffers["options"].dtype != torch.float32:  # type: ignore[union-attr]  # looked up as fast as can be
            for module in (row_pass, *self._learned()):
                module.restore_precision()
        call = Call(
            self.config,
            self._sequence_keys,
            logits=logits,
            targets=targets,
            attention_mask=attention_mask,
            hidden_states=hidden_states,
            primary_logits=primary_logits,
            additional_logits=additional_logits,
            mtp_hidden_states=mtp_hidden_states,
            mtp_depth_weights=mtp_depth_weights,
            confidence_scores=confidence_scores,
            mtp_active=mtp_active,
            gate_logits=gate_logits,
            expert_indices=expert_indices,
            expert_outputs=expert_outputs,
            global_expert_counts=global_expert_counts,
            lm_head_weight=lm_head_weight,
            lm_head_bias=lm_head_bias,
            token_weights=token_weights,
            input_ids=input_ids,
            prefix_ids=prefix_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
            cu_seqlens=cu_seqlens,
            num_items_in_batch=num_items_in_batch,
            negative_ids=negative_ids,
            negative_weights=negative_weights,
            soft_target_ids=soft_target_ids,
            soft_target_weights=soft_target_weights,
            target_probabilities=target_probabilities,
            contrastive_pair=contrastive_pair,
            max_counted_rows=max_counted_rows,
            labels_are_shifted=labels_are_shifted,
            class_weights=None if self.config.class_weights is None else row_pass.class_weights,
        )
        if self._learns:
            for state in self._learned():
                call.recording = state.begin(call.rows.weights, targets)
        temperature = self.temperature.read("value") if self.config.temperature_adapts else None
        rows = row_pass.run(call, temperature, self.penalty_factor(), is_detailed=return_detailed)
        total = rows.loss
        terms: dict[str, Tensor] = {}  # what the pass over the rows does not give
        metrics: dict[str, Tensor] = {}
        for name in self._part_names:
            addends = getattr(self, name).of_call(call)
            terms |= addends.terms
            metrics |= addends.metrics
        for key, addend in terms.items():
            if addend.is_meta and not total.is_meta:  # without values, the whole loss would be
                raise RuntimeError(f"unified_loss: expected the tensors of {key} on {total.device}, got meta")
            total = total + addend
        if self.config.reduction == "none":
            total = call.like_targets(total)
        if call.recording is not False:
            self._learn(call, rows)
        return self._detailed(total, call, rows, terms, metrics) if return_detailed else total

    def penalty_factor(self) -> Tensor | None:  # []
        """The factor by which the weights of repetition penalties are multiplied; None: 1. Schedules override it."""
        return None

    def _learn(self, call: Call, rows: RowPassOutput) -> None:
        """Records what this call has taught and, with auto_step, commits it."""
        for record in call.learned:
            record(call.recording)
        if self.config.temperature_adapts:
            loss_sum = rows.terms[CROSS_ENTROPY].sum()
            self.temperature.record(call.recording, pending_loss=loss_sum, pending_rows=call.rows.n_counted)
        if self.config.auto_step:
            self._commit(call.recording)

    @torch.no_grad()
    def _detailed(
        self,
        total: Tensor,
        call: Call,
        rows: RowPassOutput,
        terms: dict[str, Tensor],
        metrics: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The dict of return_detailed; its keys depend on the configuration only."""
        weighted = rows.terms * call.rows.weights  # [n_terms, batch_size, n_tokens]
        if self.config.reduction == "none":
            weighted = call.like_targets(weighted)
            terms = {key: call.like_targets(term) for key, term in terms.items()}
        else:
            weighted = weighted.flatten(1).sum(1)
        # copies: what is done to one entry in place is done to no other, and not to the loss
        addends = dict(zip(rows.names, weighted.unbind(), strict=True)) | {k: term.clone() for k, term in terms.items()}
        addends |= {key: torch.zeros_like(addends["main_loss"]) for key in self._keys if key not in addends}
        n_counted = call.rows.n_counted
        most = n_counted.clamp_min(1)
        means = rows.terms[CROSS_ENTROPY : CROSS_ENTROPY + 3].flatten(1).sum(1) / most
        cross_entropy, entropy, accuracy = means.unbind()
        rank: Any = rows.rank  # 0 where a row does not count; None without accuracy_top_k
        return (
            {"total_loss": total}
            | {key: addends[key].detach() for key in self._keys}
            | {name: addends["main_loss"].clone() for name in self._main_metrics}
            | {
                "cross_entropy": cross_entropy,
                "perplexity": cross_entropy.exp(),
                "n_tokens": n_counted.long(),
                "accuracy": accuracy,
                "entropy": entropy,
                "temperature": rows.options[0] * self.config.logit_scale,
            }
            | {f"{TOP_K_ACCURACY}{k}": ((rank > 0) & (rank <= k)).sum() / most for k in self.config.accuracy_top_k}
            | self._of_candidates(call, rows)
            | {name: metric.detach() for name, metric in metrics.items()}
        )

    def _of_candidates(self, call: Call, rows: RowPassOutput) -> dict[str, Tensor]:
        """The metrics of sources of candidates; 0 where a source has found none."""
        terms = dict(zip(rows.names, rows.terms.unbind(), strict=True))
        return {
            metric.name: metric.of_term(call, terms[key]) if key in terms else torch.zeros_like(call.rows.n_counted)
            for key, metric in self.row_pass.metrics
        }

    def _learned(self) -> list[Any]:
        """The components that learn."""
        return [getattr(self, name) for name in self._state_names]

    def step(self) -> None:
        """Makes what training calls have learned take effect: temperature, expert load and bias.

        Call it once per optimizer step. With auto_step=True, every training forward with grad enabled does this itself.
        With process_group, what the ranks have learned is summed first.
        """
        self._commit(True)

    def _commit(self, recording: bool | Tensor) -> None:
        for state in self._learned():
            state.step(self.config.process_group, recording)

    def get_loss_statistics(self) -> dict[str, dict[str, Tensor]]:
        """Running statistics of the components that keep any, as of the last step(); on the device.

        Returns:
            {"temperature": {value, count, mean_loss}} and, where they are on, "adaptive_mtp" (averages, count),
            "moe_balancing" (expert_counts, expert_scores, total_tokens, max_violation) and "penalty_schedule" (steps,
            factor), that of AdaptiveAntiRepetitionLoss.
        """
        return {state.statistics_name: state.statistics() for state in self._learned()}

    def reset_statistics(self) -> None:
        """Clears averages, counts and recorded losses, and resets the temperature. expert_bias stays."""
        for state in self._learned():
            state.reset_statistics()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # a checkpoint of a configuration with extra or missing components loads strictly: their state is left out, or
        # kept as it is
        own = {prefix + name: value for name, value in self.state_dict().items()}
        # "schedule" is that of presets.AdaptiveAntiRepetitionLoss, "temperature" every loss has
        for component in ("temperature", "schedule", *(part.name for part in {*PARTS, *self.PARTS})):
            begin = f"{prefix}{component}."
            given = [name for name in state_dict if name.startswith(begin)]
            if not given:
                state_dict.update({name: value for name, value in own.items() if name.startswith(begin)})
            elif getattr(self, component, None) is None:
                for name in given:
                    del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        return self.config.changed_options()


def _constants_follow(loss_fn: UnifiedLoss, _: Any) -> None:
    """With assign=True, a loss on the meta device has its state where the checkpoint was: the constants go there."""
    row_pass, home = loss_fn.row_pass, loss_fn.temperature.value.device
    if row_pass.options.is_meta and home.type != "meta":
        row_pass.to_empty(device=home)


class _Option:
    """An option of the configuration, as an attribute that can be read."""

    def __init__(self, name: str, doc: str) -> None:
        self.name = name
        self.__doc__ = doc

    def __get__(self, loss_fn: UnifiedLoss | None, owner: type) -> Any:
        return self if loss_fn is None else getattr(loss_fn.config, self.name)

    def __set__(self, loss_fn: UnifiedLoss, value: Any) -> None:
        raise AttributeError(
            f"unified_loss: {self.name} is an option, and options are fixed: expected a new loss with "
            f"{self.name}={value!r}, got an assignment"
        )


def create_unified_loss(options: Mapping[str, Any] | UnifiedLossConfig) -> UnifiedLoss:
    """UnifiedLoss from a dict of options, such as a configuration file holds, or from a UnifiedLossConfig.

    Raises:
        TypeError: there is no such option.
        ValueError: an option is out of range.

    Example:
        >>> loss_fn = create_unified_loss({"vocab_size": 32000, "label_smoothing": 0.1})
        >>> loss_fn.label_smoothing
        0.1
    """
    return UnifiedLoss(**(vars(options) if isinstance(options, UnifiedLossConfig) else options))


def _signature() -> inspect.Signature:
    kinds = inspect.Parameter
    options = [
        kinds(
            option.name,
            kinds.POSITIONAL_OR_KEYWORD if option.name in ("vocab_size", "hidden_size") else kinds.KEYWORD_ONLY,
            default=kinds.empty if option.default is dataclasses.MISSING else option.default,
            annotation=option.type,
        )
        for option in dataclasses.fields(UnifiedLossConfig)
    ]
    return inspect.Signature([kinds("self", kinds.POSITIONAL_OR_KEYWORD), *options])


# what help() and editors show is the configuration's own list; of __init__, because subclasses may have another
UnifiedLoss.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
for _option in dataclasses.fields(UnifiedLossConfig):
    setattr(UnifiedLoss, _option.name, _Option(_option.name, _option.metadata["doc"]))
