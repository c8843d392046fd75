"""How good a language model is on held-out text, and how much it repeats itself when it writes."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from small_gpt import SmallGPT
from text_corpus import Corpus
from torch import Tensor


@dataclasses.dataclass
class Run:
    """What was seen of one training run, step by step."""

    measured_at: list[int] = dataclasses.field(default_factory=list)  # steps of the measurements below
    perplexity: list[float] = dataclasses.field(default_factory=list)  # on held-out text
    repeated: list[float] = dataclasses.field(default_factory=list)  # repeated 4-grams of greedy text, 0 to 1
    continuations: Tensor | None = None  # the last greedy texts [n_documents, length]
    components: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # of the loss, at every step

    def measure(self, model: SmallGPT, corpus: Corpus, step: int) -> None:
        """Adds a measurement of the model as it is after this step."""
        prompts, real_continuations = corpus.prompts()
        # never ending, all continuations have the same length and their rates compare
        self.continuations = model.greedy(prompts, real_continuations.shape[1], banned_token=corpus.end_of_text)
        self.measured_at.append(step)
        self.perplexity.append(validation_perplexity(model, corpus))
        self.repeated.append(repeated_ngram_rate(self.continuations))


@torch.no_grad()
def validation_perplexity(model: SmallGPT, corpus: Corpus) -> float:
    """exp of the mean cross-entropy per token of the held-out text: PyTorch's own, whatever the training loss was."""
    inputs, targets = corpus.validation_windows()
    total = torch.zeros((), dtype=torch.float64)
    for rows, row_targets in zip(inputs.split(32), targets.split(32), strict=True):
        total += F.cross_entropy(model(rows).flatten(0, 1), row_targets.flatten(), reduction="sum")
    return (total / targets.numel()).exp().item()


def repeated_ngram_rate(
    texts: Tensor,  # [n_texts, length]
    n: int = 4,
) -> float:
    """The share of n-grams that occurred before in the same text, 0 to 1: seq-rep-n of Welleck et al. 2019.

    Example:
        >>> repeated_ngram_rate(torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]]))  # one of the five 4-grams
        0.2
    """
    n_repeated = n_total = 0
    for text in texts.tolist():
        ngrams = [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]
        n_repeated += len(ngrams) - len(set(ngrams))
        n_total += len(ngrams)
    return n_repeated / n_total
