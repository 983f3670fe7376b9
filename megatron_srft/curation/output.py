"""A data file that is written problem by problem and can be gone on with after a kill.

Beside FILE lies FILE.journal: first the settings, then a line per finished problem with its counts and the size of FILE
behind it. A row is written before its line in the journal, so what FILE holds beyond the last line is cut off.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_srft.metrics import read_lines


def journal_of(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def check_output(path: Path, mode: str) -> None:
    """Raise ValueError when the file cannot be written under this mode; asked before anything expensive is done."""
    if not path.name.endswith(".jsonl"):
        raise ValueError(f"{path}: the output is written as JSONL; give it a name that ends in .jsonl")
    if mode == "new" and (path.exists() or journal_of(path).exists()):
        journal = " (its journal is)" if not path.exists() else ""
        raise ValueError(f"{path} is already there{journal}; give --overwrite, or --resume where the tool has it")


def check_outputs(paths: Sequence[Path | None], mode: str, inputs: Sequence[str]) -> None:
    """`check_output` of the output and of what is written beside it, each a file of its own and none of the inputs."""
    taken = {Path(file).resolve() for file in inputs}
    for path in paths:
        if path is None:
            continue
        check_output(path, mode)
        if path.resolve() in taken:
            raise ValueError(f"{path} is named twice; what is read and whatever is written need files of their own")
        taken.add(path.resolve())


def as_json(fields: dict[str, Any], where: str) -> str:
    """One line of JSON. Raises ValueError for a value that JSON has no form for."""

    def plain(value: Any) -> str:
        if isinstance(value, Decimal | date):  # parquet has them
            return str(value)
        raise ValueError(f"{where}: a value of type {type(value).__name__} cannot be written as JSON; leave it out")

    return json.dumps(fields, ensure_ascii=False, default=plain) + "\n"


class Output:
    """Use as a context manager. `done` holds the counts of every finished problem by its id, `counts` their sum.

    Args:
        settings: what the rows depend on; going on with others is refused.
        mode: new, resume (a file that is not there is new too) or overwrite.

    Raises:
        ValueError: the file is there and mode is new, it cannot be gone on with, or its settings differ.
    """

    def __init__(self, path: Path, settings: dict[str, Any], mode: str):
        check_output(path, mode)
        self.path, self.journal = path, journal_of(path)
        self.done: dict[str, Counter[str]] = {}
        self.counts: Counter[str] = Counter()
        self.settings = json.loads(json.dumps(settings))
        there = path.exists() or self.journal.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self._restore() if there and mode == "resume" else 0
        self.rows = path.open("r+b" if size else "wb")
        self.rows.truncate(size)
        self.rows.seek(size)
        if self.done:
            _drop_half_line(self.journal)
        self.lines = self.journal.open("a" if self.done else "w", encoding="utf-8")
        if not self.done:
            self._journal({"settings": self.settings})

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *exception: object) -> None:
        self.rows.close()
        self.lines.close()
        if self.path.stat().st_size == 0:
            self.path.unlink()  # a file without rows would look like data
        if not self.done:
            self.journal.unlink()

    def add(self, problem_id: str, row: dict[str, Any] | None, counts: Counter[str]) -> None:
        """Write down a finished problem; `row` is None when nothing was kept.

        Raises ValueError for a row with a value that JSON has no form for.
        """
        if row is not None:
            self.rows.write(as_json(row, problem_id).encode("utf-8", "surrogatepass"))
            self.rows.flush()
        self._journal({"id": problem_id, "counts": dict(counts), "bytes": self.rows.tell()})
        self.done[problem_id] = counts
        self.counts += counts

    def _journal(self, line: dict[str, Any]) -> None:
        # Flushed survives a kill. It is not synced to the disk, which for a row each would take longer than the rest.
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()

    def _restore(self) -> int:
        """Take over the journal; the size of the file behind its last line."""
        first, *lines = read_lines(self.journal) or [{}]
        if "settings" not in first:
            raise ValueError(f"{self.path} cannot be gone on with: {self.journal} is missing or empty; --overwrite it")
        before = first["settings"]
        other = sorted(k for k in before.keys() | self.settings.keys() if before.get(k) != self.settings.get(k))
        if other:
            was = ", ".join(f"{name} was {before.get(name)!r}, is {self.settings.get(name)!r}" for name in other)
            raise ValueError(f"{self.path} was begun with other settings ({was}); give the same, or --overwrite")
        for line in lines:
            self.done[line["id"]] = Counter(line["counts"])
            self.counts.update(line["counts"])
        size = lines[-1]["bytes"] if lines else 0
        if size > (self.path.stat().st_size if self.path.exists() else 0):
            raise ValueError(f"{self.path} is shorter than when it was written ({size} bytes); --overwrite it")
        return size


def _drop_half_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
