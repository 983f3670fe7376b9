"""Peak memory of linear_token_logprob at a real size, measured in a process of its own."""

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
from megatron_srft.ops.linear_token_logprob import linear_token_logprob

rows, columns, width, saved = map(int, sys.argv[1:])
# Not getrusage, which also counts what the parent held when it forked.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def step(rows, columns):
    hidden = torch.randn(rows, width, requires_grad=True)
    labels = torch.randint(0, columns, (rows,))
    outputs = linear_token_logprob(
        hidden, weight[:columns], labels, vocab_start=0, vocab_size=columns,
        weight_gradient=buffer[:columns], saved_logits_bytes=saved,
    )
    torch.autograd.backward(outputs, [torch.ones(rows), torch.ones(rows)])

weight = (torch.randn(columns, width) / 30).requires_grad_()
buffer = torch.zeros(columns, width).add_(1)  # written to, so that it counts
step(16, 4096)  # libraries take their own memory
before = peak()
step(rows, columns)
print(json.dumps(peak() - before))
"""


def peak_bytes(rows, columns, width, saved):
    """Peak over what weight, its gradient's buffer and the libraries take."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, (rows, columns, width, saved))],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    return json.loads(result.stdout)


@pytest.mark.slow
def test_a_large_head_computes_its_logits_again_in_bounded_memory():
    """4096 x 151,936 logits are 2.3 GiB in float32. Allowed: hidden states, their gradient and its sum (14 MiB each),
    the working chunk (32 MiB) and what the matrix products take to pack their factors."""
    assert peak_bytes(4096, 151_936, 896, 0) < 160 * MIB


def test_memory_does_not_grow_with_the_vocabulary():
    small, large = peak_bytes(2048, 8192, 64, 0), peak_bytes(2048, 65_536, 64, 0)
    assert large - small < 8 * MIB  # the logits themselves grow by 448 MiB


def test_kept_logits_take_the_memory_stated():
    kept = peak_bytes(2048, 32_768, 64, 1 << 30)
    assert 256 * MIB <= kept < 320 * MIB
