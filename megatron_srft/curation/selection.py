"""Which of a problem's samples become demonstrations, and the account of all of them.

samples = failed + truncated + unfinished + unverified + wrong + correct
correct = repeated + too_short + too_long + surplus + kept
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_srft.curation.sources import CurationError, Sample
from megatron_srft.sample import Score

COUNTS = {
    "prompts": "asked about",
    "samples": "drawn",
    "failed": "of them without an answer: the source could not give one",
    "truncated": "cut at the length limit",
    "unfinished": "ended by the endpoint for another reason than the end of the answer",
    "unverified": "without a verdict: the reference cannot be read, or the verifier failed",
    "wrong": "with a wrong answer or none",
    "correct": "with the right answer",
    "repeated": "of those, the same text as another one",
    "too_short": "shorter than --min-tokens",
    "too_long": "longer than --max-kept-tokens",
    "surplus": "not wanted under --keep",
    "kept": "written as demonstrations",
    "prompts_without_any": "prompts for which none was kept",
}
"""Every count with its meaning, in the order of the table."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to keep of a problem's correct samples."""

    keep: Literal["all", "first", "shortest", "longest"] = "all"
    """The order in which they are taken; all and first: as sampled."""

    count: int | None = None
    """How many; None: all of them under `all`, one under the others."""

    min_tokens: int = 0
    max_tokens: int | None = None
    """Lengths that are kept, in tokens."""

    @property
    def limit(self) -> int | None:
        return 1 if self.count is None and self.keep != "all" else self.count

    @property
    def needs_lengths(self) -> bool:
        return self.keep in ("shortest", "longest") or self.min_tokens > 0 or self.max_tokens is not None


def select(
    samples: Sequence[Sample], scores: Sequence[Score | None], selection: Selection
) -> tuple[list[Sample], Counter[str]]:
    """The samples to keep, in the order in which they were sampled, and the counts of one problem.

    Args:
        scores: one per sample that ended by itself, None for the others.

    Raises:
        CurationError: the rule needs lengths, and the endpoint does not report them.
    """
    counts = Counter({"prompts": 1, "samples": len(samples)})
    fates = [_fate(sample, score) for sample, score in zip(samples, scores, strict=True)]
    counts.update(fates)
    candidates: dict[str, Sample] = {}
    for sample, fate in zip(samples, fates, strict=True):
        if fate != "correct":
            continue
        if selection.needs_lengths and sample.tokens is None:
            raise CurationError(
                "the endpoint does not say how many tokens an answer has (usage.completion_tokens), so lengths cannot "
                "be compared; leave out --min-tokens, --max-kept-tokens and --keep shortest or longest"
            )
        excess = "repeated" if sample.text in candidates else _misfit(sample, selection)
        if excess:
            counts[excess] += 1
        else:
            candidates[sample.text] = sample
    kept = _take(list(candidates.values()), selection)
    counts["surplus"] += len(candidates) - len(kept)
    counts["kept"] += len(kept)
    counts["prompts_without_any"] += not kept
    return kept, counts


def _fate(sample: Sample, score: Score | None) -> str:
    if score is None:
        return {"failed": "failed", "length": "truncated"}.get(sample.finish_reason, "unfinished")
    if score.correct is None:
        return "unverified"
    return "correct" if score.correct else "wrong"


def _misfit(sample: Sample, selection: Selection) -> str:
    if selection.min_tokens and sample.tokens < selection.min_tokens:
        return "too_short"
    return "too_long" if selection.max_tokens is not None and sample.tokens > selection.max_tokens else ""


def _take(candidates: list[Sample], selection: Selection) -> list[Sample]:
    order = list(range(len(candidates)))
    if selection.keep in ("shortest", "longest"):
        sign = 1 if selection.keep == "shortest" else -1
        order.sort(key=lambda i: (sign * candidates[i].tokens, i))
    return [candidates[i] for i in sorted(order[: selection.limit])]


def table(counts: Counter[str], meanings: dict[str, str] = COUNTS) -> str:
    """One line per count."""
    width = max(map(len, COUNTS))
    return "\n".join(f"{name.ljust(width)}  {counts[name]:>9,}  {meaning}" for name, meaning in meanings.items())
