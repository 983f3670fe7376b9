"""A hang becomes a message and an exit status, also of a rank that waits in a collective."""

import os
import subprocess
import sys

from spawning import _free_port

from megatron_srft.deadline import Deadline

RANK = """
import sys, time
import torch, torch.distributed as dist
from megatron_srft.deadline import Deadline

dist.init_process_group("gloo")
with Deadline(3, "weight sync of policy version 7", dist.get_rank(), "Raise rollout.sync_timeout.") as deadline:
    for name in ("model.norm.weight", "lm_head.weight"):
        deadline.at("gathering", name)
        if dist.get_rank() == 1 and name == "lm_head.weight":
            deadline.at("loading into vLLM", name)
            time.sleep(60)
        dist.all_reduce(torch.zeros(1))
        deadline.done += 1
"""


def test_every_rank_names_its_own_phase_and_ends():
    port = str(_free_port())
    variables = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env={**variables, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    texts = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    waiting, hanging = (text.split("rank ", 1)[1] for text in texts)
    assert waiting.startswith("0: weight sync of policy version 7 took longer than 3 s")
    assert "gathering, tensor lm_head.weight (after 1 tensors)" in waiting
    assert hanging.startswith("1: weight sync of policy version 7 took longer than 3 s")
    assert "loading into vLLM, tensor lm_head.weight (after 1 tensors)" in hanging
    assert "Raise rollout.sync_timeout." in hanging


def test_work_done_in_time_ends_nothing():
    with Deadline(100, "work", 0, "") as deadline:
        deadline.at("phase")
    assert deadline.timer.finished.is_set()
