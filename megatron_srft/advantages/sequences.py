"""The sequences of a step, and where each of their tokens' advantages comes from."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_srft.advantages.formulas import centred_returns, group_advantages
from megatron_srft.advantages.returns import divergence_returns, generalised_advantages, token_returns
from megatron_srft.config import AdvantageConfig, KlConfig, RewardConfig, name_streams
from megatron_srft.sample import Demonstration, Group, Score, TrainingSequence

NO_PENALTY = KlConfig()


def to_sequences(groups: list[Group]) -> list[TrainingSequence]:
    """Everything the step trains on, group by group, with advantages of 0.

    Within a group completions stand before the demonstration; the chosen answer of a pair before the rejected one.
    """
    return [s for index, group in enumerate(groups) for s in _group_sequences(group, index)]


def _group_sequences(group: Group, index: int) -> list[TrainingSequence]:
    prompt, scores = group.prompt.token_ids, group.scores or ()
    assert len(scores) == len(group.completions), f"group of prompt {group.prompt.id} is not scored"
    sequences = [
        TrainingSequence(
            token_ids=np.concatenate([prompt, completion.token_ids]),
            prompt_length=len(prompt),
            is_demonstration=False,
            advantages=np.zeros(len(completion.token_ids), np.float32),
            correct=score.correct is True,
            group=index,
            rollout_logprobs=completion.rollout_logprobs,
        )
        for completion, score in zip(group.completions, scores, strict=True)
    ]
    if group.demonstration is not None:
        score = group.demonstration_score
        sequences.append(_given(group, index, group.demonstration, correct=score is not None and score.correct is True))
    if group.prompt.preference is not None:
        pair = group.prompt.preference
        sequences += [
            _given(group, index, answer, preferred=answer is pair.chosen) for answer in (pair.chosen, pair.rejected)
        ]
    return sequences


def _given(
    group: Group, index: int, answer: Demonstration, *, correct: bool = False, preferred: bool | None = None
) -> TrainingSequence:
    prompt = group.prompt.token_ids
    return TrainingSequence(
        token_ids=np.concatenate([prompt, answer.token_ids]),
        prompt_length=len(prompt),
        is_demonstration=True,
        advantages=np.zeros(len(answer.token_ids), np.float32),
        correct=correct,
        group=index,
        preferred=preferred,
    )


def with_advantages(
    sequences: list[TrainingSequence],
    groups: list[Group],
    config: AdvantageConfig,
    rewards: Sequence[RewardConfig] = (),
    kl: KlConfig = NO_PENALTY,
) -> list[TrainingSequence]:
    """The sequences of `to_sequences(groups)` with their advantages, and with kind gae what the critic is to predict.

    A demonstration outside its group's advantage (left out by the config, truncated and hence without a score, or not
    judged because the verifier failed) has advantage 0: it still teaches through a supervised term.

    Args:
        rewards: what the groups were scored with; its gammas and weights make the returns of tokens.
        kl: with place reward, the sequences must have policy_logprobs and reference_logprobs.
        sequences: with kind gae, all are rollouts and have values.
    """
    streams, advantages = name_streams(rewards), []
    if config.kind == "gae":
        scores = [score for group in groups for score in group.scores or ()]
        advantages = [
            _against_values(score, s, config, streams, kl) for score, s in zip(scores, sequences, strict=True)
        ]
        sequences = [
            replace(s, returns=(a + s.values).astype(np.float32)) for s, a in zip(sequences, advantages, strict=True)
        ]
    else:
        for index, members in itertools.groupby(sequences, key=lambda s: s.group):
            advantages += _advantages(groups[index], list(members), config, streams, kl)
    if config.normalize_batch:
        advantages = _over_batch(advantages, sequences, config.std_epsilon)
    return [replace(s, advantages=np.asarray(a, dtype=np.float32)) for s, a in zip(sequences, advantages, strict=True)]


def _over_batch(advantages: list[np.ndarray], sequences: list[TrainingSequence], epsilon: float) -> list[np.ndarray]:
    """Every advantage less the mean of the rollouts' tokens, over their (population) standard deviation."""
    of_rollouts = [a for a, s in zip(advantages, sequences, strict=True) if not s.is_demonstration]
    tokens = np.concatenate([*of_rollouts, np.zeros(0)])
    if not len(tokens):
        return advantages
    mean, deviation = tokens.mean(), tokens.std() + epsilon
    return [a if s.is_demonstration else (a - mean) / deviation for a, s in zip(advantages, sequences, strict=True)]


def _against_values(
    score: Score, sequence: TrainingSequence, config: AdvantageConfig, streams: dict[str, RewardConfig], kl: KlConfig
) -> np.ndarray:
    """[response] generalised advantages; with lam below 1 the config has one gamma only."""
    assert sequence.values is not None, "the critic's values were not measured"
    returns = token_returns(score, sequence.response_length, streams)[: sequence.response_length]
    if kl.in_reward:
        returns = returns + divergence_returns(sequence, kl)
    gamma = next((stream.gamma for stream in streams.values()), 1.0)
    return generalised_advantages(returns, sequence.values, gamma, config.lam)


def _advantages(
    group: Group,
    sequences: list[TrainingSequence],
    config: AdvantageConfig,
    streams: dict[str, RewardConfig],
    kl: KlConfig,
) -> list[np.ndarray]:
    """[response] for each completion, then for the demonstration where there is one."""
    lengths = [s.response_length for s in sequences]
    scores, score = list(group.scores or ()), group.demonstration_score
    judged = score if score is not None and score.is_judged else None
    undiscounted = all(stream.gamma == 1 for stream in streams.values()) and not any(s.dense for s in scores)
    if undiscounted and not kl.in_reward:
        values, value = group_advantages([s.reward for s in scores], judged.reward if judged else None, config)
        given = itertools.repeat(value or 0.0)  # one demonstration, or the two answers of a pair
        return [np.full(n, value) for n, value in zip(lengths, itertools.chain(values, given), strict=False)]
    members = [*scores, judged] if config.include_demonstration and judged else scores
    returns = [token_returns(score, length, streams) for score, length in zip(members, lengths, strict=False)]
    if kl.in_reward:
        for number in range(len(scores)):
            returns[number] = returns[number] + divergence_returns(sequences[number], kl)
    advantages = centred_returns(returns, config) + [np.zeros(length) for length in lengths[len(members) :]]
    return [a[:length] for a, length in zip(advantages, lengths, strict=True)]
