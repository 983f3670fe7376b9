"""Keep the rows of noisy data that can be verified: the reference answer is there, short, readable, and matched.

Source: "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), section 5: answers extracted from web text
are kept when one of two answers of a strong model matches them. Rows are written as they are.

The files are read twice, first to check every row before anything is asked; no more than a portion is in memory.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from megatron_srft.config import DataConfig, MathRewardConfig, RewardConfig
from megatron_srft.curation import settings
from megatron_srft.curation.distil import sampler
from megatron_srft.curation.harvest import refuse_silence, verifiers, verify
from megatron_srft.curation.output import Output, check_output, check_outputs
from megatron_srft.curation.problems import Problem
from megatron_srft.curation.progress import Progress
from megatron_srft.curation.rows import read_all, write_rows
from megatron_srft.curation.selection import table
from megatron_srft.curation.sources import CurationError, Sample
from megatron_srft.data import schema
from megatron_srft.data.readers import Row
from megatron_srft.rewards import Scorer, answers

PORTION = 64
"""Rows looked at between two writes."""

PROBE = r"\boxed{\sqrt{2}+q}"
"""An answer that no comparison of texts settles, so that the verifier must read the reference."""

COUNTS = {
    "rows": "read",
    "no_answer": "left out: no reference answer",
    "long_answer": "left out: reference longer than --max-answer-characters",
    "unreadable_answer": "left out: the verifier cannot read the reference",
    "no_response": "left out: no response to match the reference with",
    "unmatched": "left out: matched by fewer than --min-matched responses",
    "kept": "written",
}

FATES = {name: Counter({"rows": 1, name: 1}) for name in COUNTS if name != "rows"}
"""What a row adds to the counts; one object per fate, since a resumable output keeps those of every row."""

Respond = Callable[[Sequence[Row], Sequence[Problem], int], list[list[Sample]]]
"""Responses to the problem of each row; the number is that of the rows already written."""


class Filter:
    """Decides about rows. The rules come in the order of COUNTS, and the first that applies gives the reason.

    Args:
        data: says where a row's problem stands.
        max_characters: of a reference; None: no limit.
        respond: gives the responses of problems, of which `min_matched` must match; None: nothing is matched.
    """

    def __init__(
        self,
        scorer: Scorer,
        rewards: Sequence[RewardConfig],
        data: DataConfig,
        max_characters: int | None,
        min_matched: int,
        respond: Respond | None,
    ):
        self.scorer, self.data, self.max_characters = scorer, data, max_characters
        self.min_matched, self.respond = min_matched, respond
        verifier = next(reward for reward in verifiers(rewards) if reward.kind != "format")
        self.probe = f"{verifier.answer_after} {PROBE}" if isinstance(verifier, MathRewardConfig) else None

    def fates(self, rows: Sequence[Row], done: int) -> list[str]:
        """The count under which each row falls."""
        problems = [_problem(row, self.data) for row in rows]
        fates = [self._by_text(problem.record.answer) for problem in problems]
        if self.probe is not None:
            left = [i for i, fate in enumerate(fates) if fate == "kept"]
            good = readable([problems[i].record.answer for i in left], self.scorer, self.probe)
            for i, is_readable in zip(left, good, strict=True):
                fates[i] = "kept" if is_readable else "unreadable_answer"
        left = [i for i, fate in enumerate(fates) if fate == "kept"]
        if self.respond is not None and left:
            matched = self._matched([rows[i] for i in left], [problems[i] for i in left], done)
            for i, fate in zip(left, matched, strict=True):
                fates[i] = fate
        return fates

    def _by_text(self, answer: str | None) -> str:
        if answer is None:
            return "no_answer"
        return "long_answer" if self.max_characters is not None and len(answer) > self.max_characters else "kept"

    def _matched(self, rows: Sequence[Row], problems: Sequence[Problem], done: int) -> list[str]:
        responses = self.respond(rows, problems, done)
        fates = []
        for some, scores in zip(responses, verify(problems, responses, self.scorer), strict=True):
            matched = sum(score is not None and score.correct is True for score in scores)
            heard = any(sample.finish_reason != "failed" for sample in some)
            fates.append("no_response" if not heard else "kept" if matched >= self.min_matched else "unmatched")
        return fates


def readable(references: Sequence[str], scorer: Scorer, probe: str = PROBE) -> list[bool]:
    """Whether the math verifier can read each reference: a number, a letter, a word, or a formula that it parses."""
    plain = [_is_plain(answers.normal(reference)) for reference in references]
    others = [reference for reference, settled in zip(references, plain, strict=True) if not settled]
    verdicts = iter(scorer.verify([probe] * len(others), others))
    return [settled or next(verdicts).status in ("verified", "no_answer") for settled in plain]


def _is_plain(normal_form: str) -> bool:
    return answers.number(normal_form) is not None or answers.is_letter(normal_form) or answers.is_words(normal_form)


# ---------------------------------------------------------------- responses


def open_responses(options: argparse.Namespace, data: DataConfig, opened: ExitStack) -> Respond | None:
    """Where responses come from: a model, a file, or the rows' own field `responses`; None when none are asked for."""
    if options.min_matched is None:
        return None
    if options.responses is not None:
        given = _by_id(options.responses)
        return lambda rows, problems, done: [given.get(problem.id, []) for problem in problems]
    if options.model is None:
        return lambda rows, problems, done: [_own_responses(row) for row in rows]
    source = opened.enter_context(settings.open_source(options, data))
    draw = sampler(source, settings.sampling(options), options.samples, options.seed)

    def drawn(rows: Sequence[Row], problems: Sequence[Problem], done: int) -> list[list[Sample]]:
        responses = draw(problems)
        refuse_silence(responses, done > 0, source, done)
        return responses

    return drawn


