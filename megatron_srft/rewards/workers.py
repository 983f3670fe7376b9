"""A pool of verifier processes with a deadline of our own for every job.

Each worker is `python -m megatron_srft.rewards.worker` (a fresh interpreter: no fork of torch or gloo threads, no
`__main__` guard, the same under torchrun, pytest and notebooks). Jobs go out in small batches, answers come back one by
one, so the clock always runs for exactly one known job: when it passes the deadline, or the process dies, that job is
a timeout or a crash, the process is replaced, and the rest of its batch is sent again.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import unpack

import megatron_srft
from megatron_srft.rewards.answers import Verdict
from megatron_srft.rewards.worker import encode

Job = tuple[str | None, str, str]
"""(explicit answer or None, end of the response, reference): the arguments of `symbolic.judge`."""

BATCH_JOBS = 16
START_SECONDS = 120.0
"""Importing sympy takes one second, on a loaded network file system many more."""
MAX_FAILED_STARTS = 3


class VerifierError(RuntimeError):
    """The verifier cannot do its work; the message says why."""


@dataclass(eq=False)
class Worker:
    """One process and what it owes us."""

    process: subprocess.Popen
    ready: bool = False
    batch: deque[int] = field(default_factory=deque)
    """Indices of the jobs sent and not yet answered; the first one is being worked on."""
    deadline: float = 0.0
    """Monotonic time at which the process is killed."""
    received: bytes = b""


class WorkerPool:
    """Judges jobs in `workers` processes, each job within `seconds`.

    Use: pool = WorkerPool(...); pool.judge(jobs) as often as wanted; pool.close(). Start-up overlaps with the caller's
    other work; the first judge() waits for it. Processes also end with the interpreter, or when this object goes away.
    """

    def __init__(self, workers: int, seconds: float, megabytes: int = 1024):
        self.seconds, self.megabytes = seconds, megabytes
        self.restarts = 0
        """Processes replaced after a timeout or a crash."""
        self._failed_starts = 0
        self._workers: list[Worker] = []
        self._end = weakref.finalize(self, _end_processes, self._workers)
        self._workers.extend(self._start() for _ in range(workers))

    @property
    def process_ids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the processes; returns when they are gone. A closed pool cannot judge."""
        self._end()

    def judge(self, jobs: Sequence[Job]) -> list[Verdict]:
        """One verdict per job, in order; equal jobs are worked on once.

        Raises VerifierError when the workers cannot be started, or after close().
        """
        if not self._end.alive:
            raise VerifierError("this verifier is closed")
        unique = list(dict.fromkeys(jobs))
        try:
            verdicts = dict(zip(unique, self._judge(unique), strict=True))
        except BaseException:
            self.close()  # Answers still in the pipes would be taken for the next call's.
            raise
        return [verdicts[job] for job in jobs]

    def _judge(self, jobs: list[Job]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        while None in verdicts:
            for worker in list(self._workers):
                if worker.process.poll() is not None and worker.ready and not worker.batch:
                    self._replace(worker, "crash", verdicts, waiting)
                elif worker.ready and not worker.batch and waiting:
                    self._send(worker, jobs, waiting)
            busy = [worker for worker in self._workers if worker.batch or not worker.ready]
            for worker in _readable(busy):
                self._receive(worker, verdicts, waiting)
            for worker in busy:
                if (worker.batch or not worker.ready) and time.monotonic() > worker.deadline:
                    self._replace(worker, "timeout", verdicts, waiting)
        return verdicts

    def _send(self, worker: Worker, jobs: list[Job], waiting: deque[int]) -> None:
        """Hand a fair share of what is left to an idle worker."""
        size = min(BATCH_JOBS, -(-len(waiting) // len(self._workers)))
        worker.batch.extend(waiting.popleft() for _ in range(size))
        worker.deadline = time.monotonic() + self.seconds
        message = memoryview(encode([jobs[i] for i in worker.batch]))
        # An error is a process that just died; the end of its output, read next, says so too.
        with contextlib.suppress(BrokenPipeError):
            while message:
                message = message[os.write(worker.process.stdin.fileno(), message) :]

    def _receive(self, worker: Worker, verdicts: list[Verdict | None], waiting: deque[int]) -> None:
        chunk = os.read(worker.process.stdout.fileno(), 65536)
        if not chunk:
            self._replace(worker, "crash", verdicts, waiting)
            return
        worker.received += chunk
        for message in _messages(worker):
            worker.deadline = time.monotonic() + self.seconds
            if worker.ready:
                correct, status, answer = message
                verdicts[worker.batch.popleft()] = Verdict(correct=correct, status=status, answer=answer)
            elif "error" in message:
                raise VerifierError(f"the math verifier cannot start: {message['error']}; run: pip install math-verify")
            else:
                worker.ready, self._failed_starts = True, 0

    def _replace(self, worker: Worker, status: str, verdicts: list[Verdict | None], waiting: deque[int]) -> None:
        """Kill a worker, settle the job it failed on, give the rest of its batch back, start a successor."""
        _end_processes([worker])
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise VerifierError(
                    f"the math verifier did not start in {MAX_FAILED_STARTS} attempts (the last one ended with code "
                    f"{worker.process.returncode}); try: {' '.join(self._command())} < /dev/null"
                )
        if worker.batch:
            verdicts[worker.batch.popleft()] = Verdict(correct=None, status=status)
            waiting.extendleft(reversed(worker.batch))
        self.restarts += 1
        self._workers[self._workers.index(worker)] = self._start()

    def _command(self) -> list[str]:
        return [sys.executable, "-P", "-m", "megatron_srft.rewards.worker", str(self.seconds), str(self.megabytes)]

    def _start(self) -> Worker:
        root = str(Path(megatron_srft.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        process = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # A Ctrl-C at the terminal is the trainer's to handle.
        )
        return Worker(process=process, deadline=time.monotonic() + START_SECONDS)


def _readable(workers: list[Worker]) -> list[Worker]:
    """The workers with something to say; waits for one until the first deadline."""
    patience = min(worker.deadline for worker in workers) - time.monotonic()
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(max(0.0, patience) + 0.001)]


def _messages(worker: Worker) -> list:
    """Complete messages in what was received."""
    messages = []
    while len(worker.received) >= 4 and len(worker.received) >= 4 + (size := unpack(">I", worker.received[:4])[0]):
        messages.append(json.loads(worker.received[4 : 4 + size]))
        worker.received = worker.received[4 + size :]
    return messages


def _end_processes(workers: list[Worker]) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.stdin.close()
        worker.process.stdout.close()
        worker.process.wait()
