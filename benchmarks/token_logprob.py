"""Log-prob and entropy with both gradients, from logits or from hidden states: eager torch, torch.compile, ours.

    python benchmarks/token_logprob.py                                    # logits, 4096 x 32768 float32
    python benchmarks/token_logprob.py --rows 8192 --vocabulary 151936 --dtype bfloat16
    python benchmarks/token_logprob.py --width 896                        # from hidden states, 896 wide

Times are of the forward pass alone and of forward and backward. `memory` is the peak over inputs and libraries; `error`
the largest difference of log-probs, entropies and of the gradient (relative to its largest entry) from float64 on some
rows. On a GPU the peers that are installed (cut-cross-entropy, liger-kernel) and a verl checkout (--verl FOLDER) run
too, as far as they have the op.
"""

import argparse
import json

import measure
import torch

from megatron_srft.ops.implementations import reason_against
from megatron_srft.ops.linear_token_logprob import linear_token_logprob
from megatron_srft.ops.token_logprob import token_logprob

CHECKED_ROWS = 16


def eager(logits, labels):
    """What trainers write: a float32 log-softmax, its gather and its entropy."""
    logprobs = logits.float().log_softmax(dim=-1)
    return logprobs.gather(1, labels[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def function_of(side: str, args: argparse.Namespace):
    """(leaves) -> (logprobs, entropy) of one side."""
    labels = make_labels(args)
    if side in ("eager", "torch.compile"):
        dense = torch.compile(eager) if side == "torch.compile" else eager
        return (lambda hidden, weight: dense(hidden @ weight.t(), labels)) if args.width else lambda x: dense(x, labels)
    name, _, option = side.partition(" ")
    common = dict(vocab_start=0, vocab_size=args.vocabulary, implementation=name)
    if not args.width:
        return lambda x: token_logprob(x, labels, overwrite_logits=option == "in place", **common)
    saved = 1 << 40 if option == "kept" else 0
    return lambda hidden, weight: linear_token_logprob(hidden, weight, labels, saved_logits_bytes=saved, **common)


def sides(args: argparse.Namespace) -> list[str]:
    ours = [name for name in ("reference", "native", "triton") if reason_against(name, measure.DEVICE) is None]
    options = ("kept", "recomputed") if args.width else ("", "in place")
    return ["eager", "torch.compile", *[f"{name} {option}".strip() for name in ours for option in options]]


def make_labels(args: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, args.vocabulary, (args.rows,), generator=generator).to(measure.DEVICE)


def make_leaves(args: argparse.Namespace) -> list[torch.Tensor]:
    generator = torch.Generator(measure.DEVICE).manual_seed(0)
    make = dict(generator=generator, dtype=getattr(torch, args.dtype), device=measure.DEVICE)
    if not args.width:
        return [torch.randn(args.rows, args.vocabulary, **make).mul_(3)]
    hidden = torch.randn(args.rows, args.width, **make)
    return [hidden, torch.randn(args.vocabulary, args.width, **make).mul_(3 / args.width**0.5)]


def run(side: str, args: argparse.Namespace) -> dict:
    leaves = make_leaves(args)
    function, ones = function_of(side, args), torch.ones(args.rows, device=measure.DEVICE)
    before = measure.peak_bytes()
    measure.reset_peak()

    def forward():
        with torch.no_grad():
            return function(*leaves)

    def both():
        for leaf in leaves:
            leaf.grad = None
        # An operand of its own each time: in place, the gradient takes the logits' memory.
        inputs = [leaf.requires_grad_() for leaf in leaves]
        torch.autograd.backward(function(*inputs), [ones, ones])

    error = error_of(function, args, leaves) if not side.endswith("in place") else None
    timed = dict(forward=measure.time_of(forward, args.repeats), both=measure.time_of(both, args.repeats))
    memory = (measure.peak_bytes() - before) / 2**20
    return timed | {"memory MiB": f"{memory:.0f}"} | ({"error": error} if error else {})


def error_of(function, args: argparse.Namespace, leaves: list[torch.Tensor]) -> str:
    """Against float64 on the first rows; weights get no figure, for they depend on all rows."""
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = function(*inputs)
    ones = torch.ones(args.rows, device=measure.DEVICE)
    torch.autograd.backward(outputs, [ones, ones])
    exact = [inputs[0].detach()[:CHECKED_ROWS].double().requires_grad_(), *[x.detach().double() for x in inputs[1:]]]
    logits = exact[0] @ exact[1].t() if args.width else exact[0]
    logprobs = logits.log_softmax(-1)
    label = logprobs.gather(1, make_labels(args)[:CHECKED_ROWS, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    (label.sum() + entropy.sum()).backward()
    gradient = inputs[0].grad[:CHECKED_ROWS].double()
    worst = ((outputs[0][:CHECKED_ROWS] - label).abs().max(), (outputs[1][:CHECKED_ROWS] - entropy).abs().max())
    relative = (gradient - exact[0].grad).abs().max() / exact[0].grad.abs().max()
    return " ".join(f"{number:.0e}" for number in (*worst, relative))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=0, help="from hidden states of this width; 0: from logits")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args.side, args)))
    else:
        measure.compare(sides(args), ("forward", "both"))


if __name__ == "__main__":
    main()
