"""Inputs of gated pooling, and the stacked-states form of it in float64, as the paper writes it."""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}

RAGGED = [[1, 2], [2, 5], [9, 26], [26, 43], [50, 52]]
"""One token, neighbours, and gaps (prompts) at the start, between and at the end of 53 tokens."""


@dataclass
class Problem:
    """Hidden states of layers, and the head on them."""

    states: list[Tensor]
    """One [tokens, width] per layer."""
    weights: list[Tensor]
    """One [2, width] per layer."""
    bias: Tensor
    sequences: Tensor

    def leaves(self) -> list[Tensor]:
        return [*self.states, *self.weights, self.bias]

    def in_float64(self) -> "Problem":
        states, weights = ([t.detach().double().requires_grad_() for t in ts] for ts in (self.states, self.weights))
        return Problem(states, weights, self.bias.detach().double().requires_grad_(), self.sequences)


def problem(width: int, *, layers: int = 1, dtype=torch.float32, extra_stride: int = 0, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    wide = [normal(53, width + extra_stride).to(dtype) for _ in range(layers)]
    states = [tensor[:, extra_stride // 2 : extra_stride // 2 + width].requires_grad_() for tensor in wide]
    weights = [(normal(2, width) * (4 / (width * layers)) ** 0.5).requires_grad_() for _ in range(layers)]
    return Problem(states, weights, normal(2).requires_grad_(), torch.tensor(RAGGED))


def stacked(problem: Problem) -> tuple[Tensor, Tensor]:
    """(scores, gate sums), [responses] each: all layers concatenated, one linear layer, one response at a time."""
    features = torch.cat(problem.states, dim=1)
    raw_gate, reward = (features @ torch.cat(problem.weights, dim=1).T + problem.bias).T
    gate = 1 / (1 + torch.exp(-raw_gate))
    spans = [slice(*span) for span in problem.sequences.tolist()]
    gate_sums = torch.stack([gate[span].sum() for span in spans])
    weighted = torch.stack([(gate[span] * reward[span]).sum() for span in spans])
    return weighted / gate_sums.clamp(min=FLOOR), gate_sums


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a loss that weighs every score and gate sum differently."""
    loss = sum((output * torch.linspace(-1.0, 2.0, len(output)).to(output)).sum() for output in outputs)
    return torch.autograd.grad(loss, leaves)


def assert_near(actual: Tensor, expected: Tensor, rounding: float, what: str = "") -> None:
    """Errors within `rounding` of the largest expected value, of which sums round off many."""
    scale = expected.abs().max().item() + 1e-30
    worst = (actual.detach().double() - expected.detach()).abs().max().item() / scale
    assert worst <= rounding, f"{what}: off by {worst:.2e} of {scale:.2e}, not {rounding:.2e}"
