"""Training of a reward head from verified responses, as SWIFT does it (arXiv 2505.12225), over any `States`.

    fitted = fit(states, responses, FitSettings())

Where the released code (aster2024/SWIFT, train/extract_train.py) differs from the paper or from itself, this is done:

- the split is by question: with one by response, siblings of a question lie on both sides, and a head that knows the
  question instead of the answer looks good;
- the head that is returned is the one with the least validation loss; the released code returns the last one, because
  its best one is a reference to the model that goes on training;
- a batch is made of whole questions for every loss, 16 responses unless one question has more.

A step takes its gradient portion by portion (`States.portion_tokens`), so no more states are held at a time. Every rank
has all labels and the whole head, and makes the same steps; two numbers per token and one gradient cross ranks. With
the same seed the batches and the first weights are the same under any layout, and the figures up to rounding.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_srft.hidden_reward import losses
from megatron_srft.hidden_reward.descent import Descent
from megatron_srft.hidden_reward.losses import LossName
from megatron_srft.hidden_reward.parametrisation import Parametrisation
from megatron_srft.hidden_reward.parts import (
    Responses,
    batches,
    check_labels,
    questions_of,
    split,
    teaching,
)
from megatron_srft.hidden_reward.quality import Quality, quality
from megatron_srft.hidden_reward.standardise import standardisation
from megatron_srft.hidden_reward.states import States


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """The defaults are the paper's. Raises ValueError for a value out of range, naming the option."""

    loss: LossName = "bce"
    alpha: float = losses.ALPHA
    """Of infonca and nca."""
    gate: bool = True
    standardise: bool = False
    """Train on standardised columns; the head that comes out reads plain states all the same."""
    lr: float = 1e-4
    weight_decay: float = 1e-5
    epochs: int = 40
    """At most."""
    patience: int = 3
    """Epochs in a row without a lower validation loss that end training."""
    batch: int = 16
    """Responses to a step, in whole questions."""
    validation_share: float = 0.2
    """Of the questions."""
    seed: int = 42
    """Of the split, the first weights, and the order of questions."""

    def __post_init__(self):
        for name, fits, what in (
            ("alpha", self.alpha > 0, "above 0"),
            ("lr", self.lr > 0, "above 0"),
            ("weight-decay", self.weight_decay >= 0, "at least 0"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("patience", self.patience >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("validation-share", 0 < self.validation_share < 1, "above 0 and below 1"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
        ):
            if not fits:
                raise ValueError(f"--{name} must be {what}, not {getattr(self, name.replace('-', '_'))}")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over the training part."""

    number: int
    """From 1."""
    train_loss: float
    """Mean of its steps' losses, each taken before the step, as the training part's figures are."""
    validation_loss: float
    """After the epoch."""
    train: Quality
    validation: Quality
    shut_gates: int
    """Training responses whose gates were all shut: they have no gradient through them."""
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """The head with the least validation loss, and how it came about."""

    weight: Tensor
    """[layers, 2, hidden] float32."""
    bias: Tensor
    """[2] float32."""
    epochs: tuple[Epoch, ...]
    best: Epoch
    train: np.ndarray
    """Indices of the responses that were trained on; none where their question could teach this loss nothing."""
    validation: np.ndarray
    validation_scores: np.ndarray
    """[validation responses] float64, of the best head."""


def fit(
    states: States,
    responses: Responses,
    settings: FitSettings,
    *,
    parts: tuple[np.ndarray, np.ndarray] | None = None,
    lm_head: Tensor | None = None,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> Fitted:
    """Train a head; collective over all ranks, which all get the same.

    Args:
        parts: indices of training and validation responses; None: `split`.
        lm_head: [vocabulary, hidden] of the base: train on its logits. The states are those of its last layer then.
        report: called after each epoch.

    Raises:
        ValueError: the labels are of one class, or cannot teach this loss anything; or states are not finite.
    """
    if parts is None:
        parts = split(responses.questions, settings.validation_share, settings.seed)
    return _Fit(states, responses, settings, parts, lm_head).run(report)


class _Fit:
    """The state of one training."""

    def __init__(
        self,
        states: States,
        responses: Responses,
        settings: FitSettings,
        parts: tuple[np.ndarray, np.ndarray],
        lm_head: Tensor | None,
    ):
        self.states, self.responses, self.settings = states, responses, settings
        self.train, self.validation = teaching(responses, parts[0], settings.loss), parts[1]
        check_labels(responses, self.train, self.validation, settings.loss)
        self.questions = questions_of(responses, self.train)
        self.parameters = Parametrisation(
            states.shape,
            gate=settings.gate,
            seed=settings.seed,
            device=states.device,
            standardisation=standardisation(states, self.questions) if settings.standardise else None,
            lm_head=lm_head,
        )
        optimizer = torch.optim.AdamW(self.parameters.trained, lr=settings.lr, weight_decay=settings.weight_decay)
        self.descent = Descent(states, responses, self.parameters, optimizer, loss=settings.loss, alpha=settings.alpha)

    def run(self, report: Callable[[Epoch], None]) -> Fitted:
        epochs: list[Epoch] = []
        best, since = None, 0
        while len(epochs) < self.settings.epochs and since < self.settings.patience:
            epoch, found = self._epoch(len(epochs) + 1)
            epochs.append(epoch)
            report(epoch)
            since += 1
            if best is None or epoch.validation_loss < best.validation_loss:
                best, since = epoch, 0
                kept = (*self.parameters.copy(), found)
        weight, bias, found = kept
        return Fitted(
            weight=weight, bias=bias, epochs=tuple(epochs), best=best, train=self.train, validation=self.validation,
            validation_scores=found[self.validation],
        )  # fmt: skip

    def _epoch(self, number: int) -> tuple[Epoch, np.ndarray]:
        """Train on every question once, then score the validation part: (figures, [responses] its scores)."""
        began = time.monotonic()
        mixed = batches(self.questions, self.settings.batch, (self.settings.seed, number))
        before, train_loss, shut = self.descent.update(mixed)
        held_out = self.descent.scores(self.validation)
        epoch = Epoch(
            number=number,
            train_loss=train_loss,
            validation_loss=self.descent.loss(held_out, self.validation),
            train=self._quality(before, self.train),
            validation=self._quality(held_out, self.validation),
            shut_gates=shut,
            seconds=time.monotonic() - began,
        )
        return epoch, held_out

    def _quality(self, found: np.ndarray, part: np.ndarray) -> Quality:
        scored, labels, questions = (every[part] for every in (found, self.responses.labels, self.responses.questions))
        return quality(scored, labels, questions, self.states.lengths[part])
