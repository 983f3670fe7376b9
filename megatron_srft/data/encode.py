"""Records to prompts and demonstrations: text, tokens, length limits, and the counts of each file."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_srft.config import DataConfig
from megatron_srft.data import preferences
from megatron_srft.data.report import DataReport, RowCounts
from megatron_srft.data.schema import Record
from megatron_srft.data.templates import PromptFormat, prompt_format, strip_demonstration, tokenize
from megatron_srft.sample import Demonstration, Preference, Prompt

RECORDS_PER_CALL = 1024
"""Rows tokenised in one call."""

TOO_LONG = "longer than data.max_prompt_tokens"
NO_DEMONSTRATION = "no demonstration (data.require_demonstration)"


@dataclass(frozen=True)
class _Encoder:
    """What the tokenisation of every row needs."""

    config: DataConfig
    format: PromptFormat
    tokenizer: Any
    demonstration_limit: int


def encode(
    records: list[Record], config: DataConfig, demonstration_limit: int, tokenizer: Any, report: DataReport
) -> tuple[Prompt, ...]:
    """Render, tokenise and apply the limits of `config`; what happens to each row is counted in `report`.

    Raises:
        ValueError: a row cannot be rendered or tokenised, or is too long and its over-long option is `error`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token (eos_token); responses could not end")
    encoder = _Encoder(config, prompt_format(config, tokenizer), tokenizer, demonstration_limit)
    report.chat_template = encoder.format.chat
    prompts: list[Prompt] = []
    for start in range(0, len(records), RECORDS_PER_CALL):
        prompts += _encode_chunk(records[start : start + RECORDS_PER_CALL], encoder, report)
    return tuple(prompts)


def _encode_chunk(records: list[Record], encoder: _Encoder, report: DataReport) -> list[Prompt]:
    texts = [encoder.format.text(record.messages, record.where) for record in records]
    prompt_tokens = encoder.format.tokens(texts)
    demonstrations, pairs = _demonstrations(records, encoder, report), _pairs(records, encoder, report)
    prompts = []
    for record, text, token_ids, shown in zip(records, texts, prompt_tokens, demonstrations, strict=True):
        pair = pairs.get(record.id)
        if isinstance(pair, str):
            report.files[record.file].drop(pair, record.where)
            continue
        prompt = Prompt(
            id=record.id,
            text=text,
            token_ids=token_ids,
            answer=record.answer,
            source=record.source,
            response_prefix=encoder.config.generation_prefix,
            demonstrations=tuple(shown),
            preference=pair,
        )
        kept = _keep(prompt, record, encoder, report.files[record.file])
        prompts += [kept] if kept else []
    return prompts


def _keep(prompt: Prompt, record: Record, encoder: _Encoder, counts: RowCounts) -> Prompt | None:
    """Apply the length limit and data.require_demonstration, and count. None: dropped."""
    config, length = encoder.config, len(prompt.token_ids)
    counts.longest_prompt_tokens = max(counts.longest_prompt_tokens, length)
    if length == 0:
        raise ValueError(f"{record.where}: the tokenizer makes no token of the prompt")
    if config.require_demonstration and not prompt.demonstrations:
        counts.drop(NO_DEMONSTRATION, record.where)
        return None
    if length > config.max_prompt_tokens:
        if config.overlong_prompts == "error":
            raise _too_long(record, "prompt", length, config.max_prompt_tokens, "drop or truncate_left")
        if config.overlong_prompts == "drop":
            counts.drop(TOO_LONG, record.where)
            return None
        token_ids = encoder.format.cut_left(prompt.token_ids, config.max_prompt_tokens)
        prompt = replace(prompt, token_ids=token_ids, text=encoder.tokenizer.decode(token_ids))
        counts.truncated_prompts += 1
    counts.kept += 1
    counts.without_answer += prompt.answer is None
    counts.joined_answers += record.answer_parts > 1
    counts.without_demonstration += not prompt.demonstrations
    counts.demonstrations += len(prompt.demonstrations)
    counts.blank_demonstrations += record.blank_demonstrations
    counts.pairs += prompt.preference is not None
    return prompt


def _demonstrations(records: list[Record], encoder: _Encoder, report: DataReport) -> list[list[Demonstration]]:
    """For each record its demonstrations as tokens, without those that were dropped."""
    owners = [(record, text) for record in records for text in record.demonstrations]
    shown: dict[str, list[Demonstration]] = {record.id: [] for record in records}
    for (record, _), demonstration in zip(owners, _encoded(owners, encoder, report), strict=True):
        shown[record.id] += [demonstration] if demonstration else []
    return list(shown.values())


def _pairs(records: list[Record], encoder: _Encoder, report: DataReport) -> dict[str, Preference | str]:
    """Of the records with a pair, by their ids: the pair as tokens, or why it is dropped."""
    paired = [record for record in records if record.pair is not None]
    answers = iter(_encoded([(record, text) for record in paired for text in record.pair], encoder, report))
    return {record.id: _pair(next(answers), next(answers)) for record in paired}


def _pair(chosen: Demonstration | None, rejected: Demonstration | None) -> Preference | str:
    if chosen is None or rejected is None:
        return preferences.TOO_LONG
    if np.array_equal(chosen.token_ids, rejected.token_ids):
        return preferences.EQUAL
    return Preference(chosen=chosen, rejected=rejected)


def _encoded(owners: list[tuple[Record, str]], encoder: _Encoder, report: DataReport) -> Iterator[Demonstration | None]:
    """Answers as tokens, end token appended; over-long ones treated as configured, None where that drops them."""
    prefix, end_token = encoder.config.generation_prefix, encoder.tokenizer.eos_token
    stripped = [strip_demonstration(text, prefix, end_token) for _, text in owners]
    tokens = tokenize([text for text, _ in stripped], encoder.tokenizer)
    for (record, _), (text, had_prefix), ids in zip(owners, stripped, tokens, strict=True):
        counts = report.files[record.file]
        counts.without_prefix += not had_prefix
        yield _demonstration(text, ids, record, encoder, counts)


def _demonstration(
    text: str, ids: list[int], record: Record, encoder: _Encoder, counts: RowCounts
) -> Demonstration | None:
    end, limit = encoder.tokenizer.eos_token_id, encoder.demonstration_limit
    if end in ids:
        raise ValueError(
            f"{record.where}: the demonstration holds the end-of-sequence token {encoder.tokenizer.eos_token!r} "
            "before its end; remove it"
        )
    if not ids:
        raise ValueError(f"{record.where}: the tokenizer makes no token of the demonstration")
    length = len(ids) + 1
    counts.longest_demonstration_tokens = max(counts.longest_demonstration_tokens, length)
    if length <= limit:
        return Demonstration(token_ids=np.array([*ids, end], dtype=np.int32), text=text)
    match encoder.config.overlong_demonstrations:
        case "error":
            raise _too_long(record, "demonstration", length, limit, "drop or truncate")
        case "drop":
            counts.overlong_demonstrations += 1
            return None
    counts.truncated_demonstrations += 1
    return Demonstration(token_ids=np.array(ids[:limit], dtype=np.int32), text=text, truncated=True)


def _too_long(record: Record, what: str, length: int, limit: int, choices: str) -> ValueError:
    return ValueError(
        f"{record.where}: the {what} has {length} tokens, more than data.max_{what}_tokens = {limit}; "
        f"raise the limit or set data.overlong_{what}s to {choices}"
    )
