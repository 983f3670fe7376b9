"""Training a reward head on while its policy moves: the updates of `reward train`, on the window's completions.

One AdamW goes on from refresh to refresh over a stage; its moments are part of a checkpoint.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_srft.config import SwiftRewardConfig
from megatron_srft.hidden_reward import HeadConfig, RewardHead
from megatron_srft.hidden_reward.descent import Descent
from megatron_srft.hidden_reward.parametrisation import Parametrisation
from megatron_srft.hidden_reward.parts import Responses, batches, questions_of
from megatron_srft.hidden_reward.states import States
from megatron_srft.hidden_stream.window import Judged
from megatron_srft.sample import TrainingSequence

BATCH = 16
"""Responses to an update, in whole groups; as in the paper and in `reward train`."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of every tensor."""


class Refresher:
    """A head in training, on every rank the same.

    Args:
        head: what it is now, on this rank's device.
    """

    def __init__(self, head: RewardHead, config: SwiftRewardConfig):
        self.config = config
        self.parameters = Parametrisation.of_head(head.weight, head.bias, gate=head.config.gate)
        self.optimizer = torch.optim.AdamW(
            self.parameters.trained, lr=config.refresh_lr, weight_decay=config.refresh_weight_decay
        )

    def train(self, states: States, responses: Responses, seed: int, number: int) -> dict[str, float]:
        """Make the updates of one refresh.

        Args:
            number: refreshes of the stage before it; with the seed it decides the order of the groups.

        Returns:
            swift/refresh_loss (mean over the last pass, before each update), swift/refresh_responses, and
            accounting/skipped_refreshes: where all verdicts are the same there is nothing to learn, and the head stays.

        Raises:
            ValueError: hidden states are not finite.
        """
        right = int(responses.labels.sum())
        figures = {"swift/refresh_responses": float(len(responses.labels)), "accounting/skipped_refreshes": 0}
        if right in (0, len(responses.labels)):
            return figures | {"accounting/skipped_refreshes": 1}
        descent = Descent(states, responses, self.parameters, self.optimizer, loss=self.config.refresh_loss)
        questions = questions_of(responses, np.arange(len(responses.labels)))
        for epoch in range(self.config.refresh_epochs):
            order = batches(questions, BATCH, (seed, number * self.config.refresh_epochs + epoch))
            _, loss, _ = descent.update(order)
        return figures | {"swift/refresh_loss": loss}

    def head(self, head: RewardHead) -> RewardHead:
        """The given head with the numbers that training has come to.

        Raises:
            ValueError: they are not finite.
        """
        weight, bias = self.parameters.copy()
        return replace(head, weight=weight, bias=bias)

    # ------------------------------------------------------------ checkpoints

    def arrays(self) -> dict[str, np.ndarray]:
        """AdamW's moments; nothing before the first refresh."""
        state = self.optimizer.state_dict()["state"]
        return {_name(place, key): state[place][key].cpu().numpy() for place in state for key in MOMENTS}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` gave."""
        if _name(0, "step") not in arrays:
            return
        places = range(len(self.parameters.trained))
        moments = {place: {key: torch.from_numpy(arrays[_name(place, key)]) for key in MOMENTS} for place in places}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def _name(place: int, key: str) -> str:
    return f"swift_adamw_{place}_{key}"


def sequences_of(judged: Sequence[Judged], config: HeadConfig) -> tuple[list[TrainingSequence], Responses]:
    """The completions that have a token to score, as the trainer takes them and as training does."""
    least = 2 if config.last_token == "excluded" else 1
    kept = [one for one in judged if len(one.token_ids) - one.prompt_length >= least]
    groups = {place: number for number, place in enumerate(dict.fromkeys((one.step, one.group) for one in kept))}
    numbers = [groups[one.step, one.group] for one in kept]
    sequences = [
        TrainingSequence(
            token_ids=one.token_ids,
            prompt_length=one.prompt_length,
            is_demonstration=False,
            advantages=np.zeros(len(one.token_ids) - one.prompt_length, np.float32),
            correct=one.correct,
            group=number,
        )
        for one, number in zip(kept, numbers, strict=True)
    ]
    responses = Responses(
        labels=np.array([one.correct for one in kept], bool),
        questions=np.array(numbers, np.int64),
        names=[f"a completion of group {one.group} of stage step {one.step}" for one in kept],
    )
    return sequences, responses
