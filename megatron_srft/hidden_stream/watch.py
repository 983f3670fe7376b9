"""Is a hidden-state reward still a sign of right answers, or has the policy learned to please its head?

The head was trained on a verifier's verdicts, and the verifier goes on judging every answer: as long as the head is
any good, answers that it calls right score higher than the others to the same question.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from megatron_srft.hidden_reward.quality import within_auroc
from megatron_srft.hidden_stream.merge import HiddenScores
from megatron_srft.sample import Group

STEPS = 10
"""Latest steps that the warning looks at."""


def figures(groups: Sequence[Group], found: Sequence[HiddenScores]) -> dict[str, float]:
    """The head's scores (as they are, before normalisation) against the verdicts, over a step's completions.

    swift/score                               mean
    swift/score_correct, swift/score_wrong    over the right answers, and over the wrong ones
    swift/correlation                         Pearson's, of score and verdict (1 right, 0 wrong)
    swift/auroc, swift/auroc_groups           within groups that have both, mean over them; and their number
    swift/unscored_share                      completions without a token to score

    Answers without a verdict are in the first and the last only. A figure of nothing is left out.
    """
    pairs = [
        (number, score, verdict.correct if verdict.is_judged else None)
        for number, (group, scores) in enumerate(zip(groups, found, strict=True))
        for score, verdict in zip(scores.completions, group.scores or (), strict=True)
    ]
    scored = [(number, score, correct) for number, score, correct in pairs if score is not None]
    judged = [pair for pair in scored if pair[2] is not None]
    questions = np.array([number for number, _, _ in judged])
    scores, right = np.array([score for _, score, _ in judged]), np.array([correct for *_, correct in judged], bool)
    auroc, contrasted = within_auroc(scores, right, questions) if judged else (None, 0)
    shares = {
        "swift/score": [score for _, score, _ in scored],
        "swift/score_correct": scores[right] if judged else [],
        "swift/score_wrong": scores[~right] if judged else [],
        "swift/unscored_share": [score is None for _, score, _ in pairs],
    }
    out = {name: float(np.mean(values)) for name, values in shares.items() if len(values)}
    if judged and scores.std() > 0 and right.std() > 0:
        out["swift/correlation"] = float(np.corrcoef(scores, right)[0, 1])
    if auroc is not None:
        out |= {"swift/auroc": auroc}
    return out | {"swift/auroc_groups": float(contrasted)}


class Watch:
    """Tells once when the latest steps say that the head rewards wrong answers. A resumed run starts anew."""

    def __init__(self):
        self.latest: deque[dict[str, float]] = deque(maxlen=STEPS)
        self.told = False

    def look(self, found: dict[str, float]) -> str | None:
        """A sentence, the first time that it is called for.

        Args:
            found: `figures` of one more step.
        """
        self.latest.append(found)
        groups = sum(step["swift/auroc_groups"] for step in self.latest)
        correlations = [step["swift/correlation"] for step in self.latest if "swift/correlation" in step]
        if self.told or len(self.latest) < STEPS or not groups or not correlations:
            return None
        auroc = sum(step.get("swift/auroc", 0.0) * step["swift/auroc_groups"] for step in self.latest) / groups
        correlation = float(np.mean(correlations))
        if auroc >= 0.5 and correlation >= 0:
            return None
        self.told = True
        return (
            f"over the last {STEPS} steps the hidden-state reward does not tell right answers from wrong ones: AUROC "
            f"within groups {auroc:.2f} (chance is 0.50), correlation with the verdict {correlation:.2f}; the policy "
            "may have learned to please its head. Set rewards: swift.refresh_every (or lower it), lower swift.weight, "
            "or train a new head"
        )
