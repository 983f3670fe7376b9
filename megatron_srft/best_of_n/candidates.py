"""Candidates of Best-of-N: from rollout dumps and JSONL files to groups with verdicts and external scores.

A dump (`rollout/dump.py`; a run's rollouts, or what `generate` wrote) has tokens and verdicts. A JSONL row has texts:

    {"id"?: "q1", "prompt": text or messages, "answer"?: "7", "responses": ["... 7", "... 5"],
     "correct"?: [true, false], "scores"?: {"rm": [0.3, -1.2]}, "finish_reasons"?: ["stop", "length"]}

Prompts go through the templates and the tokenizer as training data do; a response is tokenised apart and gets an end
token unless it was cut ("length"). Rows of one id, in whatever files, are one question with all their candidates.
Where there is no verdict but an answer, the configured verifier gives one. Scores may also come in a file of their own,
{"id": "q1", "scores": {"rm": [0.3, -1.2]}}, in the order of the question's candidates. null stands for no verdict and
for no score; both are counted.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_srft.analysis.sequences import is_dump
from megatron_srft.config import DataConfig
from megatron_srft.data import schema
from megatron_srft.data.encode import encode
from megatron_srft.data.readers import Row, read_rows
from megatron_srft.data.report import DataReport, RowCounts
from megatron_srft.data.templates import prompt_format, strip_demonstration, tokenize
from megatron_srft.rollout import load_dump
from megatron_srft.sample import Completion, Group, Prompt, Score

FIELDS = ("responses", "correct", "scores", "finish_reasons")
COMPARED_PROMPTS = 20
"""Prompts of a dump that are tokenised again, to see whether its tokens are this model's."""
UNKNOWN = Score(reward=0.0, correct=None, status="unverifiable")

