"""The figures of one run: accuracy, what it took to reach a given one, and how training looked towards the end.

    reached(target) = the first evaluation whose accuracy is at least the target
    rollout tokens  = sum over the steps before it of completions * mean response length, or of all that was sampled
    seconds         = sum over the steps before it of time/step - time/evaluate - time/save

so a run is charged for what it did before that evaluation, and not for being evaluated. The resolution is
evaluation.every.
"""

import math
from dataclasses import dataclass
from statistics import fmean

from megatron_srft.analysis.runs import Run, Series

LATE_SHARE = 0.1
"""The figures of training (`late`) are means over this last share of the steps, at least one."""

LATE_KEYS = (
    "reward/mean", "accuracy", "response_length/mean", "truncated_share", "entropy/rollouts", "entropy/demonstrations",
    "nll/demonstrations", "clip_fraction/high", "clip_fraction/low", "clip_fraction/demonstrations",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Where a run first had the target accuracy."""

    step: int
    rollout_tokens: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FileFigures:
    """One run on one evaluation file."""

    metric: str
    """The file's primary metric: greedy, or avg@k."""
    first: float
    final: float
    final_step: int
    best: float
    best_step: int
    """The first step at which the best accuracy was measured."""
    reached: Reached | None
    """None without a target, or when it was not reached."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One run."""

    folder: str
    seed: int
    steps: int
    rollout_tokens: float
    seconds: float
    files: dict[str, FileFigures]
    """By evaluation file, without folder and ending."""
    late: dict[str, float]
    """Means over the last steps, of those LATE_KEYS that were logged."""


def run_figures(run: Run, target: float | None) -> RunFigures:
    """The figures of one run."""
    files = {file: next(iter(metrics.items())) for file, metrics in run.evaluations().items()}
    return RunFigures(
        folder=str(run.folder),
        seed=run.config.seed,
        steps=run.steps_done,
        rollout_tokens=spent(rollout_tokens(run), run.steps_done),
        seconds=spent(seconds(run), run.steps_done),
        files={file: _file_figures(run, metric, series, target) for file, (metric, series) in files.items()},
        late=late(run),
    )


def _file_figures(run: Run, metric: str, series: Series, target: float | None) -> FileFigures:
    best_step, best = max(series, key=lambda point: (point[1], -point[0]))
    step = next((step for step, value in series if target is not None and value >= target), None)
    reached = None
    if step is not None:
        reached = Reached(step=step, rollout_tokens=spent(rollout_tokens(run), step), seconds=spent(seconds(run), step))
    return FileFigures(
        metric=metric,
        first=series[0][1],
        final=series[-1][1],
        final_step=series[-1][0],
        best=best,
        best_step=best_step,
        reached=reached,
    )


def rollout_tokens(run: Run) -> Series:
    """Tokens sampled in each step, with those of groups that dynamic sampling dropped; SFT steps are not there."""
    lengths, drawn = dict(run.series("response_length/mean")), dict(run.series("dynamic/response_tokens"))
    kept = {step: number * lengths[step] for step, number in run.series("count/completions") if step in lengths}
    return sorted((kept | drawn).items())


def seconds(run: Run) -> Series:
    """Wall time of each step without evaluation and saving, which count to the step after them."""
    between = [dict(run.series(key)) for key in ("time/evaluate", "time/save")]
    return [(step, whole - sum(b.get(step, 0.0) for b in between)) for step, whole in run.series("time/step")]


def spent(series: Series, step: int) -> float:
    """Sum over the steps before `step`: what the policy that was measured there has cost."""
    return math.fsum(value for at, value in series if at < step)


def late(run: Run) -> dict[str, float]:
    """Means over the last LATE_SHARE of the run's steps."""
    start = run.steps_done - max(1, round(LATE_SHARE * run.steps_done))
    found = {key: [value for step, value in run.series(key) if step >= start] for key in LATE_KEYS}
    return {key: fmean(values) for key, values in found.items() if values}
