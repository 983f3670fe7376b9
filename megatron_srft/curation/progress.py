"""A line on standard error now and then, while a tool works for long."""

import sys
import time


class Progress:
    """Use: progress = Progress(total, "prompts"); progress.show(done, remark) as often as wanted."""

    def __init__(self, total: int, noun: str, every_seconds: float = 10.0):
        self.total, self.noun, self.every_seconds = total, noun, every_seconds
        self.last = time.monotonic()

    def show(self, done: int, remark: str) -> None:
        now = time.monotonic()
        if now - self.last >= self.every_seconds:
            print(f"{done:,} of {self.total:,} {self.noun}, {remark}", file=sys.stderr, flush=True)
            self.last = now
