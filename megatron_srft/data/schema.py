"""From a row of any supported schema to one `Record`.

    own          {prompt: text or chat messages, answer, demonstration(s), id, options}
    benchmark    {id, problem, answer, demonstration, options}
    verl, LUFFY  {data_source, prompt: messages, reward_model: {ground_truth}, target: messages}

Other fields are ignored. Which fields are read can be set by data.prompt_key, answer_key and demonstration_key; a key
may lead into a nested object by dots.
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from megatron_srft.config import DataConfig
from megatron_srft.data.readers import Row

PROMPT_KEYS = ("prompt", "problem", "question")
ANSWER_KEYS = ("answer", "reward_model.ground_truth")
DEMONSTRATION_KEYS = ("demonstration", "demonstrations", "target")
OTHER_KEYS = ("id", "options", "data_source")
OPTION_LABEL = re.compile(r"\s*\(?[A-Za-z]\s*[).:]")
"""'A)', '(a)', 'B.', 'C:' at the start of an option of a multiple-choice problem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A row as text, checked, before templates and tokens."""

    id: str
    messages: list[dict[str, str]]
    """The prompt as chat messages; a prompt given as a string is one message of the user."""
    answer: str | None
    answer_parts: int
    """1, or the length of an answer given as a list."""
    demonstrations: tuple[str, ...]
    blank_demonstrations: int = 0
    """Demonstrations that were there and held nothing but white space."""
    pair: tuple[str, str] | None = None
    """Chosen and rejected answer, where preferences are wanted."""
    file: str
    """Label of the file."""
    source: str
    """The row's data_source, else the file's label."""
    where: str


def columns(config: DataConfig) -> set[str]:
    """The top-level fields that `parse` reads."""
    keys = prompt_keys(config) + answer_keys(config) + demonstration_keys(config) + OTHER_KEYS
    return set(keys) | {key.partition(".")[0] for key in keys}


def prompt_keys(config: DataConfig) -> tuple[str, ...]:
    return (config.prompt_key,) if config.prompt_key else PROMPT_KEYS


def answer_keys(config: DataConfig) -> tuple[str, ...]:
    return (config.answer_key,) if config.answer_key else ANSWER_KEYS


def demonstration_keys(config: DataConfig) -> tuple[str, ...]:
    if config.demonstration_key:
        return (config.demonstration_key,)
    # Many data sets call the answer `target`; whoever names it as the answer does not mean LUFFY's field.
    return tuple(key for key in DEMONSTRATION_KEYS if key not in (config.prompt_key, config.answer_key))


def parse(row: Row, config: DataConfig, file: str) -> Record:
    """Read one row of a prompt file.

    Raises:
        ValueError: a field is missing or has the wrong type; the message starts with file and line.
    """
    answer, parts = parse_answer(first(row.fields, answer_keys(config)), row.where)
    source = row.fields.get("data_source")
    return Record(
        id=parse_id(row) or f"{file}:{row.number}",
        messages=_parse_prompt(row, config),
        answer=answer,
        answer_parts=parts,
        demonstrations=parse_demonstrations(row, config),
        blank_demonstrations=sum(isinstance(t, str) and not t.strip() for t in _demonstration_items(row, config)),
        file=file,
        source=source if isinstance(source, str) and source else file,
        where=row.where,
    )


def parse_id(row: Row) -> str | None:
    """The row's own id as text; None when it has none."""
    value = row.fields.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{row.where}: id must be a non-empty string or an integer, not {value!r}")
    return str(value)


# ---------------------------------------------------------------- prompt


def _parse_prompt(row: Row, config: DataConfig) -> list[dict[str, str]]:
    keys = prompt_keys(config)
    value = first(row.fields, keys)
    if value is None:
        fields = ", ".join(map(str, row.fields)) or "none"
        raise ValueError(
            f"{row.where}: no prompt: none of the fields {', '.join(keys)} is there (fields: {fields}); "
            "name the right one with data.prompt_key"
        )
    options = _option_lines(row)
    if isinstance(value, str):
        text = valid_text("prompt", value, row.where) + options
        return [{"role": "user", "content": fill_template(config.prompt_template, text)}]
    messages = _parse_messages(value, row.where)
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + options}]


