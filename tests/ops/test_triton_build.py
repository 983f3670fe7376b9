"""Every Triton kernel, compiled for each architecture: no stack, nothing spilled, 16-byte loads where memory allows.

A row of LAUNCHES is a function that launches one kernel, with arguments as they come in practice;
`tests/triton_kernels.py` says how it is compiled.
"""

from dataclasses import dataclass

import pytest
import torch
from triton_kernels import ARCHITECTURES, compiled, needs_triton

pytestmark = needs_triton

SOFTMAX = "megatron_srft.ops.triton.softmax_statistics:"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def logits(columns, dtype, width=None):
    return torch.zeros(2, width or columns, dtype=dtype), torch.zeros(2, dtype=torch.int64)


def statistics(columns, dtype, width=None):
    return (*logits(columns, dtype, width), 0, columns, 1.0)


def gradient(columns, dtype, width=None):
    return (*logits(columns, dtype, width), torch.zeros(4, 2), 0, columns, 1.0)


@dataclass
class Launch:
    function: str
    """module:name"""
    arguments: tuple
    vector_loads: int
    """16-byte loads that the kernel has at least; 0: none, because its memory is not aligned for them."""
    most_registers: int
    architectures: tuple[int, ...] = ARCHITECTURES


STATISTICS, KEEP = SOFTMAX + "softmax_statistics", SOFTMAX + "softmax_statistics_keep"
GRADIENT, IN_PLACE = SOFTMAX + "softmax_gradient", SOFTMAX + "softmax_gradient_"
LAUNCHES = {
    "statistics-bf16": Launch(STATISTICS, statistics(151936, BF16), 2, 48),
    "statistics-fp32": Launch(STATISTICS, statistics(151936, FP32), 4, 48, (90,)),
    "statistics-chunk": Launch(STATISTICS, statistics(1024, FP32), 4, 48, (90,)),
    "statistics-unaligned": Launch(STATISTICS, statistics(1001, BF16), 0, 48),
    "keep-chunk": Launch(KEEP, (*statistics(1024, FP32), torch.zeros(2, 1024, dtype=BF16)), 8, 64),
    "keep-unaligned": Launch(KEEP, (*statistics(1001, FP32), torch.zeros(2, 1001, dtype=BF16)), 0, 80, (90,)),
    "gradient-bf16": Launch(GRADIENT, gradient(151936, BF16), 2, 64),
    "gradient-fp16": Launch(GRADIENT, gradient(151936, FP16), 2, 64, (90,)),
    "gradient-fp32": Launch(GRADIENT, gradient(151936, FP32), 4, 64, (90,)),
    "gradient-chunk": Launch(IN_PLACE, gradient(1024, FP32), 4, 64, (90,)),
    "gradient-unaligned": Launch(GRADIENT, gradient(1001, BF16), 0, 64, (90,)),
}


@pytest.mark.parametrize(
    ("name", "architecture"), [(name, number) for name, launch in LAUNCHES.items() for number in launch.architectures]
)
def test_kernels_keep_to_registers_and_load_whole_vectors(name, architecture):
    launch = LAUNCHES[name]
    (build,) = compiled(launch.function, architecture, [launch.arguments])
    assert build.count("EXIT") > 0, "no instructions found"
    assert (build.stack_bytes, build.local_memory) == (0, 0)
    assert build.registers <= launch.most_registers
    vector_loads = build.count("LDG.E.128")
    assert vector_loads >= launch.vector_loads
    assert vector_loads == 0 or launch.vector_loads > 0


def with_numbers(rows, vocab_start, columns, scale, skip=0):
    """Launches of one kind whose numbers differ; `skip` moves the row vectors to other alignments."""
    memory = torch.zeros(rows, 6144, dtype=BF16)[:, :columns], torch.zeros(rows + skip, dtype=torch.int64)[skip:]
    return (*memory, vocab_start, columns, scale)


NUMBERS = [(1, 0, 6000, 1.0), (16, 1, 5904, 0.5, 1), (7, 32768, 6001, 1.0), (48, 1 << 20, 4097, 2.0, 1)]


def test_other_numbers_do_not_compile_a_kernel_again():
    assert len(compiled(SOFTMAX + "softmax_statistics", 90, [with_numbers(*numbers) for numbers in NUMBERS])) == 1
    launches = []
    for numbers in NUMBERS:
        memory, labels, *rest = with_numbers(*numbers)
        launches.append((memory, labels, torch.zeros(4, len(memory)), *rest))
    assert len(compiled(SOFTMAX + "softmax_gradient_", 90, launches)) == 1


def test_the_loop_over_a_row_does_not_talk_between_threads():
    (build,) = compiled(STATISTICS, 90, [statistics(151936, BF16)])
    start = build.instructions.index("LDG.E.128")
    loop = build.instructions[start : build.instructions.index("BRA", start)]
    assert loop.count("MUFU.EX2") == 17, "16 columns and the rescaling of what was before them"
    assert not [opcode for opcode in loop if opcode.startswith(("SHFL", "BAR", "LDS", "STS"))]
