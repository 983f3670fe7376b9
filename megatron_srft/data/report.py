"""What became of every row of the data files: kept, dropped and why, cut, doubtful."""

from collections import Counter
from dataclasses import dataclass, field, fields


@dataclass(kw_only=True)
class RowCounts:
    """The fate of the rows of one file, or of all files together."""

    rows: int = 0
    """Rows read."""

    blank_lines: int = 0
    """Blank lines skipped (JSONL)."""

    kept: int = 0
    """Rows that became prompts."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason; rows = kept + the sum of these."""

    first_dropped: dict[str, str] = field(default_factory=dict)
    """File and line of the first row that was left out for each reason."""

    truncated_prompts: int = 0
    """Kept prompts that lost their beginning (data.overlong_prompts: truncate_left)."""

    without_answer: int = 0
    """Kept prompts without a reference answer: they cannot be rewarded, only imitated."""

    joined_answers: int = 0
    """Kept prompts whose answer was a list of several parts, joined by commas."""

    without_demonstration: int = 0
    """Kept prompts without a demonstration."""

    demonstrations: int = 0
    """Demonstrations of the kept prompts."""

    blank_demonstrations: int = 0
    """Demonstrations of the kept prompts that held nothing but white space, and were left out."""

    pairs: int = 0
    """Kept prompts with a chosen and a rejected answer."""

    overlong_demonstrations: int = 0
    """Demonstrations dropped for their length; the prompt itself stays, unless it is of a pair."""

    truncated_demonstrations: int = 0
    """Demonstrations, or answers of pairs, cut to the limit: no end token, never a reward."""

    without_prefix: int = 0
    """Demonstrations, or answers of pairs, that did not begin with data.generation_prefix (nothing was stripped)."""

    longest_prompt_tokens: int = 0
    """Tokens of the longest prompt, before dropping and truncation."""

    longest_demonstration_tokens: int = 0
    """Tokens of the longest demonstration or answer with its end token, before dropping and truncation."""

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, where)

    def __add__(self, other: "RowCounts") -> "RowCounts":
        total = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, dict) and not isinstance(mine, Counter):
                total[f.name] = theirs | mine
            else:
                total[f.name] = max(mine, theirs) if f.name.startswith("longest_") else mine + theirs
        return RowCounts(**total)


@dataclass(kw_only=True)
class DataReport:
    """The accounting of one `load_dataset` or `load_problems`."""

    files: dict[str, RowCounts] = field(default_factory=dict)
    """Counts of each prompt file, by its label."""

    chat_template: bool = False
    """Prompts were rendered with the tokenizer's chat template."""

    preferences: bool = False
    """Pairs of answers were read in place of demonstrations."""

    matched_demonstrations: int = 0
    """Rows of data.demonstrations that found their prompt."""

    unmatched_demonstrations: int = 0
    """Rows of data.demonstrations whose id no prompt has."""

    @property
    def total(self) -> RowCounts:
        """Sums (for the longest, maxima) over all files."""
        return sum(self.files.values(), RowCounts())

    def summary(self) -> str:
        """One paragraph for the console: the sizes, then everything that was dropped, cut or missing."""
        total = self.total
        given, answer = (total.pairs, "answer") if self.preferences else (total.demonstrations, "demonstration")
        rendering = "the tokenizer's chat template" if self.chat_template else "no chat template"
        parts = [
            f"{_plural(total.kept, 'prompt')} from {_plural(total.rows, 'row')} in {_plural(len(self.files), 'file')}, "
            f"with {rendering}; longest prompt {total.longest_prompt_tokens:,} tokens",
            *(
                f"dropped {count:,}: {reason} (first at {total.first_dropped[reason]})"
                for reason, count in total.dropped.items()
            ),
            *_noted(total.truncated_prompts, "prompt", "cut on the left"),
            *_noted(total.without_answer, "prompt", "without an answer"),
            *_noted(total.joined_answers, "answer", "given as a list, joined by commas"),
            _plural(given, "answer pair" if self.preferences else "demonstration")
            + (f", the longest {total.longest_demonstration_tokens:,} tokens" if given else ""),
            *(_noted(total.without_demonstration, "prompt", "without one") if total.demonstrations else ()),
            *_noted(total.blank_demonstrations, "demonstration", "left out as empty"),
            *_noted(total.overlong_demonstrations, answer, "dropped as too long"),
            *_noted(total.truncated_demonstrations, answer, "truncated"),
            *_noted(total.without_prefix, answer, "not beginning with data.generation_prefix"),
            *_noted(self.unmatched_demonstrations, "row", "of data.demonstrations whose id no prompt has"),
            *_noted(total.blank_lines, "blank line", "skipped"),
        ]
        return "; ".join(parts) + "."

    def __str__(self) -> str:
        return self.summary()


def _noted(count: int, noun: str, fate: str) -> list[str]:
    return [f"{_plural(count, noun)} {fate}"] if count else []


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
