"""Seconds per stage of a training step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Seconds per stage of one training step.

    Each step: `with timer("generate"): ...`, `with timer("train"): ...`, then `timer.take()`. The figures are host
    time; a stage that leaves work on the GPU hands its time to the stage that waits for it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`; the same stage may run several times in a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return {"time/<stage>": seconds, ..., "time/step": wall time since the last take} and start afresh."""
        now = time.perf_counter()
        taken = {f"time/{stage}": seconds for stage, seconds in self._seconds.items()}
        taken["time/step"] = now - self._start
        self._seconds, self._start = {}, now
        return taken
