"""Data files to prompts with demonstrations, and the account of what became of every row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_srft.config import ConfigError, DataConfig, SamplingConfig
from megatron_srft.data import preferences, schema
from megatron_srft.data.encode import encode
from megatron_srft.data.readers import Row, read_rows
from megatron_srft.data.report import DataReport, RowCounts
from megatron_srft.data.schema import Record
from megatron_srft.sample import Prompt


@dataclass(frozen=True)
class Dataset:
    prompts: tuple[Prompt, ...]
    """In the order of the files and their rows."""

    report: DataReport


def load_dataset(
    config: DataConfig, rollout: SamplingConfig, tokenizer: Any, *, with_preferences: bool = False
) -> Dataset:
    """Read data.train (and data.demonstrations), render and tokenise.

    Args:
        rollout: its max_response_tokens limits demonstrations where data.max_demonstration_tokens is null.
        tokenizer: a Hugging Face tokenizer.
        with_preferences: keep rows with a chosen and a rejected answer, and nothing else of them; otherwise such
            answers are not looked at.

    Raises:
        ConfigError: there is not one pair of answers.
        ValueError: a file or row is wrong, with file and line; an id stands twice; no demonstration row matches; no
            prompt is left; the tokenizer lacks an end token or a template that is asked for.
    """
    report = DataReport()
    limit = config.max_demonstration_tokens or rollout.max_response_tokens
    report.preferences = with_preferences
    if with_preferences:
        return _load_preferences(config, limit, tokenizer, report)
    records = read_records(config.train, "data.train", config, report)
    if config.demonstrations:
        records = _join_demonstrations(records, config, report)
    _refuse_unused_keys(records, config)
    prompts = encode(records, config, limit, tokenizer, report)
    if not prompts:
        raise ValueError(f"data.train: no prompt is left: {report.summary()}")
    return Dataset(prompts, report)


def _load_preferences(config: DataConfig, limit: int, tokenizer: Any, report: DataReport) -> Dataset:
    records = read_records(config.train, "data.train", config, report, with_preferences=True)
    prompts = encode(records, replace(config, require_demonstration=False), limit, tokenizer, report)
    if not prompts:
        raise ConfigError(
            f"data.train holds no pair of answers to learn a preference from: {report.summary()} The fields are named "
            f"by data.chosen_key ({config.chosen_key}) and data.rejected_key ({config.rejected_key})"
        )
    return Dataset(prompts, report)


def load_problems(
    files: Sequence[str],
    config: DataConfig,
    tokenizer: Any,
    max_problems: int = 0,
    *,
    key: str = "evaluation.files",
    need_answers: bool = True,
) -> Dataset:
    """Read files of problems with the templates and limits of `config`; their demonstrations are left out.

    Args:
        max_problems: use only the first this many rows of each file; 0 uses all.
        key: what named the files, for messages.

    Raises:
        ValueError: as `load_dataset`; also a problem without an answer, where answers are needed.
    """
    report = DataReport()
    records = read_records(files, key, config, report, max_problems)
    unanswered = next((record for record in records if record.answer is None), None)
    if unanswered is not None and need_answers:
        raise ValueError(f"{unanswered.where}: an evaluation problem needs an answer; see data.answer_key")
    problems = [replace(record, demonstrations=()) for record in records]
    prompts = encode(problems, replace(config, require_demonstration=False), 1, tokenizer, report)
    if not prompts:
        raise ValueError(f"{key}: no problem is left: {report.summary()}")
    return Dataset(prompts, report)


# ---------------------------------------------------------------- reading


def read_records(
    files: Sequence[str],
    key: str,
    config: DataConfig,
    report: DataReport,
    max_rows: int = 0,
    with_preferences: bool = False,
) -> list[Record]:
    """The checked rows of all files in order, as text.

    Args:
        key: what named the files, for messages.
        max_rows: use only the first this many rows of each file; 0 uses all.
        with_preferences: keep only rows with a pair of answers, which are counted otherwise.

    Raises:
        ValueError: a file or row is wrong, with file and line, or an id stands twice.
    """
    if not files:
        raise ValueError(f"{key} names no file")
    records: dict[str, Record] = {}
    for path, label in zip(files, _labels(files, key), strict=True):
        counts = report.files[label] = RowCounts()
        columns = schema.columns(config) | (preferences.columns(config) if with_preferences else set())
        for row in islice(read_rows(Path(path), columns, counts), max_rows or None):
            record = (_parse_pair if with_preferences else schema.parse)(row, config, label)
            if isinstance(record, str):
                counts.drop(record, row.where)
                continue
            twin = records.setdefault(record.id, record)
            if twin is not record:
                raise ValueError(
                    f"{record.where}: id {record.id!r} stands already at {twin.where}; "
                    "ids must be unique over all files (rows without an id get one)"
                )
    return list(records.values())


def _parse_pair(row: Row, config: DataConfig, file: str) -> Record | str:
    """The record of a row with its pair in place of demonstrations, or why the row is left out."""
    found = preferences.parse_pair(row, config)
    if isinstance(found, str):
        return found
    return replace(schema.parse(found.row, config, file), demonstrations=(), pair=(found.chosen, found.rejected))


def _labels(files: Sequence[str], key: str) -> list[str]:
    """The name of each file, with as many of its folders as tell it from the others."""
    paths = [Path(file) for file in files]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{key} names {twice} twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _join_demonstrations(records: list[Record], config: DataConfig, report: DataReport) -> list[Record]:
    """Append the demonstrations of the extra files to the records of the same id."""
    extra: dict[str, list[str]] = {record.id: [] for record in records}
    for row in _demonstration_rows(config):
        identity, demonstrations = schema.parse_id(row), schema.parse_demonstrations(row, config)
        if identity is None or not demonstrations:
            wanted = "id" if identity is None else " or ".join(schema.demonstration_keys(config))
            raise ValueError(f"{row.where}: a row of data.demonstrations needs the field {wanted}")
        if identity in extra:
            extra[identity] += demonstrations
            report.matched_demonstrations += 1
        else:
            report.unmatched_demonstrations += 1
    if report.matched_demonstrations == 0:
        raise ValueError(
            f"data.demonstrations: none of its {report.unmatched_demonstrations} ids belongs to a prompt; "
            f"ids of data.train look like {records[0].id!r}"
        )
    return [replace(record, demonstrations=record.demonstrations + tuple(extra[record.id])) for record in records]


def _demonstration_rows(config: DataConfig) -> Iterator[Any]:
    for path in config.demonstrations:
        yield from read_rows(Path(path), schema.columns(config), RowCounts())


def _refuse_unused_keys(records: list[Record], config: DataConfig) -> None:
    """A misspelled key would otherwise look like data without answers or demonstrations."""
    if config.answer_key and not any(record.answer for record in records):
        raise ValueError(f"data.answer_key: no row of data.train has the field {config.answer_key!r}")
    if config.demonstration_key and not any(record.demonstrations for record in records):
        raise ValueError(f"data.demonstration_key: no row of data.train has the field {config.demonstration_key!r}")
