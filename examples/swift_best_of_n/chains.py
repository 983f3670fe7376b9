"""Arithmetic chains by a writer who slips: right answers in about half of the samples, and real variety among them.

    prompt     7+5-3+4=
    right      7+5=2;2-3=9;9+4=3#3
    slip       7+5=8;8-3=5;5+4=9#9            one wrong step, and what follows goes on from it
    noticed    7+5=8~2;2-3=9;9+4=3#3          the value is put right

The text that the policy learns from slips in so many steps, and now and then notices. So whoever predicts such text has
to know of every value whether it is right, also when nothing is noticed. That the hidden states know more than the text
shows is what makes a reward out of them possible; how much more is what this task asks.
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "arithmetic"))

from make_data import MODULUS, distinct_problems, random_problem, solve, steps  # noqa: E402

OPERANDS = 4
SLIP, NOTICED = 0.3, 0.3
"""Share of wrong steps, and of those that are put right."""


def value(step: str) -> int:
    """Of a step such as '2-3'."""
    return (int(step[0]) + int(step[2])) % MODULUS if step[1] == "+" else (int(step[0]) - int(step[2])) % MODULUS


def slipping_solution(generator: random.Random, prompt: str, slip: float = SLIP, noticed: float = NOTICED) -> str:
    written, carried = [], None
    for step, _ in steps(prompt):
        step = step if carried is None else carried + step[1:]
        right = str(value(step))
        wrong = str((int(right) + generator.randrange(1, MODULUS)) % MODULUS)
        if generator.random() >= slip:
            shown, carried = right, right
        elif generator.random() < noticed:
            shown, carried = f"{wrong}~{right}", right
        else:
            shown, carried = wrong, wrong
        written.append(f"{step}={shown}")
    return ";".join(written) + "#" + carried


def document(generator: random.Random) -> tuple[str, str]:
    prompt = random_problem(generator, OPERANDS)
    return prompt, slipping_solution(generator, prompt)


def single_step(generator: random.Random) -> tuple[str, str]:
    """The lesson before chains: one step, wrong half of the time and then always noticed. From chains alone a model
    this small takes many times longer to see which values are wrong."""
    prompt = random_problem(generator, 2)
    return prompt, slipping_solution(generator, prompt, slip=0.5, noticed=1.0)


def write_problems(folder: Path, train: int, test: int, seed: int = 0) -> None:
    """train.jsonl and test.jsonl; no problem occurs twice."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, taken = random.Random(seed), set()
    for name, number in (("train", train), ("test", test)):
        prompts = distinct_problems(generator, (OPERANDS,), number, taken)
        rows = [{"id": f"{name}/{i}", "prompt": p, "answer": solve(p)} for i, p in enumerate(prompts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
