"""Problems of the arithmetic example: chains of sums and differences modulo 10, some with an expert's worked solution.

    prompt         7+5-3=
    demonstration  7+5=2;2-3=9#9      every step written out, the answer behind '#'
    answer         9

Every intermediate value stays below the modulus, so a model that knows the 200 single steps `a+b` and `a-b` can solve a
chain of any length, provided that it writes the steps down.

Writes train.jsonl (only every second prompt has a demonstration), heldout.jsonl (same lengths, other problems) and
ood.jsonl (longer chains than any in train.jsonl). The same seed gives the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

MODULUS = 10
TRAIN_OPERANDS = (4, 5)
OOD_OPERANDS = (6, 7)
HERE = Path(__file__).resolve().parent


def random_problem(generator: random.Random, num_operands: int) -> str:
    """Draw a prompt with `num_operands` operands, for example '7+5-3='."""
    operands = [str(generator.randrange(MODULUS)) for _ in range(num_operands)]
    signs = [generator.choice("+-") for _ in range(num_operands - 1)]
    return operands[0] + "".join(sign + operand for sign, operand in zip(signs, operands[1:], strict=True)) + "="


def steps(prompt: str) -> list[tuple[str, int]]:
    """Split a prompt into its single steps: '7+5-3=' gives [('7+5', 2), ('2-3', 9)]."""
    first, *rest = prompt.removesuffix("=").replace("-", "+-").split("+")
    value, out = int(first), []
    for term in rest:
        written = f"{value}{term}" if term.startswith("-") else f"{value}+{term}"
        value = (value + int(term)) % MODULUS
        out.append((written, value))
    return out


def solve(prompt: str) -> str:
    """Return the answer: '7+5-3=' gives '9'."""
    return str(steps(prompt)[-1][1])


def worked_solution(prompt: str) -> str:
    """Return the expert's text: '7+5-3=' gives '7+5=2;2-3=9#9'."""
    return ";".join(f"{step}={value}" for step, value in steps(prompt)) + "#" + solve(prompt)


def distinct_problems(generator: random.Random, lengths: tuple[int, ...], count: int, taken: set[str]) -> list[str]:
    """Draw `count` prompts that are not in `taken`, and add them to it; the lengths take turns."""
    prompts = []
    while len(prompts) < count:
        prompt = random_problem(generator, lengths[len(prompts) % len(lengths)])
        if prompt not in taken:
            taken.add(prompt)
            prompts.append(prompt)
    return prompts


def write_rows(path: Path, prompts: list[str], with_demonstration: set[str]) -> None:
    """Write one JSON object per prompt: id, prompt, answer and, for some, demonstration."""
    lines = []
    for number, prompt in enumerate(prompts):
        row = {"id": f"{path.stem}/{number}", "prompt": prompt, "answer": solve(prompt)}
        if prompt in with_demonstration:
            row["demonstration"] = worked_solution(prompt)
        lines.append(json.dumps(row) + "\n")
    write_whole(path, "".join(lines))


def write_whole(path: Path, text: str) -> None:
    """The file appears under its name when it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def make(folder: Path, seed: int, train: int, heldout: int, ood: int, demonstration_share: float) -> None:
    """Write the three files into `folder`, train.jsonl last; no problem occurs twice."""
    generator, taken = random.Random(seed), set()
    folder.mkdir(parents=True, exist_ok=True)
    train_prompts = distinct_problems(generator, TRAIN_OPERANDS, train, taken)
    demonstrated = set(generator.sample(train_prompts, round(train * demonstration_share)))
    write_rows(folder / "heldout.jsonl", distinct_problems(generator, TRAIN_OPERANDS, heldout, taken), set())
    write_rows(folder / "ood.jsonl", distinct_problems(generator, OOD_OPERANDS, ood, taken), set())
    write_rows(folder / "train.jsonl", train_prompts, demonstrated)
    print(f"{folder}: {train} prompts to train on, {len(demonstrated)} of them with a demonstration;", end=" ")
    print(f"{heldout} held out, {ood} out of distribution")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "data", help="where the JSONL files go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2000, help="prompts to train on")
    parser.add_argument("--heldout", type=int, default=200, help="held-out problems of the same lengths")
    parser.add_argument("--ood", type=int, default=200, help="held-out problems with longer chains")
    parser.add_argument("--demonstration-share", type=float, default=0.5, help="share of prompts with a demonstration")
    arguments = parser.parse_args()
    make(**vars(arguments))


if __name__ == "__main__":
    main()
