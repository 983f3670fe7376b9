"""What the data tools wrote and printed."""

import json
import re
from pathlib import Path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def counts_of(table: str) -> dict[str, int]:
    """The counts that a tool printed."""
    found = re.findall(r"^(\w+) +([\d,]+)  \w", table, re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in found}
