"""Problems to make demonstrations for: checked rows of data files, in the form in which they are asked and kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_srft.config import DataConfig
from megatron_srft.data import DataReport, read_records
from megatron_srft.data.schema import Record


@dataclass(frozen=True, kw_only=True)
class Problem:
    record: Record
    """The row as it stands in its file, without data.prompt_template."""

    messages: list[dict[str, str]]
    """What the model is asked: with the template."""

    @property
    def id(self) -> str:
        return self.record.id

    def row(self, demonstrations: Sequence[str]) -> dict[str, Any]:
        """The row of a data file with these demonstrations in the place of its own."""
        messages = self.record.messages
        plain = len(messages) == 1 and messages[0]["role"] == "user"
        row = {"id": self.id, "prompt": messages[0]["content"] if plain else messages, "answer": self.record.answer}
        return row | {"data_source": self.record.source, "demonstrations": list(demonstrations)}


def read_problems(files: Sequence[str], data: DataConfig, max_problems: int = 0) -> list[Problem]:
    """Every row of the files, as a problem with a reference answer.

    Args:
        max_problems: use only the first this many rows of each file; 0 uses all.

    Raises:
        ValueError: a file or row is wrong, with file and line, or a problem has no answer to verify against.
    """
    kept = read_records(files, "the command line", replace(data, prompt_template=None), DataReport(), max_problems)
    templated = data.prompt_template is not None
    asked = read_records(files, "the command line", data, DataReport(), max_problems) if templated else kept
    for record in kept:
        if record.answer is None:
            raise ValueError(
                f"{record.where}: no answer to verify samples against; name its field with data.answer_key in --config"
            )
    return [Problem(record=a, messages=b.messages) for a, b in zip(kept, asked, strict=True)]
