"""The rollout engine protocol: what the loop and the evaluation ask of anything that samples completions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_srft.config import SamplingConfig
from megatron_srft.sample import Completion, Prompt


class RolloutError(RuntimeError):
    """Completions cannot be sampled with these weights; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to sample.

    Example: prompt=Prompt(id="train/17", ...), sample=3, seed=0, step=12 is the fourth completion of that prompt in
    step 12 of a run with seed 0; asked again, of any engine state with the same weights, it is the same completion.
    """

    prompt: Prompt

    sample: int
    """Number of the completion within its group, from 0; a prompt's second group in the same step goes on counting."""

    seed: int
    """The run's seed."""

    step: int = 0
    """The training step; evaluate.STREAM for an evaluation, whose answers share no random numbers with training."""

    begun: np.ndarray | None = None
    """[tokens] int32; of a response that was begun before: what is there of it. The completion is what comes after."""

    @property
    def token_ids(self) -> np.ndarray:
        """[tokens] int32; what the engine reads before it samples."""
        prompt = self.prompt.token_ids
        return prompt if self.begun is None else np.concatenate([prompt, self.begun])

    @property
    def offset(self) -> int:
        """Where in the response the next token stands."""
        return 0 if self.begun is None else len(self.begun)


class RolloutEngine(Protocol):
    """Samples completions from the newest weights it was given."""

    ranks: int
    """Neighbouring ranks of the world that are one engine together: they pass the same requests and get the same
    completions."""

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Take over a full set of weights under their Hugging Face names.

        Raises:
            ValueError: a name is unknown or missing, or a tensor has another shape than the model's.
        """

    def unlike(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """Names of those tensors (all of the model's, in full) that this rank's part of the engine holds otherwise."""

    def generate(self, requests: list[Request], sampling: SamplingConfig) -> list[Completion]:
        """One completion per request, in the order of the requests.

        Raises:
            ValueError: a request cannot be served (prompt and response exceed the model's positions, for example).
            RolloutError: the weights give log-probs that are not finite.
        """

    def rest(self) -> bool:
        """Give back, until the next `update_weights`, what memory can be given back; whether the weights went with it.

        Called when the step has its completions, before the trainer needs the memory.
        """

    def take_metrics(self) -> dict[str, float]:
        """Figures of what happened since the last call, for the step's line; the same on every rank. Collective."""

    def close(self) -> None:
        """Give memory back; the engine is of no use afterwards."""


LOWER = "lower data.max_prompt_tokens or rollout.max_response_tokens"
"""What helps in every engine."""


def check_lengths(requests: Sequence[Request], max_response_tokens: int, tokens: int, room: str, remedy: str) -> None:
    """Raises ValueError for a prompt without tokens, or one that leaves too little room for the response.

    Args:
        tokens: of prompt and response together, at most.
        room: what they are, for the message.
    """
    for request in requests:
        length = len(request.token_ids)
        if length == 0:
            raise ValueError(f"prompt {request.prompt.id} has no tokens; give it some text or a chat template")
        if length + max_response_tokens > tokens:
            raise ValueError(
                f"prompt {request.prompt.id} has {length} tokens; with rollout.max_response_tokens "
                f"{max_response_tokens} that exceeds the {room}: {remedy}"
            )
