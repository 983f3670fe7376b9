"""The sink itself: every number of a step goes to metrics.jsonl, the progress and, by option, TensorBoard and W&B."""

import importlib.util
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron_srft.metrics.lines import (
    LINE_FIELDS,
    METRICS_FILE,
    append_line,
    discard_from,
    is_training,
    read_metrics,
)
from megatron_srft.metrics.progress import PlainProgress, TerminalProgress, evaluation_text

NONFINITE_KEY = "accounting/nonfinite_metrics"
ETA_WINDOW_STEPS = 10


class LoggingOptions(Protocol):
    """The fields of config.LoggingConfig that this folder reads."""

    tensorboard: bool
    wandb_project: str | None


def check_packages(config: LoggingOptions) -> None:
    """Raise ValueError naming the key and the pip command when a package that `config` asks for is missing."""
    wanted = {
        "tensorboard": (config.tensorboard, "logging.tensorboard", "false"),
        "wandb": (config.wandb_project is not None, "logging.wandb_project", "null"),
    }
    for package, (is_wanted, key, off) in wanted.items():
        # A folder of that name in the working directory (W&B leaves one) is found too, but without an origin.
        spec = importlib.util.find_spec(package) if is_wanted else None
        if is_wanted and (spec is None or spec.origin is None):
            raise ValueError(
                f"{key} is set but the package {package} is not installed; run `pip install {package}`, or set it to "
                f"{off}"
            )


class MetricSink:
    """Where rank 0 writes the numbers of a run. Use as a context manager: `with MetricSink(...) as sink`.

    Args:
        folder: the run folder; made when missing.
        config: config.LoggingConfig.
        total_steps: training steps of the whole run, over all stages.
        start_step: steps already done (0, or the resumed checkpoint's). Lines of this step and later are removed from
            metrics.jsonl first, because a run killed between logging and saving repeats them; but not an evaluation
            in the middle of the run, which was made before the checkpoint.
        settings: the resolved config as a plain tree, shown by W&B.
        stream: where the progress goes; a terminal gets a live bar, anything else one plain line per step.

    Raises:
        ValueError: a package that `config` asks for is missing, or metrics.jsonl is damaged.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        config: LoggingOptions,
        *,
        total_steps: int,
        start_step: int = 0,
        settings: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        check_packages(config)
        self._folder, self._total = Path(folder), total_steps
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / METRICS_FILE
        # Before the first step and after the last every start evaluates anew.
        removed = discard_from(path, start_step, _is_evaluation if 0 < start_step < total_steps else None)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = self._open_tensorboard(start_step) if config.tensorboard else None
        self._wandb = self._open_wandb(config.wandb_project, settings) if config.wandb_project is not None else None
        stream = stream or sys.stdout
        self._progress = (
            TerminalProgress(stream, total_steps, start_step) if stream.isatty() else PlainProgress(stream, total_steps)
        )
        self._step_seconds: deque[float] = deque(maxlen=ETA_WINDOW_STEPS)
        self._clock = time.perf_counter()
        if removed:
            self._progress.note(f"{path}: removed {removed} lines of step {start_step} and later; they run again")

    def _open_tensorboard(self, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start_step)
        for line in read_metrics(self._folder):
            if line["step"] == start_step:  # a kept evaluation, which the purge takes away
                _add_scalars(writer, start_step, {k: v for k, v in line.items() if k not in LINE_FIELDS})
        return writer

    def _open_wandb(self, project: str, settings: Mapping[str, Any] | None):
        import wandb

        id_file = self._folder / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else os.urandom(6).hex()
        run = wandb.init(
            project=project,
            id=run_id,
            name=self._folder.name,
            dir=str(self._folder),
            config=dict(settings or {}),
            resume="allow",
        )
        id_file.write_text(run_id + "\n")
        return run

    def log(self, step: int, values: Mapping[str, float], stage: str) -> None:
        """Record one training step, or one evaluation (only eval/ keys), of a stage of the run.

        Values that are not finite are written as null and counted under accounting/nonfinite_metrics.
        """
        numbers = {key: float(value) for key, value in values.items()}
        clean = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        bad = [key for key, value in clean.items() if value is None]
        if bad:
            clean[NONFINITE_KEY] = clean.get(NONFINITE_KEY, 0.0) + len(bad)
        append_line(self._file, {"step": step, "stage": stage, "timestamp": round(time.time(), 3), **clean})
        if self._tensorboard is not None:
            _add_scalars(self._tensorboard, step, clean)
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in clean.items() if value is not None}, step=step)
        self._show(step, stage, clean, bad)

    def _show(self, step: int, stage: str, values: Mapping[str, float | None], bad: list[str]) -> None:
        now = time.perf_counter()
        evaluation = evaluation_text(values)
        if evaluation:
            self._progress.note(f"evaluation after {step}/{self._total} steps: {evaluation}")
        if is_training(values):
            self._step_seconds.append(now - self._clock)
            pace = sum(self._step_seconds) / len(self._step_seconds)
            self._progress.step(step, stage, values, pace * max(self._total - step - 1, 0))
        if bad:
            self._progress.note(f"warning: step {step + 1}: not finite, written as null: {', '.join(bad)}")
        self._clock = now

    def close(self) -> None:
        """End the progress bar and flush every writer; safe to call twice."""
        self._progress.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "MetricSink":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return not is_training(line)


def _add_scalars(writer: Any, step: int, values: Mapping[str, float | None]) -> None:
    for key, value in values.items():
        if value is not None:
            writer.add_scalar(key, value, step)
    writer.flush()


class NullSink:
    """What every rank but the first holds: the same methods, nothing written."""

    def log(self, step: int, values: Mapping[str, float], stage: str) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> "NullSink":
        return self

    def __exit__(self, *exception: object) -> None:
        pass