def _own_responses(row: Row) -> list[Sample]:
    return [] if row.fields.get("responses") is None else _responses(row, "a list of texts in the field responses")


def _by_id(file: str) -> dict[str, list[Sample]]:
    """The responses of a file; several rows of one id add up. Raises ValueError for a row without id or responses."""
    given: dict[str, list[Sample]] = {}
    needed = "an id and a list of texts in the field responses"
    for row in read_all([file]):
        key = schema.parse_id(row)
        if key is None:
            raise ValueError(f"{row.where}: needs {needed}")
        given.setdefault(key, []).extend(_responses(row, needed))
    return given


def _responses(row: Row, needed: str) -> list[Sample]:
    texts = row.fields.get("responses")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{row.where}: needs {needed}")
    return [Sample(text=text, finish_reason="stop") for text in texts]


# ---------------------------------------------------------------- command


def main(options: argparse.Namespace) -> int:
    """`megatron-srft data filter`: print the counts; see data_command.py for the options."""
    config, mode = settings.read_config(options), settings.mode(options)
    _check(options, mode)
    total = _check_rows(options, config.data)
    with ExitStack() as opened:
        respond = open_responses(options, config.data, opened)
        scorer = opened.enter_context(settings.open_scorer(config.rewards))
        output = opened.enter_context(Output(options.output, settings.recorded(options, config), mode))
        limit, matched = options.max_answer_characters, options.min_matched
        rules = Filter(scorer, config.rewards, config.data, limit, matched, respond)
        progress = Progress(total, "rows")
        waiting = (row for row in read_all(options.files, options.max_problems) if row.where not in output.done)
        while some := list(islice(waiting, PORTION)):
            for row, fate in zip(some, rules.fates(some, len(output.done)), strict=True):
                output.add(row.where, row.fields if fate == "kept" else None, FATES[fate])
            progress.show(len(output.done), f"{output.counts['kept']:,} kept")
    if options.dropped is not None:
        _write_dropped(options.dropped, read_all(options.files, options.max_problems), output)
    if not output.counts["kept"]:
        raise CurationError(f"no row is left, so {options.output} is not written:\n{table(output.counts, COUNTS)}")
    print(table(output.counts, COUNTS))
    return 0


def _check(options: argparse.Namespace, mode: str) -> None:
    if options.model is not None and options.responses is not None:
        raise ValueError("--model draws responses and --responses gives them; choose one")
    if options.url is not None and options.model is None:
        raise ValueError("--url needs --model, the name of the model there")
    if options.min_matched is None and (options.model is not None or options.responses is not None):
        options.min_matched = 1
    if options.model is not None and options.min_matched > options.samples:
        raise ValueError(f"--min-matched {options.min_matched} can never be reached with --samples {options.samples}")
    if options.model is not None and options.temperature == 0 and options.samples > 1:
        raise ValueError("--samples above 1 needs --temperature above 0 (greedy answers are all the same)")
    inputs = [*options.files, *filter(None, [options.responses])]
    check_output(options.output, mode)
    check_outputs([options.output, options.dropped], "overwrite", inputs)  # what was dropped is written anew each time


def _check_rows(options: argparse.Namespace, data: DataConfig) -> int:
    """The number of rows.

    Raises ValueError for a row that is wrong, or when responses are to come out of the rows and none has any.
    """
    total, with_responses = 0, 0
    inside = options.min_matched is not None and options.model is None and options.responses is None
    for row in read_all(options.files, options.max_problems):
        _problem(row, data)
        total += 1
        with_responses += inside and bool(_own_responses(row))
    if inside and not with_responses:
        raise ValueError(
            "--min-matched needs responses, and no row has the field responses; give --model or --responses"
        )
    return total


def _problem(row: Row, data: DataConfig) -> Problem:
    record = schema.parse(row, data, Path(row.where.rpartition(":")[0]).name)
    return Problem(record=record, messages=record.messages)


def _write_dropped(path: Path, rows: Iterator[Row], output: Output) -> None:
    """Every row that was left out, with its place and the reason."""
    reasons = ((row, next(name for name in output.done[row.where] if name != "rows")) for row in rows)
    dropped = ((row, reason) for row, reason in reasons if reason != "kept")
    fields = (({**row.fields, "reason": reason, "where": row.where}, row.where) for row, reason in dropped)
    write_rows(path, fields, "overwrite")
