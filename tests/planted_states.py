"""Hidden states of made-up responses in which a verdict is planted, or is not."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_srft.hidden_reward.parts import Responses

LAYERS, HIDDEN = 3, 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    states: list[torch.Tensor]
    """[layers, tokens, hidden] of each response."""
    responses: Responses

    @property
    def means(self) -> np.ndarray:
        """[responses, layers x hidden] mean state, what a plain probe gets."""
        return np.stack([one.mean(dim=1).flatten().numpy() for one in self.states])


def planted(
    kind: str, *, questions: int = 60, per_question: int = 8, seed: int = 0, share_right: float = 0.4
) -> Planted:
    """Responses of 3 to 12 tokens, verdicts by chance.

    Args:
        kind: `mean`: right responses' states lean to one side, in layer 1 at every token. `marked`: at one token in
            six, marked by another direction, and as much the other way at all others: their mean says nothing.
            `noise`: nothing. `question`: every question has a direction of its own at every token, and one verdict.
    """
    generator = torch.Generator().manual_seed(seed)
    u, mark = torch.linalg.qr(torch.randn(HIDDEN, 2, generator=generator))[0].T
    number = torch.arange(questions).repeat_interleave(per_question)
    labels = torch.rand(len(number), generator=generator) < share_right
    if kind == "question":
        labels = (torch.rand(questions, generator=generator) < 0.5)[number]
        own = 3 * torch.randn(questions, HIDDEN, generator=generator)
    states = []
    for index, right in enumerate(labels.tolist()):
        length = int(torch.randint(3, 13, (), generator=generator)) * (2 if kind == "marked" else 1)
        hidden = torch.randn(LAYERS, length, HIDDEN, generator=generator)
        side = 1.0 if right else -1.0
        if kind == "mean":
            hidden[1] += side * u
        elif kind == "marked":
            marked = torch.arange(length) % 6 == 2
            hidden[1, marked] += 4 * mark + 2 * side * u
            hidden[1, ~marked] -= 2 * side * u * marked.sum() / (~marked).sum()
        elif kind == "question":
            hidden[1] += own[number[index]]
        states.append(hidden)
    names = [f"question {q}, response {i}" for i, q in enumerate(number.tolist())]
    return Planted(states=states, responses=Responses(labels=labels.numpy(), questions=number.numpy(), names=names))
