"""A run folder, finished or in progress, as values: config, metric series, stages, evaluations, sample rollouts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_srft import config as configuration
from megatron_srft.analysis.samples import read_samples
from megatron_srft.metrics import LINE_FIELDS, is_training, read_metrics

PRIMARY_METRICS = ("accuracy", "greedy", "avg@")
"""The evaluation metric that stands for a file: the first of these that a metric's name starts with."""

Series = list[tuple[int, float]]
"""(step, value) in order of steps; values that were not finite are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a run folder holds."""

    folder: Path
    config: configuration.RunConfig
    config_text: str
    """config.yaml as it stands in the folder."""
    lines: list[dict[str, Any]]
    """metrics.jsonl, in order."""
    samples: list[dict[str, Any]]
    """samples.jsonl, in order."""

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for _, stage in self.config.stage_configs())

    @property
    def steps_done(self) -> int:
        """Training steps logged so far; evaluations are not steps."""
        return max((line["step"] + 1 for line in self.lines if is_training(line)), default=0)

    @property
    def seconds(self) -> float:
        """Wall time spent in logged steps and evaluations; pauses between a stop and a resume do not count."""
        timed = sum(line.get("time/step") or 0.0 for line in self.lines)
        return timed or self.lines[-1]["timestamp"] - self.lines[0]["timestamp"]

    def keys(self) -> list[str]:
        """All metric keys, in the order in which they first appear."""
        return list(dict.fromkeys(key for line in self.lines for key in line if key not in LINE_FIELDS))

    def series(self, key: str) -> Series:
        """The metric's values; where a step was logged twice the later line counts."""
        values = {line["step"]: line[key] for line in self.lines if line.get(key) is not None}
        return sorted(values.items())

    def stage_starts(self) -> list[tuple[int, str]]:
        """(first step, name) of each stage that has begun training."""
        starts: dict[str, int] = {}
        for line in filter(is_training, self.lines):
            starts.setdefault(line["stage"], line["step"])
        return [(step, name) for name, step in starts.items()]

    def evaluations(self) -> dict[str, dict[str, Series]]:
        """Evaluation file -> metric -> series, the file's primary metric first."""
        files: dict[str, dict[str, Series]] = {}
        for key in self.keys():
            file, _, metric = key.removeprefix("eval/").rpartition("/")
            if key.startswith("eval/") and self.series(key):
                files.setdefault(file, {})[metric] = self.series(key)
        return {file: dict(sorted(metrics.items(), key=lambda m: _precedence(m[0]))) for file, metrics in files.items()}


def _precedence(metric: str) -> int:
    return next((i for i, start in enumerate(PRIMARY_METRICS) if metric.startswith(start)), len(PRIMARY_METRICS))


def load_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: it is no run folder, has no metrics yet, or holds a damaged file; the message says what to do.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        found = "has no config.yaml" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} is not a run folder: it {found}; pass the folder of a run, for example runs/<name>")
    lines = read_metrics(folder)
    if not any(set(line) - set(LINE_FIELDS) for line in lines):
        raise ValueError(
            f"{folder} has no metrics yet; run `megatron-srft train {folder}/config.yaml` and wait for the first step"
        )
    return Run(
        folder=folder,
        config=configuration.load(folder / "config.yaml"),
        config_text=(folder / "config.yaml").read_text(encoding="utf-8"),
        lines=lines,
        samples=read_samples(folder),
    )