def fill_template(template: str | None, prompt: str) -> str:
    """Put the prompt into data.prompt_template.

    Raises:
        ValueError: the template has other fields, or unbalanced or unescaped braces.
    """
    if template is None:
        return prompt
    try:
        return template.format(prompt=prompt)
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(
            f"data.prompt_template {template!r} is not a format string with the one field {{prompt}} ({error!r}); "
            "write {{ and }} for literal braces"
        ) from None


def _parse_messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: prompt must be a string or a non-empty list of messages, not {short(value)}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: each message of the prompt needs a role and a content, not {short(message)}")
        content = valid_text(f"content of the {message['role']} message", message.get("content"), where)
        messages.append({"role": message["role"], "content": content})
    if messages[-1]["role"] in ("assistant", "system"):
        raise ValueError(
            f"{where}: the last message of the prompt is the {messages[-1]['role']}'s, it must be the user's; "
            "move an expert's answer to the field demonstration"
        )
    return messages


def _option_lines(row: Row) -> str:
    """The options of a multiple-choice problem, one per line after it; labelled A), B), ... if they are not yet."""
    options = row.fields.get("options")
    if options is None:
        return ""
    if not isinstance(options, list) or not options:
        raise ValueError(f"{row.where}: options must be a non-empty list of strings, not {short(options)}")
    lines = [valid_text("option", option, row.where) for option in options]
    if not all(OPTION_LABEL.match(line) for line in lines):
        lines = [f"{chr(ord('A') + index)}) {line}" for index, line in enumerate(lines)]
    return "\n" + "\n".join(lines)


# ---------------------------------------------------------------- answer and demonstrations


def parse_answer(value: Any, where: str) -> tuple[str | None, int]:
    """The reference answer as text (None when missing or blank), and how many parts it was given in.

    Whole floats lose their point (18.0 -> "18"). A list is one answer with several parts, all of them required:
    ["1", -2] -> "1, -2".
    """
    if isinstance(value, list):
        parts = [text for item in value if (text := _answer_text(item, where)) is not None]
        return (", ".join(parts) or None), len(parts)
    return _answer_text(value, where), 1


def _answer_text(value: Any, where: str) -> str | None:
    if isinstance(value, str):
        return valid_text("answer", value, where) if value.strip() else None
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | Decimal)
        or value != value
        or abs(value) == math.inf
    ):
        raise ValueError(
            f"{where}: answer must be a string, a finite number or a list of them, not {short(value)}; "
            "name the right field with data.answer_key"
        )
    if isinstance(value, int):
        return str(value)
    digits = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def parse_demonstrations(row: Row, config: DataConfig) -> tuple[str, ...]:
    """The row's demonstrations as text; null, "" and [] are none."""
    items = _demonstration_items(row, config)
    return tuple(text for item in items if (text := _demonstration_text(item, row.where)))


def _demonstration_items(row: Row, config: DataConfig) -> list[Any]:
    """What stands for the row's demonstrations; of an assistant's message (LUFFY writes [{role: assistant, content:
    ...}]) its content."""
    value = first(row.fields, demonstration_keys(config))
    items = value if isinstance(value, list) else [value]
    return [i.get("content") if isinstance(i, dict) and i.get("role") == "assistant" else i for i in items]


def _demonstration_text(item: Any, where: str) -> str | None:
    if item is None or (isinstance(item, str) and not item.strip()):
        return None
    if not isinstance(item, str):
        raise ValueError(
            f"{where}: a demonstration must be a string or a message of the assistant, not {short(item)}; "
            "name the right field with data.demonstration_key"
        )
    return valid_text("demonstration", item, where)


# ---------------------------------------------------------------- helpers


def first(fields: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value under the first of the keys that has one."""
    return next((value for key in keys if (value := lookup(fields, key)) is not None), None)


def lookup(fields: dict[str, Any], key: str) -> Any:
    """The value under `key`, which may lead into nested objects by dots; None when there is none."""
    if key in fields:
        return fields[key]
    head, _, rest = key.partition(".")
    inner = fields.get(head)
    return lookup(inner, rest) if rest and isinstance(inner, dict) else None


def valid_text(name: str, value: Any, where: str) -> str:
    """The value, if it is text that a tokenizer takes and not blank; ValueError otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: the {name} must be text, not {short(value)}")
    if not value.strip():
        raise ValueError(f"{where}: the {name} is empty")
    try:
        value.encode("utf-8")  # JSON may spell half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError:
        raise ValueError(f"{where}: the {name} holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    return value


def short(value: Any) -> str:
    """As it would be written in Python, for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
