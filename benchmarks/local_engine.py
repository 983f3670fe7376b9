"""The local rollout engine against transformers' generate() on the same weights and prompts.

    python benchmarks/local_engine.py                  # both model sizes, 24 prompts x 8 samples
    python benchmarks/local_engine.py --model tiny --prompts 64 --samples 4 --tokens 128

Two settings: `fixed` decodes the same number of tokens in every row (no end token), `ragged` is greedy with end tokens,
so both sides produce the same tokens and finished rows appear over time. Each side runs in a process of its own, for
its own peak memory; the fastest repeat counts. On a busy machine compare the CPU seconds.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch
from memory import peak_bytes
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2Config

from megatron_srft.config import SamplingConfig
from megatron_srft.rollout.cache import SLOT_ATTENTION
from megatron_srft.rollout.engine import Request
from megatron_srft.rollout.local import LocalEngine
from megatron_srft.sample import Prompt

END = 1
Measured = tuple[float, float, int]
SIZES = {
    "tiny": dict(vocab_size=32, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4),
    "16m": dict(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6),
}


class Tokens(PreTrainedTokenizerBase):
    """Stands in for a tokenizer: numbers for text. Only sampling is measured."""

    def batch_decode(self, sequences, **kwargs):
        return [""] * len(sequences)


def build(size: str, end_bias: float, attention: str) -> torch.nn.Module:
    """A random model; `end_bias` shifts the end token's logit through the output layer, to end rows at odd times."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZES[size], num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=END, pad_token_id=0,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.lm_head.weight.data[END] *= end_bias
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def make_prompts(count: int, length: int, vocabulary: int) -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(max(1, length // 2), length + 1, size=count)
    return [numbers.integers(2, vocabulary, size=n).astype(np.int32) for n in lengths]


def run_engine(args: argparse.Namespace, greedy: bool) -> Measured:
    model = build(args.model, 1.5 if greedy else 0.0, SLOT_ATTENTION)
    model.generation_config.eos_token_id = END if greedy else None
    tokenizer = Tokens(eos_token=None)
    engine = LocalEngine(model, tokenizer, max_concurrent_sequences=args.rows)
    engine.policy_version = 0
    prompts = [
        Prompt(id=str(i), text="", token_ids=ids, answer=None, source="")
        for i, ids in enumerate(make_prompts(args.prompts, args.length, model.config.vocab_size))
    ]
    requests = [Request(prompt=p, sample=i, seed=0) for p in prompts for i in range(args.samples)]
    sampling = SamplingConfig(temperature=0.0 if greedy else 1.0, max_response_tokens=args.tokens)
    return best_of(args.repeats, lambda: sum(len(c.token_ids) for c in engine.generate(requests, sampling)))


def run_generate(args: argparse.Namespace, greedy: bool) -> Measured:
    model = build(args.model, 1.5 if greedy else 0.0, "sdpa")
    model.generation_config.eos_token_id = END if greedy else None
    prompts = make_prompts(args.prompts, args.length, model.config.vocab_size)
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    ids, mask = (torch.from_numpy(a).repeat_interleave(args.samples, 0).to(model.device) for a in (ids, mask))

    def once() -> int:
        count = 0
        for start in range(0, len(ids), args.rows):
            out = model.generate(
                ids[start : start + args.rows], attention_mask=mask[start : start + args.rows],
                do_sample=not greedy, top_k=0, max_new_tokens=args.tokens, pad_token_id=0,
            )[:, longest:]  # fmt: skip
            ended = (out == END).int().cumsum(1) - (out == END).int() if greedy else torch.zeros_like(out)
            count += int((ended == 0).sum())
        return count

    with torch.inference_mode():
        return best_of(args.repeats, once)


def best_of(repeats: int, work) -> Measured:
    """Fastest (wall seconds, CPU seconds) of the repeats, each by itself, and the tokens of one."""
    work()
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        count = work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus), count


def peak_mebibytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_bytes() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, help="default: all of them")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=24, help="longest prompt, in tokens; the shortest is half of it")
    parser.add_argument("--tokens", type=int, default=40, help="longest response, in tokens")
    parser.add_argument("--rows", type=int, default=256, help="sequences decoded together, on both sides")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=("engine", "generate"), help=argparse.SUPPRESS)
    parser.add_argument("--setting", choices=("fixed", "ragged"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run = run_engine if args.side == "engine" else run_generate
        wall, cpu, tokens = run(args, args.setting == "ragged")
        print(json.dumps(dict(wall=wall, cpu=cpu, tokens=tokens, peak=peak_mebibytes())))
        return
    print("engine / generate     tokens           wall seconds            CPU seconds          peak MiB")
    for model in [args.model] if args.model else SIZES:
        for setting in ("fixed", "ragged"):
            ours, theirs = (measure(model, setting, side) for side in ("engine", "generate"))
            wall, cpu = (f"{ours[k]:6.2f} /{theirs[k]:6.2f} {theirs[k] / ours[k]:6.2f}x" for k in ("wall", "cpu"))
            tokens, peak = (f"{ours[k]:6.0f} /{theirs[k]:6.0f}" for k in ("tokens", "peak"))
            print(f"{model:6} {setting:8} {tokens}   {wall}   {cpu}   {peak}", flush=True)


def measure(model: str, setting: str, side: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--model", model, "--setting", setting, "--side", side]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


if __name__ == "__main__":
    main()
