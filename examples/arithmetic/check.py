"""What a finished run of this example learned, and whether transformers alone gives the same greedy answers.

    python examples/arithmetic/check.py runs/arithmetic

Prints the accuracy on both held-out sets before and after, then loads the run's final Hugging Face folder with
transformers, answers the same problems with its own generate(), and compares text by text with what the run recorded.
Exit status 1 when fewer than 99 % agree (not all: a tie between two tokens may fall either way by rounding).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIRED_SHARE = 0.99


def evaluations(run: Path) -> tuple[dict, dict]:
    """The first and the last evaluation that the run wrote."""
    files = sorted((run / "evaluations").glob("step-*.json"))
    if len(files) < 2:
        sys.exit(f"{run} has no finished run: expected evaluations before and after, found {len(files)}")
    return tuple(json.loads(file.read_text(encoding="utf-8")) for file in (files[0], files[-1]))


def print_accuracies(before: dict, after: dict) -> None:
    print(f"{'greedy accuracy':<18}{'problems':>10}{'before':>10}{'after':>10}")
    for name, result in after["files"].items():
        first = before["files"][name]["greedy"]
        print(f"{name:<18}{result['problems']:>10}{100 * first:>8.1f} %{100 * result['greedy']:>8.1f} %")


@torch.inference_mode()
def generate(folder: Path, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers of plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, for example runs/arithmetic")
    arguments = parser.parse_args()
    before, after = evaluations(arguments.run)
    print_accuracies(before, after)
    recorded = [answer for answers in after["greedy_answers"].values() for answer in answers]
    folder = arguments.run / "hf" / "final"
    prompts = [answer["prompt"] for answer in recorded]
    own = generate(folder, prompts, after["settings"]["max_response_tokens"])
    same = sum(text == answer["response"] for text, answer in zip(own, recorded, strict=True))
    print(f"transformers, loading {folder}, gives {same} of {len(recorded)} greedy answers exactly as the run did")
    return 0 if same >= REQUIRED_SHARE * len(recorded) else 1


if __name__ == "__main__":
    sys.exit(main())
