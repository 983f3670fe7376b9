"""Which of a step's sequences an update learns from: HPT's gate for each prompt, ReLIFT's queue of unsolved ones."""

from collections.abc import Sequence

import numpy as np

from megatron_srft.config import HptConfig, ObjectiveConfig, ReliftConfig
from megatron_srft.sample import Group, TrainingSequence

Routed = tuple[list[TrainingSequence], dict[str, float]]
"""The sequences that are left, and metrics of what was done."""


class Router:
    """Over the steps of one stage. Objectives other than HPT and ReLIFT learn from every sequence."""

    def __init__(self, objective: ObjectiveConfig):
        self.objective = objective
        self.waiting: list[str] = []
        """ReLIFT: ids of unsolved prompts, the longest waiting first. One that comes again waits twice."""

    def select(self, sequences: Sequence[TrainingSequence], groups: Sequence[Group]) -> Routed:
        """What the step's updates learn from, of the sequences of these groups."""
        match self.objective:
            case HptConfig(gate=gate):
                return gated(sequences, groups, gate)
            case ReliftConfig():
                return self._queue_unsolved(sequences, groups)
        return list(sequences), {}

    def take(self) -> list[str]:
        """ReLIFT: the prompts whose demonstrations make a supervised update now; none while too few are waiting."""
        size = getattr(self.objective, "buffer_size", None)
        if size is None or len(self.waiting) < size:
            return []
        taken, self.waiting = self.waiting[:size], self.waiting[size:]
        return taken

    def _queue_unsolved(self, sequences: Sequence[TrainingSequence], groups: Sequence[Group]) -> Routed:
        """The completions; prompts without a right one are put in the queue if they have a demonstration."""
        unsolved = [group.prompt for group in groups if right_share(group) == 0]
        queued = [prompt.id for prompt in unsolved if prompt.demonstrations]
        self.waiting += queued
        metrics = {
            "relift/queued": float(len(queued)),
            "relift/without_demonstration": float(len(unsolved) - len(queued)),
            "relift/waiting": float(len(self.waiting)),
        }
        return [s for s in sequences if not s.is_demonstration], metrics

    def remark(self, stage_step: int, steps: int) -> str | None:
        """A sentence after the last of a stage's steps, if prompts are left over."""
        if not self.waiting or stage_step + 1 < steps:
            return None
        return (
            f"{len(self.waiting)} prompts without a right answer were still waiting, and their demonstrations have not "
            f"been learned from; a lower objective.buffer_size ({self.objective.buffer_size}) leaves fewer"
        )

    # ------------------------------------------------------------ checkpoints

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint has to hold; nothing where no prompt is waiting."""
        return {"waiting": np.array(self.waiting, np.str_)} if self.waiting else {}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` gave."""
        self.waiting = arrays["waiting"].tolist() if "waiting" in arrays else []


def gated(sequences: Sequence[TrainingSequence], groups: Sequence[Group], gate: float) -> Routed:
    """HPT (arXiv 2509.04419): of each prompt either the demonstration or the completions.

    The demonstration where no more than a share `gate` of the completions is right (a failed verification is not), the
    completions elsewhere, and where there is no demonstration.

    Metrics: hpt/supervised_prompts, hpt/policy_gradient_prompts, of the latter hpt/without_demonstration (at or under
    the gate), hpt/dropped_completions.
    """
    under = [right_share(group) <= gate for group in groups]
    taught = [low and group.demonstration is not None for low, group in zip(under, groups, strict=True)]
    kept = [s for s in sequences if s.is_demonstration == taught[s.group]]
    supervised = sum(taught)
    return kept, {
        "hpt/supervised_prompts": float(supervised),
        "hpt/policy_gradient_prompts": float(len(groups) - supervised),
        "hpt/without_demonstration": float(sum(under) - supervised),
        "hpt/dropped_completions": float(sum(taught[s.group] and not s.is_demonstration for s in sequences)),
    }


def right_share(group: Group) -> float:
    """Share of the completions that the verifier called right."""
    assert group.scores, f"group of prompt {group.prompt.id} is not scored"
    return sum(score.correct is True for score in group.scores) / len(group.scores)
