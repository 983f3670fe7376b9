"""DAPO's dynamic sampling: a step keeps groups with both right and wrong answers (arXiv 2503.14476, equation 11)."""

from collections.abc import Callable

from megatron_srft.sample import Group


def refill(
    groups: list[Group], sample: Callable[[], list[Group]], wanted: int, max_draws: int
) -> tuple[list[Group], dict[str, float]]:
    """Groups with right and wrong answers, drawing more until there are enough.

    Args:
        groups: the step's first draw, scored.
        sample: draws, samples and scores as many again, of the prompts that come next.
        wanted: groups of a step; what is beyond them is dropped.
        max_draws: draws of a step, the first one included. Then the step goes on with what it has; with nothing, it
            keeps the last draw, which has no advantage to learn from.

    Returns:
        (groups, metrics): dynamic/draws, dynamic/groups (all that were sampled), dynamic/response_tokens (of all that
        were sampled), dynamic/all_correct and
        dynamic/none_correct (dropped for it), dynamic/surplus (dropped unused), dynamic/accuracy (over all completions
        that were sampled; that of the step's own groups is biased towards one half).
    """
    sampled, latest, draws = list(groups), groups, 1
    while sum(is_mixed(group) for group in sampled) < wanted and draws < max_draws:
        latest = sample()
        sampled += latest
        draws += 1
    mixed = [group for group in sampled if is_mixed(group)]
    verdicts = [score.correct is True for group in sampled for score in group.scores or ()]
    metrics = {
        "dynamic/draws": float(draws),
        "dynamic/groups": float(len(sampled)),
        "dynamic/response_tokens": float(sum(len(c.token_ids) for group in sampled for c in group.completions)),
        "dynamic/all_correct": float(sum(correct(group) == len(group.completions) for group in sampled)),
        "dynamic/none_correct": float(sum(correct(group) == 0 for group in sampled)),
        "dynamic/surplus": float(max(0, len(mixed) - wanted)),
        "dynamic/accuracy": sum(verdicts) / max(1, len(verdicts)),
    }
    return mixed[:wanted] or latest[:wanted], metrics


def correct(group: Group) -> int:
    return sum(score.correct is True for score in group.scores or ())


def is_mixed(group: Group) -> bool:
    return 0 < correct(group) < len(group.completions)
