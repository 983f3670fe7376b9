"""The scores that a head read off the policy's hidden states, as one more stream of a step's groups.

    none      value = score, a logit
    sigmoid   value = 1 / (1 + exp(-score))
    group     value = (score - mean) / deviation     of the group's completions that have a score, population deviation

A response without a token to score takes the lowest value of its group's completions. A demonstration is placed among
the completions: it takes no part in their mean and deviation, and with n of them it is at most sqrt(n) deviations away,
which is as far as a member can be of a group of n + 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_srft.config import SwiftRewardConfig
from megatron_srft.rollout.engine import RolloutError
from megatron_srft.sample import Group, Score, TrainingSequence

STREAM = "swift"

EQUAL = 1e-4
"""Scores of a group that deviate by less (in logits) are equal up to rounding, and give its members the value 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenScores:
    """What the head gave one group's members; None for a response without a token to score.

    Example: completions=(0.7, -1.2, None), demonstration=2.0.
    """

    completions: tuple[float | None, ...]
    demonstration: float | None = None


def scores_by_group(sequences: Sequence[TrainingSequence], groups: int) -> list[HiddenScores]:
    """The measured scores of each group's members, from the step's sequences in their order."""
    completions: list[list[float | None]] = [[] for _ in range(groups)]
    demonstrations: list[float | None] = [None] * groups
    for sequence in sequences:
        if sequence.is_demonstration:
            demonstrations[sequence.group] = sequence.hidden_score
        else:
            completions[sequence.group].append(sequence.hidden_score)
    return [
        HiddenScores(completions=tuple(found), demonstration=of_demonstration)
        for found, of_demonstration in zip(completions, demonstrations, strict=True)
    ]


def of_engine(groups: Sequence[Group], measured: Sequence[HiddenScores]) -> list[HiddenScores]:
    """The engine's scores of the completions, the trainer's of the demonstrations.

    Raises:
        RolloutError: the engine gave no score to a completion that has a token to score.
    """
    for group in groups:
        if any(c.hidden_score is None and len(c.token_ids) > 1 for c in group.completions):
            raise RolloutError(
                f"the rollout engine gave completions of prompt {group.prompt.id} no score, and rewards: "
                "swift.scored_by is engine; set it to trainer"
            )
    return [
        HiddenScores(completions=tuple(c.hidden_score for c in group.completions), demonstration=own.demonstration)
        for group, own in zip(groups, measured, strict=True)
    ]


def engine_difference(groups: Sequence[Group], measured: Sequence[HiddenScores]) -> dict[str, float]:
    """swift/engine_difference: the largest between the engine's and the trainer's scores of one completion; nothing
    where the trainer has measured none."""
    pairs = [
        (completion.hidden_score, score)
        for group, own in zip(groups, measured, strict=True)
        for completion, score in zip(group.completions, own.completions, strict=True)
    ]
    known = [abs(one - other) for one, other in pairs if one is not None and other is not None]
    return {"swift/engine_difference": max(known)} if known else {}


def merge(groups: Sequence[Group], found: Sequence[HiddenScores], config: SwiftRewardConfig) -> list[Group]:
    """The groups with the stream in every score: the reward grows by weight * value."""
    return [_merged(group, scores, config) for group, scores in zip(groups, found, strict=True)]


def unscored(groups: Sequence[Group], found: Sequence[HiddenScores]) -> int:
    """Responses without a token to score, among those that have a reward."""
    return sum(
        scores.completions.count(None) + (group.demonstration_score is not None and scores.demonstration is None)
        for group, scores in zip(groups, found, strict=True)
    )


def values(found: HiddenScores, normalise: str) -> tuple[list[float], float]:
    """The stream's value of each completion, and that of the demonstration."""
    known = [score for score in found.completions if score is not None]
    mean, deviation = (float(np.mean(known)), float(np.std(known))) if known else (0.0, 0.0)
    reach = math.sqrt(len(known))

    def value(score: float) -> float:
        if normalise == "none":
            return score
        if normalise == "sigmoid":
            return 0.5 * (1 + math.tanh(score / 2))
        return min(reach, max(-reach, (score - mean) / deviation)) if deviation >= EQUAL else 0.0

    lowest = min((value(score) for score in known), default=value(0.0))
    completions = [lowest if score is None else value(score) for score in found.completions]
    return completions, lowest if found.demonstration is None else value(found.demonstration)


def _merged(group: Group, found: HiddenScores, config: SwiftRewardConfig) -> Group:
    of_completions, of_demonstration = values(found, config.normalise)
    scores = zip(group.scores or (), of_completions, strict=True)
    score = group.demonstration_score
    return replace(
        group,
        scores=tuple(_with_value(score, value, config.weight) for score, value in scores),
        demonstration_score=None if score is None else _with_value(score, of_demonstration, config.weight),
    )


def _with_value(score: Score, value: float, weight: float) -> Score:
    return replace(score, reward=score.reward + weight * value, streams={**score.streams, STREAM: value})
