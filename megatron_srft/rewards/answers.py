"""Find the final answer in a response, and compare answers as text and as plain numbers. Standard library only.

Where the answer is looked for, first hit wins:
  1. the last complete \\boxed{...} (boxes joined by a comma or "and" form one list);
  2. the last statement: `#### x`, `<answer>x</answer>`, "the answer is x", "Answer: x", "the correct option is x";
  3. the last line, when nothing but the answer stands there; for letters also "... (C)" at the very end;
  4. otherwise the caller may try harder (math-verify takes the last number or formula of the text).

`decide` returns True or False only where text alone proves it; everything else is None, for the symbolic comparison.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal

Status = Literal["verified", "no_answer", "unverifiable", "timeout", "crash"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a verifier says about one response. Example: correct=True, status="verified", answer="1/2"."""

    correct: bool | None
    """None when the verifier reached no verdict (unverifiable, timeout, crash)."""

    status: Status

    answer: str | None = None
    """The response's final answer in canonical form; None when there is none."""


# ---------------------------------------------------------------- extraction

MAX_ANSWER_CHARACTERS = 2000
"""A longer last line is not looked at."""

MAX_FORMULA_CHARACTERS, MAX_NESTING = 200, 8
"""An answer longer than this and than four references, or deeper, is degenerate and would cost the parser seconds."""

STATEMENT_WINDOW = 4000
"""Characters at the end of a response in which a statement of the answer is looked for."""

STATEMENT = re.compile(
    r"""\#\#\#\#[ \t]*
      | <answer>\s*
      | (?i:\banswer\b [*_]* (?:\s+(?:is|are)\b (?:\s*[:=])? | \s*[:=]) [\s*_]*)
      | (?i:\banswer\b [^\n.:]{1,80}? \s(?:is|are)\b \s*:? [\s*_]*)
      | (?i:\b(?:correct|right|best) \s+ (?:option|choice) [*_]* (?:\s+is\b\s*:? | \s*:) [\s*_]*)
    """,
    re.VERBOSE,
)
SENTENCE_END = re.compile(r"\.(?=\s|\**$)|</answer>|\n|\bI hope\b")
LIST_JOINT = re.compile(r"[\s$]*(?:,|and|,\s*and|or|&)[\s$]*")
LETTER = re.compile(r"(?:(?:option|choice|answer)\s*)?(?:\(([A-J])\)|([A-J])(?:[).:,]|$))", re.IGNORECASE)
LETTER_STATEMENT = re.compile(
    r"""(?i:\b(?:ans|answer|option|choice)\b) [\s:.,*_$>-]*+ (?i:(?:is|are|(?:will|would|must)\ be)\b)?
        [\s:.,*_$({>-]*+ (?i:(?:option|choice|answer)\b)? [\s:*_$({]*+ (?:\\text\w*+\{\(?)?
        ([A-J]) (?= \s{0,9}(?:[).:,;*_$}\]]|\n|\Z) | \s{1,9}(?:because|since|as|is)\b )
      | (?:^|[\s(*$]) ([A-J]) [)*$.]{0,4} \s{1,9} is \s{1,9} (?:the\s{1,9})? (?:correct|right|best|answer)
      | [(>] ([A-J]) \)? [\s.*$]{0,9} \Z
      | (?:^|\n) [\s*$]{0,9} ([A-J]) [\s.*$)]{0,9} \Z
    """,
    re.VERBOSE,
)
"""Bounded and possessive repeats: a response of a thousand spaces must not cost a thousand squared steps."""

MAX_BOXES = 50
"""Boxes looked at from the end of a response."""


def final_answer(response: str) -> str | None:
    """The explicit final answer of a response (rules 1 and 2), as written, or None."""
    boxed = last_boxed(response)
    return boxed if boxed is not None else last_statement(response)


