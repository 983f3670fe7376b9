"""Ends a process whose work takes too long, after saying where it stood: a hang becomes a message.

A rank that waits in a collective for another one cannot be interrupted, only ended. Every rank that reaches the
deadline names its own phase; the one whose phase differs from the others' is the one they were waiting for.
"""

import os
import sys
import threading
import time


class Deadline:
    """Use as a context manager around the work, and call `at` whenever it enters a phase or comes to a tensor."""

    def __init__(self, seconds: float, work: str, rank: int, remedy: str):
        """
        Args:
            work: what must be done in time, as in "weight sync of policy version 3".
            remedy: what the user can do.
        """
        self.seconds, self.work, self.rank, self.remedy = seconds, work, rank, remedy
        self.done = 0
        """Tensors that are through."""
        self.at("starting")

    def at(self, phase: str, tensor: str | None = None) -> None:
        self.phase, self.tensor, self.since = phase, tensor, time.monotonic()

    def message(self) -> str:
        where = f"{self.phase}{f', tensor {self.tensor}' if self.tensor else ''}"
        return (
            f"rank {self.rank}: {self.work} took longer than {self.seconds:g} s. This rank has been at this point for "
            f"{time.monotonic() - self.since:.1f} s: {where} (after {self.done} tensors). If other ranks name another "
            f"one, they wait for each other there. {self.remedy}"
        )

    def __enter__(self) -> "Deadline":
        self.timer = threading.Timer(self.seconds, self._end)
        self.timer.daemon = True
        self.timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.timer.cancel()

    def _end(self) -> None:
        print(self.message(), file=sys.stderr, flush=True)
        os._exit(1)  # no exception reaches a thread that waits in a collective
