"""The vLLM engine beside the local one on the same weights and prompts, and its weight sync beside a full copy.

    python benchmarks/vllm_engine.py                   # needs vLLM (make test-vllm)

generate   local, vllm: one engine per process; the same requests, answers of one length; the fastest repeat counts
sync       stream, copy: weights into vLLM, handed on one by one as the exporter does, or collected into a full copy
           first; memory is what the process holds at most above what it held before

CPU seconds are for comparing on a busy machine. Random weights, one process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from memory import held_bytes, peak_bytes
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2Config

from megatron_srft.config import DataConfig, LocalRolloutConfig, ModelConfig, RunConfig, VllmRolloutConfig
from megatron_srft.rollout import Request, build_engine
from megatron_srft.sample import Prompt
from megatron_srft.trainer import parallel

SIZES = {
    # The demo's model, but 128 wide instead of 96: vLLM's CPU build has no attention for heads of 24.
    "demo": dict(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4),
    "16m": dict(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6),
    "110m": dict(
        vocab_size=32768, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12
    ),
}
LENGTH = 24


class Tokens(PreTrainedTokenizerBase):
    """Stands in for a tokenizer: numbers for text."""

    def batch_decode(self, sequences, **kwargs):
        return [""] * len(sequences)


def write_model(size: str, folder: str) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZES[size], num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=None, pad_token_id=0,
        initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def start(args: argparse.Namespace) -> tuple[RunConfig, object, dict[str, torch.Tensor]]:
    """Config, engine and weights of this process."""
    sampling = {"max_response_tokens": args.tokens}
    rollout = LocalRolloutConfig(**sampling)
    if args.side != "local":
        rollout = VllmRolloutConfig(**sampling, checksum_every=0)
    model = ModelConfig(path=args.folder)
    config = RunConfig(model=model, data=DataConfig(max_prompt_tokens=LENGTH), rollout=rollout)
    groups = parallel.start(config.parallel, 0)
    engine = build_engine(config, Tokens(eos_token=None), parallel.device(), groups.world)
    weights = dict(AutoModelForCausalLM.from_pretrained(args.folder).named_parameters())
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    engine.update_weights(weights.items(), 0)
    return config, engine, weights


def fastest(repeats: int, work: Callable[[], None]) -> dict[str, float]:
    """Wall and CPU seconds, each of the repeat with the fewest, and the most memory above the start in MiB."""
    work()
    before, walls, cpus = held_bytes(), [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return dict(wall=min(walls), cpu=min(cpus), extra=(peak_bytes() - before) / 2**20)


def measure(args: argparse.Namespace) -> dict[str, float]:
    config, engine, weights = start(args)
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) / 2**20
    if args.side in ("local", "vllm"):
        numbers, vocabulary = np.random.default_rng(0), len(weights["model.embed_tokens.weight"])
        prompts = [
            Prompt(
                id=str(i), text="", answer=None, source="",
                token_ids=numbers.integers(2, vocabulary, size=numbers.integers(12, LENGTH + 1)).astype(np.int32),
            )
            for i in range(args.prompts)
        ]  # fmt: skip
        requests = [Request(prompt=p, sample=s, seed=0) for p in prompts for s in range(args.samples)]
        return fastest(args.repeats, lambda: engine.generate(requests, config.rollout)) | {"weights": size}

    def sync() -> None:
        given = weights if args.side == "stream" else {name: tensor.clone() for name, tensor in weights.items()}
        engine.update_weights(given.items(), 1)

    return fastest(args.repeats, sync) | {"weights": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, help="default: all of them")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=("local", "vllm", "stream", "copy"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    print("model  what      wall s   CPU s   memory above the start, MiB (weights)")
    for model in [args.model] if args.model else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_model(model, folder)
            for side in ("local", "vllm", "stream", "copy"):
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
                found = json.loads(
                    subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\n")[-2]
                )
                print(
                    f"{model:6} {side:8} {found['wall']:7.2f} {found['cpu']:7.2f} {found['extra']:8.0f} "
                    f"({found['weights']:.0f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
