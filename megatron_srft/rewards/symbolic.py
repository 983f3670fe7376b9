"""Compare two answers as mathematics, with math-verify and sympy. Runs in worker processes only: it may take forever.

math-verify's own deadlines are signal alarms, which need the main thread and leave sympy in an undefined state; they
are switched off here, and the parent process kills a worker that is late.

Stricter than math-verify where it says yes too easily:
  - it rounds floats to 6 decimals and chops small numbers, so 2.9e-19 equals 7e-24; here values must agree to 1e-4;
  - it calls two equations equal when neither can be solved; here the solutions of each must fulfil the other;
  - from a formula it cannot read it takes a part; here only the whole formula counts.
"""

import re
from functools import lru_cache

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy.core.function import AppliedUndef

from megatron_srft.rewards.answers import SCIENTIFIC, Verdict, canonical, clean, is_letter, is_words, normal

LATEX = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
TEXT = [LatexExtractionConfig(), ExprExtractionConfig()]

PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
TEXT_COMMAND = re.compile(r"\\(?:text\w*|mbox|mathrm|begin|end)\s*\{[^{}]*\}")
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "max", "min", "arcsin", "arccos", "arctan", "sqrt"}
NUMERALS = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
CHANGES_THE_NUMBER = re.compile(r"(?i)\b(?:not|no|half|hundred|thousand|million|billion|trillion|dozen|pi)\b")

READABLE = [
    (SCIENTIFIC, r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<!\\)\$\s*,\s*\$"), ", "),
    (re.compile(r"(?<!\\)\$"), " "),
    (re.compile(r"(\d)\.(?=\D|$)"), r"\1.0"),
    # E_1 and I_1 are read as Euler's number and the imaginary unit, \max and \odot in a subscript not at all.
    (re.compile(r"(?<![A-Za-z\\])[Ee](?=_)"), r"\\Xi "),
    (re.compile(r"(?<![A-Za-z\\])I(?=_)"), r"\\Psi "),
    (re.compile(r"_(?:\{\s*\\([a-zA-Z]+)\s*\}|\\([a-zA-Z]+))"), r"_{\1\2}"),
]
"""What is changed in a LaTeX answer so that latex2sympy reads it as meant."""

RELATIVE_TOLERANCE = 1e-4


def judge(answer: str | None, tail: str, reference: str) -> Verdict:
    """Compare an explicit answer, or where there is none the last formula or number of `tail`, with the reference.

    Raises MemoryError when sympy outgrows the process.
    """
    wanted = parse_reference(reference)
    found = parse_answer(answer) if answer is not None else []
    if not found and tail:
        found = _parse_text(tail)
    if not found and answer is None:
        return Verdict(correct=False, status="no_answer")
    key = canonical(answer if answer is not None else str(found[0]))
    if not wanted:
        # Words are wrong when they differ, a formula that sympy cannot read might still be right.
        worded = is_words(normal(reference)) or is_letter(normal(reference))
        return Verdict(correct=False if worded else None, status="verified" if worded else "unverifiable", answer=key)
    right = any(same(w, f) for w in wanted for f in found)
    return Verdict(correct=right, status="verified", answer=key)


# ---------------------------------------------------------------- reading


@lru_cache(maxsize=4096)
def parse_reference(reference: str) -> list[sympy.Basic]:
    """Readings of a reference answer; none for words and for what latex2sympy cannot read."""
    if is_words(normal(reference)):
        return []
    readings = _parse_latex(reference) if not _prose(reference) else _parse_quantity(reference)
    # math-verify folds case, which makes N = n a statement that every equation without a solution would equal.
    return [r for r in readings if not (isinstance(r, sympy.Eq) and r.lhs == r.rhs)]


def parse_answer(answer: str) -> list[sympy.Basic]:
    """Readings of an explicit answer: a formula, or one number among words; other prose has none."""
    return _parse_quantity(answer) if _prose(answer) else _parse_latex(answer)


def _prose(answer: str) -> bool:
    """Whether there are words outside \\text{}, whose letters would be read as a product of symbols."""
    return any(word not in FUNCTIONS for word in PROSE.findall(TEXT_COMMAND.sub("", answer)))


def _parse_quantity(answer: str) -> list[sympy.Basic]:
    """18 for '18 dollars per day'; nothing when there are two numbers, or words that change the number."""
    numerals = NUMERALS.findall(answer)
    if len(numerals) != 1 or CHANGES_THE_NUMBER.search(answer):
        return []
    return _parse_text(numerals[0])


def _parse_latex(answer: str) -> list[sympy.Basic]:
    text = clean(answer)
    for pattern, replacement in READABLE:
        text = pattern.sub(replacement, text)
    return parse(f"\\boxed{{{text}}}", LATEX, fallback_mode="no_fallback", parsing_timeout=None)


def _parse_text(text: str) -> list[sympy.Basic]:
    text = SCIENTIFIC.sub(r"$\1 \\times 10^{\2}$", text)
    return parse(text, TEXT, fallback_mode="no_fallback", parsing_timeout=None)


# ---------------------------------------------------------------- comparing


