"""Verify a step's answers, each rank its share."""

from dataclasses import replace

from megatron_srft import distributed
from megatron_srft.distributed import rank, size
from megatron_srft.rewards.scorer import Scorer
from megatron_srft.sample import Group


def score_over_ranks(
    scorer: Scorer, groups: list[Group], world: distributed.Group
) -> tuple[list[Group], dict[str, float]]:
    """The groups with scores, the same on every rank, and how many answers were right, wrong, doubtful (all ranks).

    Args:
        groups: the same list on every rank.
    """
    before = scorer.accounting()
    share = scorer.score(groups[rank(world) :: size(world)])
    counts = {name: value - before[name] for name, value in scorer.accounting().items()}
    everyone = distributed.all_gather_objects(([(g.scores, g.demonstration_score) for g in share], counts), world)
    shares = [scores for scores, _ in everyone]
    ordered = [shares[i % size(world)][i // size(world)] for i in range(len(groups))]
    scored = [
        replace(group, scores=scores, demonstration_score=of_demonstration)
        for group, (scores, of_demonstration) in zip(groups, ordered, strict=True)
    ]
    return scored, {f"accounting/{name}": sum(found[name] for _, found in everyone) for name in counts}
