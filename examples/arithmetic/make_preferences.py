"""Pairs of a right and a wrong worked solution for DPO, for the training problems that have no demonstration.

    prompt    7+5-3=
    chosen    7+5=2;2-3=9#9
    rejected  7+5=2;2-3=4#4      one step has a wrong result, and what follows goes on from it
    rejected  #4                 every second one: a guess without a step

Reads train.jsonl (from make_data.py) and writes preferences.jsonl beside it. The same seed gives the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

from make_data import HERE, MODULUS, solve, steps, worked_solution


def wrong_chain(generator: random.Random, prompt: str) -> str:
    """A solution whose every step is right but one, so that its answer is wrong: '7+5=2;2-3=4#4'."""
    written = steps(prompt)
    wrong, offset = generator.randrange(len(written)), generator.randrange(1, MODULUS)
    parts, carried = [], None
    for number, (step, value) in enumerate(written):
        # From the wrong step on, every value is off by the same amount.
        shown = (value + offset) % MODULUS if number >= wrong else value
        parts.append(f"{step if carried is None else carried + step[1:]}={shown}")
        carried = str(shown)
    return ";".join(parts) + "#" + carried


def guess(generator: random.Random, prompt: str) -> str:
    """A wrong answer without a step: '#4'."""
    return f"#{(int(solve(prompt)) + generator.randrange(1, MODULUS)) % MODULUS}"


def make(folder: Path, seed: int) -> None:
    """Write one pair for each problem of train.jsonl without a demonstration."""
    generator = random.Random(seed)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows if "demonstration" not in row]
    with (folder / "preferences.jsonl").open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            rejected = (wrong_chain, guess)[number % 2](generator, prompt)
            row = {"id": f"preferences/{number}", "prompt": prompt, "answer": solve(prompt)}
            file.write(json.dumps(row | {"chosen": worked_solution(prompt), "rejected": rejected}) + "\n")
    print(f"{folder / 'preferences.jsonl'}: {len(prompts)} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "data", help="where train.jsonl is")
    parser.add_argument("--seed", type=int, default=0)
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
