"""Real text that is there already, as tokens: the documentation of Python's standard library, and of torch.nn.

The first is the language reference of `pydoc_data.topics` and the docstrings of the standard library's modules. All
docstrings are read from the sources, without importing them. They differ a little from one version to the next.
"""

from __future__ import annotations

import ast
import dataclasses
import pydoc_data.topics
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
UNDERLINE = re.compile(r"([-=*~^#_.+])\1{3,}")


def standard_library_documentation(min_characters: int = 150) -> list[str]:
    """Each topic and each docstring of at least `min_characters`."""
    topics = list(pydoc_data.topics.topics.values())
    return _cleaned([*topics, *_docstrings_of(_standard_library_sources())], min_characters)


def torch_nn_documentation(min_characters: int = 150) -> list[str]:
    """Each docstring of torch.nn of at least `min_characters`: layers and losses, with formulas and shapes."""
    return _cleaned(_docstrings_of(sorted(Path(torch.nn.__file__).parent.rglob("*.py"))), min_characters)


def _cleaned(texts: Iterable[str], min_characters: int) -> list[str]:
    """Each text once, whitespace collapsed and underlines removed.

    Runs of spaces, newlines, "=====" and "*****" would count as repetition when nobody reads them.
    """
    collapsed = (" ".join(UNDERLINE.sub(" ", text).split()) for text in texts)
    return list(dict.fromkeys(text for text in collapsed if len(text) >= min_characters))


def _standard_library_sources() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    sources = []
    for module in sorted(sys.stdlib_module_names):
        sources += [folder / f"{module}.py", *sorted((folder / module).rglob("*.py"))]
    not_documentation = {"test", "tests", "idle_test"}
    return [path for path in sources if path.is_file() and not_documentation.isdisjoint(path.parts)]


def _docstrings_of(sources: Iterable[Path]) -> Iterator[str]:
    for path in sources:
        try:
            yield from _docstrings(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError):
            continue  # a few modules carry templates that are no Python


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child)


@dataclasses.dataclass
class Corpus:
    """Tokenised documents, every fifteenth held out. In the streams of tokens each document ends with `end_of_text`."""

    tokenizer: Tokenizer
    context: int  # tokens per window
    train_tokens: Tensor  # [n_train_tokens]
    validation_tokens: Tensor  # [n_validation_tokens]
    validation_documents: list[Tensor]  # each [document_length], without end_of_text

    @classmethod
    def from_texts(cls, texts: list[str], context: int, vocab_size: int = 4096) -> Corpus:
        """Trains a byte-level BPE on the texts that are not held out and tokenises all of them with it."""
        held_out = range(0, len(texts), 15)
        train_texts = [text for index, text in enumerate(texts) if index not in held_out]
        tokenizer = _train_tokenizer(train_texts, vocab_size)
        train = [encoding.ids for encoding in tokenizer.encode_batch(train_texts)]
        validation = [encoding.ids for encoding in tokenizer.encode_batch([texts[index] for index in held_out])]
        end = [tokenizer.token_to_id(END_OF_TEXT)]
        return cls(
            tokenizer,
            context,
            torch.tensor([token for ids in train for token in ids + end]),
            torch.tensor([token for ids in validation for token in ids + end]),
            [torch.tensor(ids) for ids in validation],
        )

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def end_of_text(self) -> int:
        return self.tokenizer.token_to_id(END_OF_TEXT)

    def random_batch(
        self, batch_size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:  # each [batch_size, context]
        """Inputs, targets (the inputs one token later) and the segment of every target, from anywhere in the text."""
        starts = torch.randint(len(self.train_tokens) - self.context, (batch_size, 1), generator=generator)
        windows = self.train_tokens[starts + torch.arange(self.context + 1)]
        inputs, targets = windows[:, :-1], windows[:, 1:]
        return inputs, targets, segments_of(targets, self.end_of_text)

    def validation_windows(self) -> tuple[Tensor, Tensor]:  # each [n_windows, context]
        """Inputs and targets that cover the held-out text once; less than one window at its end is left out."""
        n_tokens = (len(self.validation_tokens) - 1) // self.context * self.context
        inputs, targets = self.validation_tokens[:n_tokens], self.validation_tokens[1 : n_tokens + 1]
        return inputs.view(-1, self.context), targets.view(-1, self.context)

    def prompts(
        self, prompt_length: int = 24
    ) -> tuple[Tensor, Tensor]:  # [n_documents, prompt_length], [n_documents, context - prompt_length]
        """The beginnings of the held-out documents that fill the context, and how they really go on."""
        documents = [ids[: self.context] for ids in self.validation_documents if len(ids) >= self.context]
        texts = torch.stack(documents)
        return texts[:, :prompt_length], texts[:, prompt_length:]


def segments_of(targets: Tensor, end_of_text: int) -> Tensor:  # [batch, length] -> [batch, length]
    """Number of the document that each target belongs to, counted from the start of the row."""
    is_end = targets == end_of_text
    return is_end.cumsum(dim=1) - is_end.long()  # an end still belongs to the document it ends


def _train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
