"""Keep the rows of noisy data that can be verified: the reference answer is there, short, readable, and matched.

Source: "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), section 5: answers extracted from web text
are kept when one of two answers of a strong model matches them. Rows are written as they are.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_srft.config import DataConfig, MathRewardConfig, RewardConfig
from megatron_srft.curation import settings
from megatron_srft.curation.distil import sampler
from megatron_srft.curation.harvest import refuse_silence, verifiers, verify
from megatron_srft.curation.output import Output, check_output
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

Respond = Callable[[Sequence[Problem], int], list[list[Sample]]]
"""Responses to each problem; the number is that of the rows already written."""


class Filter:
    """Decides about rows. The rules come in the order of COUNTS, and the first that applies gives the reason.

    Args:
        max_characters: of a reference; None: no limit.
        respond: gives the responses of problems, of which `min_matched` must match; None: nothing is matched.
    """

    def __init__(self, scorer: Scorer, rewards: Sequence[RewardConfig], max_characters: int | None, min_matched: int,
                 respond: Respond | None):  # fmt: skip
        self.scorer, self.max_characters = scorer, max_characters
        self.min_matched, self.respond = min_matched, respond
        verifier = next(reward for reward in verifiers(rewards) if reward.kind != "format")
        self.probe = f"{verifier.answer_after} {PROBE}" if isinstance(verifier, MathRewardConfig) else None

    def fates(self, problems: Sequence[Problem], done: int) -> list[str]:
        """The count under which each row falls."""
        fates = [self._by_text(problem.record.answer) for problem in problems]
        if self.probe is not None:
            left = [i for i, fate in enumerate(fates) if fate == "kept"]
            good = readable([problems[i].record.answer for i in left], self.scorer, self.probe)
            for i, is_readable in zip(left, good, strict=True):
                fates[i] = "kept" if is_readable else "unreadable_answer"
        left = [i for i, fate in enumerate(fates) if fate == "kept"]
        if self.respond is not None and left:
            for i, fate in zip(left, self._matched([problems[i] for i in left], done), strict=True):
                fates[i] = fate
        return fates

    def _by_text(self, answer: str | None) -> str:
        if answer is None:
            return "no_answer"
        return "long_answer" if self.max_characters is not None and len(answer) > self.max_characters else "kept"

    def _matched(self, problems: Sequence[Problem], done: int) -> list[str]:
        responses = self.respond(problems, done)
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


def open_responses(
    options: argparse.Namespace, problems: Sequence[Problem], rows: Sequence[Row], data: DataConfig, opened: ExitStack
) -> Respond | None:
    """Where responses come from: a model, a file, or the rows' own field `responses`; None when none are asked for.

    Raises ValueError when there are none.
    """
    if options.min_matched is None:
        return None
    if options.model is not None:
        source = opened.enter_context(settings.open_source(options, data))
        draw = sampler(source, settings.sampling(options), options.samples, options.seed)

        def drawn(some: Sequence[Problem], done: int) -> list[list[Sample]]:
            responses = draw(some)
            refuse_silence(responses, done > 0, source, done)
            return responses

        return drawn
    joined = options.responses is not None
    given = _given(read_all([options.responses]) if joined else rows, joined)
    if not any(given.values()):
        raise ValueError(
            "--min-matched needs responses, and no row has the field responses; give --model or --responses"
        )
    return lambda some, done: [given.get(p.id if joined else p.record.where, []) for p in some]


def _given(rows: Sequence[Row], joined: bool) -> dict[str, list[Sample]]:
    """Responses by id, where several rows add up, or by the place of their row."""
    given: dict[str, list[Sample]] = {}
    for row in rows:
        key, texts = (schema.parse_id(row) if joined else row.where), row.fields.get("responses")
        texts = [] if texts is None and not joined else texts
        if key is None or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{row.where}: needs {'an id and ' if joined else ''}a list of texts in the field responses"
            )
        given.setdefault(key, []).extend(Sample(text=text, finish_reason="stop") for text in texts)
    return given


# ---------------------------------------------------------------- command


def main(options: argparse.Namespace) -> int:
    """`megatron-srft data filter`: print the counts; see data_command.py for the options."""
    config, mode = settings.read_config(options), settings.mode(options)
    _check(options)
    check_output(options.output, mode)
    rows = read_all(options.files, options.max_problems)
    problems = [_problem(row, config.data) for row in rows]
    with ExitStack() as opened:
        respond = open_responses(options, problems, rows, config.data, opened)
        scorer = opened.enter_context(settings.open_scorer(config.rewards))
        output = opened.enter_context(Output(options.output, settings.recorded(options, config), mode))
        rules = Filter(scorer, config.rewards, options.max_answer_characters, options.min_matched, respond)
        progress = Progress(len(rows), "rows")
        waiting = [pair for pair in zip(rows, problems, strict=True) if pair[0].where not in output.done]
        for start in range(0, len(waiting), PORTION):
            some = waiting[start : start + PORTION]
            fates = rules.fates([problem for _, problem in some], len(output.done))
            for (row, _), fate in zip(some, fates, strict=True):
                output.add(row.where, row.fields if fate == "kept" else None, Counter({"rows": 1, fate: 1}))
            progress.show(len(output.done), f"{output.counts['kept']:,} kept")
    if options.dropped is not None:
        _write_dropped(options.dropped, rows, output)
    if not output.counts["kept"]:
        raise CurationError(f"no row is left, so {options.output} is not written:\n{table(output.counts, COUNTS)}")
    print(table(output.counts, COUNTS))
    return 0


def _check(options: argparse.Namespace) -> None:
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
    if options.dropped is not None:
        check_output(options.dropped, "overwrite")


def _problem(row: Row, data: DataConfig) -> Problem:
    record = schema.parse(row, data, Path(row.where.rpartition(":")[0]).name)
    return Problem(record=record, messages=record.messages)


def _write_dropped(path: Path, rows: Sequence[Row], output: Output) -> None:
    """Every row that was left out, with its place and the reason."""
    reasons = {row.where: next(name for name in output.done[row.where] if name != "rows") for row in rows}
    dropped = [row for row in rows if reasons[row.where] != "kept"]
    fields = [({**row.fields, "reason": reasons[row.where], "where": row.where}, row.where) for row in dropped]
    write_rows(path, fields, "overwrite")