Verify = Callable[[list[Group]], list[Group]]
"""Groups without scores to groups with scores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """All questions, and what there is to choose from."""

    groups: tuple[Group, ...]
    """Every completion has a score; `correct` is None where there is no verdict."""
    external: dict[str, tuple[np.ndarray, ...]]
    """By name, for each group [candidates] float64, NaN where a candidate has no score."""
    dropped: int
    """Rows whose prompt is longer than data.max_prompt_tokens."""
    merged: int
    """Rows that added candidates to a question that was there already."""

    @property
    def ungraded(self) -> int:
        """Candidates without a verdict."""
        return sum(score.correct is None for group in self.groups for score in group.scores)

    @property
    def size(self) -> int:
        return sum(len(group.completions) for group in self.groups)

    def unscored(self, name: str) -> int:
        """Candidates without an external score of this name."""
        return sum(int(np.isnan(values).sum()) for values in self.external[name])


@dataclass
class _Question:
    """One question while it is put together."""

    prompt: Prompt
    where: str
    completions: list[Completion] = field(default_factory=list)
    verdicts: list[Score | None] = field(default_factory=list)
    """None: not looked at yet."""
    external: dict[str, list[float | None]] = field(default_factory=dict)


def read_candidates(
    files: Sequence[Path], data: DataConfig, tokenizer: Any, verify: Verify, scores: Path | None = None
) -> Candidates:
    """Read, put together, and verify what has no verdict.

    Args:
        verify: called once, with the groups that have an answer and no verdicts or no final answers to vote with.
        scores: file of external scores.

    Raises:
        ValueError: a file or row is wrong, with file and line and what to do; an id stands for two prompts; no
            question is left.
    """
    questions: dict[str, _Question] = {}
    merged, report = 0, DataReport()
    for path in files:
        found = _dumped(path, data, tokenizer) if is_dump(path) else _from_rows(path, data, tokenizer, report)
        for one in found:
            merged += _merge(questions, one)
    if not questions:
        raise ValueError(f"no question is left: {report.summary()}")
    if scores is not None:
        _read_scores(scores, questions)
    groups = _verified(list(questions.values()), verify)
    names = sorted({name for one in questions.values() for name in one.external})
    return Candidates(
        groups=tuple(groups),
        external={name: tuple(_column(one, name) for one in questions.values()) for name in names},
        dropped=report.total.rows - report.total.kept,
        merged=merged,
    )


def _merge(questions: dict[str, _Question], one: _Question) -> bool:
    """Add to the question of the same id, if there is one; whether there was."""
    own = questions.setdefault(one.prompt.id, one)
    if own is one:
        return False
    if not np.array_equal(own.prompt.token_ids, one.prompt.token_ids) or own.prompt.answer != one.prompt.answer:
        raise ValueError(
            f"{one.where}: id {one.prompt.id!r} has another prompt or answer at {own.where}; give every question an "
            "id of its own"
        )
    for name in {*own.external, *one.external}:
        before = own.external.get(name, [None] * len(own.completions))
        own.external[name] = before + one.external.get(name, [None] * len(one.completions))
    own.completions += one.completions
    own.verdicts += one.verdicts
    return True


def _column(one: _Question, name: str) -> np.ndarray:
    values = one.external.get(name, [None] * len(one.completions))
    return np.array([math.nan if value is None else value for value in values])


# ---------------------------------------------------------------- dumps


def _dumped(path: Path, data: DataConfig, tokenizer: Any) -> list[_Question]:
    groups = [group for group in load_dump(path) if group.completions]
    if not groups:
        raise ValueError(f"{path}: its groups have no completions; name the rollouts of a method that samples")
    some = [group.prompt for group in groups[:COMPARED_PROMPTS]]
    again = prompt_format(data, tokenizer).tokens([prompt.text for prompt in some])
    if not any(np.array_equal(prompt.token_ids, ids) for prompt, ids in zip(some, again, strict=True)):
        raise ValueError(
            f"{path}: its prompts have other tokens than this model's tokenizer makes of their texts; name the model "
            "that sampled them, or one with its tokenizer"
        )
    return [
        _Question(
            prompt=group.prompt,
            where=f"{path}:{number}",
            completions=list(group.completions),
            verdicts=list(group.scores) if group.scores is not None else [None] * len(group.completions),
        )
        for number, group in enumerate(groups, start=1)
    ]


# ---------------------------------------------------------------- JSONL


def _from_rows(path: Path, data: DataConfig, tokenizer: Any, report: DataReport) -> list[_Question]:
    label = str(path)
    counts = report.files[label] = RowCounts()
    rows = list(read_rows(path, schema.columns(data) | set(FIELDS), counts))
    records = [replace(schema.parse(row, data, label), demonstrations=(), pair=None) for row in rows]
    _check_ids(records)
    prompts = encode(records, replace(data, require_demonstration=False), 1, tokenizer, report)
    by_id = {record.id: row for record, row in zip(records, rows, strict=True)}
    return [_question(by_id[prompt.id], prompt, data, tokenizer) for prompt in prompts]


def _check_ids(records: Sequence[schema.Record]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if record.id in seen:
            raise ValueError(
                f"{record.where}: id {record.id!r} stands already at {seen[record.id]}; put a question's responses "
                "into one row, or more of them into another file"
            )
        seen[record.id] = record.where


def _question(row: Row, prompt: Prompt, data: DataConfig, tokenizer: Any) -> _Question:
    texts, reasons = _responses(row)
    stripped = [strip_demonstration(text, data.generation_prefix, tokenizer.eos_token)[0] for text in texts]
    completions = [
        _completion(text, ids, reason, row, number, tokenizer)
        for number, (text, ids, reason) in enumerate(zip(stripped, tokenize(stripped, tokenizer), reasons, strict=True))
    ]
    verdicts = [
        None if verdict is None else Score(reward=float(verdict), correct=verdict)
        for verdict in _verdicts(row, len(texts))
    ]
    external = parse_scores(row, len(texts)) if row.fields.get("scores") is not None else {}
    return _Question(prompt=prompt, where=row.where, completions=completions, verdicts=verdicts, external=external)


def _responses(row: Row) -> tuple[list[str], list[str]]:
    """Texts and finish reasons."""
    texts = row.fields.get("responses")
    if texts is None:
        there = ", ".join(map(str, row.fields)) or "none"
        raise ValueError(
            f"{row.where}: no responses: a row of candidates needs the field responses, a list of texts "
            f"(fields: {there}); `megatron-srft generate` samples some"
        )
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{row.where}: responses must be a non-empty list of texts, not {schema.short(texts)}")
    reasons = row.fields.get("finish_reasons")
    if reasons is None:
        return texts, ["stop"] * len(texts)
    if not isinstance(reasons, list) or len(reasons) != len(texts) or set(reasons) - {"stop", "length"}:
        raise ValueError(
            f'{row.where}: finish_reasons must be a list of "stop" and "length", one for each of the {len(texts)} '
            f"responses, not {schema.short(reasons)}"
        )
    return texts, reasons


def _completion(text: str, ids: list[int], reason: str, row: Row, number: int, tokenizer: Any) -> Completion:
    end = tokenizer.eos_token_id
    if end in ids:
        raise ValueError(
            f"{row.where}: response {number} holds the end-of-sequence token {tokenizer.eos_token!r} before its end; "
            "cut it there"
        )
    token_ids = np.array([*ids, end] if reason == "stop" else ids, np.int32)
    return Completion(
        token_ids=token_ids,
        text=text,
        rollout_logprobs=np.zeros(len(token_ids), np.float32),
        finish_reason=reason,
        policy_version=0,
    )


def _verdicts(row: Row, responses: int) -> list[bool | None]:
    given = row.fields.get("correct")
    if given is None:
        return [None] * responses
    if not isinstance(given, list) or not all(value is None or value in (0, 1) for value in given):
        raise ValueError(f"{row.where}: correct must be a list of true, false and null, not {schema.short(given)}")
    if len(given) != responses:
        raise ValueError(f"{row.where}: correct has {len(given)} verdicts for {responses} responses; give one for each")
    return [None if value is None else bool(value) for value in given]


# ---------------------------------------------------------------- external scores


def parse_scores(row: Row, responses: int) -> dict[str, list[float | None]]:
    """The field scores: a list for each name, null where a response has none.

    Raises:
        ValueError: it is something else, a list has another length, or a score is not finite.
    """
    tree = row.fields.get("scores")
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f'{row.where}: scores must look like {{"NAME": [0.5, -1.2]}}, not {schema.short(tree)}')
    for name, values in tree.items():
        if not isinstance(values, list) or len(values) != responses:
            number = f"{len(values)} values" if isinstance(values, list) else schema.short(values)
            raise ValueError(f"{row.where}: scores.{name} has {number} for {responses} responses; give one for each")
        for number, value in enumerate(values):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(
                    f"{row.where}: scores.{name} of response {number} is {json.dumps(value)}, not a finite number; "
                    "write null for a response without a score"
                )
    return tree


def _read_scores(path: Path, questions: dict[str, _Question]) -> None:
    """Add the scores of a file to the questions of the same ids; ids of no question are other people's rows."""
    matched, unmatched, seen = 0, 0, {}
    for row in read_rows(path, {"id", "scores"}, RowCounts()):
        identity = schema.parse_id(row)
        if identity is None:
            raise ValueError(f"{row.where}: a row of --scores needs an id, that of its question")
        if identity in seen:
            raise ValueError(f"{row.where}: id {identity!r} stands already at {seen[identity]}; keep one of the two")
        seen[identity] = row.where
        if identity not in questions:
            unmatched += 1
            continue
        one = questions[identity]
        found = parse_scores(row, len(one.completions))
        twice = next((name for name in found if name in one.external), None)
        if twice is not None:
            raise ValueError(f"{row.where}: scores.{twice} stands already at {one.where}; keep one, or rename one")
        one.external |= found
        matched += 1
    if not matched:
        raise ValueError(
            f"{path}: none of its {unmatched} ids belongs to a question; ids of the candidates look like "
            f"{next(iter(questions))!r}"
        )


