"""Gated mean of a linear reward over hidden states: SWIFT's stacked layers in eager torch and torch.compile, ours.

    python benchmarks/gated_pooling.py                                     # 24 layers of 896, 4096 tokens, bfloat16
    python benchmarks/gated_pooling.py --layers 28 --width 3584 --tokens 2048

Times are of the forward pass, and of forward and backward to the head's weights, as in training it. `memory` is the
peak over the hidden states (which stacking must keep, all layers of them, until the last one is there) and libraries;
`error` the largest difference from float64 of the scores and, relative to its largest entry, of the weights' gradient.
"""

import argparse

import measure
import torch

from megatron_srft.ops.gated_pooling import gated_mean, gated_projection
from megatron_srft.ops.implementations import IMPLEMENTATIONS, reason_against


def stacked(states, weight, bias, spans):
    """As SWIFT computes it: all layers side by side in full precision, then one linear layer."""
    features = torch.cat([layer.to(weight.dtype) for layer in states], dim=1)
    raw_gate, reward = (features @ weight.t() + bias).unbind(dim=1)
    gate = torch.sigmoid(raw_gate)
    parts = [(gate[start:end], reward[start:end]) for start, end in spans]
    return torch.stack([(own * rewards).sum() / own.sum().clamp_min(1e-8) for own, rewards in parts])


def streamed(states, weight, bias, sequences, implementation):
    accumulated = None
    for layer, of_layer in zip(states, weight.chunk(len(states), dim=1), strict=True):
        accumulated = gated_projection(accumulated, layer, of_layer, implementation=implementation)
    return gated_mean(accumulated, sequences, bias, implementation=implementation)[0]


def make(args: argparse.Namespace) -> tuple:
    generator = torch.Generator(measure.DEVICE).manual_seed(0)
    options = dict(generator=generator, device=measure.DEVICE)
    dtype = getattr(torch, args.dtype)
    states = [torch.randn(args.tokens, args.width, dtype=dtype, **options) for _ in range(args.layers)]
    features = args.layers * args.width
    weight = (torch.randn(2, features, **options) / features**0.5).requires_grad_()
    bias = torch.zeros(2, device=measure.DEVICE, requires_grad=True)
    starts = torch.arange(0, args.tokens, args.length)
    ends = (starts + args.length).clamp(max=args.tokens)
    sequences = torch.stack((starts + args.length // 4, ends), dim=1)  # the first quarter is prompt
    return states, weight, bias, sequences[sequences[:, 0] < ends]


def function_of(side: str, sequences: torch.Tensor):
    """(states, weight, bias) -> scores of one side."""
    spans = sequences.tolist()
    if side in ("eager", "torch.compile"):
        function = torch.compile(stacked) if side == "torch.compile" else stacked
        return lambda *inputs: function(*inputs, spans)
    on_device = sequences.to(measure.DEVICE)
    return lambda *inputs: streamed(*inputs, on_device, side)


def run(side: str, args: argparse.Namespace) -> dict:
    states, weight, bias, sequences = make(args)
    function, weights = function_of(side, sequences), torch.linspace(-1, 2, len(sequences), device=measure.DEVICE)
    start = measure.start_memory()

    def forward():
        with torch.no_grad():
            return function(states, weight, bias)

    def both():
        weight.grad = bias.grad = None
        (function(states, weight, bias) * weights).sum().backward()

    timed = dict(forward=measure.time_of(forward, args.repeats), both=measure.time_of(both, args.repeats))
    memory = measure.memory_over(start)
    found = function(states, weight, bias).detach(), weight.grad
    exact = weight.detach().double().requires_grad_()
    expected = stacked(states, exact, bias.detach().double(), sequences.tolist())
    (expected * weights).sum().backward()
    error = (found[0] - expected).abs().max().item()
    gradient_error = ((found[1] - exact.grad).abs().max() / exact.grad.abs().max()).item()
    return timed | {"memory MiB": memory, "score error": error, "gradient error": gradient_error}


def sides(args: argparse.Namespace) -> dict[str, str | None]:
    ours = {name: reason_against(name, measure.DEVICE) for name in IMPLEMENTATIONS}
    return {"eager": None, "torch.compile": None} | ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    measure.main(parser, run, sides, ("forward", "both"), vary="tokens")


if __name__ == "__main__":
    main()
