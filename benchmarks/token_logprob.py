"""Log-prob and entropy with their gradients, from logits or hidden states: eager torch, torch.compile, ours, peers.

    python benchmarks/token_logprob.py                                    # logits, 4096 x 32768 float32
    python benchmarks/token_logprob.py --rows 8192 --vocabulary 151936 --dtype bfloat16
    python benchmarks/token_logprob.py --rows 8192 --vocabulary 151936 --dtype bfloat16 --width 896 3584 --peers FOLDER

With `--width` it goes from hidden states of that width. Times are of the forward pass alone, of the backward pass, and
of both (the forward pass of training may do more than the one alone). What is the least to be done, against the rates
of matrix products and copies measured in the same run:

    from hidden states    forward 1, backward 2 products of 2 rows x vocabulary x width operations: `TFLOP/s`
    from logits           forward reads them, backward reads them and writes their gradient: `GB/s`

so `of best` is the least time over the time. Operations beyond the least, such as computing logits again, do not
count. `memory` is the peak over inputs and libraries. `error` are the largest differences from float64: of log-probs
and entropies, and of gradients relative to their largest entry, on some rows (the weight's: of some tokens, over all
rows). A peer without entropy gets the gradient of its log-probs alone.
"""

import argparse
from pathlib import Path

import measure
import peers
import torch
from dense import exact_scores

from megatron_srft.ops.implementations import IMPLEMENTATIONS, reason_against
from megatron_srft.ops.linear_token_logprob import linear_token_logprob
from megatron_srft.ops.token_logprob import token_logprob

PARTS = ("forward", "backward", "both")
LEAST = {"forward": 1, "backward": 2, "both": 3}
"""Matrix products from hidden states, or passes over the logits, that a part needs."""


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
    if side in peers_of(args):
        peers.find(args.peers)
        return peers_of(args)[side].load(peers.Workload(labels, args.vocabulary, max(args.values), args.peers))
    name, _, option = side.partition(" ")
    common = dict(vocab_start=0, vocab_size=args.vocabulary, implementation=name)
    if not args.width:
        return lambda x: token_logprob(x, labels, overwrite_logits=option == "in place", **common)
    saved = 1 << 40 if option == "kept" else 0
    return lambda hidden, weight: linear_token_logprob(hidden, weight, labels, saved_logits_bytes=saved, **common)


def peers_of(args: argparse.Namespace) -> dict[str, peers.Peer]:
    return peers.LINEAR if max(args.values) else peers.LOGITS


def sides(args: argparse.Namespace) -> dict[str, str | None]:
    if len(args.values) > 1 and 0 in args.values:
        raise SystemExit("--width 0, from logits, stands alone")
    options = ("kept", "recomputed") if args.values[0] else ("", "in place")
    found = {"eager": None, "torch.compile": None}
    for name in IMPLEMENTATIONS:
        found |= {f"{name} {option}".strip(): reason_against(name, measure.DEVICE) for option in options}
    for name, peer in peers_of(args).items():
        found[name] = peers.reason_against(peer, args.peers, measure.DEVICE)
    return {name: reason for name, reason in found.items() if not args.only or name in args.only}


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
    leaves, function = make_leaves(args), function_of(side, args)
    start = measure.start_memory()

    def forward():
        with torch.no_grad():
            return function(*leaves)

    def forward_of_training():
        for leaf in leaves:
            leaf.grad = None
        outputs.append(function(*[leaf.requires_grad_() for leaf in leaves]))

    def backward():
        backpropagate(outputs.pop())

    outputs = []
    timed = {"forward": measure.time_of(forward, args.repeats)}
    _, timed["backward"], timed["both"] = measure.times_of([forward_of_training, backward], args.repeats)
    figures = timed | {"memory MiB": measure.memory_over(start)}
    leaves.clear()
    if not side.endswith("in place"):
        figures |= errors_of(function, args, make_leaves(args))
    if peer := peers_of(args).get(side):
        figures["note"] = "; ".join(filter(None, (peers.version(peer), peer.note)))
    return figures


def backpropagate(outputs: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    outputs = [output for output in outputs if output is not None]
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def errors_of(function, args: argparse.Namespace, leaves: list[torch.Tensor]) -> dict[str, float]:
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    logprobs, entropy = function(*inputs)
    backpropagate((logprobs, entropy))
    exact = exact_scores(leaves, make_labels(args), with_entropy=entropy is not None)
    if logprobs.dim() == 0:
        errors = {"logprob error": abs(logprobs.item() / args.rows - exact.logprobs.mean().item())}
    else:
        errors = {"logprob error": (logprobs[: len(exact.logprobs)] - exact.logprobs).abs().max().item()}
    if entropy is not None:
        errors["entropy error"] = (entropy[: len(exact.entropy)] - exact.entropy).abs().max().item()
    for name, right, leaf in zip(("gradient error", "weight error"), exact.gradients, inputs, strict=False):
        errors[name] = ((leaf.grad[: len(right)] - right).abs().max() / right.abs().max()).item()
    return errors


def derive(args: argparse.Namespace, figures: dict, ceilings: dict) -> dict:
    size = args.rows * args.vocabulary
    if args.width:
        unit, once, best = "TFLOP/s", 2 * size * args.width / 1e12, ceilings["matmul TFLOP/s"]
    else:
        unit, once, best = "GB/s", size * getattr(torch, args.dtype).itemsize / 1e9, ceilings["copy GB/s"]
    rates = {part: LEAST[part] * once / figures[part][0] for part in PARTS if figures[part][0] > 0}
    return {f"{part} {unit}": rate for part, rate in rates.items()} | {
        f"{part} of best": rate / best for part, rate in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument(
        "--width", type=int, nargs="+", default=[0], help="from hidden states of these widths; 0: from logits"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="folder with other projects, see peers.py")
    parser.add_argument("--only", nargs="+", help="sides to measure; all of them if not given")
    measure.main(parser, run, sides, PARTS, vary="width", derive=derive)


if __name__ == "__main__":
    main()