def last_boxed(response: str) -> str | None:
    r"""The content of the last complete, non-empty \boxed{...}; neighbours joined by a comma or 'and' come along."""
    end = start = len(response)
    contents = []
    for _ in range(MAX_BOXES):
        start = _last_box_start(response, start)
        if start < 0:
            break
        content, after = _braced(response, start)
        found = content is not None and content.strip()
        if contents and not (found and LIST_JOINT.fullmatch(response, after, end)):
            break
        if found:
            contents.insert(0, content.strip())
            end = start
    return ", ".join(dict.fromkeys(contents)) if contents else None


def _last_box_start(response: str, end: int) -> int:
    return max(response.rfind("\\boxed{", 0, end), response.rfind("\\fbox{", 0, end))


def _braced(text: str, start: int) -> tuple[str | None, int]:
    """The text inside the braces that open at or after `start`, and the position behind them."""
    depth, open_at = 0, text.index("{", start)
    for mark in re.finditer(r"\\[{}]|[{}]", text[open_at : open_at + 4 * MAX_ANSWER_CHARACTERS]):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return text[open_at + 1 : open_at + mark.start()], open_at + mark.end()
    return None, len(text)


def last_statement(response: str) -> str | None:
    """What follows the last 'the answer is', up to the end of the sentence."""
    tail = response[-STATEMENT_WINDOW:]
    ends = [match.end() for match in STATEMENT.finditer(tail)]
    if not ends:
        return None
    rest = tail[ends[-1] :]
    end = SENTENCE_END.search(rest)
    return rest[: end.start() if end else None].rstrip(" \t*_`.:").lstrip(" \t*_`:") or None


def last_line(response: str) -> str:
    """The last line that is not empty, without markdown."""
    return response.rstrip().rpartition("\n")[2].strip(" \t*_`")


# ---------------------------------------------------------------- normal form

UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ",
    "°": "^\\circ", "∪": "\\cup ", "\u00a0": " ", "“": '"', "”": '"', "’": "'",
})  # fmt: skip
REWRITES = [
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"(?<!\\)\$\s*,\s*(?<!\\)\$"), ", "),
    (re.compile(r"\\?\$"), " "),
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)(?![a-zA-Z])\.?"), ""),
    (re.compile(r"\\(?:displaystyle|quad|qquad)(?![a-zA-Z])|\\[;:> ]|(?<!\\)~"), " "),
    (re.compile(r"\\[,!]"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:geqslant|geq)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\(?:leqslant|leq)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|mbox|operatorname|mathit)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"(?<![\w.,])(\d{1,3}(?:,\d{3})+)(?![\w,])"), lambda match: match.group(1).replace(",", "")),
    (re.compile(r"(?<=[A-Za-z0-9])\s+(?=[A-Za-z0-9])"), "\x00"),
    (re.compile(r"\s+"), ""),
    (re.compile("\x00"), " "),
    (re.compile(r"([_^])\{(\w)\}(?!\w)"), r"\1\2"),
]
WHOLE_BOX = re.compile(r"\\(?:boxed|fbox)\{(.*)\}", re.DOTALL)
PARENTHESISED_LETTER = re.compile(r"\(([A-Za-z])\)")


def clean(answer: str) -> str:
    r"""The answer without an enclosing \boxed{} or closing period; still readable by a LaTeX parser."""
    text = answer.translate(UNICODE).strip()
    boxed = last_boxed(text) if WHOLE_BOX.fullmatch(text.strip("$. ")) else None
    return (boxed if boxed is not None else text).strip().rstrip(".").strip()


def normal(answer: str) -> str:
    r"""One spelling for answers that differ only in typesetting: delimiters, \left, \dfrac, \text, spaces, 1,234.

    A space survives only between two letters or digits, where it tells `1 1/2` from `11/2`.
    """
    text = clean(answer)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    letter = PARENTHESISED_LETTER.fullmatch(text)
    return letter.group(1) if letter else text


NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
DECIMAL = re.compile(rf"({NUMBER})(?:(?:[eE]|(?:\\times|\\cdot|\*)10\^)\{{?([+-]?\d{{1,3}})\}}?)?")
RATIO = re.compile(rf"({NUMBER})/({NUMBER})|([+-]?)\\frac(?:\{{({NUMBER})\}}|(\d))(?:\{{({NUMBER})\}}|(\d))")
SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d{1,4})(?![\w.])")
BASED = re.compile(r"(\d+)_(?:\{(\d+)\}|(\d+))")


