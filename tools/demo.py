"""`make demo`: the arithmetic example from nothing to a trained model, on the GPUs there are or on the CPU.

    data -> base model -> training (two ranks, tensor-parallel) -> check against transformers

Data and base model are made once. An interrupted run goes on where it stopped; a finished one is moved aside.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "arithmetic"
PYTHON = sys.executable
RUN = ROOT / "runs" / "arithmetic"


def step(number: int, title: str, *command: str) -> None:
    """Run one step in the foreground; end here, saying which one failed, if it does."""
    print(f"[{number}/4] {title}", flush=True)
    start = time.monotonic()
    # The model is too small for a second thread to help, and on a busy machine threads that wait for each other crawl.
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if status:
        sys.exit(
            f"\ndemo: step {number} failed with status {status}: {' '.join(command)}\n"
            "  Its message is above; `make doctor` shows what works on this machine."
        )
    print(f"      {time.monotonic() - start:.0f} s\n", flush=True)


def move_finished_run() -> None:
    if not (RUN / "hf" / "final").is_dir():
        return
    number = next(n for n in range(1, 10**6) if not RUN.with_name(f"arithmetic-{n}").exists())
    RUN.rename(RUN.with_name(f"arithmetic-{number}"))
    print(f"the finished run of earlier is now runs/arithmetic-{number}\n")


def training_command(ranks: int) -> list[str]:
    launcher = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "megatron_srft.train", "examples/arithmetic/config.yaml", f"parallel.tensor={ranks}"]


def main() -> None:
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    print("SRFT on arithmetic chains, on " + (f"{gpus} GPU(s)" if gpus else f"CPU with {cores} cores") + "\n")
    start = time.monotonic()
    move_finished_run()
    if (EXAMPLE / "data" / "train.jsonl").exists():
        print("[1/4] data: already in examples/arithmetic/data\n")
    else:
        step(1, "data: prompts, demonstrations, held-out problems", PYTHON, "examples/arithmetic/make_data.py")
    if (EXAMPLE / "base" / "config.json").exists():
        print("[2/4] base model: already in examples/arithmetic/base\n")
    else:
        step(2, "base model: a small Qwen2, pre-trained", PYTHON, "examples/arithmetic/pretrain.py")
    ranks = 1 if gpus == 1 else 2
    command = training_command(ranks)
    step(3, f"training: torchrun {' '.join(command[4:])}", *command)
    run = RUN.relative_to(ROOT)
    step(4, "check: transformers alone on the trained model", PYTHON, "examples/arithmetic/check.py", str(run))
    print(f"done in {time.monotonic() - start:.0f} s. Look at {run}/report.html in a browser;")
    print(f"the trained model is the Hugging Face folder {run}/hf/final.")


if __name__ == "__main__":
    main()
