"""Compare two answers as mathematics, with math-verify and sympy. Runs in worker processes only: it may take forever.

math-verify's own deadlines are signal alarms, which need the main thread and leave sympy in an undefined state; they
are switched off here, and the parent process kills a worker that is late.
"""

import logging
import re
from functools import lru_cache

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_srft.rewards.answers import SCIENTIFIC, Verdict, canonical, clean, is_letter, is_words, normal

# math-verify warns that its deadlines are off; antlr and latex2sympy report every malformed formula.
logging.disable(logging.CRITICAL)

LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
TEXT = [LatexExtractionConfig(), ExprExtractionConfig()]
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "max", "min", "arcsin", "arccos", "arctan", "sqrt"}


def judge(answer: str | None, tail: str, reference: str) -> Verdict:
    """Compare an explicit answer, or where there is none the last formula or number of `tail`, with the reference.

    Raises MemoryError when sympy outgrows the process.
    """
    wanted = parse_reference(reference)
    found = parse_answer(answer) if answer is not None else []
    if not found and tail:
        found = _parse_text(tail)
    key = canonical(answer) if answer is not None else str(found[0]) if found else None
    if key is None:
        return Verdict(correct=False, status="no_answer")
    if not wanted:
        # Words are wrong when they differ, a formula that sympy cannot read might still be right.
        worded = is_words(normal(reference)) or is_letter(normal(reference))
        return Verdict(correct=False if worded else None, status="verified" if worded else "unverifiable", answer=key)
    return Verdict(correct=bool(found) and same(wanted, found), status="verified", answer=key)


@lru_cache(maxsize=4096)
def parse_reference(reference: str) -> list[sympy.Basic]:
    """Readings of a reference answer; none for words."""
    if is_words(normal(reference)):
        return []
    return _parse_latex(reference) or _parse_text(reference)


def parse_answer(answer: str) -> list[sympy.Basic]:
    """The reading of a response's explicit answer; none for prose, whose letters are not a product of symbols."""
    prose = [word for word in PROSE.findall(re.sub(r"\\text\w*\s*\{[^{}]*\}", "", answer)) if word not in FUNCTIONS]
    return [] if prose else _parse_latex(answer)


def _parse_latex(answer: str) -> list[sympy.Basic]:
    text = SCIENTIFIC.sub(r"\1 \\times 10^{\2}", clean(answer))
    text = re.sub(r"(?<!\\)\$\s*,\s*\$", ", ", text)
    text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"(\d)\.(?=\D|$)", r"\1.0", text)
    return parse(f"\\boxed{{{text}}}", LATEX, fallback_mode="no_fallback", parsing_timeout=None)


def _parse_text(text: str) -> list[sympy.Basic]:
    text = SCIENTIFIC.sub(r"$\1 \\times 10^{\2}$", text)
    return parse(text, TEXT, fallback_mode="no_fallback", parsing_timeout=None)


def same(wanted: list[sympy.Basic], found: list[sympy.Basic]) -> bool:
    """Whether any reading of the reference equals any reading of the answer."""
    digits = max(decimals(expression) for expression in wanted)
    return verify(wanted, found, float_rounding=digits, timeout_seconds=None)


def decimals(expression: sympy.Basic) -> int:
    """Decimals to which floats are compared: 6, and for small numbers enough to see 4 of their digits.

    math-verify rounds to 6 decimals whatever the size, so that 5.9e-7 would equal 6.9e-7.
    """
    value = expression.evalf(8) if isinstance(expression, sympy.Expr) and expression.is_number else None
    if not isinstance(value, sympy.Float) or not 0 < abs(value) < 1:
        return 6
    return max(6, 3 - int(sympy.floor(sympy.log(abs(value), 10))))
