"""metrics.jsonl and its like: one JSON object with a `step` per line, safe to kill at any moment."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

METRICS_FILE = "metrics.jsonl"
LINE_FIELDS = ("step", "stage", "timestamp")
"""What every line of metrics.jsonl has besides its metrics."""


def is_training(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl (or the values of one) is a training step, not only an evaluation."""
    return any(key not in LINE_FIELDS and not key.startswith(("eval/", "accounting/")) for key in line)


def append_line(file: TextIO, record: Mapping[str, Any]) -> None:
    """Append one strictly valid JSON line that survives a kill right afterwards."""
    file.write(json.dumps(record, allow_nan=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of objects; a missing file is empty, a half-written last line is left out.

    Raises:
        ValueError: a line before the last is damaged; the message names it.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    records = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    try:
        records += [_parse(last, str(path))] if last else []
    except ValueError:
        pass  # killed while writing it
    return records


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object; delete that line and try again")
    return record


def discard_from(path: Path, step: int, keep: Callable[[dict[str, Any]], bool] | None = None) -> int:
    """Remove the lines of `step` and later (and a half-written last line), which a resumed run logs again.

    Args:
        keep: of the lines of `step` itself, those that stay; None: none.

    Returns the number of whole lines removed. The file is replaced in one move, so a kill in between loses nothing.
    """
    records = read_lines(path)
    kept = [r for r in records if r["step"] < step or (r["step"] == step and keep is not None and keep(r))]
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept).encode()
    if path.exists() and path.read_bytes() != text:
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return len(records) - len(kept)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl in order; each has `step`, `stage`, `timestamp` and metrics.

    A metric is a float, or None where it was not finite. Raises ValueError as `read_lines` does.
    """
    return read_lines(Path(folder) / METRICS_FILE)
