"""The GRPO objective with its metrics and both gradients: eager torch, torch.compile, ours.

    python benchmarks/clipped_ratio.py                  # 1024, 8192 and 65536 response tokens
    python benchmarks/clipped_ratio.py --rows 4096
    OMP_NUM_THREADS=1 python benchmarks/clipped_ratio.py

`op` is forward and backward of the bare op, its terms prebuilt and all its figures computed; for the peers, who have no
such thing, the same as `both`.

The peer is what trainers write: the clipped surrogate and an entropy bonus with global denominators, and the same
figures (likelihood, entropy, ratio, KL estimates, clipped shares, mismatch with the rollout engine) as separate tensor
operations. `memory` is the peak over inputs and libraries; `error` the largest difference of the gradients from
float64, relative to the largest of them.
"""

import argparse
from functools import partial

import measure
import torch

from megatron_srft.config import from_dict
from megatron_srft.objectives import ObjectiveInputs, compute
from megatron_srft.ops import implementations
from megatron_srft.ops.clipped_ratio import clipped_ratio
from megatron_srft.ops.token_losses import Term
from megatron_srft.sample import Counts

ROWS = (1024, 8192, 65536)
LOW, HIGH, COEFFICIENT = 0.2, 0.28, 0.01


def eager(logprobs, entropy, old, engine, advantages, is_demonstration, rollout_tokens):
    """(loss, metrics) in plain torch."""
    rollouts = ~is_demonstration

    def mean(values):
        return torch.where(rollouts, values, 0).sum() / rollout_tokens

    log_ratio = (logprobs - old).clamp(-20, 20)
    ratio = log_ratio.exp()
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)
    policy, bonus = mean(surrogate), -COEFFICIENT * mean(entropy)
    with torch.no_grad():
        gap = torch.where(rollouts, (old - engine).clamp(-20, 20), 0)
        metrics = {
            "nll": mean(-logprobs),
            "entropy": mean(entropy),
            "ratio": mean(ratio),
            "k1": mean(-log_ratio),
            "k3": mean(ratio - 1 - log_ratio),
            "clipped_low": mean(((advantages < 0) & (ratio < 1 - LOW)).float()),
            "clipped_high": mean(((advantages > 0) & (ratio > 1 + HIGH)).float()),
            "mismatch": mean(gap.abs()),
            "mismatch_k3": mean(gap.exp() - 1 - gap),
            "max_ratio": torch.where(rollouts, ratio, 0).amax(),
            "max_mismatch": gap.abs().amax(),
        }
    loss = policy + bonus
    return loss, metrics | {"loss": loss.detach(), "policy": policy.detach(), "bonus": bonus.detach()}


def make_rows(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs = -3 * torch.rand(count, generator=generator)
    old = logprobs + 0.2 * torch.randn(count, generator=generator)
    rows = {
        "logprobs": logprobs,
        "entropy": 2 * torch.rand(count, generator=generator),
        "old_logprobs": old,
        "rollout_logprobs": old + 0.05 * torch.randn(count, generator=generator),
        "advantages": torch.randn(count, generator=generator),
        "is_demonstration": torch.rand(count, generator=generator) < 0.1,
    }
    return {name: tensor.to(measure.DEVICE) for name, tensor in rows.items()}


def function_of(side: str, rows: dict[str, torch.Tensor]):
    """(logprobs, entropy) -> (loss, metrics) of one side."""
    rest = {name: tensor for name, tensor in rows.items() if name not in ("logprobs", "entropy")}
    demonstrations = int(rows["is_demonstration"].sum())
    count = len(rows["logprobs"])
    if side in ("eager", "torch.compile"):
        plain = torch.compile(eager) if side == "torch.compile" else eager
        given = [rest[name] for name in ("old_logprobs", "rollout_logprobs", "advantages", "is_demonstration")]
        return lambda logprobs, entropy: plain(logprobs, entropy, *given, count - demonstrations)
    implementations.set_default(side, measure.DEVICE)
    counts = Counts(
        rollout_tokens=count - demonstrations, rollout_sequences=8,
        demonstration_tokens=demonstrations, demonstration_sequences=1,
    )  # fmt: skip
    others = dict(correct=rest["is_demonstration"], sequence=torch.zeros(count, dtype=torch.int64), num_sequences=1)
    others["response_lengths"] = torch.ones_like(rows["logprobs"])
    settings = dict(kind="grpo", preset="dapo", clip_low=LOW, clip_high=HIGH, entropy_coefficient=COEFFICIENT)
    config = from_dict({"objective": settings}).resolved().objective

    def ours(logprobs, entropy):
        inputs = ObjectiveInputs(logprobs=logprobs, entropy=entropy, **rest, **others)
        output = compute(inputs, counts, config)
        return output.loss, output.metrics

    return ours


def bare_function_of(side: str, rows: dict[str, torch.Tensor]):
    """(logprobs, entropy) -> (loss, figures) without what an objective does before and after its op."""
    if side in ("eager", "torch.compile"):
        return function_of(side, rows)
    demonstrations = int(rows["is_demonstration"].sum())
    tokens = len(rows["logprobs"]) - demonstrations, demonstrations
    bonus = Term(loss="entropy", rows="rollouts", scale=COEFFICIENT / tokens[0])
    clips = dict(clip_low=LOW, clip_high=HIGH)
    policy = Term(loss="clipped", rows="rollouts", scale=1 / tokens[0], advantages=rows["advantages"], **clips)
    given = {name: rows[name] for name in ("is_demonstration", "old_logprobs")}
    given |= dict(engine_logprobs=rows["rollout_logprobs"], response_lengths=torch.ones_like(rows["old_logprobs"]))
    return lambda logprobs, entropy: clipped_ratio(
        logprobs, entropy, [policy, bonus], tokens=tokens, implementation=side, **given
    )


def run(side: str, args: argparse.Namespace) -> dict:
    rows = make_rows(args.rows)
    leaves = [rows[name].requires_grad_() for name in ("logprobs", "entropy")]
    function, bare = function_of(side, rows), bare_function_of(side, rows)

    def forward():
        return function(*leaves)

    def both(function=function):
        for leaf in leaves:
            leaf.grad = None
        function(*leaves)[0].backward()

    both()
    error = error_of(leaves, rows)
    start = measure.start_memory()
    timed = dict(forward=measure.time_of(forward, args.repeats), both=measure.time_of(both, args.repeats))
    timed["op"] = measure.time_of(partial(both, bare), args.repeats)
    return timed | {"memory MiB": measure.memory_over(start), "error": error}


def sides(args: argparse.Namespace) -> dict[str, str | None]:
    ours = {name: implementations.reason_against(name, measure.DEVICE) for name in implementations.IMPLEMENTATIONS}
    return {"eager": None, "torch.compile": None} | ours


def error_of(leaves: list[torch.Tensor], rows: dict[str, torch.Tensor]) -> float:
    exact = {n: v.detach().double() if v.is_floating_point() else v.detach() for n, v in rows.items()}
    inputs = [exact[name].requires_grad_() for name in ("logprobs", "entropy")]
    others = [exact[name] for name in ("old_logprobs", "rollout_logprobs", "advantages", "is_demonstration")]
    eager(*inputs, *others, int((~exact["is_demonstration"]).sum()))[0].backward()
    pairs = zip(leaves, inputs, strict=True)
    return max(((ours.grad - right.grad).abs().max() / right.grad.abs().max()).item() for ours, right in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="response tokens")
    parser.add_argument("--repeats", type=int, default=200)
    measure.main(parser, run, sides, ("forward", "both", "op"), vary="rows")


if __name__ == "__main__":
    main()
