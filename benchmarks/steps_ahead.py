"""What a step waits for: GRPO runs that sample as they go, a step ahead, and in rounds over several steps.

    python benchmarks/steps_ahead.py --model runs/arithmetic/hf/final

Each form is the ordinary training command with the same model, prompts and limits, in turn; figures are medians over
the steps after the second. One rank with one thread trains, so sampling ahead has a core of its own if there are two.

    step       wall seconds of a whole step
    generate   of it, waiting for completions (sync not counted)
    ahead      what the completions took in the background
    tokens/s   tokens of the step's sequences over its time
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "arithmetic"
FIGURES = {"step": "time/step", "generate": "time/generate", "ahead": "ahead/seconds", "tokens/s": "tokens/s"}
LEFT_OUT = 2
"""First steps, with the parity check and whatever is slow the first time."""

FORMS = {
    "as it goes": {},
    "a step ahead": {"rollout.steps_ahead": 1},
    "in rounds": {"rollout.partial": {"extra_prompts": 12, "max_age": 4}},
}


def run(form: str, options: argparse.Namespace, data: Path, folder: Path) -> dict[str, float]:
    """Train; the medians of a form's figures."""
    values = {
        "name": form.replace(" ", "-"), "run_dir": str(folder), "steps": options.steps, "model.path": options.model,
        "parallel.tensor": 1, "data.train": [str(data)], "evaluation.files": [], "batch.prompts_per_step": 24,
        "batch.rollouts_per_prompt": 8, "rollout.max_response_tokens": options.tokens, "objective": {"kind": "grpo"},
        "rollout.temperature": options.temperature,
        "parity": {"every": 0, "correction": "truncate"}, "optimizer.lr": 0.0, "optimizer.warmup_steps": 0,
        **FORMS[form],
    }  # fmt: skip
    if partial := values.get("rollout.partial"):
        values["rollout.partial"] = partial | {"tokens_per_round": options.round}
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    command = [sys.executable, "-m", "megatron_srft.train", str(EXAMPLE / "config.yaml"), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    lines = [json.loads(line) for line in (folder / values["name"] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][LEFT_OUT:]
    return {
        name: statistics.median(found)
        for name, key in FIGURES.items()
        if (found := [step[key] for step in steps if key in step])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder with the arithmetic example's tokenizer")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=64, help="limit of a response")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="high ones make lengths uneven: at 4 the demo's tail is long"
    )
    parser.add_argument("--round", type=int, default=16, help="tokens of a round")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    data = EXAMPLE / "data" / "train.jsonl"
    if not data.is_file():
        sys.exit(f"{data} is not there: run `make demo`, or {EXAMPLE / 'task.py'}, first")
    print("form             step   generate   ahead   tokens/s   step against as it goes")
    for _ in range(options.repeats):
        plain = None
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                found = run(form, options, data, Path(folder))
            plain = plain or found["step"]
            cells = [f"{found[name]:8.3f}" if name in found else "       -" for name in ("step", "generate", "ahead")]
            print(f"{form:13}{''.join(cells)}   {found['tokens/s']:8.0f}   {plain / found['step']:.2f}x", flush=True)


if __name__ == "__main__":
    main()
