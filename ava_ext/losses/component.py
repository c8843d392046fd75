"""The three kinds of component that a UnifiedLoss adds up. Their lists are in losses/__init__.py.

A component's `from_config(config)` returns the component, or None where the configuration leaves it off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ava_ext.ops.row_fields import Candidates, RowFlags

if TYPE_CHECKING:
    from ava_ext.call import Call
    from ava_ext.config import UnifiedLossConfig


class RowTerm(NamedTuple):
    """A term that the row kernel computes for each row of logits."""

    key: str | None  # its entry in the detailed dict; None: it changes the main term
    flags: RowFlags
    options: Mapping[str, float]  # arguments of row_options
    metric: str | None = None  # a further entry that repeats main_loss


class CandidateMetric(NamedTuple):
    """A further entry of the detailed dict, made of what the candidates of a source cost each row."""

    name: str
    of_term: Callable[[Call, Tensor], Tensor]  # the call, and its term [batch_size, n_tokens] -> []


class CandidateSource(NamedTuple):
    """A rule that names tokens for each row to push down, by -sum_c w_c log(1 - p_c)."""

    key: str
    options: Mapping[str, Any] = {}  # arguments of repetition_candidates, which finds those of all sources in one pass
    weights: Mapping[str, float] = {}  # arguments of repetition_weights
    given: Callable[[Call], Candidates | None] | None = None  # where the call itself names them
    needs_sequences: bool = True  # rows in the order of the text
    flags: int = 0  # RowFlags of these candidates; SOFT_TARGETS, to pull up by -sum_c w_c log p_c: at most one source
    temperature: float = 1.0  # of a soft source, beside that of the rows; other than 1: a pass of its own
    metric: CandidateMetric | None = None


class Addends(NamedTuple):
    """What a part adds to the loss of a call."""

    terms: Mapping[str, Tensor]  # weighted, with graph, by key: they are added to the loss
    metrics: Mapping[str, Tensor] = {}  # further entries of the detailed dict


METRICS_OF_PARTS: set[str] = set()  # of every class of parts, those of a user's own loss too


class Part(nn.Module):
    """A component outside the row kernel: anything that computes addends from a call."""

    name: ClassVar[str]  # the attribute of UnifiedLoss, and so the prefix of its state
    METRICS: ClassVar[tuple[str, ...]] = ()  # names of the metrics that it may give
    needs_sequences: bool = False  # rows in the order of the text
    keys: tuple[str, ...]  # of the terms that it adds

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        METRICS_OF_PARTS.update(cls.METRICS)

    @classmethod
    def from_config(cls, config: UnifiedLossConfig) -> Part | None:
        """The part with these options, or None where they leave it off."""
        raise NotImplementedError

    def of_call(self, call: Call) -> Addends:
        """The terms and metrics that it adds to this call."""
        raise NotImplementedError
