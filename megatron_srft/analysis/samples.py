"""Sample rollouts of each step: a few completions with their scores, one JSON line each, in samples.jsonl."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_srft.metrics import append_line, discard_from, read_lines
from megatron_srft.sample import Group, Score

SAMPLES_FILE = "samples.jsonl"


def log_samples(folder: str | Path, step: int, groups: list[Group], limit: int) -> None:
    """Append up to `limit` completions of a step's scored groups: one of each group, then second ones, and so on.

    Lines of this step and later, which a run left that was killed before it saved, are removed first.
    """
    path = Path(folder) / SAMPLES_FILE
    if _last_step(path) >= step:
        discard_from(path, step)
    chosen = sorted((number, g) for g, group in enumerate(groups) for number in range(len(group.completions)))
    with path.open("a", encoding="utf-8") as file:
        for number, g in chosen[:limit]:
            append_line(file, {"step": step, **describe(groups[g], number)})


def _last_step(path: Path) -> float:
    """The step of the last line without reading the whole file; infinite when that line is only half written."""
    size, block = path.stat().st_size if path.exists() else 0, 1 << 16
    if size == 0:
        return -1
    with path.open("rb") as file:
        while True:
            file.seek(max(size - block, 0))
            *before, line, after = b"\n", *file.read().split(b"\n")
            if after:
                return math.inf
            if len(before) > 1 or block >= size:
                return json.loads(line)["step"]
            block *= 4


def describe(group: Group, number: int) -> dict[str, Any]:
    """One completion of a scored group as a plain record, with the group's demonstration and all its rewards."""
    assert group.scores is not None, "sample rollouts are logged after scoring"
    completion, score, demonstration = group.completions[number], group.scores[number], group.demonstration
    return {
        "prompt_id": group.prompt.id,
        "source": group.prompt.source,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "response": completion.text,
        "response_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        **_score(score),
        "group_rewards": [s.reward for s in group.scores],
        "demonstration": demonstration and {
            "text": demonstration.text,
            "truncated": demonstration.truncated,
            **(_score(group.demonstration_score) if group.demonstration_score else {}),
        },
    }  # fmt: skip


def _score(score: Score) -> dict[str, Any]:
    return {"reward": score.reward, "streams": score.streams, "correct": score.correct, "status": score.status}


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run folder's samples.jsonl in order; empty without the file."""
    return read_lines(Path(folder) / SAMPLES_FILE)
