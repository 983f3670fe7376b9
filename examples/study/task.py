"""Problems of the study: the arithmetic example's chains, arranged so that fine-tuning methods come apart.

    prompt         7+5-3=
    worked         7+5=2;2-3=9#29     every step written out; behind '#' the last two totals
    brief          2;9#29             the totals alone: right as well, but not how the base model works

The answer is the last two totals, so that a guess is right 1 time in 100. The files, none with a problem of another:

    train.jsonl      chains of 3 to 8 operands; a few hundred of 3 to 5 operands have a demonstration, some of these
                     brief, some with a wrong step and therefore a wrong answer
    heldout.jsonl    3 to 5 operands: where demonstrations are
    harder.jsonl     6 to 8 operands: prompts were trained on, without demonstrations
    ood.jsonl        9 and 10 operands: longer than anything before

The same seed gives the same bytes.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELD_OUT = ("heldout", "harder", "ood")
sys.path.insert(0, str(HERE.parent / "arithmetic"))

from make_data import MODULUS, distinct_problems, steps, write_whole  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the files hold."""

    demonstrated: tuple[int, ...] = (3, 4, 5)
    """Operands of the problems that have demonstrations."""
    harder: tuple[int, ...] = (6, 7, 8)
    ood: tuple[int, ...] = (9, 10)
    prompts: int = 1200
    """Prompts to train on; all lengths from demonstrated and harder equally often."""
    demonstrations: int = 300
    brief_share: float = 0.25
    """Demonstrations in the brief style."""
    wrong_share: float = 0.15
    """Demonstrations with one wrong step; drawn independently of their style."""
    problems: int = 100
    """Problems of each held-out file."""
    seed: int = 0


def answer(totals: list[int]) -> str:
    return "".join(str(total) for total in totals[-2:])


def worked(prompt: str, totals: list[int] | None = None) -> str:
    """'7+5-3=' gives '7+5=2;2-3=9#29'. `totals` replace the right ones; each step then starts from the one before."""
    right = steps(prompt)
    totals = totals or [total for _, total in right]
    starts = [right[0][0][0], *map(str, totals)]
    written = [start + step[1:] for start, (step, _) in zip(starts, right, strict=False)]
    return ";".join(f"{step}={total}" for step, total in zip(written, totals, strict=True)) + "#" + answer(totals)


def brief(prompt: str, totals: list[int] | None = None) -> str:
    """'7+5-3=' gives '2;9#29'."""
    totals = totals or [total for _, total in steps(prompt)]
    return ";".join(map(str, totals)) + "#" + answer(totals)


def solve(prompt: str) -> str:
    """'7+5-3=' gives '29'."""
    return answer([total for _, total in steps(prompt)])


def slip(prompt: str, generator: random.Random) -> list[int]:
    """The totals with one step wrong; those after it follow from it, so the answer is wrong as well."""
    right = [total for _, total in steps(prompt)]
    place, error = generator.randrange(len(right)), generator.randrange(1, MODULUS)
    return right[:place] + [(total + error) % MODULUS for total in right[place:]]


def demonstration(prompt: str, setting: Setting, generator: random.Random) -> str:
    style = brief if generator.random() < setting.brief_share else worked
    return style(prompt, slip(prompt, generator) if generator.random() < setting.wrong_share else None)


def write_rows(path: Path, prompts: list[str], demonstrations: dict[str, str]) -> None:
    lines = []
    for number, prompt in enumerate(prompts):
        row = {"id": f"{path.stem}/{number}", "prompt": prompt, "answer": solve(prompt)}
        if prompt in demonstrations:
            row["demonstration"] = demonstrations[prompt]
        lines.append(json.dumps(row) + "\n")
    write_whole(path, "".join(lines))


def make(folder: Path, setting: Setting) -> None:
    """Write the four files into `folder`, train.jsonl last."""
    generator, taken = random.Random(setting.seed), set()
    folder.mkdir(parents=True, exist_ok=True)
    held_out = {
        name: distinct_problems(generator, lengths, setting.problems, taken)
        for name, lengths in (("heldout", setting.demonstrated), ("harder", setting.harder), ("ood", setting.ood))
    }
    train = distinct_problems(generator, setting.demonstrated + setting.harder, setting.prompts, taken)
    short = [prompt for prompt in train if len(steps(prompt)) + 1 in setting.demonstrated]
    chosen = generator.sample(short, setting.demonstrations)
    for name, prompts in held_out.items():
        write_rows(folder / f"{name}.jsonl", prompts, {})
    write_rows(folder / "train.jsonl", train, {p: demonstration(p, setting, generator) for p in chosen})
    print(
        f"{folder}: {len(train)} prompts, {len(chosen)} demonstrations, {setting.problems} problems in each of 3 files"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "data", help="where the JSONL files go")
    make(parser.parse_args().folder, Setting())


if __name__ == "__main__":
    main()