def same(wanted: sympy.Basic, found: sympy.Basic) -> bool:
    """Whether two readings mean the same. Numerical disproofs first: they are quick, simplify() and solve() are not."""
    if not _are_scalar_equations(wanted, found):
        return not differ_numerically(wanted, found) and _verify(wanted, found)
    left, right = _opaque(wanted.lhs - wanted.rhs), _opaque(found.lhs - found.rhs)
    if not _sides_differ(left, right):
        return _verify(wanted, found)
    return (
        not _roots_differ(left, right)
        and _verify(wanted, found)
        and _solutions_fulfil(left, right)
        and _solutions_fulfil(right, left)
    )


def _verify(wanted: sympy.Basic, found: sympy.Basic) -> bool:
    return verify([wanted], [found], timeout_seconds=None)


def differ_numerically(wanted: sympy.Basic, found: sympy.Basic) -> bool:
    """Whether two scalar expressions take clearly different values where both have one.

    Left to math-verify: symbols (it also matches e with Euler's number and abc with a*b*c), percentages (it equates 9
    and 9%), and a reference of exactly zero, to which nothing is close in relative terms.
    """
    scalars = all(
        isinstance(e, sympy.Expr) and not isinstance(e, sympy.Symbol) and not e.has(sympy.UnevaluatedExpr)
        for e in (wanted, found)
    )
    if not scalars or wanted.is_zero:
        return False
    wanted, found = _opaque(wanted), _opaque(found)
    point = generic_point(wanted, found)
    values = [expression.evalf(15, subs=point) for expression in (wanted, found)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    difference, *sizes = (sympy.Abs(value).evalf(15) for value in (values[0] - values[1], *values))
    return bool(difference > RELATIVE_TOLERANCE * max(sizes))


def _opaque(expression: sympy.Expr) -> sympy.Expr:
    """The expression with a symbol for each unknown function such as x(t), dM/dt or y'(t), which have no value."""
    unknown = {f for f in expression.atoms(AppliedUndef) if all(argument.is_Atom for argument in f.args)}
    unknown |= {d for d in expression.atoms(sympy.Derivative) if d.expr.is_Symbol or d.expr in unknown}
    return expression.xreplace({u: sympy.Symbol(f"<{u}>", real=True) for u in unknown})


# ---------------------------------------------------------------- equations, as expressions that are to vanish


def _are_scalar_equations(wanted: sympy.Basic, found: sympy.Basic) -> bool:
    return all(
        isinstance(equation, sympy.Eq) and all(isinstance(side, sympy.Expr) for side in equation.args)
        for equation in (wanted, found)
    )


def _sides_differ(left: sympy.Expr, right: sympy.Expr) -> bool:
    return differ_numerically(left, right) and differ_numerically(left, -right)


def _roots_differ(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether, all other symbols fixed, some symbol in which both are linear would have to take two values."""
    point = generic_point(left, right)
    for symbol in left.free_symbols & right.free_symbols:
        roots = [_linear_root(expression, symbol, point) for expression in (left, right)]
        if None not in roots and sympy.Abs(roots[0] - roots[1]) > RELATIVE_TOLERANCE * max(map(sympy.Abs, roots)):
            return True
    return False


def _linear_root(expression: sympy.Expr, symbol: sympy.Symbol, point: dict) -> sympy.Expr | None:
    """Where a linear expression vanishes, from its values at symbol = 1, 2, 3; None when it is not linear."""
    values = [expression.evalf(15, subs={**point, symbol: sympy.Float(s)}) for s in (1, 2, 3)]
    if not all(value.is_number and value.is_finite for value in values):
        return None
    first, second, third = values
    slope, scale = second - first, max(map(sympy.Abs, values))
    if sympy.Abs(slope) <= RELATIVE_TOLERANCE * scale or sympy.Abs(third - second - slope) > 1e-9 * scale:
        return None
    return 1 - first / slope


def _solutions_fulfil(equation: sympy.Expr, other: sympy.Expr) -> bool:
    """Whether the solutions of one equation fulfil the other; one that cannot be solved proves nothing."""
    symbol = max(equation.free_symbols, key=str, default=None)
    solutions = sympy.solve(equation, symbol) if symbol is not None else []
    return bool(solutions) and all(_vanishes(other.subs(symbol, solution)) for solution in solutions)


def _vanishes(expression: sympy.Expr) -> bool:
    """Whether the terms of a sum cancel at a generic point."""
    terms = [term.evalf(15, subs=generic_point(expression)) for term in sympy.Add.make_args(expression)]
    sizes = [sympy.Abs(term).evalf(15) for term in [*terms, sum(terms)]]
    return all(size.is_number for size in sizes) and bool(sizes[-1] <= RELATIVE_TOLERANCE * sum(sizes[:-1]))


def generic_point(*expressions: sympy.Expr) -> dict[sympy.Symbol, sympy.Float]:
    """A value for every symbol at which nothing vanishes by accident."""
    symbols = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
    return {symbol: sympy.Float(0.7390851332 + 0.1618033989 * i) for i, symbol in enumerate(symbols)}
