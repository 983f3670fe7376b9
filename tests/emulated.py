"""Compiles a CUDA source with g++ and the built-ins of ops/emulation/cuda_emulation.h, and loads it with ctypes.

An op's kernels are reached through `ops/emulation/<op>.cpp`, which includes its .cu (and .cpp) and exports C functions.
Under a sanitizer they run in a process of their own (`run_sanitized`), because the sanitizer must be loaded first.
"""

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WRAPPERS = Path(__file__).resolve().parent / "ops" / "emulation"
FLAGS = ("-std=c++20", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-DSRFT_EMULATION")
PLAIN = ("-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZED_PROCESS = "SRFT_TEST_SANITIZED"
"""Environment variable that tells a test process to load sanitized kernels."""


@functools.cache
def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def library(op: str) -> ctypes.CDLL:
    """The kernels of an op that `ops/emulation/<op>.cpp` exports, with sanitizers if this process was started so."""
    return ctypes.CDLL(str(compile_source(WRAPPERS / f"{op}.cpp", SANITIZED_PROCESS in os.environ)))


def check(library: ctypes.CDLL, error: int) -> None:
    """Raise RuntimeError, with the emulation's reason, for a CUDA error that a launcher returned."""
    if error != 0:
        library.emulation_failure.restype = ctypes.c_char_p
        raise RuntimeError(f"CUDA error {error}: {library.emulation_failure().decode()}")


@functools.cache
def compile_source(source: Path, sanitized: bool = False) -> Path:
    """Shared object of one C++ file, compiled once per process."""
    target = _folder() / f"{source.stem}{'_sanitized' if sanitized else ''}.so"
    includes = (f"-I{ROOT / 'csrc'}", f"-I{WRAPPERS}")
    command = [compiler(), *FLAGS, *(SANITIZED if sanitized else PLAIN), *includes, "-o", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def sanitizer_runtime() -> Path | None:
    """AddressSanitizer's library, which a process must load before all others; None if the compiler has none."""
    printed = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    path = Path(printed.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


def run_sanitized(test_file: str, selection: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of a file that `selection` (pytest's -k) names with kernels under Address- and UBSanitizer.

    That file must neither import torch, which does not load under the sanitizer, nor need fixtures of a conftest.py.
    """
    environment = os.environ | {
        "LD_PRELOAD": str(sanitizer_runtime()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        SANITIZED_PROCESS: "1",
        "PYTHONMALLOC": "malloc",  # so that the sanitizer sees every array's end
    }
    # -s: pytest would otherwise keep the sanitizer's report when it ends the process. conftest.py imports torch.
    options = ["-p", "no:cacheprovider", "--noconftest", "-q", "-s", "-k", selection]
    command = [sys.executable, "-m", "pytest", *options, test_file]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="srft_kernels_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
