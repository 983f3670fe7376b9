"""Rows of data files with all their fields, read and written as they are, one at a time.

Long demonstrations make files of many gigabytes, so a tool that needs the rows twice reads them twice.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_srft.config import DataConfig
from megatron_srft.curation.output import as_json, check_output
from megatron_srft.data import RowCounts, schema
from megatron_srft.data.readers import Row, read_rows

ALL_COLUMNS: frozenset[str] = frozenset()
"""For read_rows: no column in particular, so every one."""


def read_all(files: Sequence[str], max_rows: int | None = None) -> Iterator[Row]:
    """Every row of the files, in order; of each file the first `max_rows`.

    Raises ValueError for a file or row that cannot be read, or a file that is named twice.
    """
    twice = next((file for file in files if list(files).count(file) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice")
    for file in files:
        yield from islice(read_rows(Path(file), ALL_COLUMNS, RowCounts()), max_rows)


def text_of(row: Row, field: str | None, data: DataConfig) -> str:
    """The text of a field, which may lead into nested objects by dots; by default the prompt's.

    Raises ValueError when there is none, with file and line.
    """
    if field is None:
        return "\n".join(message["content"] for message in schema.parse(row, data, "").messages)
    value = schema.lookup(row.fields, field)
    if not isinstance(value, str):
        raise ValueError(f"{row.where}: no text in the field {field!r}; name another one with --field")
    return value


def write_rows(path: Path, rows: Iterable[tuple[dict[str, Any], str]], mode: str) -> None:
    """Write (fields, where) pairs; the file appears under its name only when it is complete."""
    check_output(path, mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", errors="surrogatepass") as file:
        file.writelines(as_json(fields, where) for fields, where in rows)
    os.replace(partial, path)
