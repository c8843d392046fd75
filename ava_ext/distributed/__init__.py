"""Losses of logits, hidden states and heads that are spread over processes."""

from ava_ext.distributed.fused_head import FusedHead
from ava_ext.distributed.pipeline import pipeline_loss
from ava_ext.ops.sharded_logits import ShardedLogits

__all__ = ["FusedHead", "ShardedLogits", "pipeline_loss"]
