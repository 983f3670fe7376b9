"""Launches every compiled kernel on a few small shapes, for compute-sanitizer to watch (tools/gpu_suite.sh).

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tools/launch_kernels.py

Without torch's cache every tensor is an allocation of its own, so that reads beyond it show. Whether the numbers are
right is for the tests; their inputs are used here: odd widths and strides, rows and tokens that fill no block, masked
and padded columns, every list of terms. `--device cpu` launches the CPU kernels instead.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import clipped_ratio_cases  # noqa: E402
import pooling_cases  # noqa: E402
import softmax_cases  # noqa: E402

from megatron_srft.ops.gated_pooling import gated_mean, gated_projection  # noqa: E402
from megatron_srft.ops.implementations import kernel, reason_against  # noqa: E402

SOFTMAX_CASES = (
    "7-fp16", "1000-bf16", "1001-fp32", "no-rows", "no-columns", "padded", "padded-wide", "odd-stride", "odd-start",
    "two-blocks", "masked", "masked-bf16", "32000-bf16",
)  # fmt: skip
CLIPPED_ROWS = (1, 255, 1025)
WIDTHS = (1, 7, 64, 896)


def softmax(device: str) -> None:
    for name in SOFTMAX_CASES:
        problem = softmax_cases.case(name, device)
        kept = torch.empty_like(problem.logits)
        for target in (kept, problem.logits):
            kernel("softmax_statistics_keep", "native")(*problem.statistics_arguments, target)
        statistics = kernel("softmax_statistics", "native")(*problem.statistics_arguments)
        arguments = problem.gradient_arguments(torch.ones_like(statistics))
        kernel("softmax_gradient", "native")(*arguments)
        kernel("softmax_gradient_", "native")(*arguments)


def clipped_ratio(device: str) -> None:
    for count in CLIPPED_ROWS:
        rows = clipped_ratio_cases.batch(count, dtype=torch.float32)
        rows = {name: tensor.to(device) for name, tensor in rows.items()}
        for terms in clipped_ratio_cases.terms_of(rows).values():
            clipped_ratio_cases.call(rows, terms, implementation="native")


def gated_pooling(device: str) -> None:
    for width in WIDTHS:
        for dtype in pooling_cases.DTYPES.values():
            given = pooling_cases.problem(width, layers=2, dtype=dtype, extra_stride=3)
            leaves = [_moved(tensor, device) for tensor in given.leaves()]
            accumulated = None
            for states, weight in zip(leaves[:2], leaves[2:4], strict=True):
                accumulated = gated_projection(accumulated, states, weight, implementation="native")
            outputs = gated_mean(accumulated, given.sequences.to(device), leaves[4], implementation="native")
            pooling_cases.gradients(outputs, leaves)


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A leaf on the device whose rows are as far apart."""
    memory = torch.zeros(len(tensor) * tensor.stride(0), dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor.detach()).requires_grad_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    if reason := reason_against("native", device):
        sys.exit(f"launch_kernels: {reason}")
    for launch in (softmax, clipped_ratio, gated_pooling):
        launch(device)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{launch.__name__}: ran", flush=True)


if __name__ == "__main__":
    main()
