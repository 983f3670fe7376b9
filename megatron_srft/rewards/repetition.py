"""Penalties of repeated n-grams of token ids: "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373).

    dense     r_t = P when t lies in an n-gram that starts at an earlier place of the response too, else 0
    sequence  P (1 - distinct n-grams / n-grams)

dense is the paper's Algorithm 1: the first occurrence is free, a token in several repeated n-grams is penalised once.
sequence is the released code's other function, on token ids instead of words, and the form that other libraries have
(TRL's `get_repetition_penalty_reward`). A response shorter than n tokens has no n-gram and no penalty.
"""

from collections.abc import Sequence


def repeated_starts(token_ids: Sequence[int], ngram: int) -> list[int]:
    """Places at which an n-gram starts that started earlier already, in order."""
    seen: set[tuple[int, ...]] = set()
    starts = []
    for start in range(len(token_ids) - ngram + 1):
        run = tuple(token_ids[start : start + ngram])
        if run in seen:
            starts.append(start)
        seen.add(run)
    return starts


def dense(token_ids: Sequence[int], ngram: int, penalty: float) -> tuple[float, ...]:
    """[response] rewards, `penalty` for every token of a repeated n-gram."""
    rewards = [0.0] * len(token_ids)
    marked = 0
    for start in repeated_starts(token_ids, ngram):
        first, end = max(start, marked), start + ngram
        rewards[first:end] = [penalty] * (end - first)
        marked = end
    return tuple(rewards)


def share(token_ids: Sequence[int], ngram: int) -> float:
    """Share of the n-grams that stood in the response already; 0 for a response without n-grams."""
    total = len(token_ids) - ngram + 1
    return len(repeated_starts(token_ids, ngram)) / total if total > 0 else 0.0
