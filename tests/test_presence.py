"""Whether a folder is taken, and who outlives whom, seen from other processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_srft.presence import claim_folder

HOLD = "import sys, time, pathlib; from megatron_srft.presence import claim_folder; "
HOLD += "lock = claim_folder(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
CHILD = "import time; from megatron_srft.presence import end_with_launcher; end_with_launcher(); "
CHILD += "print('ready', flush=True); time.sleep(60)"
LAUNCHER = "import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); "
LAUNCHER += "print(c.pid, flush=True); c.wait()"


def test_a_folder_is_taken_until_its_process_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OSError, match="another process is training in this folder"):
        claim_folder(tmp_path / "run")
    holder.kill()
    holder.wait()
    claim_folder(tmp_path / "run").close()


def test_a_rank_does_not_outlive_a_killed_launcher():
    environment = dict(os.environ, TORCHELASTIC_RUN_ID="none")
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, CHILD], stdout=subprocess.PIPE, text=True, env=environment
    )
    rank, ready = int(launcher.stdout.readline()), launcher.stdout.readline()
    assert ready == "ready\n"
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 20
    while running(rank) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(rank)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
