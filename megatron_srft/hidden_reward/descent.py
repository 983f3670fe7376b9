"""Updates of a head from the states of verified responses, the same on every rank."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_srft.distributed import all_gather_objects, all_reduce, rank
from megatron_srft.hidden_reward import losses
from megatron_srft.hidden_reward.losses import LossName
from megatron_srft.hidden_reward.parametrisation import Parametrisation
from megatron_srft.hidden_reward.parts import Responses, flat, portions, questions_of, totals_of
from megatron_srft.hidden_reward.states import Question, States, scores
from megatron_srft.ops.gated_pooling import GATE_SUM_FLOOR

QUESTIONS_AT_A_TIME = 64
"""Whose loss is figured at once: a loss compares all responses with all others."""


class Descent:
    """The states and verdicts of some responses, and a head that is trained on them.

    Args:
        optimizer: over the parameters' `trained`; None where only `gradient` and `scores` are asked for.
        loss, alpha: see losses.py.
    """

    def __init__(
        self,
        states: States,
        responses: Responses,
        parameters: Parametrisation,
        optimizer: torch.optim.Optimizer | None,
        *,
        loss: LossName,
        alpha: float = losses.ALPHA,
    ):
        self.states, self.responses = states, responses
        self.parameters, self.optimizer = parameters, optimizer
        self.name, self.alpha = loss, alpha

    def update(self, batches: Sequence[list[Question]]) -> tuple[np.ndarray, float, int]:
        """One update from each batch.

        Returns:
            ([responses] scores, each before the update that it is part of; mean of the updates' losses; responses whose
            gates were all shut).

        Raises:
            ValueError: a score is not finite.
        """
        found = torch.zeros(len(self.responses.labels), dtype=torch.float64, device=self.states.device)
        shut = torch.zeros((), dtype=torch.int64, device=self.states.device)
        for batch in batches:
            self._step(batch, found, shut)
        before = self._everywhere(found)
        steps = [self.loss(before, np.array(flat(batch))) for batch in batches]
        return before, float(np.mean(steps)), int(all_reduce(shut, self.states.groups.data))

    @torch.no_grad()
    def scores(self, part: np.ndarray) -> np.ndarray:
        """[responses] float64 scores of the part under the head as it is, on every rank.

        Raises:
            ValueError: a score is not finite.
        """
        found = torch.zeros(len(self.responses.labels), dtype=torch.float64, device=self.states.device)
        head = self.parameters.head()
        for portion in self._portions(questions_of(self.responses, part)):
            found[portion] = scores(self.states.read(portion), self.states, *head)[0].double()
        return self._everywhere(found)

    def loss(self, found: np.ndarray, part: np.ndarray) -> float:
        """Of whole questions with these scores [responses], in float64."""
        by_question = questions_of(self.responses, part)
        totals, total = totals_of(self.responses, part), 0.0
        for first in range(0, len(by_question), QUESTIONS_AT_A_TIME):
            some = np.array(flat(by_question[first : first + QUESTIONS_AT_A_TIME]))
            own, labels, questions = (torch.from_numpy(every[some]) for every in (found, *self._verdicts()))
            total += float(losses.loss(self.name, own, labels, questions, totals, alpha=self.alpha))
        return total

    # ------------------------------------------------------------ one update

    def gradient(self, batch: list[Question], found: Tensor, shut: Tensor) -> tuple[Tensor, Tensor]:
        """Of the batch's loss with respect to the head as it is: ([layers, 2, hidden], [2]), on every rank.

        Args:
            found: [responses] float64, takes the scores of this data rank's share of the batch.
            shut: int64, counts its responses whose gates are all shut.

        Raises:
            ValueError: a score is not finite.
        """
        totals = totals_of(self.responses, flat(batch))
        weight, bias = (one.detach().requires_grad_() for one in self.parameters.head())
        for portion in self._portions(batch):
            own, gate_sums = scores(self.states.read(portion), self.states, weight, bias)
            labels, questions = (torch.from_numpy(values[portion]).to(own.device) for values in self._verdicts())
            losses.loss(self.name, own, labels, questions, totals, alpha=self.alpha).backward()
            found[portion] = own.detach().double()
            shut += (gate_sums.detach() < GATE_SUM_FLOOR).sum()
        return self._everywhere_once(weight, bias, found)

    def _step(self, batch: list[Question], found: Tensor, shut: Tensor) -> None:
        """Update the head; adds to `found` the scores before the update, to `shut` responses with all gates shut."""
        gradient = self.gradient(batch, found, shut)
        self.optimizer.zero_grad()
        self.parameters.send_back(self.parameters.head(), *gradient)
        self.optimizer.step()

    def _everywhere_once(self, weight: Tensor, bias: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the whole batch on every rank, in one exchange. Raises ValueError as `gradient`."""
        groups = self.states.groups
        of_weight, of_bias = (torch.zeros_like(p) if p.grad is None else p.grad for p in (weight, bias))
        # All ranks of a replica have the same scores, and each the whole gradient of the bias: one of them gives it.
        broken = (~found.isfinite()).any().to(of_bias.dtype)
        rest = torch.cat((of_bias, broken[None])) * (rank(groups.model) == 0)
        packed = all_reduce(torch.cat((of_weight.flatten(), rest)), groups.world)
        if packed[-1] > 0:
            self._refuse(found)
        return packed[: of_weight.numel()].view_as(of_weight), packed[of_weight.numel() : -1]

    def _portions(self, questions: list[Question]) -> list[list[int]]:
        return portions(self.states.share(questions), self.states.lengths, self.states.portion_tokens)

    def _everywhere(self, found: Tensor) -> np.ndarray:
        """[responses] scores of all data ranks, which have zeros where another one scores."""
        values = all_reduce(found.clone(), self.states.groups.data).cpu().numpy()
        if not np.isfinite(values).all():
            self._refuse(found)
        return values

    def _refuse(self, found: Tensor) -> None:
        own = (~found.isfinite()).nonzero().flatten().tolist()
        broken = sorted({index for some in all_gather_objects(own, self.states.groups.data) for index in some})
        raise ValueError(
            f"{len(broken)} of {len(self.responses.names)} responses have a score that is not a number, the first is "
            f"{self.responses.names[broken[0]]}: hidden states of the model are NaN or infinite there; see that the "
            "model's weights are whole and that its type has the range (bfloat16 rather than float16)"
        )

    def _verdicts(self) -> tuple[np.ndarray, np.ndarray]:
        return self.responses.labels, self.responses.questions
