"""One update on one long sequence, with its tokens on one rank and shared by several (`parallel.context`).

    python benchmarks/context_parallel.py                                  # 1 and 2 ranks of one thread each
    python benchmarks/context_parallel.py --ranks 1 2 4 8 --length 65536 --width 2048 --dtype bfloat16     # on GPUs

The same random model, sequence and GRPO update in every form, each in processes of its own, in turn; the fastest repeat
counts. Memory is the largest rank's: its peak in the update above what it held before it. Loss and gradient norm are
there to be compared.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from made import random_rollout
from memory import held_bytes, peak_bytes
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_srft.config import from_dict
from megatron_srft.distributed import all_gather_objects, barrier


def make_folder(folder: str, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=4 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 64, num_key_value_heads=args.width // 256,
        max_position_embeddings=args.length, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(getattr(torch, args.dtype)).save_pretrained(folder)


def measure(args: argparse.Namespace) -> None:
    """As one rank of a form; the first prints what all found."""
    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.trainer import Trainer

    torch.set_num_threads(1)
    config = from_dict(
        {
            "model": {"path": args.folder, "dtype": args.dtype},
            "parallel": {"context": int(os.environ["WORLD_SIZE"]), "recompute": args.recompute},
            "batch": {"tokens_per_microbatch": args.length, "prompts_per_step": 1},
            "data": {"max_prompt_tokens": args.length // 8},
            "rollout": {"kind": "local", "max_response_tokens": args.length - args.length // 8},
            "objective": {"kind": "grpo"},
            "optimizer": {"lr": 0.0},
        }
    ).resolved()
    groups = parallel.start(config.parallel, seed=0)
    sequence = random_rollout(np.random.default_rng(0), args.length, args.length // 8, args.vocabulary)
    trainer = Trainer(config, groups)
    trainer.step([sequence], 0)
    before, walls = held(), []
    for _ in range(args.repeats):
        barrier(groups.world)
        begun = time.perf_counter()
        metrics = trainer.step([sequence], 0)
        barrier(groups.world)
        walls.append(time.perf_counter() - begun)
    extra = max(all_gather_objects(peak() - before, groups.world))
    if groups.world.rank() == 0:
        found = {"wall": min(walls), "extra": extra / 2**20, "loss": metrics["loss"], "norm": metrics["grad_norm"]}
        print(json.dumps(found), flush=True)
    parallel.stop()


def held() -> int:
    """Bytes that this rank holds now; the peak is counted from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return held_bytes()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()


def run(ranks: int, folder: str) -> dict[str, float]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{ranks} ranks: a rank failed")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        return measure(args)
    first = None
    print("ranks   s/update   of one rank   MiB above   of one rank          loss   gradient norm")
    with tempfile.TemporaryDirectory() as folder:
        make_folder(folder, args)
        for ranks in args.ranks:
            found = run(ranks, folder)
            first = first or found
            print(
                f"{ranks:5} {found['wall']:10.2f} {found['wall'] / first['wall']:12.2f}x {found['extra']:11.0f} "
                f"{found['extra'] / first['extra']:12.2f}x {found['loss']:13.6f} {found['norm']:15.6f}",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
