"""The trainer's log-prob pass alone, with the streaming reward head, and with all hidden states kept for it.

    python benchmarks/hidden_reward.py                                # width of Qwen2.5-0.5B, a quarter of its depth
    python benchmarks/hidden_reward.py --layers 24 --vocabulary 151936 --dtype bfloat16 --tokens 8192     # on a GPU

A random model of a real width; with fewer layers take a smaller vocabulary in proportion, or the LM head hides what the
layers cost. `kept` is what `output_hidden_states` makes of the same pass: every layer's states stay until the end and
are then put side by side in float32 for one linear layer, as SWIFT's released code has it.

One process takes turns with all sides, forwards and backwards. On a CPU it counts CPU seconds, which a busy machine
distorts less than the clock, though not by nothing: for each side the fastest and the median round, each as a ratio to
the pass alone, and the quartiles of the ratio within a round say how far to trust them. `head's own work` is the time
inside the head's functions alone, which noise of the pass around them does not touch. Peak memory is that of one pass
in a process of its own, after a small pass, over what the process held before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
import torch
import torch.distributed as dist
from made import random_rollout
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_srft.config import from_dict
from megatron_srft.hidden_reward import HeadConfig, RewardHead, scored_sequences
from megatron_srft.sample import TrainingSequence

SIDES = ("alone", "streamed", "kept")


def make_folder(folder: Path, args: argparse.Namespace) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(getattr(torch, args.dtype)).save_pretrained(folder)
    return folder


def make_sequences(args: argparse.Namespace) -> list[TrainingSequence]:
    """Sequences of `length` tokens, of which the first quarter is prompt."""
    random = np.random.default_rng(0)
    count = args.tokens // args.length
    return [random_rollout(random, args.length, args.length // 4, args.vocabulary) for _ in range(count)]


class Bench:
    """A trainer, a step's sequences, and the three ways to measure them."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        from megatron_srft.trainer import parallel
        from megatron_srft.trainer.trainer import Trainer

        config = from_dict(
            {
                "model": {"path": str(folder), "dtype": args.dtype},
                "parallel": {"distributed_optimizer": False},
                "batch": {"tokens_per_microbatch": args.tokens_per_microbatch},
                "data": {"max_prompt_tokens": args.length},
                "rollout": {"kind": "local", "max_response_tokens": args.length},
            }
        ).resolved()
        self.trainer = Trainer(config, parallel.start(config.parallel, seed=1))
        self.sequences = make_sequences(args)
        self.trainer.reward_head = self._head(args)
        self.head = self.trainer.reward_head

    def _head(self, args: argparse.Namespace) -> RewardHead:
        base, count = self.trainer.base_model(), args.layers + 1
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(count, 2, args.width, generator=generator) / (count * args.width) ** 0.5
        config = HeadConfig(base=base, layers=tuple(range(count)), prompt_format="")
        return RewardHead(config=config, weight=weight, bias=torch.zeros(2))

    def alone(self) -> None:
        self.trainer.reward_head = None
        self.trainer.measure(self.sequences)

    def streamed(self) -> list[float]:
        self.trainer.reward_head = self.head
        return [stats.hidden_score for stats in self.trainer.measure(self.sequences)]

    def kept(self) -> list[float]:
        from megatron_srft.trainer.tap import tapped

        self.trainer.reward_head = None
        states: dict[int, list[torch.Tensor]] = {}
        with tapped(
            self.trainer.models, self.head.layers, lambda batch, _, own: states.setdefault(batch, []).append(own)
        ):
            self.trainer.measure(self.sequences)
        weight, scores = torch.cat(list(self.head.weight), dim=1), {}
        for number, batch in enumerate(self.trainer.microbatches(self.sequences)):
            raw = torch.cat([layer.float() for layer in states.pop(number)], dim=1) @ weight.t() + self.head.bias
            spans = scored_sequences(batch, self.head.config.last_token).tolist()
            for index, (start, end) in zip(batch.sequence_ids, spans, strict=True):
                gate = torch.sigmoid(raw[start:end, 0])
                scores[index] = ((gate * raw[start:end, 1]).sum() / gate.sum()).item()
        return [scores[index] for index in range(len(self.sequences))]


