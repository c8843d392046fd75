"""How repetitive a text is: of continuations, as lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Tokens = Sequence[int]


def ngrams(tokens: Tokens, n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def seq_rep(tokens: Tokens, n: int) -> float:
    """Share of a continuation's n-grams that are repeats: 1 - distinct / all (Welleck et al. 2019).

    Example:
        >>> seq_rep([1, 2, 1, 2, 1, 2], 2)  # (1, 2) three times and (2, 1) twice
        0.6
    """
    found = ngrams(tokens, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(continuations: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams of all continuations together / all of them (Li et al. 2016)."""
    found = [ngram for tokens in continuations for ngram in ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else 0.0


class Loop(NamedTuple):
    """A passage that says the same at least three times in a row."""

    n_tokens: int  # of all its turns
    is_at_end: bool


def longest_loop(tokens: Tokens) -> Loop:
    """The longest passage with tokens[i] = tokens[i - period] over two periods and more; (0, False) without one.

    is_at_end says whether any loop reaches the end.

    Example:
        >>> longest_loop([7, 1, 2, 1, 2, 1, 2])
        Loop(n_tokens=6, is_at_end=True)
    """
    longest, at_end = 0, False
    for period in range(1, len(tokens) // 3 + 1):
        run = 0
        for i in range(period, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - period] else 0
            if run >= 2 * period:
                longest = max(longest, run + period)
        at_end = at_end or run >= 2 * period
    return Loop(longest, at_end)


def repeated_positions(tokens: Tokens, n: int) -> list[bool]:
    """Of each token: whether it belongs to an n-gram that occurred before in the same continuation.

    Example:
        >>> repeated_positions([1, 2, 3, 1, 2, 4], 2)
        [False, False, False, True, True, False]
    """
    seen: set[tuple[int, ...]] = set()
    repeated = [False] * len(tokens)
    for i, ngram in enumerate(ngrams(tokens, n)):
        if ngram in seen:
            repeated[i : i + n] = [True] * n
        seen.add(ngram)
    return repeated


def measures(continuations: Sequence[Tokens]) -> dict[str, float]:
    """Means over continuations (distinct: of all together)."""
    count = len(continuations)
    loops = [longest_loop(tokens) for tokens in continuations]
    found = {f"seq_rep_{n}": sum(seq_rep(tokens, n) for tokens in continuations) / count for n in (1, 2, 3, 4)}
    found |= {f"distinct_{n}": distinct(continuations, n) for n in (1, 2, 3)}
    found["longest_loop"] = sum(loop.n_tokens for loop in loops) / count
    found["ends_in_loop"] = sum(loop.is_at_end for loop in loops) / count
    return found
