"""Advantages of a group, and the training sequences made of it.

With rewards R of a group's members (its completions, and its demonstration where that counts as one):

    group           A_i = R_i - mean(R)                        GRPO (arXiv 2402.03300), SRFT eq. 7, LUFFY eq. 4
    leave_one_out   A_i = R_i - mean of the other members      RLOO (arXiv 2402.14740)

divided by std(R) + std_epsilon under `normalize_std`. The standard deviation is the unbiased one (n - 1), as torch.std
and hence verl and LUFFY compute it; the papers do not say. A group of one, and a group of equal rewards, has
advantage exactly 0.
"""

import numpy as np

from megatron_srft.config import AdvantageConfig
from megatron_srft.sample import Completion, Group, TrainingSequence


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


def to_sequences(groups: list[Group], config: AdvantageConfig) -> list[TrainingSequence]:
    """Everything the step trains on: group by group, the completions in order, then the demonstration.

    A demonstration outside its group's advantage (left out by the config, truncated and hence without a score, or not
    judged because the verifier failed) has advantage 0: it still teaches through a supervised term.
    """
    return [sequence for index, group in enumerate(groups) for sequence in _group_sequences(group, index, config)]


def _group_sequences(group: Group, index: int, config: AdvantageConfig) -> list[TrainingSequence]:
    scores = group.scores or ()
    assert len(scores) == len(group.completions), f"group of prompt {group.prompt.id} is not scored"
    demonstration_score = group.demonstration_score
    is_judged = demonstration_score is not None and demonstration_score.is_judged
    advantages, demonstration_advantage = group_advantages(
        [score.reward for score in scores], demonstration_score.reward if is_judged else None, config
    )
    sequences = [
        TrainingSequence(
            token_ids=np.concatenate([group.prompt.token_ids, completion.token_ids]),
            prompt_length=len(group.prompt.token_ids),
            is_demonstration=False,
            advantages=np.full(len(completion.token_ids), advantage, dtype=np.float32),
            correct=score.correct is True,
            group=index,
            rollout_logprobs=completion.rollout_logprobs,
        )
        for completion, score, advantage in zip(group.completions, scores, advantages, strict=True)
    ]
    if group.demonstration is not None:
        tokens = group.demonstration.token_ids
        sequences.append(
            TrainingSequence(
                token_ids=np.concatenate([group.prompt.token_ids, tokens]),
                prompt_length=len(group.prompt.token_ids),
                is_demonstration=True,
                advantages=np.full(len(tokens), demonstration_advantage or 0.0, dtype=np.float32),
                correct=demonstration_score is not None and demonstration_score.correct is True,
                group=index,
            )
        )
    return sequences


def group_statistics(groups: list[Group]) -> dict[str, float]:
    """What a step's scored groups look like. A mean or share over nothing is left out; counts are always there.

    accuracy                    share of completions that are correct; a failed verification is not correct
    groups/...                  shares of the groups with completions: all or none correct, or all rewards equal (no
                                signal for a group advantage without its demonstration)
    demonstration_solved        share of scored demonstrations that the verifier accepts
    response_length/...         tokens, over all completions, those that ended by themselves, those cut at the limit
    reward/<stream>             mean of a stream before its weight
    """
    groups_with_rollouts = [group for group in groups if group.completions]
    completions = [completion for group in groups for completion in group.completions]
    scores = [score for group in groups for score in group.scores or ()]
    demonstration_scores = [group.demonstration_score for group in groups if group.demonstration_score]
    correct_counts = [sum(score.correct is True for score in group.scores) for group in groups_with_rollouts]
    streams = sorted({name for score in scores for name in score.streams})
    shares = {
        "reward/mean": [score.reward for score in scores],
        **{f"reward/{name}": [s.streams[name] for s in scores if name in s.streams] for name in streams},
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
        **_length_statistics(completions),
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
