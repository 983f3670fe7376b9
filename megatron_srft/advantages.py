"""Advantages of a group, and the training sequences made of it.

With rewards R of a group's members (its completions, and its demonstration where that counts as one):

    group           A_i = R_i - mean(R)                        GRPO (arXiv 2402.03300), SRFT eq. 7, LUFFY eq. 4
    leave_one_out   A_i = R_i - mean of the other members      RLOO (arXiv 2402.14740)

divided by std(R) + std_epsilon under `normalize_std`. The standard deviation is the unbiased one (n - 1), as torch.std
and hence verl and LUFFY compute it; the papers do not say. A group of one, and a group of equal rewards, has
advantage exactly 0.

Where a reward has a gamma below 1, or a value for every token, the tokens of a response have returns of their own,

    G_t = sum over rewards m and l >= 0 of weight_m gamma_m^l r_{m, t + l}         (arXiv 2502.03373, section 4.6)

with a reward of the whole response at its last token. Then A_{i,t} = G_{i,t} - b_i, where the baseline b_i takes the
mean return of a member in place of R, and the deviation is that of all returns about the group's mean; in both each
member counts once, whatever its length. Constant returns are rewards R, so this is the formula above.
"""

import math
from collections.abc import Sequence

import numpy as np

from megatron_srft.config import AdvantageConfig, RewardConfig, name_streams
from megatron_srft.metrics.reflection import keyword_rates
from megatron_srft.sample import Completion, Group, Score, TrainingSequence


def group_advantages(
    rewards: list[float], demonstration_reward: float | None, config: AdvantageConfig
) -> tuple[np.ndarray, float | None]:
    """Advantages of one group, from a resolved config.

    Args:
        rewards: one per completion.
        demonstration_reward: None when there is no demonstration or it has no score.

    Returns:
        ([completions] float64, the demonstration's advantage). The latter is None when the demonstration is no member:
        it has no reward, or the config leaves it out.
    """
    assert config.normalize_std is not None and config.include_demonstration is not None, "use a resolved config"
    is_member = config.include_demonstration and demonstration_reward is not None
    members = np.array([*rewards, demonstration_reward] if is_member else rewards, dtype=np.float64)
    advantages = _centre(members, config)
    if is_member:
        return advantages[:-1], float(advantages[-1])
    return advantages, None


