"""What is trained, and the head that it stands for: weight [layers, 2, hidden] and bias [2], linear in what is trained.

    states          W itself
    standardised    V on (h - m) / s with m, s the training tokens' mean and deviation of each column:
                    W = V / s,  b = c - sum_l V_l (m_l / s_l)
    logits          V [2, vocabulary] on the logits U h:  W = V U

The head that is scored with, saved and served is always (W, b). A step's gradient is taken with respect to that, summed
over ranks, and only then sent on to what is trained, which every rank holds whole: so a rank's share of the columns or
of the layers needs no thought here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Standardisation:
    """Of every column over the tokens of the training part."""

    mean: Tensor
    """[layers, hidden] float32."""
    deviation: Tensor
    """[layers, hidden] float32; 1 where a column is constant."""


class Parametrisation:
    """Trained numbers of a head, all of them the same on every rank.

    Args:
        shape: (layers, hidden).
        gate: False keeps the gate's row and bias at zero, which makes all gates the same.
        lm_head: [vocabulary, hidden] of the base, to train on logits.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        gate: bool,
        seed: int,
        device: torch.device,
        standardisation: Standardisation | None = None,
        lm_head: Tensor | None = None,
    ):
        self.gate, self.standardisation, self.lm_head = gate, standardisation, lm_head
        rows = 2 if gate else 1
        layers, width = shape if lm_head is None else (1, lm_head.shape[0])
        # As torch's Linear begins: uniform within 1 / sqrt(inputs). Drawn on the CPU, for the same numbers anywhere.
        generator = torch.Generator().manual_seed(seed)
        bound = (layers * width) ** -0.5
        weight = torch.empty(layers, rows, width).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(rows).uniform_(-bound, bound, generator=generator)
        self.trained = [one.to(device).requires_grad_() for one in (weight, bias)]

    @classmethod
    def of_head(cls, weight: Tensor, bias: Tensor, *, gate: bool) -> "Parametrisation":
        """What is trained is a head as it is: weight [layers, 2, hidden], bias [2]."""
        parameters = cls((weight.shape[0], weight.shape[2]), gate=gate, seed=0, device=weight.device)
        rows = slice(0, 2) if gate else slice(1, 2)
        with torch.no_grad():
            for trained, given in zip(parameters.trained, (weight[:, rows], bias[rows]), strict=True):
                trained.copy_(given)
        return parameters

    def head(self) -> tuple[Tensor, Tensor]:
        """(weight [layers, 2, hidden], bias [2]), differentiable in what is trained."""
        weight, bias = self.trained
        if self.lm_head is not None:
            weight = (weight[0] @ self.lm_head.to(weight.dtype))[None]
        if self.standardisation is not None:
            weight = weight / self.standardisation.deviation[:, None]
            bias = bias - torch.einsum("lrh,lh->r", weight, self.standardisation.mean)
        if not self.gate:
            weight = torch.cat((torch.zeros_like(weight), weight), dim=1)
            bias = torch.cat((torch.zeros_like(bias), bias))
        return weight, bias

    def send_back(self, head: tuple[Tensor, Tensor], of_weight: Tensor, of_bias: Tensor) -> None:
        """Gradients of the head to what is trained."""
        torch.autograd.backward(head, [of_weight, of_bias])

    def copy(self) -> tuple[Tensor, Tensor]:
        """The head as it is now; what is trained may go on changing."""
        return tuple(one.detach().clone() for one in self.head())
