"""Runs with vLLM inside that are killed or asked to stop while they generate: nothing stays behind, nothing is lost."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vllm_runs import write_run

from megatron_srft.metrics import read_metrics

pytestmark = pytest.mark.slow
psutil = pytest.importorskip("psutil", reason="it comes with vLLM")

STEPS = 6
GENERATING_SECONDS = 0.3
"""After a step's line the next one's generation has begun, and it takes longer than this."""
PATIENCE_SECONDS = 900


class Launch:
    """`torchrun` with two ranks of the training command, one vLLM over both."""

    def __init__(self, config: Path, log: Path):
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "SRFT_TEST_MARK": str(log)}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "-m", "megatron_srft.train", str(config)], stdout=out, stderr=out, env=environment
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list:
        return [
            p for p in psutil.Process(self.process.pid).children() if "megatron_srft.train" in " ".join(p.cmdline())
        ]

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not re.search(words, self.output):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE_SECONDS)
        finally:
            for process in self.left_over():
                process.kill()

    def left_over(self) -> list:
        """Processes of this launch that live, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SRFT_TEST_MARK") == str(self.log) and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found


def abandoned() -> set[str]:
    """Shared memory that no process uses: what other tests have beside this one does not count."""
    # By inode, because a semaphore is mapped under a name of its own.
    names = {}
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names[path.stat().st_ino] = path.name
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            for line in maps.read_text().splitlines():
                if "/dev/shm/" in line:
                    names.pop(int(line.split()[4]), None)
    return set(names.values())


def left_in_memory(before: set[str]) -> set[str]:
    """What has been abandoned since; looked at for a while, as another test's may be just about to be used or freed."""
    deadline = time.monotonic() + 10
    while (left := abandoned() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def test_killed_and_stopped_while_vllm_generates(tmp_path):
    """kill -9 of one rank, then SIGTERM to both, then to the end: one run, resumed twice."""
    rollout = {"vllm": {"kv_cache_memory_bytes": 64 << 20, "tensor_parallel_size": 2}, "max_response_tokens": 480}
    layout = {"parallel": {"tensor": 2}, "checkpoint": {"every": 1, "keep": 10}}
    config = write_run(tmp_path, name="run", steps=STEPS, rollout=rollout, **layout)
    run, before = tmp_path / "runs" / "run", abandoned()

    killed = Launch(config, tmp_path / "killed.log")
    killed.wait_for("step 1/")
    time.sleep(GENERATING_SECONDS)
    killed.ranks()[1].kill()
    assert killed.process.wait(PATIENCE_SECONDS) != 0
    time.sleep(1)
    assert killed.left_over() == [], "the other rank, and what it started, go with it"
    assert left_in_memory(before) == set()

    stopped = Launch(config, tmp_path / "stopped.log")
    stopped.wait_for(r"step [23]/")
    time.sleep(GENERATING_SECONDS)
    for rank in stopped.ranks():
        rank.send_signal(signal.SIGTERM)
    assert stopped.wait() == 0, stopped.output
    assert re.search("resumed from .*step-00000[12]", stopped.output)
    last = int(re.search(r"stopped by a signal after step (\d)", stopped.output)[1])
    assert (run / "checkpoints" / f"step-{last:06d}" / "manifest.json").is_file() and last < STEPS
    assert not (run / "hf" / "final").exists()
    assert left_in_memory(before) == set()

    finished = Launch(config, tmp_path / "finished.log")
    assert finished.wait() == 0, finished.output
    assert f"step-{last:06d}" in re.search("resumed from (.*)", finished.output)[1]
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == list(range(STEPS))
    assert (run / "hf" / "final" / "model.safetensors").is_file()
