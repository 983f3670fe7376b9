"""What a step's scored groups look like."""

import numpy as np

from megatron_srft.metrics.reflection import keyword_rates
from megatron_srft.sample import Completion, Group


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
        "count/pairs": float(sum(group.prompt.preference is not None for group in groups)),
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
