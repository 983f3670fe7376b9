"""Figures of quality: by hand with ties, pair by pair, and scikit-learn's own where it is installed."""

import numpy as np
import pytest

from megatron_srft.hidden_reward.quality import auroc, calibration_error, quality, reliability, sigmoid, within_auroc

SCORES = np.array([0.5, 0.5, -1.0, 2.0, 2.0, 1.0, 0.0])
LABELS = np.array([True, False, False, True, True, False, True])
QUESTIONS = np.array([4, 4, 4, 1, 1, 9, 9])
LENGTHS = np.array([3, 3, 9, 1, 2, 5, 7])


def test_auroc_by_hand():
    # question 4: the pairs are a tie and a win, 1.5 of 2; question 1 has one verdict; question 9: a loss
    assert within_auroc(SCORES, LABELS, QUESTIONS) == (pytest.approx((0.75 + 0.0) / 2), 2)
    # right 0.5, 2, 2, 0 against wrong 0.5, -1, 1: 1.5 + 3 + 3 + 1 of 12
    assert auroc(SCORES, LABELS) == pytest.approx(8.5 / 12)
    assert auroc(SCORES[:1], LABELS[:1]) is None
    assert within_auroc(SCORES[3:5], LABELS[3:5], QUESTIONS[3:5]) == (None, 0)


def test_length_by_hand():
    found = quality(SCORES, LABELS, QUESTIONS, LENGTHS)
    assert found.within_auroc_by_length == pytest.approx((0.75 + 0.0) / 2)
    # right 3, 1, 2, 7 against wrong 3, 9, 5, shorter is better: 2.5 + 3 + 3 + 1
    assert found.overall_auroc_by_length == pytest.approx(9.5 / 12)
    assert (found.responses, found.right, found.questions, found.questions_with_both) == (7, 4, 3, 2)


def test_calibration_by_hand():
    probabilities, labels = np.array([0.0, 0.05, 0.15, 1.0, 0.95]), np.array([0, 1, 1, 1, 0], bool)
    bins = reliability(probabilities, labels)
    assert [one.responses for one in bins] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert (bins[0].mean_probability, bins[0].share_right) == (pytest.approx(0.025), 0.5)
    assert bins[5].mean_probability is None
    assert calibration_error(bins) == pytest.approx((2 * 0.475 + 0.85 + 2 * 0.475) / 5)


def made_up(decimals: int):
    """Forty questions; with few decimals there are ties."""
    random = np.random.default_rng(decimals)
    questions = random.integers(0, 40, 400)
    labels = random.random(400) < 0.3
    return np.round(random.normal(size=400) + labels, decimals), labels, questions


def pair_by_pair(scores, labels) -> float:
    margins = scores[labels][:, None] - scores[~labels]
    return float(np.mean((1 + np.sign(margins)) / 2))


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_auroc_counts_pairs(decimals):
    scores, labels, questions = made_up(decimals)
    found = quality(scores, labels, questions, np.ones(400))
    assert found.overall_auroc == pytest.approx(pair_by_pair(scores, labels), abs=1e-12)
    parts = [(scores[questions == q], labels[questions == q]) for q in range(40)]
    own = [pair_by_pair(s, y) for s, y in parts if 0 < y.sum() < len(y)]
    assert (found.within_auroc, found.questions_with_both) == (pytest.approx(np.mean(own), abs=1e-12), len(own))
    assert found.overall_auroc_by_length == found.within_auroc_by_length == 0.5


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_the_figures_are_scikit_learns(decimals):
    metrics = pytest.importorskip("sklearn.metrics", reason="pip install -r requirements/probe.txt")
    calibration = pytest.importorskip("sklearn.calibration")
    scores, labels, questions = made_up(decimals)
    found = quality(scores, labels, questions, np.ones(400))
    probabilities = 1 / (1 + np.exp(-scores))
    assert found.overall_auroc == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert found.brier == pytest.approx(metrics.brier_score_loss(labels, probabilities), abs=1e-12)
    assert found.accuracy == metrics.accuracy_score(labels, scores > 0)
    curve = [(one.share_right, one.mean_probability) for one in found.bins if one.responses]
    expected = calibration.calibration_curve(labels, probabilities, n_bins=10)
    np.testing.assert_allclose(np.transpose(curve), expected, atol=1e-12)


def test_scores_of_any_size_are_probabilities():
    np.testing.assert_array_equal(sigmoid(np.array([-1e9, 0.0, 1e9])), [0.0, 0.5, 1.0])


def test_nothing_has_no_figures():
    found = quality(np.zeros(0), np.zeros(0, bool), np.zeros(0, int), np.zeros(0))
    assert (found.responses, found.within_auroc, found.ece, found.brier, found.accuracy) == (0, None, None, None, None)
