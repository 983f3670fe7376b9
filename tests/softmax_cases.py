"""Logits that are hard for the kernels of the softmax statistics, and what float64 says of the kernels' results.

Padded columns hold NaN, so that a kernel that looks at them shows; labels lie inside, on both edges and outside.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}
"""Numbers below may become 0."""


@dataclass
class Case:
    logits: Tensor
    labels: Tensor
    vocab_start: int
    columns: int
    scale: float
    """1 / temperature."""

    @property
    def statistics_arguments(self) -> tuple:
        return self.logits, self.labels, self.vocab_start, self.columns, self.scale

    def gradient_arguments(self, coefficients: Tensor) -> tuple:
        return self.logits, self.labels, coefficients, self.vocab_start, self.columns, self.scale

    @property
    def scaled(self) -> Tensor:
        """x / T of the real columns, in float64 on the CPU."""
        return self.logits[:, : self.columns].cpu().double() * self.scale

    @property
    def precision(self) -> float:
        """Relative error of one exponential in float32, whose argument carries a relative error of 2^-24 or two."""
        finite = self.scaled[self.scaled.isfinite()].abs()
        return 2e-6 + 2e-7 * (finite.max().item() if finite.numel() else 0)

    @property
    def hits(self) -> Tensor:
        """[rows, columns], where the label is."""
        return torch.arange(self.columns) + self.vocab_start == self.labels.cpu()[:, None]


def make(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    padding: int = 0,
    stride: int | None = None,
    offset: int = 0,
    edit: Callable[[Tensor], None] | None = None,
    device: str = "cpu",
) -> Case:
    """Normal logits of standard deviation 3 in rows `stride` apart that start `offset` elements into the memory."""
    generator = torch.Generator().manual_seed(rows + columns)
    values = 3 * torch.randn(rows, columns, generator=generator)
    if edit is not None:
        edit(values)
    width = columns + padding
    memory = torch.full((rows, stride or width + offset), torch.nan, dtype=dtype, device=device)
    logits = memory[:, offset : offset + width]
    logits[:, :columns] = values.to(device, dtype)
    labels = vocab_start + torch.randint(0, max(1, columns), (rows,), generator=generator)
    edges = torch.tensor([0, columns - 1, -1, columns])[:rows]
    labels[: len(edges)] = vocab_start + edges
    return Case(logits, labels.to(device), vocab_start, columns, 1 / temperature)


def _large(values: Tensor) -> None:
    values *= 50
    values.clamp_(-150, 150)
    values[0] = -150 + values[0] / 50
    values[1, ::2] = 150


def _masked(values: Tensor) -> None:
    values[:, ::3] = -torch.inf
    values[0, :-1] = -torch.inf
    values[1] = -torch.inf


def _rising(values: Tensor) -> None:
    values += torch.linspace(-40, 40, values.shape[1])


CASES = {
    f"{columns}-{name}": (4, columns, DTYPES[name], dict(temperature=(0.5, 1.0, 1.5)[(row + column) % 3]))
    for row, columns in enumerate((1, 7, 1000, 1001))
    for column, name in enumerate(DTYPES)
}
CASES |= {f"32000-{name}": (3, 32000, dtype, dict(temperature=0.7)) for name, dtype in DTYPES.items()}
CASES |= {
    "151936-bf16": (2, 151936, torch.bfloat16, {}),
    "151936-fp32": (1, 151936, torch.float32, {}),
    "one-row": (1, 1000, torch.bfloat16, {}),
    "no-rows": (0, 1000, torch.float32, {}),
    "no-columns": (4, 0, torch.float32, dict(padding=8)),
    "no-columns-bf16": (4, 0, torch.bfloat16, dict(padding=8)),
    "block": (4, 512, torch.bfloat16, {}),
    "two-blocks": (4, 8192, torch.float32, {}),
    "rising": (4, 9000, torch.float32, dict(edit=_rising)),
    "shard": (4, 1001, torch.float32, dict(vocab_start=5000)),
    "padded": (4, 1000, torch.bfloat16, dict(vocab_start=3000, padding=24)),
    "padded-wide": (4, 4000, torch.float32, dict(padding=6000)),
    "odd-stride": (4, 1000, torch.bfloat16, dict(stride=1007)),
    "odd-start": (4, 1000, torch.float32, dict(stride=1008, offset=1)),
    "wide-stride": (4, 1000, torch.float32, dict(stride=1024, offset=8)),
    "large": (4, 5000, torch.float32, dict(edit=_large)),
    "large-fp16": (4, 1000, torch.float16, dict(edit=_large, temperature=1.5)),
    "masked": (4, 1001, torch.float32, dict(edit=_masked)),
    "masked-bf16": (4, 9000, torch.bfloat16, dict(edit=_masked, temperature=0.5)),
}


def case(name: str, device: str = "cpu") -> Case:
    rows, columns, dtype, more = CASES[name]
    return make(rows, columns, dtype, device=device, **more)


def check_statistics(actual: Tensor, case: Case) -> None:
    maximum, total, weighted, label_logits = actual.cpu().double()
    scaled = case.scaled
    rows = len(scaled)
    expected = scaled.amax(1) if case.columns else torch.full((rows,), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(maximum, expected, rtol=2e-7, atol=0)
    # About the maximum that the kernel has rounded: the sums go with it.
    shifted = scaled - torch.where(maximum == -torch.inf, 0, maximum)[:, None]
    exponentials = shifted.exp()
    products = torch.where(exponentials > 0, exponentials * shifted, 0)
    torch.testing.assert_close(total, exponentials.sum(1), rtol=case.precision, atol=0)
    error = (weighted - products.sum(1)).abs()  # exponents err by what the logits are rounded to, in every term
    assert (error <= case.precision * (total + products.abs().sum(1))).all()
    torch.testing.assert_close(
        label_logits, torch.where(case.hits, scaled, 0).sum(1), rtol=2e-7, atol=0, equal_nan=True
    )


def coefficients(case: Case) -> Tensor:
    """Some [4, rows]: r is the log of the normaliser, and -inf where the row has no finite logit."""
    rows = len(case.logits)
    result = torch.randn(4, rows, generator=torch.Generator().manual_seed(rows))
    result[0] = case.scaled.logsumexp(1)
    return result.to(case.logits.device)


def check_gradient(actual: Tensor, case: Case, coefficients: Tensor) -> None:
    """Every element within the error of its exponential and the rounding of its type."""
    width, dtype = case.logits.shape[1], case.logits.dtype
    assert actual.shape == case.logits.shape and actual.dtype == dtype
    reference, constant, slope, at_label = coefficients.cpu().double()[:, :, None]
    exponents = (case.scaled - torch.where(reference == -torch.inf, 0, reference)).clamp(min=-1e4)
    exponentials = exponents.exp()
    expected = exponentials * (constant + slope * exponents) + torch.where(case.hits, at_label, 0)
    error = (actual[:, : case.columns].cpu().double() - expected).abs()
    terms = exponentials * (constant.abs() + (slope * exponents).abs()) + torch.where(case.hits, at_label.abs(), 0)
    flushed = SMALLEST[torch.float32] * (constant.abs() + (slope * exponents).abs())
    allowed = case.precision * terms + flushed + ROUNDING[dtype] * expected.abs() + SMALLEST[dtype]
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.3g} times what rounding explains"
    assert torch.equal(actual[:, case.columns :].cpu(), torch.zeros(len(actual), width - case.columns, dtype=dtype))
