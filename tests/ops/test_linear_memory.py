"""Peak memory of the ops from hidden states, measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

MIB = 2**20

PROGRAM = """
import json, re, sys
from pathlib import Path
import torch
from megatron_srft.ops.linear_kl import linear_kl
from megatron_srft.ops.linear_token_logprob import linear_token_logprob

rows, columns, width, saved = map(int, sys.argv[2:])
# Not getrusage, which also counts what the parent held when it forked.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def step(rows, columns):
    hidden = torch.randn(rows, width, requires_grad=True)
    head, where = weight[:columns], dict(vocab_start=0, vocab_size=columns, weight_gradient=buffer[:columns])
    if sys.argv[1] == "linear_kl":
        outputs = [linear_kl(hidden, head, hidden + 1, head, **where)]
    else:
        labels = torch.randint(0, columns, (rows,))
        outputs = linear_token_logprob(hidden, head, labels, saved_logits_bytes=saved, **where)
    torch.autograd.backward(outputs, [torch.ones(rows) for _ in outputs])

weight = (torch.randn(columns, width) / 30).requires_grad_()
buffer = torch.zeros(columns, width).add_(1)  # written to, so that it counts
step(16, 4096)  # libraries take their own memory
before = peak()
step(rows, columns)
print(json.dumps(peak() - before))
"""


# Without the second glibc keeps large blocks that were freed, now more, now fewer of them.
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": str(MIB)}


def peak_bytes(rows, columns, width, saved, op="linear_token_logprob"):
    """Peak over what weight, its gradient's buffer and the libraries take."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, op, *map(str, (rows, columns, width, saved))],
        capture_output=True, text=True, check=True, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    return json.loads(result.stdout)


@pytest.mark.slow
def test_a_large_head_computes_its_logits_again_in_bounded_memory():
    """4096 x 151,936 logits are 2.3 GiB in float32. Allowed: hidden states, their gradient and its sum (14 MiB each),
    the working chunk (32 MiB) and what the matrix products take to pack their factors."""
    assert peak_bytes(4096, 151_936, 896, 0) < 160 * MIB


@pytest.mark.parametrize("op", ["linear_token_logprob", "linear_kl"])
def test_memory_does_not_grow_with_the_vocabulary(op):
    small, large = peak_bytes(2048, 8192, 64, 0, op), peak_bytes(2048, 32_768, 64, 0, op)
    assert large - small < 8 * MIB  # the logits of a model themselves grow by 192 MiB


def test_kept_logits_take_the_memory_stated():
    kept = peak_bytes(2048, 32_768, 64, 1 << 30)
    assert 256 * MIB <= kept < 320 * MIB
