"""One verifier process: reads batches of jobs from its standard input, answers each job as soon as it is done.

    python -m megatron_srft.rewards.worker SECONDS MEGABYTES

A message is a 4-byte big-endian length and that many bytes of JSON. First the worker says {"ready": true} (or
{"error": ...} when math-verify cannot be imported). Then it reads a list of jobs [answer, tail, reference] and writes
one [correct, status, answer] for each, in order. It ends when its input does.

It can never outlive or outgrow its welcome: a kernel alarm ends a job that its parent did not end (a killed parent),
and an address-space limit turns 9^(9^(9^9)) into a MemoryError, after which the process leaves.
"""

import json
import logging
import os
import resource
import signal
import struct
import sys
from typing import BinaryIO

ORPHAN_GRACE_SECONDS = 5.0


def read_message(stream: BinaryIO) -> object | None:
    """The next message, or None at the end of the stream."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    return json.loads(stream.read(struct.unpack(">I", header)[0]))


def encode(message: object) -> bytes:
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def main(seconds: float, megabytes: int) -> None:
    # antlr prints complaints; they must not reach the pipe that carries the answers.
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    try:
        # math-verify warns that its deadlines are off; antlr and latex2sympy report every malformed formula.
        logging.disable(logging.CRITICAL)
        from megatron_srft.rewards.symbolic import judge
    except ImportError as error:
        output.write(encode({"error": f"{type(error).__name__}: {error}"}))
        return
    limit_memory(megabytes)
    output.write(encode({"ready": True}))
    while (jobs := read_message(sys.stdin.buffer)) is not None:
        for answer, tail, reference in jobs:
            signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN_GRACE_SECONDS)
            verdict = judge(answer, tail, reference)
            signal.setitimer(signal.ITIMER_REAL, 0)
            output.write(encode([verdict.correct, verdict.status, verdict.answer]))


def limit_memory(megabytes: int) -> None:
    """Bound the address space; a lower limit that already holds stays."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
