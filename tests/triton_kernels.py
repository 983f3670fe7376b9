"""Runs Triton kernels without a GPU: under Triton's interpreter, and compiled to machine code that is looked at.

Both need a process of their own, because the variable TRITON_INTERPRET is read when triton is imported, for good. One
worker of each kind serves the whole pytest run; the calls are made there, the results come back.

    gradient = interpreted("megatron_srft.ops.triton.softmax_statistics:softmax_gradient", logits, labels, ...).result

calls a function (`module:function`) with the kernels interpreted on CPU tensors. Arguments that it writes to come back
in `.arguments`; those given stay as they are. Layout, strides and shared memory of tensors arrive as they are.

    builds = compiled("megatron_srft.ops.triton.softmax_statistics:softmax_gradient", 90, (logits, labels, ...))

calls it once for each tuple of arguments, on CPU tensors, with launches replaced by compilation for sm_90: what is
compiled is what a GPU of that architecture would run, with the alignment and constants that Triton infers from these
arguments. It returns one `Build` per kernel, so launches that share a kernel show as one. To add kernels to the gates
on stack, spills and vector loads, add a row to LAUNCHES in tests/ops/test_triton_build.py; pointers and strides that
are multiples of 16 bytes in practice must be so in the row.

Traps of the interpreter: `tl.dot` of bfloat16 is silently wrong (cast to float32 first), reads out of bounds and
`tl.device_assert` go unnoticed, `tl.max` skips NaN, as on a GPU. It cuts float32 off to bfloat16 where a GPU rounds to
the nearest; the worker puts that right.
"""

import atexit
import importlib.metadata
import importlib.util
import io
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

ARCHITECTURES = (80, 90, 100)
LIMIT_SECONDS = 300
ROOT = Path(__file__).resolve().parent.parent


def _triton_version() -> tuple[int, ...]:
    if importlib.util.find_spec("triton") is None:
        return (0,)
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


needs_triton = pytest.mark.skipif(
    _triton_version() < (3, 9),
    reason="needs triton 3.9: the interpreters of older ones fail with NumPy 2.4, their compilers use other registers",
)


@dataclass
class Answer:
    result: Any
    arguments: tuple
    """The positional arguments after the call, for those that it wrote to."""


@dataclass
class Build:
    """What the compiler made of one kernel."""

    kernel: str
    architecture: int
    warps: int
    registers: int
    stack_bytes: int
    instructions: list[str]
    """Opcodes with their suffixes, in the order of the code, such as LDG.E.128."""

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode starts with one of these."""
        return sum(opcode.startswith(prefixes) for opcode in self.instructions)

    @property
    def local_memory(self) -> int:
        """Loads and stores of local memory, that is of what did not fit into registers."""
        return self.count("LDL", "STL")


def interpreted(target: str, *args: Any, **kwargs: Any) -> Answer:
    """Call `target` with its Triton kernels interpreted; its exception is raised here as a RuntimeError."""
    return _worker("interpreter").ask(("call", target, args, kwargs))


def compiled(target: str, architecture: int, launches: Sequence[tuple]) -> list[Build]:
    """The distinct kernels that calls of `target` with these arguments launch on a GPU of this architecture."""
    return _worker("compiler").ask(("compile", target, architecture, tuple(launches)))


class _Worker:
    """A process that answers one question at a time over its standard input and output."""

    def __init__(self, kind: str):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        if kind == "interpreter":
            environment["TRITON_INTERPRET"] = "1"
        paths = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", "import triton_kernels as k; k.serve()"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        atexit.register(self.process.kill)

    def ask(self, question: tuple) -> Any:
        watchdog = threading.Timer(LIMIT_SECONDS, self.process.kill)
        watchdog.start()
        try:
            _send(self.process.stdin, question)
            kind, answer = _receive(self.process.stdout)
        except (EOFError, BrokenPipeError):
            _worker.cache_clear()
            raise RuntimeError(
                f"the process that runs Triton kernels ended with exit status {self.process.wait()}, "
                f"or took more than {LIMIT_SECONDS} seconds"
            ) from None
        finally:
            watchdog.cancel()
        if kind == "error":
            raise RuntimeError(answer)
        return answer


@cache
def _worker(kind: str) -> _Worker:
    return _Worker(kind)


def serve() -> None:
    """The worker's loop; whatever the functions print goes to standard error."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _round_bfloat16()
    while True:
        try:
            kind, *rest = _receive(questions)
        except EOFError:
            return
        try:
            _send(answers, ("answer", _call(*rest) if kind == "call" else _compile(*rest)))
        except Exception:
            _send(answers, ("error", traceback.format_exc()))


def _round_bfloat16() -> None:
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (source, target) != (float32, bfloat16):
            return convert(values, source, target, mode)
        bits = torch.tensor(values).bfloat16().view(torch.int16)
        return bits.numpy().view("uint16")

    interpreter._convert_float = rounding


def _send(stream: BinaryIO, message: tuple) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(len(buffer.getbuffer()).to_bytes(8, "little"))
    stream.write(buffer.getbuffer())
    stream.flush()


def _receive(stream: BinaryIO) -> tuple:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    return torch.load(io.BytesIO(stream.read(int.from_bytes(header, "little"))), weights_only=False)


def _call(target: str, args: tuple, kwargs: dict) -> Answer:
    result = pkgutil.resolve_name(target)(*args, **kwargs)
    return Answer(result, args)


def _compile(target: str, architecture: int, launches: tuple) -> list[Build]:
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """As much of a driver as compiling asks for; the architecture doubles as the device that keys the caches."""

        get_current_device = staticmethod(lambda: architecture)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", architecture, 32))

    kernels = {}
    launch = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[id(kernel)] = kernel

    function = pkgutil.resolve_name(target)
    triton.runtime.driver.set_active(Driver())
    triton.JITFunction.run = compile_only
    try:
        for arguments in launches:
            function(*arguments)
    finally:
        triton.JITFunction.run = launch
    return [_read(kernel, architecture) for kernel in kernels.values()]


def _read(kernel: Any, architecture: int) -> Build:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    return Build(
        kernel.metadata.name, architecture, kernel.metadata.num_warps, int(registers), int(stack), instructions
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
