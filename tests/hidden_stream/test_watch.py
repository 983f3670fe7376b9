"""The head against the verifier, on scores written out by hand."""

from statistics import correlation

import numpy as np
import pytest
from advantage_cases import group, score

from megatron_srft.hidden_stream.merge import HiddenScores
from megatron_srft.hidden_stream.watch import STEPS, Watch, figures
from megatron_srft.sample import Score

FAILED = Score(reward=0.0, correct=None, status="timeout")


def judged(*verdicts: bool | None):
    return group([1] * len(verdicts), [FAILED if v is None else score(float(v)) for v in verdicts])


def found(*scores: float | None) -> HiddenScores:
    return HiddenScores(completions=scores)


def test_figures_of_two_groups():
    """Within the first group the right answer beats one wrong one of two, in the second it ties with the wrong one."""
    groups = [judged(True, False, False), judged(True, False), judged(False, False)]
    scores = [found(1.0, 0.0, 2.0), found(-1.0, -1.0), found(4.0, 5.0)]
    got = figures(groups, scores)
    assert got["swift/auroc"] == pytest.approx(0.5) and got["swift/auroc_groups"] == 2.0
    values, verdicts = [1.0, 0.0, 2.0, -1.0, -1.0, 4.0, 5.0], [1, 0, 0, 1, 0, 0, 0]
    assert got["swift/correlation"] == pytest.approx(correlation(values, verdicts), abs=1e-12)
    assert (got["swift/score_correct"], got["swift/score_wrong"]) == (0.0, 2.0)
    assert got["swift/score"] == pytest.approx(np.mean(values))
    assert got["swift/unscored_share"] == 0.0


def test_answers_without_a_verdict_or_without_a_score_are_left_out():
    got = figures([judged(True, None, False, False)], [found(1.0, -9.0, 0.0, None)])
    assert got["swift/auroc"] == 1.0 and got["swift/correlation"] == pytest.approx(1.0)
    assert got["swift/score"] == pytest.approx(-8 / 3)  # the one without a verdict has a score
    assert (got["swift/score_correct"], got["swift/score_wrong"], got["swift/unscored_share"]) == (1.0, 0.0, 0.25)


def test_figures_of_nothing_are_left_out():
    all_wrong = figures([judged(False, False)], [found(1.0, 2.0)])
    assert {"swift/auroc", "swift/correlation", "swift/score_correct"}.isdisjoint(all_wrong)
    assert all_wrong["swift/auroc_groups"] == 0.0
    unscored = figures([judged(True, False)], [found(None, None)])
    assert unscored == {"swift/unscored_share": 1.0, "swift/auroc_groups": 0.0}
    unverified = figures([group([1], [Score(reward=0.0)])], [found(3.0)])
    assert unverified == {"swift/score": 3.0, "swift/unscored_share": 0.0, "swift/auroc_groups": 0.0}


RIGHT_ORDER = figures([judged(True, False)], [found(1.0, 0.0)])
WRONG_ORDER = figures([judged(True, False)], [found(0.0, 1.0)])


def test_it_tells_once_when_wrong_answers_score_higher():
    watch = Watch()
    told = [watch.look(step) for step in [RIGHT_ORDER] * 5 + [WRONG_ORDER] * 7]
    # The last ten steps hold more wrong ones than right ones from the eleventh step on.
    assert [number for number, sentence in enumerate(told) if sentence] == [10]
    assert "AUROC within groups 0.40 (chance is 0.50), correlation with the verdict -0.20" in told[10]
    assert "swift.refresh_every" in told[10] and "swift.weight" in told[10]


def test_groups_count_alike_in_the_warning():
    """One step of nine groups in the right order outweighs nine of one in the wrong one; the correlation does not."""
    many = figures([judged(True, False)] * 9, [found(1.0, 0.0)] * 9)
    watch = Watch()
    told = [watch.look(step) for step in [WRONG_ORDER] * 9 + [many]]
    assert told[-1] is not None and "AUROC within groups 0.50" in told[-1] and "verdict -0.80" in told[-1]


def test_it_is_silent_about_a_good_head_and_about_nothing_to_compare():
    watch = Watch()
    assert [watch.look(RIGHT_ORDER) for _ in range(2 * STEPS)] == [None] * (2 * STEPS)
    watch = Watch()
    alike = figures([judged(False, False)], [found(1.0, 2.0)])
    assert [watch.look(alike) for _ in range(2 * STEPS)] == [None] * (2 * STEPS)
