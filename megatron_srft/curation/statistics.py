"""What the answers in files look like: lengths, reflection keywords, branching, code fences, repetition.

    demonstration files    every demonstration
    rollout dumps          every completion (runs/<name>/rollouts/*.jsonl.zst)
    samples.jsonl          every sampled response of a run

Keyword, branching and coding rates are those of "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373),
which does not say whether its keyword rate is per response or per token; both are given.
"""

import argparse
import json
import statistics
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_srft import config as configuration
from megatron_srft.config import DataConfig, ModelConfig
from megatron_srft.curation.rows import ALL_COLUMNS
from megatron_srft.data import RowCounts, schema
from megatron_srft.data.readers import Row, read_rows
from megatron_srft.data.templates import tokenize
from megatron_srft.metrics.reflection import KEYWORDS, count_keywords
from megatron_srft.rewards.repetition import share

TEXTS_PER_CALL = 1024
CODE_FENCE = "```"


@dataclass(frozen=True, kw_only=True)
class Answer:
    text: str
    token_ids: Sequence[int] | None = None
    """None: not known; then lengths are counted in words."""


def read_answers(path: Path, data: DataConfig) -> tuple[int, list[Answer]]:
    """The number of rows of a file, and every answer in them.

    Raises ValueError for a file or row that cannot be read, and for a file without a single answer.
    """
    counts = RowCounts()
    answers = [answer for row in read_rows(path, ALL_COLUMNS, counts) for answer in _row_answers(row, data)]
    if not answers:
        keys = ", ".join(schema.demonstration_keys(data))
        raise ValueError(
            f"{path}: none of its {counts.rows} rows has a demonstration ({keys}), completions or a response; name the "
            "demonstration's field with data.demonstration_key in --config"
        )
    return counts.rows, answers


def _row_answers(row: Row, data: DataConfig) -> Iterator[Answer]:
    fields = row.fields
    if isinstance(fields.get("completions"), list) and isinstance(fields.get("prompt"), dict):
        for completion in fields["completions"]:
            try:
                yield Answer(text=str(completion["text"]), token_ids=array("i", completion["token_ids"]))
            except (KeyError, TypeError, OverflowError) as error:
                raise ValueError(f"{row.where}: not a dumped group ({error!r}); write the dump again") from None
    elif "prompt_id" in fields and isinstance(fields.get("response"), str):
        yield Answer(text=fields["response"])
    else:
        yield from (Answer(text=text) for text in schema.parse_demonstrations(row, data))


def with_tokens(answers: Sequence[Answer], tokenizer: Any) -> list[Answer]:
    """The answers with the tokens of this tokenizer where they have none of their own."""
    out = list(answers)
    missing = [place for place, answer in enumerate(out) if answer.token_ids is None]
    for start in range(0, len(missing), TEXTS_PER_CALL):
        some = missing[start : start + TEXTS_PER_CALL]
        for place, ids in zip(some, tokenize([out[place].text for place in some], tokenizer), strict=True):
            out[place] = Answer(text=out[place].text, token_ids=array("i", ids))
    return out


def describe(answers: Sequence[Answer], ngram: int) -> dict[str, float | str]:
    """Figures of at least one answer, by name.

    Args:
        ngram: tokens (or words) of the runs whose repetition is measured.
    """
    in_tokens = all(answer.token_ids is not None for answer in answers)
    lengths, repetition = [], []
    for answer in answers:
        pieces = answer.token_ids if in_tokens else answer.text.split()
        lengths.append(len(pieces))
        repetition.append(share(pieces, ngram))
    lengths.sort()
    thousands = max(sum(lengths), 1) / 1000
    keywords = [count_keywords(answer.text) for answer in answers]
    fences = [CODE_FENCE in answer.text for answer in answers]
    totals = {word: sum(counts[word] for counts in keywords) for word in KEYWORDS}
    return {
        "answers": len(answers),
        "unit": "tokens" if in_tokens else "words",
        "length/mean": statistics.fmean(lengths),
        "length/median": statistics.median(lengths),
        "length/p90": lengths[(9 * len(lengths) - 1) // 10],
        "length/max": lengths[-1],
        **{f"{word}/per_response": total / len(answers) for word, total in totals.items()},
        **{f"{word}/per_1k": total / thousands for word, total in totals.items()},
        "reflection/per_response": sum(totals.values()) / len(answers),
        "reflection/per_1k": sum(totals.values()) / thousands,
        "reflection/share": statistics.fmean(counts.total() > 0 for counts in keywords),
        "branching/share": statistics.fmean(counts["alternatively"] > 0 for counts in keywords),
        "code_fence/share": statistics.fmean(fences),
        "repetition/mean": statistics.fmean(repetition),
        "repetition/share": statistics.fmean(value > 0 for value in repetition),
    }


def table(files: dict[str, dict[str, float | str]]) -> str:
    """A line per figure, a column per file."""
    names = list(next(iter(files.values())))
    cells = {name: [_cell(figures[name]) for figures in files.values()] for name in names}
    widths = [max(len(file), *(len(row[i]) for row in cells.values())) for i, file in enumerate(files)]
    first = max(map(len, names))
    lines = [("", list(files)), *cells.items()]
    return "\n".join(
        name.ljust(first) + "".join("  " + cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for name, row in lines
    )


def _cell(value: float | str) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def main(options: argparse.Namespace) -> int:
    """`megatron-srft data statistics`: print the table; see data_command.py for the options."""
    data = configuration.load(options.config).data if options.config is not None else DataConfig()
    if len(set(options.files)) < len(options.files):
        raise ValueError("a file is named twice")
    tokenizer = _tokenizer(options.tokenizer) if options.tokenizer is not None else None
    figures = {}
    for file in options.files:
        rows, answers = read_answers(Path(file), data)
        answers = with_tokens(answers, tokenizer) if tokenizer is not None else answers
        figures[file] = {"rows": rows, **describe(answers, options.ngram)}
    labels = dict(zip(_labels(options.files), figures.values(), strict=True))
    print(table(labels))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _tokenizer(folder: Path) -> Any:
    from megatron_srft.rollout import load_tokenizer  # transformers takes seconds that counting words does not need

    return load_tokenizer(ModelConfig(path=str(folder)))


def _labels(files: Sequence[str]) -> list[str]:
    """File names, or whole paths where two names are alike."""
    names = [Path(file).name for file in files]
    return names if len(set(names)) == len(names) else list(files)
