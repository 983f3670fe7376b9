"""Who is trained on and who validates: the split by question, batches of whole questions, and what is refused."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_srft.hidden_reward.losses import WITHIN_QUESTIONS, LossName, Totals, count_totals
from megatron_srft.hidden_reward.states import Question


@dataclass(frozen=True, kw_only=True, eq=False)
class Responses:
    """What was verified, in the order of the states."""

    labels: np.ndarray
    """[responses] bool."""
    questions: np.ndarray
    """[responses] int64; the same number for all responses to a question."""
    names: Sequence[str]
    """[responses] what to call each in a message."""


def split(questions: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation responses, each question whole in one of them.

    Raises:
        ValueError: there is only one question.
    """
    known = np.unique(questions)
    if len(known) < 2:
        raise ValueError(f"{len(known)} question with verified responses cannot be split into training and validation")
    mixed = np.random.default_rng((seed, 0)).permutation(known)
    held_out = mixed[: min(max(round(share * len(known)), 1), len(known) - 1)]
    is_held_out = np.isin(questions, held_out)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def questions_of(responses: Responses, part: np.ndarray) -> list[Question]:
    """The part's responses by question, questions in ascending order."""
    order = part[np.argsort(responses.questions[part], kind="stable")]
    _, starts = np.unique(responses.questions[order], return_index=True)
    return [tuple(question.tolist()) for question in np.split(order, starts[1:]) if len(question)]


def batches(questions: Sequence[Question], size: int, seed: tuple[int, int]) -> list[list[Question]]:
    """All questions in a random order, as many to a batch as have together at most `size` responses, at least one."""
    found: list[list[Question]] = []
    room = 0
    for place in np.random.default_rng(seed).permutation(len(questions)):
        question = questions[place]
        if not found or len(question) > room:
            found.append([])
            room = size
        found[-1].append(question)
        room -= len(question)
    return found


def portions(questions: Sequence[Question], lengths: np.ndarray, tokens: int) -> list[list[int]]:
    """Responses of neighbouring questions, together at most this many tokens, unless one question has more."""
    found: list[list[int]] = []
    room = 0
    for question in questions:
        size = int(lengths[list(question)].sum())
        if not found or size > room:
            found.append([])
            room = tokens
        found[-1] += question
        room -= size
    return found


def totals_of(responses: Responses, part: Sequence[int] | np.ndarray) -> Totals:
    """Of whole questions."""
    part = np.asarray(part, np.int64)
    return count_totals(torch.from_numpy(responses.labels[part]), torch.from_numpy(responses.questions[part]))


def teaching(responses: Responses, part: np.ndarray, loss: LossName) -> np.ndarray:
    """The training part without what has no gradient: under pairwise, questions with one verdict."""
    if loss != "pairwise":
        return part
    kept = [question for question in questions_of(responses, part) if totals_of(responses, question).pairs]
    return np.sort(np.array(flat(kept), np.int64))


def flat(questions: Sequence[Question]) -> list[int]:
    """Responses of all questions, in their order."""
    return [index for question in questions for index in question]


def check_labels(responses: Responses, train: np.ndarray, validation: np.ndarray, loss: LossName) -> None:
    """Refuse what no head can be learnt from, before anything is computed.

    Raises:
        ValueError: the verdicts are all the same, or the loss compares within questions and none has both.
    """
    for name, part in (("training", train), ("validation", validation)):
        labels = responses.labels[part]
        if loss in WITHIN_QUESTIONS and not totals_of(responses, part).pairs:
            raise ValueError(
                f"no question of the {name} part ({len(part)} responses) has both right and wrong responses, and loss "
                f"{loss} compares responses to one question; sample more responses per question, or use loss bce"
            )
        if name == "training" and (labels.all() or not labels.any()):
            raise ValueError(
                f"all {len(part)} responses of the training part are {'right' if labels.all() else 'wrong'}, and a "
                "reward is learnt from both; take rollouts of problems that the model solves sometimes"
            )
