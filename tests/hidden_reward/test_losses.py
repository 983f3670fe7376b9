"""Losses of the hidden-state reward: numbers by hand, float64 loops over the formulas, and any split of questions."""

import math

import pytest
import torch
from torch.nn.functional import log_softmax

from megatron_srft.hidden_reward.losses import Totals, count_totals, loss, loss_name

NAMES = ["bce", "hinge", "pairwise", "infonca", "nca"]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


HAND = {
    # scores 2, -1 right; 0.5 wrong; then a question with one wrong response of score 3
    "bce": (softplus(-2) + softplus(1) + softplus(0.5) + softplus(3)) / 4,
    "hinge": (0 + 2 + 1.5 + 4) / 4,
    "pairwise": (softplus(-1.5) + softplus(1.5)) / 2,
    "infonca": (math.log(sum(map(math.exp, (2, -1, 0.5)))) - 0.5 + 0) / 2,
    "nca": (
        (softplus(-2) + softplus(1)) / 2 + (softplus(2) + softplus(-1) + softplus(0.5)) / 3 + softplus(-3) + softplus(3)
    )
    / 2,
}


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name):
    scores = torch.tensor([2.0, 3.0, -1.0, 0.5], dtype=torch.float64)
    labels, questions = torch.tensor([True, False, True, False]), torch.tensor([7, 2, 7, 7])
    totals = count_totals(labels, questions)
    assert totals == Totals(responses=4, questions=2, pairs=2)
    assert loss(name, scores, labels, questions, totals).item() == pytest.approx(HAND[name], abs=1e-12)


def by_formula(name: str, scores, labels, questions, alpha: float):
    """The docstring's formulas, one question after the other."""
    sign = 2 * labels.double() - 1
    if name == "bce":
        return (1 + (-sign * scores).exp()).log().mean()
    if name == "hinge":
        return torch.stack([max(0 * r, 1 - s * r) for r, s in zip(scores, sign, strict=True)]).mean()
    terms = []
    for question in questions.unique():
        own = questions == question
        r, y = scores[own], labels[own].double()
        p = (y / alpha).softmax(0)
        if name == "pairwise":
            terms += [-(a - b).sigmoid().log() for a in r[y == 1] for b in r[y == 0]]
        elif name == "infonca":
            terms.append(-(p * log_softmax(r, 0)).sum())
        else:
            terms.append(-(p * r.sigmoid().log() + (-r).sigmoid().log() / len(r)).sum())
    return torch.stack(terms).mean()


def responses(seed: int = 0):
    """Five questions with 1 to 8 responses each, in a mixed order."""
    generator = torch.Generator().manual_seed(seed)
    questions = torch.repeat_interleave(torch.arange(5), torch.tensor([8, 1, 4, 2, 6]))
    questions = questions[torch.randperm(len(questions), generator=generator)]
    labels = torch.rand(len(questions), generator=generator) < 0.4
    scores = torch.randn(len(questions), generator=generator, dtype=torch.float64) * 3
    return scores, labels, questions


@pytest.mark.parametrize("alpha", [0.01, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_formula(name, alpha):
    scores, labels, questions = responses()
    own, other = (scores.clone().requires_grad_() for _ in range(2))
    found = loss(name, own, labels, questions, count_totals(labels, questions), alpha=alpha)
    expected = by_formula(name, other, labels, questions, alpha)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(own.grad, other.grad, atol=1e-12, rtol=1e-12)
    single = scores.float().requires_grad_()
    loss(name, single, labels, questions, count_totals(labels, questions), alpha=alpha).backward()
    torch.testing.assert_close(single.grad.double(), other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_questions_add_up_to_the_whole(name):
    scores, labels, questions = responses(1)
    totals = count_totals(labels, questions)
    parts = [questions < 2, questions == 2, questions > 2, questions > 9]
    assert (
        sum((count_totals(labels[p], questions[p]) for p in parts), Totals(responses=0, questions=0, pairs=0)) == totals
    )
    shares = [loss(name, scores[p], labels[p], questions[p], totals) for p in parts]
    torch.testing.assert_close(sum(shares), loss(name, scores, labels, questions, totals), atol=1e-12, rtol=1e-12)
    assert shares[-1].item() == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_scores_far_out_have_finite_losses_and_gradients(name):
    scores = torch.tensor([1e4, -1e4, 80.0, -80.0]).requires_grad_()
    labels, questions = torch.tensor([False, True, True, False]), torch.zeros(4, dtype=torch.int64)
    found = loss(name, scores, labels, questions, count_totals(labels, questions))
    found.backward()
    assert found.isfinite() and scores.grad.isfinite().all() and scores.grad[0] > 0


def test_a_question_with_one_verdict_teaches_pairs_nothing():
    scores = torch.randn(3, requires_grad=True)
    labels, questions = torch.tensor([True, True, True]), torch.zeros(3, dtype=torch.int64)
    loss("pairwise", scores, labels, questions, Totals(responses=3, questions=1, pairs=5)).backward()
    assert scores.grad.eq(0).all()


def test_names_of_the_released_code_and_none():
    assert (loss_name("dpo"), loss_name("ce"), loss_name("nca")) == ("pairwise", "bce", "nca")
    with pytest.raises(ValueError, match="there is no loss 'mse'; choose bce, hinge, pairwise, infonca, nca"):
        loss_name("mse")