# ---------------------------------------------------------------- verdicts


def _verified(questions: Sequence[_Question], verify: Verify) -> list[Group]:
    """Groups with a score for every candidate; a verdict from the file outranks the verifier's."""
    asked = [one for one in questions if one.prompt.answer is not None and any(_is_open(v) for v in one.verdicts)]
    judged = verify([_group(one, None) for one in asked]) if asked else []
    found = {group.prompt.id: group.scores for group in judged}
    return [_group(one, _combined(one.verdicts, found.get(one.prompt.id))) for one in questions]


def _is_open(verdict: Score | None) -> bool:
    """Not looked at, or right or wrong by the file's word, which tells no final answer to vote with."""
    return verdict is None or (verdict.answer is None and verdict.status == "verified" and not verdict.streams)


def _combined(given: Sequence[Score | None], judged: Sequence[Score] | None) -> tuple[Score, ...]:
    judged = [UNKNOWN] * len(given) if judged is None else judged
    return tuple(
        own if verdict is None else replace(verdict, answer=own.answer if verdict.answer is None else verdict.answer)
        for verdict, own in zip(given, judged, strict=True)
    )


def _group(one: _Question, scores: tuple[Score, ...] | None) -> Group:
    return Group(prompt=one.prompt, completions=tuple(one.completions), scores=scores)
