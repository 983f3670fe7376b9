"""Real verifier processes: deadlines, crashes, order, restarts, and none left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_srft.rewards.workers import VerifierError, WorkerPool

ENDLESS = (r"\sum_{k=1}^{10^{12}} \frac{1}{k^2 + k \sin k}", "", "2")
HALVES = [(f"{n}/{2 * n}", "", "0.5") for n in range(2, 40)]


def alive(process_id: int) -> bool:
    """Whether a process runs; an orphan that nobody reaps does not."""
    stat = Path(f"/proc/{process_id}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(process_ids, seconds=10.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, process_ids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, process_ids))


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(workers=2, seconds=1.0)
    yield pool
    pool.close()


def test_verdicts_come_in_the_order_of_the_jobs(pool):
    wrong = [(f"{n}/{3 * n}", "", "0.5") for n in range(2, 40)]
    jobs = [job for pair in zip(HALVES, wrong, strict=True) for job in pair] + HALVES[:3]
    verdicts = pool.judge(jobs)
    assert [v.correct for v in verdicts] == [True, False] * len(HALVES) + [True] * 3
    assert {v.status for v in verdicts} == {"verified"}
    assert pool.judge([]) == []


def test_a_hanging_job_is_killed_at_its_deadline_and_the_others_are_judged(pool):
    before, restarts = pool.process_ids, pool.restarts
    started = time.monotonic()
    verdicts = pool.judge([*HALVES[:5], ENDLESS, *HALVES[5:20]])
    assert time.monotonic() - started < 30
    assert [v.status for v in verdicts] == ["verified"] * 5 + ["timeout"] + ["verified"] * 15
    assert verdicts[5].correct is None and all(v.correct for v in verdicts[:5] + verdicts[6:])
    assert pool.restarts == restarts + 1
    assert sum(not alive(process_id) for process_id in before) == 1


def test_a_process_killed_at_work_is_a_crash_of_that_job_only():
    pool = WorkerPool(workers=1, seconds=60.0)
    assert pool.judge(HALVES[:1])[0].correct
    (victim,) = pool.process_ids
    threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    verdicts = pool.judge([HALVES[1], ENDLESS, *HALVES[2:5]])
    assert [v.status for v in verdicts] == ["verified", "crash", "verified", "verified", "verified"]
    assert pool.restarts == 1 and pool.process_ids != [victim]
    pool.close()


def test_a_process_that_died_while_idle_costs_no_job():
    pool = WorkerPool(workers=1, seconds=10.0)
    pool.judge(HALVES[:1])
    (victim,) = pool.process_ids
    os.kill(victim, signal.SIGKILL)
    assert gone([victim])
    assert [v.status for v in pool.judge(HALVES[:3])] == ["verified"] * 3
    assert pool.restarts == 1
    pool.close()


def test_an_exploding_power_takes_neither_the_machine_nor_the_next_job():
    pool = WorkerPool(workers=1, seconds=3.0, megabytes=256)
    explosion, fine = pool.judge([(r"10^{10^{10}} + 1", "", "5"), HALVES[0]])
    assert explosion.correct is not True and fine.correct is True
    # The bound is the kernel's, so no expression can get round it.
    assert f"{256 * 2**20}" in Path(f"/proc/{pool.process_ids[0]}/limits").read_text().split("Max address space")[1]
    pool.close()


def test_close_leaves_no_process_and_a_closed_pool_says_so(pool):
    short = WorkerPool(workers=2, seconds=1.0)
    process_ids = short.process_ids
    assert all(map(alive, process_ids))
    short.close()
    short.close()
    assert not any(map(alive, process_ids))
    with pytest.raises(VerifierError, match="closed"):
        short.judge(HALVES[:1])


def test_a_pool_nobody_holds_ends_its_processes():
    process_ids = WorkerPool(workers=1, seconds=1.0).process_ids
    assert not any(map(alive, process_ids))


def test_a_killed_parent_leaves_no_process_even_in_the_middle_of_a_job():
    program = (
        "import sys, threading, os, signal\n"
        "from megatron_srft.rewards.workers import WorkerPool\n"
        "pool = WorkerPool(workers=2, seconds=1.0)\n"
        f"pool.judge([{HALVES[0]!r}])\n"
        "print(*pool.process_ids, flush=True)\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        f"pool.judge([{ENDLESS!r}])\n"
    )
    parent = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    process_ids = [int(word) for word in parent.stdout.split()]
    assert len(process_ids) == 2
    assert gone(process_ids, seconds=15.0)


def test_a_verifier_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr here')")
    # A module of the same name earlier on the path: what a broken installation looks like to the worker.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = WorkerPool(workers=1, seconds=1.0)
    with pytest.raises(VerifierError, match="no antlr here.*pip install math-verify"):
        pool.judge(HALVES[:1])


def test_odd_text_survives_the_pipe(pool):
    odd = ["\ud800", "\x00", "é漢字" * 300, "{", '"]]]', "\\", "\n" * 50]
    verdicts = pool.judge([(text, "", "5") for text in odd])
    assert [v.correct for v in verdicts] == [False] * len(odd)
