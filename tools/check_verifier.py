#!/usr/bin/env python3
r"""Run the math verifier over the reference answers of your own data, before you train on it.

    python tools/check_verifier.py gsm8k.jsonl math500.jsonl --minimum 0.98 --show 20

Every reference is put into two responses that must be right, "... \boxed{X}" and "So the final answer is X.", and a
changed reference into two that must be wrong: an integer plus 1, a decimal 1 % larger, another letter, "not" before
words, the last integer of a formula plus 1 (or "+1" behind it); `accepted` counts those that pass in spite of it.
`symbolic` counts the references that equal themselves as mathematics too, without the comparison as text, which is
what a right answer in another spelling needs (words never do). Demonstrations, where a row has one, are
verified as they are. Exit status 1 when, in some file, fewer than --minimum of the boxed references are recognised.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

from megatron_srft.config import MathRewardConfig
from megatron_srft.rewards import answers
from megatron_srft.rewards.math import MathVerifier

COLUMNS = (
    "total",
    "boxed",
    "sentence",
    "symbolic",
    "accepted",
    "unverifiable",
    "failed",
    "demos",
    "demos_ok",
    "seconds",
)


def perturbed(reference: str) -> str:
    """A reference changed so little that a careless verifier would still accept it."""
    text = answers.clean(reference)
    normal = answers.normal(text)
    value = answers.number(normal)
    if answers.is_letter(normal):
        return "ABCDEFGHIJ"["ABCDEFGHIJ".index(normal) - 1]
    if answers.is_words(normal):
        return f"not {normal}"
    if value is not None and value.denominator == 1 and len(normal) < 20 and "e" not in normal:
        return str(value + 1)
    if value is not None and re.fullmatch(answers.DECIMAL, normal):
        return f"{float(value) * 1.01:.6g}"
    integers = list(re.finditer(r"\d+", text))
    if not integers:
        return f"{text.strip('$. ')}+1"
    last = integers[-1]
    return text[: last.start()] + str(int(last.group()) + 1) + text[last.end() :]


def check(path: str, verifier: MathVerifier, answer_key: str) -> tuple[Counter, list[str]]:
    """The counts of one file, and a line for every reference that did not behave."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    references = [str(row[answer_key]) for row in rows]
    changed = [perturbed(reference) for reference in references]
    boxed, sentence = "We add the parts up and get $\\boxed{{{}}}$", "So the final answer is {}."
    started = time.monotonic()

    def verdicts(template: str, values: list[str], wanted: list[str]) -> list[answers.Verdict]:
        return verifier.judge([template.format(value) for value in values], wanted, [False] * len(values))

    right_boxed, right_sentence = verdicts(boxed, references, references), verdicts(sentence, references, references)
    wrong_boxed, wrong_sentence = verdicts(boxed, changed, references), verdicts(sentence, changed, references)
    symbolic = verifier.pool.judge([(reference, "", reference) for reference in references])
    shown = [(row["demonstration"], str(row[answer_key])) for row in rows if row.get("demonstration")]
    demonstrations = verdicts("{}", [text for text, _ in shown], [reference for _, reference in shown])

    counts, residue = Counter(total=len(rows), symbolic=sum(v.correct is True for v in symbolic)), []
    for reference, change, *columns in zip(
        references, changed, right_boxed, right_sentence, wrong_boxed, wrong_sentence, strict=True
    ):
        box, said, bad_box, bad_said = columns
        counts["boxed"] += box.correct is True
        counts["sentence"] += said.correct is True
        counts["accepted"] += bad_box.correct is True or bad_said.correct is True
        counts["unverifiable"] += any(verdict.status == "unverifiable" for verdict in columns)
        counts["failed"] += any(verdict.status in ("timeout", "crash") for verdict in columns)
        if (box.correct, said.correct, bad_box.correct, bad_said.correct) != (True, True, False, False):
            states = " ".join(f"{v.status}:{v.correct}" for v in columns)
            residue.append(f"{reference!r} changed to {change!r}: boxed, sentence, changed boxed, sentence = {states}")
    counts["demos"] = len(shown)
    counts["demos_ok"] = sum(verdict.correct is True for verdict in demonstrations)
    counts["seconds"] = round(time.monotonic() - started, 1)
    return counts, residue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="JSONL files with a reference answer in every row")
    parser.add_argument("--answer-key", default="answer", help="field with the reference answer")
    parser.add_argument("--minimum", type=float, default=0.98, help="share of boxed references that must be right")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="references of each file that did not behave")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one verification")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    verifier = MathVerifier(MathRewardConfig(timeout_seconds=options.timeout, workers=options.workers))
    width = max(len(Path(path).name) for path in options.files)
    print(" ".join([" " * width, *(f"{name:>12}" for name in COLUMNS)]), flush=True)
    poor = []
    for path in options.files:
        counts, residue = check(path, verifier, options.answer_key)
        print(" ".join([f"{Path(path).name:<{width}}", *(f"{counts[name]:>12}" for name in COLUMNS)]), flush=True)
        print("".join(f"    {line}\n" for line in residue[: options.show]), end="", flush=True)
        if counts["boxed"] < options.minimum * counts["total"]:
            poor.append(path)
    verifier.close()
    for path in poor:
        print(f"{path}: fewer than {options.minimum:.0%} of the references are recognised in a box", file=sys.stderr)
    return 1 if poor else 0


if __name__ == "__main__":
    sys.exit(main())
