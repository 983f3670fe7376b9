"""Rows with a chosen and a rejected answer, in the forms of TRL and UltraFeedback.

    plain            {prompt: text or messages, chosen: text, rejected: text}
    conversational   {prompt: text or messages, chosen: [the assistant's message], rejected: [the assistant's message]}
    implicit prompt  {chosen: [messages, then the assistant's], rejected: [the same messages, then the assistant's]}

The keys are data.chosen_key and data.rejected_key. A row that holds no pair is left out, and counted with the reason.
"""

from dataclasses import dataclass, replace
from typing import Any

from megatron_srft.config import DataConfig
from megatron_srft.data import schema
from megatron_srft.data.readers import Row

OTHER_CONVERSATION = "chosen and rejected answer different conversations"
EQUAL = "chosen and rejected are equal"
TOO_LONG = "an answer is longer than data.max_demonstration_tokens"

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """The texts of one row's answers."""

    row: Row
    """The row, with its prompt under the first of the prompt's keys where it stood before the answers."""
    chosen: str
    rejected: str


def columns(config: DataConfig) -> set[str]:
    """The top-level fields that `parse_pair` reads beside those of the schema."""
    keys = {config.chosen_key, config.rejected_key}
    return keys | {key.partition(".")[0] for key in keys}


def parse_pair(row: Row, config: DataConfig) -> Pair | str:
    """The pair of a row, or why there is none.

    Raises:
        ValueError: an answer is neither text nor messages that end with the assistant's, or the row's prompt is not in
            the conversation before the answers; the message starts with file and line.
    """
    before, chosen = _answer(row, config.chosen_key)
    before_rejected, rejected = _answer(row, config.rejected_key)
    for side, key, text in (("chosen", config.chosen_key, chosen), ("rejected", config.rejected_key, rejected)):
        if text is None:
            return f"no {side} answer ({key} is missing or null)"
        if not text:
            return f"the {side} answer is empty ({key})"
    if before != before_rejected:
        return OTHER_CONVERSATION
    if chosen == rejected:
        return EQUAL
    return Pair(_with_prompt(row, before, config) if before else row, chosen, rejected)


def _answer(row: Row, key: str) -> tuple[Messages, str | None]:
    """The messages before an answer, and its text; None where there is none."""
    value = schema.lookup(row.fields, key)
    if value is None or value == []:
        return [], None
    if isinstance(value, str):
        return [], _text(value, key, row.where)
    *before, last = value if isinstance(value, list) else [value]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise ValueError(
            f"{row.where}: {key} must be text, or chat messages of which the last is the assistant's, "
            f"not {schema.short(value)}"
        )
    content = last.get("content")
    return before, None if content is None else _text(content, key, row.where)


def _text(value: Any, key: str, where: str) -> str:
    """ "" for white space alone."""
    blank = isinstance(value, str) and not value.strip()
    return "" if blank else schema.valid_text(f"{key} answer", value, where)


def _with_prompt(row: Row, before: Messages, config: DataConfig) -> Row:
    """The row with the conversation before its answers as its prompt.

    UltraFeedback gives the prompt twice, as a text and as the first message; other texts may be a mistake in the data.
    """
    keys = schema.prompt_keys(config)
    own = schema.first(row.fields, keys)
    contents = [message.get("content") for message in before if isinstance(message, dict)]
    if own is not None and own != before and own not in contents:
        raise ValueError(
            f"{row.where}: the prompt {schema.short(own)} is not in the conversation before {config.chosen_key}; give "
            "one of the two, or name another field with data.prompt_key"
        )
    return replace(row, fields={**row.fields, keys[0]: before})