def _centre(members: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    if len(members) < 2 or members.min() == members.max():
        return np.zeros(len(members))
    if config.kind == "group":
        advantages = members - members.mean()
    else:
        advantages = members - (members.sum() - members) / (len(members) - 1)
    if config.normalize_std:
        advantages = advantages / (members.std(ddof=1) + config.std_epsilon)
    return advantages


# ---------------------------------------------------------------- returns per token


def discounted(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = sum over l >= 0 of gamma^l r_{t + l}, float64; after pass k every sum has its first 2^k terms."""
    returns, reach = rewards.astype(np.float64), 1
    while reach < len(returns):
        returns[:-reach] += gamma**reach * returns[reach:]
        reach *= 2
    return returns


def token_returns(score: Score, length: int, streams: dict[str, RewardConfig]) -> np.ndarray:
    """[length] returns of one response, every stream discounted by its own gamma and weighted.

    A response without tokens has one return, its reward.
    """
    by_gamma: dict[float, np.ndarray] = {}
    for name, total in score.streams.items():
        config = streams[name]
        rewards = by_gamma.setdefault(config.gamma, np.zeros(max(length, 1)))
        if length and name in score.dense:
            assert len(score.dense[name]) == length, f"{name} has {len(score.dense[name])} values for {length} tokens"
            rewards += config.weight * np.array(score.dense[name])
        else:
            rewards[-1] += config.weight * total
    return sum(discounted(rewards, gamma) for gamma, rewards in by_gamma.items())


def centred_returns(members: list[np.ndarray], config: AdvantageConfig) -> list[np.ndarray]:
    """Advantages of the tokens of a group's members from their returns, from a resolved config."""
    if len(members) < 2 or len(np.unique(np.concatenate(members))) == 1:
        return [np.zeros(len(member)) for member in members]
    means = np.array([member.mean() for member in members])
    if config.kind == "group":
        baselines = np.full(len(members), means.mean())
    else:
        baselines = (means.sum() - means) / (len(members) - 1)
    advantages = [member - baseline for member, baseline in zip(members, baselines, strict=True)]
    if config.normalize_std:
        squares = sum(np.mean((member - means.mean()) ** 2) for member in members)
        deviation = math.sqrt(squares / (len(members) - 1))
        advantages = [advantage / (deviation + config.std_epsilon) for advantage in advantages]
    return advantages


# ---------------------------------------------------------------- sequences


def to_sequences(
    groups: list[Group], config: AdvantageConfig, rewards: Sequence[RewardConfig] = ()
) -> list[TrainingSequence]:
    """Everything the step trains on: group by group, the completions in order, then the demonstration.

    A demonstration outside its group's advantage (left out by the config, truncated and hence without a score, or not
    judged because the verifier failed) has advantage 0: it still teaches through a supervised term.

    Args:
        rewards: what the groups were scored with; its gammas and weights make the returns of tokens.
    """
    streams = name_streams(rewards)
    return [s for index, group in enumerate(groups) for s in _group_sequences(group, index, config, streams)]


def _group_sequences(
    group: Group, index: int, config: AdvantageConfig, streams: dict[str, RewardConfig]
) -> list[TrainingSequence]:
    scores = group.scores or ()
    assert len(scores) == len(group.completions), f"group of prompt {group.prompt.id} is not scored"
    advantages = iter(_advantages(group, config, streams))
    sequences = [
        TrainingSequence(
            token_ids=np.concatenate([group.prompt.token_ids, completion.token_ids]),
            prompt_length=len(group.prompt.token_ids),
            is_demonstration=False,
            advantages=next(advantages),
            correct=score.correct is True,
            group=index,
            rollout_logprobs=completion.rollout_logprobs,
        )
        for completion, score in zip(group.completions, scores, strict=True)
    ]
    if group.demonstration is not None:
        demonstration_score = group.demonstration_score
        sequences.append(
            TrainingSequence(
                token_ids=np.concatenate([group.prompt.token_ids, group.demonstration.token_ids]),
                prompt_length=len(group.prompt.token_ids),
                is_demonstration=True,
                advantages=next(advantages),
                correct=demonstration_score is not None and demonstration_score.correct is True,
                group=index,
            )
        )
    return sequences


def _advantages(group: Group, config: AdvantageConfig, streams: dict[str, RewardConfig]) -> list[np.ndarray]:
    """[response] float32 for each completion, then for the demonstration where there is one."""
    answers = [*group.completions, *([] if group.demonstration is None else [group.demonstration])]
    lengths = [len(answer.token_ids) for answer in answers]
    scores, score = list(group.scores or ()), group.demonstration_score
    judged = score if score is not None and score.is_judged else None
    if all(stream.gamma == 1 for stream in streams.values()) and not any(score.dense for score in scores):
        values, value = group_advantages([s.reward for s in scores], judged.reward if judged else None, config)
        rows = zip([*values, value or 0.0], lengths, strict=False)
        return [np.full(length, value, dtype=np.float32) for value, length in rows]
    members = [*scores, judged] if config.include_demonstration and judged else scores
    returns = [token_returns(score, length, streams) for score, length in zip(members, lengths, strict=False)]
    advantages = centred_returns(returns, config) + [np.zeros(length) for length in lengths[len(members) :]]
    return [a[:length].astype(np.float32) for a, length in zip(advantages, lengths, strict=True)]


def group_statistics(groups: list[Group]) -> dict[str, float]:
    """What a step's scored groups look like. A mean or share over nothing is left out; counts are always there.

    accuracy                    share of completions that are correct; a failed verification is not correct
    groups/...                  shares of the groups with completions: all or none correct, or all rewards equal (no
                                signal for a group advantage without its demonstration)
    demonstration_solved        share of scored demonstrations that the verifier accepts
    reflection/...              keywords of second thoughts in the completions (metrics/reflection.py)
    response_length/...         tokens, over all completions, those that ended by themselves, those cut at the limit
    reward/<stream>             mean of a stream before its weight; reward_std/... its standard deviation over all
                                completions; reward_correct/..., reward_wrong/... its mean over the right and the others
    """
    groups_with_rollouts = [group for group in groups if group.completions]
    completions = [completion for group in groups for completion in group.completions]
    scores = [score for group in groups for score in group.scores or ()]
    demonstration_scores = [group.demonstration_score for group in groups if group.demonstration_score]
    correct_counts = [sum(score.correct is True for score in group.scores) for group in groups_with_rollouts]
    streams = sorted({name for score in scores for name in score.streams})
    shares = {
        "reward/mean": [score.reward for score in scores],
        **{f"reward/{name}": [s.streams[name] for s in scores] for name in streams},
        **{f"reward_correct/{name}": [s.streams[name] for s in scores if s.correct is True] for name in streams},
        **{f"reward_wrong/{name}": [s.streams[name] for s in scores if s.correct is not True] for name in streams},
        "accuracy": [score.correct is True for score in scores],
        "groups/all_correct": [
            count == len(group.completions) for count, group in zip(correct_counts, groups_with_rollouts, strict=True)
        ],
        "groups/none_correct": [count == 0 for count in correct_counts],
        "groups/without_signal": [len({score.reward for score in group.scores}) == 1 for group in groups_with_rollouts],
        "demonstration_solved": [score.correct is True for score in demonstration_scores],
        "truncated_share": [completion.finish_reason == "length" for completion in completions],
    }
    return {
        **{name: float(np.mean(values)) for name, values in shares.items() if values},
        **{f"reward_std/{name}": float(np.std(shares[f"reward/{name}"])) for name in streams},
        **_length_statistics(completions),
        **keyword_rates([c.text for c in completions], sum(len(c.token_ids) for c in completions)),
        "count/groups": float(len(groups)),
        "count/completions": float(len(completions)),
        "count/demonstrations": float(sum(group.demonstration is not None for group in groups)),
        "count/demonstrations_scored": float(len(demonstration_scores)),
    }


def _length_statistics(completions: list[Completion]) -> dict[str, float]:
    out = {}
    for name, reasons in (("", ("stop", "length")), ("stopped/", ("stop",)), ("truncated/", ("length",))):
        lengths = [len(c.token_ids) for c in completions if c.finish_reason in reasons]
        if lengths:
            out[f"response_length/{name}mean"] = float(np.mean(lengths))
            out[f"response_length/{name}max"] = float(max(lengths))
    return out
