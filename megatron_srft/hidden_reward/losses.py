"""Losses of the hidden-state reward: from scores R and verdicts y (1 right, 0 wrong) to one number.

SWIFT (arXiv 2505.12225) trains with the first and names the others:

    bce        log(1 + exp(-(2y - 1) R))                          mean over responses (R is the logit of y = 1)
    hinge      max(0, 1 - (2y - 1) R)                             mean over responses
    pairwise   -log sigmoid(R+ - R-)                              mean over all pairs of a right and a wrong response to
                                                                  one question; its code calls this dpo
    infonca    -sum_i p_i log softmax(R)_i                        mean over questions
    nca        -sum_i [p_i log sigmoid(R_i) + log sigmoid(-R_i) / K]
                                                                  mean over questions

where i runs over the K responses to a question and p = softmax(y / alpha); the last two are Noise Contrastive
Alignment's (arXiv 2402.05369) with the verdict as explicit reward and R itself in place of a log-ratio of policies.
pairwise is that of Bradley and Terry; there is no reference policy in it, unlike in DPO (objectives/dpo.py).

Deviations from the released code (aster2024/SWIFT, train/extract_train.py), in what is averaged and not in a formula:
its batches of pairs and of single responses are drawn from all questions, so that a question lies in training and in
validation at once; here a batch is made of whole questions. And its mean is over what is in a batch, with a smaller
last batch counting as much; here every mean is over `Totals` that the caller counts, so a validation loss does not
depend on how it was cut into batches.

A question is whole in the responses given. Each loss is a sum divided by a total over all ranks and portions of an
update, so their shares add up to the update's loss however its questions were dealt out.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

LossName = Literal["bce", "hinge", "pairwise", "infonca", "nca"]

ALIASES = {"dpo": "pairwise", "ce": "bce"}
"""The released code's names."""

WITHIN_QUESTIONS = ("pairwise", "infonca", "nca")
"""Losses that compare the responses to one question. From one with a single verdict they learn nothing: pairwise has
no pair there, the other two only pull its scores together."""

ALPHA = 0.01
"""The released code's temperature of p: with verdicts, all the weight lies on the right responses in equal parts."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What an update's losses are averaged over, on all ranks together."""

    responses: int
    questions: int
    pairs: int
    """Of a right and a wrong response to one question."""

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            responses=self.responses + other.responses,
            questions=self.questions + other.questions,
            pairs=self.pairs + other.pairs,
        )

    def of(self, name: LossName) -> int:
        """The one that this loss is averaged over."""
        if name in ("bce", "hinge"):
            return self.responses
        return self.pairs if name == "pairwise" else self.questions


def loss_name(text: str) -> LossName:
    """The loss that the user calls by this name. Raises ValueError when there is none."""
    name = ALIASES.get(text, text)
    if name not in get_args(LossName):
        raise ValueError(f"there is no loss {text!r}; choose {', '.join(get_args(LossName))} (dpo is pairwise)")
    return name


def count_totals(labels: Tensor, questions: Tensor) -> Totals:
    """Of whole questions.

    Args:
        labels: [responses] bool.
        questions: [responses] int64; the same number for the responses to one question.
    """
    _, place = questions.unique(return_inverse=True)
    sizes = torch.bincount(place)
    right = torch.bincount(place, weights=labels.double()).long()
    return Totals(responses=len(labels), questions=len(sizes), pairs=int((right * (sizes - right)).sum()))


def loss(
    name: LossName, scores: Tensor, labels: Tensor, questions: Tensor, totals: Totals, *, alpha: float = ALPHA
) -> Tensor:
    """These responses' share of the update's loss: a scalar, differentiable in the scores; 0 where there is nothing.

    Args:
        scores: [responses].
        labels: [responses] bool, as verified.
        questions: [responses] int64; a question's responses are all here.
        totals: of the whole update.
        alpha: of infonca and nca.
    """
    right = labels.to(scores.dtype)
    match name:
        case "bce":
            total = binary_cross_entropy_with_logits(scores, right, reduction="sum")
        case "hinge":
            total = (1 - (2 * right - 1) * scores).clamp_min(0).sum()
        case "pairwise":
            total = _pairwise(scores, labels, questions)
        case "infonca":
            p, same = _targets(right, questions, alpha)
            total = -(p * (scores - _log_sum(scores, same))).sum()
        case "nca":
            p, same = _targets(right, questions, alpha)
            total = -(p * logsigmoid(scores) + logsigmoid(-scores) / same.sum(dim=1)).sum()
    return total / max(totals.of(name), 1)


# A question has a handful of responses, and few questions are here at a time: all pairs of responses fit in a matrix,
# and its sums run in the same order every time, which sums by index do not on a GPU.


def _pairwise(scores: Tensor, labels: Tensor, questions: Tensor) -> Tensor:
    pairs = (questions[:, None] == questions) & labels[:, None] & ~labels
    margins = scores[:, None] - scores
    return -torch.where(pairs, logsigmoid(margins), 0).sum()


def _targets(right: Tensor, questions: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """([responses] softmax of y / alpha within each question, [responses, responses] who shares a question)."""
    same = questions[:, None] == questions
    reward = right / alpha
    return (reward - _log_sum(reward, same)).exp(), same


def _log_sum(values: Tensor, same: Tensor) -> Tensor:
    """[responses] log-sum-exp over the response's question."""
    return torch.where(same, values, -torch.inf).logsumexp(dim=1)
