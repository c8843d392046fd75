"""Every row term as one writes it in PyTorch: what UnifiedLoss is compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def composed_loss(
    logits: Tensor,  # [n_rows, vocab_size]
    targets: Tensor,  # [n_rows]
    candidate_ids: Tensor,  # [n_rows, n_candidates] int64; anything where absent
    candidate_weights: Tensor,  # [n_rows, n_candidates]; 0 where absent or the row's own target
    *,
    label_smoothing: float,
    focal_gamma: float,
    z_loss_weight: float,
    confidence_penalty_weight: float,
    logit_softcap: float | None,
) -> Tensor:
    """Mean over the rows of all terms, with z = softcap(logits) and p = softmax(z).

        (1-e) (1-p_t)^gamma n + e mean_j(-log p_j) + beta lse(z)^2 + eta (1 - H / log V) - sum_c w_c log(1 - p_c)

    One log_softmax, in float32 for 16-bit logits, which all terms share; one gather for the target and the candidates,
    so that nothing is [n_rows, n_candidates, vocab_size]; lse from one column, without a second pass over the row. Of
    six ways to write it (torch.logsumexp, entropy from softmax times logits, ...) this was the fastest, or as fast,
    eager and compiled.

    Returns:
        A scalar.
    """
    z = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    log_probs = F.log_softmax(z, dim=-1)  # [n_rows, vocab_size]
    targets = targets.unsqueeze(-1)
    log_prob, candidate_log_probs = log_probs.gather(-1, torch.cat([targets, candidate_ids], -1)).tensor_split([1], -1)

    cross_entropy = (1 - log_prob.exp()) ** focal_gamma * -log_prob
    smoothing = -log_probs.mean(-1, keepdim=True)
    if torch.compiler.is_compiling():  # a slice fuses; the backward of one more gather is a pass of its own
        lse = z[:, :1] - log_probs[:, :1]
    else:
        lse = z.gather(-1, targets) - log_prob
    entropy = -(log_probs.exp() * log_probs).sum(-1, keepdim=True)
    confidence = 1 - entropy / math.log(logits.shape[-1])
    # below 1, or the logarithm of a sure repetition is -inf
    probability = candidate_log_probs.exp().clamp(max=1 - 1e-6)
    unlikelihood = -(candidate_weights * torch.log1p(-probability)).sum(-1, keepdim=True)
    rows = (
        (1 - label_smoothing) * cross_entropy
        + label_smoothing * smoothing
        + z_loss_weight * lse.square()
        + confidence_penalty_weight * confidence
        + unlikelihood
    )
    return rows.mean()
