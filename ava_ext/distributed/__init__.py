"""Losses of logits, hidden states and heads that are spread over processes.

UnifiedLoss, `row_loss`, `softmax_statistics` and `token_log_probs` take DTensors and ShardedLogits where logits go.
Targets, masks, token ids and weights are those of all rows, the same on every rank (or a DTensor).

    logits                          what a rank gets                     what is communicated
    Replicate                       the whole loss                       nothing
    Shard(-1), or ShardedLogits     the whole loss, and the gradient     forward: 7 numbers per row and one per
                                    of its columns                       candidate, once
    Shard of a dimension of rows    its share: the shares of all ranks   nothing
                                    add up to the whole loss

    hidden states, and the head's weight
    a DTensor, Shard(0)             logits in Shard(-1): each rank computes its columns; backward adds up the gradient
                                    of the hidden states, once
    a DTensor, Replicate            logits in the rows of the hidden states; the weight's gradient is added up
    a torch.Tensor, any DTensor     as under FSDP2: the weight is gathered once, and its gradient averaged

softmax_statistics, token_log_probs and token_metrics give DTensors where rows are spread, and so do
repetition_candidates and repeated_ngram_mask of tokens in Shard(0), and router_statistics of spread rows (sums in
Partial). With this module imported, the operators torch.ops.ava_ext take DTensors too: whole rows, spread in any way.

N, what the loss is divided by, is that of all rows in every placement: num_items_in_batch where it is given, else the
rows that count (or their weights) on all ranks. A rank that holds some of the rows acts like one micro-batch: its
metrics are means over its own rows, LossMeter(group) adds them up, and the gradients are those of one process.
DistributedDataParallel and FSDP2 average over processes, and nothing here undoes that: multiply the loss by the number
of processes.
"""

import torch

from ava_ext.distributed.fused_head import FusedHead
from ava_ext.distributed.pipeline import pipeline_loss
from ava_ext.ops.sharded_logits import ShardedLogits

if torch.distributed.is_available():
    from ava_ext.distributed import operator_rules

    operator_rules.register()

__all__ = ["FusedHead", "ShardedLogits", "pipeline_loss"]