def number(normal_form: str) -> Fraction | None:
    r"""The exact value of a plain number (18, -1.5, 4.5e33, 3\times10^4, 1/2, \frac{1}{2}), or None."""
    if len(normal_form) > 200:
        return None
    if match := DECIMAL.fullmatch(normal_form):
        return Fraction(match.group(1)) * Fraction(10) ** int(match.group(2) or 0)
    if match := RATIO.fullmatch(normal_form):
        a, b, sign, c, c_digit, d, d_digit = match.groups()
        above, below = Fraction(a or c or c_digit), Fraction(b or d or d_digit)
        return None if below == 0 else (-1 if sign == "-" else 1) * above / below
    return None


def canonical(answer: str) -> str:
    """The voting key of an answer: its value when it is a plain number, else its normal form."""
    text = normal(answer)
    value = number(text)
    return text if value is None else str(value)


# ---------------------------------------------------------------- comparison as text


def is_letter(reference: str) -> bool:
    """Whether a reference, in normal form, is the letter of a multiple choice."""
    return len(reference) == 1 and "A" <= reference <= "J"


def is_words(reference: str) -> bool:
    """Whether a reference, in normal form, is a word or words: compared as text, never as a product of symbols."""
    return re.fullmatch(r"[^\W\d_]{4,}(?:[ '-][^\W\d_]+)*", reference) is not None


def letter(answer: str) -> str | None:
    """The letter that an answer such as 'C', '(C)', 'C) 8 days' or 'option C' chooses."""
    text = re.sub(r"\\text\w*\s*\{([^{}]*)\}", r"\1", clean(answer)).strip("$*_ ")
    match = LETTER.match(text)
    return (match.group(1) or match.group(2)).upper() if match else None


def chosen_letter(response: str) -> str | None:
    """The letter a response chooses: its box, else the last 'answer is C', 'option: C', '(C) is correct' or final 'C'.

    Without a letter the box or statement is returned as it is: an answer, but not one of the choices.
    """
    boxed = last_boxed(response)
    if boxed is not None:
        return letter(boxed) or boxed
    found = [match for match in LETTER_STATEMENT.finditer(response[-STATEMENT_WINDOW:])]
    if found:
        return next(group for group in found[-1].groups() if group)
    return last_statement(response)


def decide(answer: str, reference: str) -> bool | None:
    """True or False where text and plain arithmetic prove it, None where mathematics must."""
    found, wanted = normal(answer), normal(reference)
    if found == wanted:
        return True
    if is_letter(wanted):
        return letter(answer) == wanted
    if is_words(wanted):
        return found.casefold() == wanted.casefold()
    if len(found) > max(MAX_FORMULA_CHARACTERS, 4 * len(wanted)) or nesting(found) > MAX_NESTING:
        return False
    if (verdict := _same_digits_in_a_base(found, wanted)) is not None:
        return verdict
    return _same_number(number(found), number(wanted))


def nesting(formula: str) -> int:
    """Greatest number of brackets open at one place."""
    return max(accumulate((mark in "([{") - (mark in ")]}") for mark in formula), default=0)


def _same_number(found: Fraction | None, wanted: Fraction | None) -> bool | None:
    """Equal values are equal; different integers differ. Other decimals may be roundings of one another."""
    if found is None or wanted is None:
        return None
    if found == wanted:
        return True
    return False if found.denominator == wanted.denominator == 1 else None


def _same_digits_in_a_base(found: str, wanted: str) -> bool | None:
    """52_8 against 52_8, 52_9 or 52: the base may be left out, but not changed. math-verify ignores it altogether."""
    bases = [BASED.fullmatch(found), BASED.fullmatch(wanted)]
    if not any(bases):
        return None
    (digits, base), (wanted_digits, wanted_base) = (
        (match.group(1), match.group(2) or match.group(3)) if match else (text, None)
        for match, text in zip(bases, (found, wanted), strict=True)
    )
    return digits == wanted_digits and (base == wanted_base or None in (base, wanted_base))
