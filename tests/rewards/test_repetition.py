"""Repetition penalties on token ids against hand cases and an independent count of every pair of places."""

import math
import random

import pytest

from megatron_srft.config import ConfigError, RepetitionRewardConfig
from megatron_srft.rewards import repetition


def brute_force(tokens, ngram, penalty):
    """A token is penalised when some n-gram over it equals one that starts earlier: all pairs are compared."""
    starts = range(len(tokens) - ngram + 1)
    repeated = [j for j in starts if any(tokens[i : i + ngram] == tokens[j : j + ngram] for i in range(j))]
    return [penalty if any(j <= t < j + ngram for j in repeated) else 0.0 for t in range(len(tokens))], len(repeated)


@pytest.mark.parametrize(
    ("tokens", "ngram", "penalised"),
    [
        ([], 1, ""),
        ([7], 2, "."),
        ([1, 2, 3], 3, "..."),
        ([1, 2, 3, 1, 2], 2, "...##"),  # the first occurrence is free; a repeat at the very end
        ([1, 2, 9, 1, 2, 1, 2], 2, "...####"),  # (2, 1) is new, its tokens are penalised by their neighbours
        ([1, 2, 1, 2, 1], 3, "..###"),  # overlaps its first occurrence
        ([5, 5, 5, 5], 2, ".###"),  # overlapping repeats are penalised once
        ([5, 6, 5, 7, 5], 1, "..#.#"),
    ],
)
def test_by_hand(tokens, ngram, penalised):
    expected = tuple(-0.5 if mark == "#" else 0.0 for mark in penalised)
    assert repetition.dense(tokens, ngram, -0.5) == expected


def test_the_papers_figures():
    """A block of 500 tokens repeated once: 500 penalised tokens, in sum -25. A run of one token: all but the first."""
    block = list(range(500))
    assert math.fsum(repetition.dense(block * 2, 40, -0.05)) == pytest.approx(-25)
    assert repetition.dense([3] * 1000, 40, -0.05) == (0.0,) + (-0.05,) * 999
    assert (RepetitionRewardConfig().ngram, RepetitionRewardConfig().penalty) == (40, -0.05)
    assert RepetitionRewardConfig().mode == "dense"


def test_against_a_brute_force():
    draw = random.Random(0)
    for _ in range(400):
        tokens = [draw.randrange(draw.choice((1, 2, 3, 6))) for _ in range(draw.randrange(25))]
        ngram = draw.randrange(1, 6)
        expected, repeated = brute_force(tokens, ngram, -0.25)
        assert repetition.dense(tokens, ngram, -0.25) == tuple(expected)
        total = len(tokens) - ngram + 1
        assert repetition.share(tokens, ngram) == (repeated / total if total > 0 else 0.0)


def test_renaming_tokens_changes_nothing():
    draw = random.Random(1)
    tokens = [draw.randrange(4) for _ in range(60)]
    renamed = [(11, 3, 90000, 0)[t] for t in tokens]
    assert repetition.dense(renamed, 3, -1.0) == repetition.dense(tokens, 3, -1.0)
    assert repetition.share(renamed, 3) == repetition.share(tokens, 3) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ngram=0), "ngram of a repetition reward must be at least 1, not 0"),
        (dict(penalty=0.05), "penalty of a repetition reward must not be above 0, got 0.05"),
        (dict(penalty=-math.inf), "penalty of a repetition reward must be a finite number, not -inf"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RepetitionRewardConfig(**settings)
