"""nvcc compiles every CUDA source for every target; no kernel spills registers, and they load 16 bytes at a time.

No GPU is needed. A kernel that spills still gives right results, only slowly: nothing else would notice.
"""

import os
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).resolve().parents[2] / "csrc" / "cuda").glob("*.cu"))
TARGETS = ("sm_80", "sm_90a", "sm_100a")
MOST_REGISTERS = 80
"""Of a thread of any kernel: 6 blocks of 128 threads, or 3 of 256, then fit on a multiprocessor of 65536 registers."""

WITHOUT_VECTORS = ("errors", "clipped_ratio")
"""Sources whose kernels do not read rows of logits or hidden states; theirs are short columns of scalars."""


@cache
def nvcc() -> Path | None:
    """The toolkit's own nvcc; what is on the path may be a script elsewhere."""
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [Path(folder) / "bin" / "nvcc" for folder in folders if folder]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    return next((path for path in candidates if path.is_file()), None)


@cache
def cuobjdump() -> Path | None:
    """The toolkit's disassembler, or the one in triton's package: small toolkits leave it out."""
    folders = [nvcc().parent] if nvcc() else []
    if (triton := find_spec("triton")) is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((folder / "cuobjdump" for folder in folders if (folder / "cuobjdump").is_file()), None)


pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc (CUDA_HOME, /usr/local/cuda or the path)")


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source.stem)
def compiled(request, tmp_path_factory) -> tuple[Path, Path, str]:
    """(source, file with machine code for all targets, what the assembler said of its kernels)."""
    source = request.param
    target = tmp_path_factory.mktemp("cuda") / f"{source.stem}.fatbin"
    machines = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in TARGETS]
    command = [nvcc(), "-fatbin", "-std=c++20", "-O3", "-Xptxas=-v", f"-I{source.parents[1]}", *machines]
    done = subprocess.run([*command, source, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return source, target, done.stderr


def kernels(report: str) -> list[tuple[str, int, list[int]]]:
    """(mangled name and target, registers, [stack, spill stores, spill loads in bytes]) of each compilation."""
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return [
        (f"{name} for {target}", int(registers), [int(number) for number in memory])
        for name, target, *memory, registers in pattern.findall(report)
    ]


def test_kernels_keep_to_their_registers(compiled):
    source, _, report = compiled
    found = kernels(report)
    assert len(found) == report.count("Compiling entry function"), report
    assert found or source.stem == "errors", report
    for name, registers, memory in found:
        assert registers <= MOST_REGISTERS, f"{name}: {registers} registers"
        assert memory == [0, 0, 0], f"{name}: stack, spill stores and loads {memory}"


def test_kernels_load_16_bytes_at_a_time(compiled):
    source, target, _ = compiled
    if source.stem in WITHOUT_VECTORS:
        pytest.skip("has no rows to read by vectors")
    if cuobjdump() is None:
        pytest.skip("needs cuobjdump (a full CUDA toolkit, or the package triton)")
    listing = subprocess.run([cuobjdump(), "-sass", target], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    assert functions
    vectorised = {function.split(maxsplit=1)[0] for function in functions if "LDG.E.128" in function}
    rows = {function.split(maxsplit=1)[0] for function in functions if is_vectorised(function)}
    assert rows and rows <= vectorised, sorted(rows - vectorised)
    assert not re.search(r"\b(LDL|STL)\b", listing), "local memory is used"


def is_vectorised(function: str) -> bool:
    """Kernels of rows: named so, and not those for columns that no vector divides (templates with a size of 1)."""
    name = function.split(maxsplit=1)[0]
    return bool(re.search(r"statistics_by|gradient_tiles|(project|sum_chunk|spread)I.*Li[248]E", name))
