"""What the loss takes for the logits, in every term: z = softcap(logit_scale logits) / T.

T is initial_temperature, or what `losses.temperature` makes of it.

Sources: Gemma 2, 2024 (soft cap); Cohere and Granite (scale).
"""

from __future__ import annotations

from ava_ext.config import UnifiedLossConfig
from ava_ext.losses.component import RowTerm
from ava_ext.ops.row_fields import RowFlags


def from_config(config: UnifiedLossConfig) -> RowTerm:
    """No term, but the options that all have in common."""
    options = {"temperature": config.initial_temperature, "logit_scale": config.logit_scale}
    if config.logit_softcap is None:
        return RowTerm(None, RowFlags(0), options)
    return RowTerm(None, RowFlags.SOFTCAP, options | {"logit_softcap": config.logit_softcap})