def seconds(work) -> float:
    """CPU seconds of this process; on a GPU those of the clock until it has finished."""
    if measure.DEVICE != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class OwnWork:
    """Seconds inside the functions that the head adds to a pass."""

    def __init__(self):
        from megatron_srft.trainer import hidden_score

        self.total, self.passes = 0.0, []
        places = [(hidden_score.Projection, "add"), (hidden_score.Projection, "total"), (hidden_score, "_scores")]
        for place, name in places:
            setattr(place, name, self._timed(getattr(place, name)))

    def _timed(self, function):
        def timed(*arguments):
            found = None

            def work():
                nonlocal found
                found = function(*arguments)

            self.total += seconds(work)
            return found

        return timed

    def end_pass(self) -> None:
        self.passes.append(self.total)
        self.total = 0.0


def own_work(bench: Bench, repeats: int) -> float:
    """Seconds of the middle one of several passes; on a GPU with a stall around every layer."""
    clock = OwnWork()
    for _ in range(repeats):
        bench.streamed()
        clock.end_pass()
    return statistics.median(clock.passes)


def take_turns(bench: Bench, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(repeats + 1):
        for side in SIDES if number % 2 else SIDES[::-1]:
            found = seconds(getattr(bench, side))
            if number:  # the first round warms up
                times[side].append(found)
    return times


def peak_of(side: str, folder: Path) -> float:
    """MiB of one pass, in a process of its own."""
    command = [sys.executable, *sys.argv, "--side", side, "--folder", str(folder)]
    # Every tensor of some size gets pages of its own and gives them back, else the peak depends on what is left over.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(ended.stdout.splitlines()[-1])["memory MiB"]


def report_peak(bench: Bench, side: str) -> None:
    whole, bench.sequences = bench.sequences, bench.sequences[:1]
    getattr(bench, side)()
    bench.sequences = whole
    if measure.DEVICE != "cuda":
        Path("/proc/self/clear_refs").write_text("5")  # the peak of making the model is not the pass's
    start = measure.start_memory()
    getattr(bench, side)()
    print(json.dumps({"memory MiB": measure.memory_over(start)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of the whole pass")
    parser.add_argument("--tokens-per-microbatch", type=int, default=8192)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--ffn", type=int, default=4864)
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--vocabulary", type=int, default=37984)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        report_peak(Bench(args.folder, args), args.side)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch) / "model", args)
        bench = Bench(folder, args)
        difference = np.abs(np.array(bench.streamed()) - np.array(bench.kept())).max()
        times = take_turns(bench, args.repeats)
        unit = "s" if measure.DEVICE == "cuda" else "CPU s"
        print(f"{measure.device_name()}, {args.layers} layers of {args.width}, {args.tokens} tokens in {args.dtype}")
        print(f"largest difference of scores, streamed and kept: {difference:.1e}")
        for side in SIDES:
            own, alone = times[side], times["alone"]
            fastest, middle = min(own) / min(alone), statistics.median(own) / statistics.median(alone)
            ratios = [mine / bare for mine, bare in zip(own, alone, strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            print(
                f"{side:10}fastest {min(own):7.3f} {unit} {fastest:7.4f}x   "
                f"median {statistics.median(own):7.3f} {unit} {middle:7.4f}x ({low:.4f} to {high:.4f})   "
                f"peak {peak_of(side, folder):8.1f} MiB"
            )
        inside = own_work(bench, args.repeats)
        share = inside / statistics.median(times["alone"])
        print(f"head's own work {inside:.4f} {unit}, {100 * share:.2f} % of the pass alone")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
