"""Rows of data files as plain dictionaries, each with the place it came from.

    .jsonl, .jsonl.zst   one object per line; blank lines, CRLF and a UTF-8 byte-order mark are tolerated
    .json                one list of objects
    .parquet             row by row out of small batches, so a large file is never in memory as a whole

The first unreadable row raises ValueError with file and line: lines count from 1, as in an editor, parquet rows and
list items from 0, as in pandas and Python.
"""

import io
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_srft.data.report import RowCounts

FORMATS = (".jsonl", ".jsonl.zst", ".json", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file. Example: fields={"prompt": "7+15="}, number=17, where="chains.jsonl:17"."""

    fields: dict[str, Any]
    number: int
    where: str
    """File and line, for error messages."""


def read_rows(path: Path, columns: Collection[str], counts: RowCounts) -> Iterator[Row]:
    """Yield the rows of a file in order, counting them and the blank lines in `counts`.

    Args:
        columns: top-level fields of interest; other columns of a parquet file are not read.

    Raises:
        ValueError: the file is missing, empty, damaged or of an unknown format, or a row is not an object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder; name its files' if path.is_dir() else 'no such file'}")
    for row in _reader(path, columns, counts):
        if not isinstance(row.fields, dict):
            raise ValueError(f"{row.where}: a row must be an object with named fields, not {_kind(row.fields)}")
        counts.rows += 1
        yield row
    if counts.rows == 0:
        raise ValueError(f"{path}: the file is empty (no rows)")


def _reader(path: Path, columns: Collection[str], counts: RowCounts) -> Iterator[Row]:
    match next((ending for ending in FORMATS if path.name.endswith(ending)), None):
        case ".jsonl" | ".jsonl.zst":
            return _jsonl_rows(path, counts)
        case ".json":
            return _json_rows(path)
        case ".parquet":
            return _parquet_rows(path, columns)
    raise ValueError(f"{path}: unknown file format; the name must end in {', '.join(FORMATS)}")


def _jsonl_rows(path: Path, counts: RowCounts) -> Iterator[Row]:
    with _open_lines(path) as lines:
        # Bytes are split at \n only: text mode would also break a line at a lone carriage return.
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if content.strip():
                yield Row(_from_json(content, where), number, where)
            else:
                counts.blank_lines += 1


@contextmanager
def _open_lines(path: Path) -> Iterator[BinaryIO]:
    if path.suffix != ".zst":
        with path.open("rb") as lines:
            yield lines
        return
    import pyarrow  # here, not above: it costs a fifth of a second that plain JSONL does not need

    # python-zstandard takes a cut-off file for a complete one; pyarrow refuses it.
    try:
        with pyarrow.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as lines:
            yield lines
    except OSError as error:
        raise ValueError(f"{path}: damaged or cut-off zstd file ({error}); copy or compress it again") from None


def _json_rows(path: Path) -> Iterator[Row]:
    value = _from_json(path.read_bytes().removeprefix(BYTE_ORDER_MARK), str(path))
    if not isinstance(value, list):
        raise ValueError(f"{path}: a .json file must hold a list of objects; name it .jsonl if it has one per line")
    for number, fields in enumerate(value):
        yield Row(fields, number, f"{path}:item {number}")


def _from_json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file") from None
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if it has one object per line" if where.endswith(".json") else ""
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}{hint}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of nested lists
        raise ValueError(f"{where}: not readable as JSON ({error})") from None


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            known = [name for name in file.schema_arrow.names if name in columns]
            number = 0
            # Without a known column all are read, so that the error can list what the file has.
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=known or None):
                for fields in batch.to_pylist():
                    yield Row(fields, number, f"{path}:row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from None


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "true/false", type(None): "null"}
    return names.get(type(value), f"a number ({value})" if isinstance(value, int | float) else type(value).__name__)
