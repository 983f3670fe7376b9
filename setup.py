"""Builds the compiled kernels of csrc/ into megatron_srft/_native.abi3.so; all else is in pyproject.toml.

CUDA kernels are compiled where a CUDA toolkit is found (CUDA_HOME, /usr/local/cuda, nvcc on the path), whether or not
a GPU is there. Without a C++ compiler, or without torch's headers, nothing is built and the package works on its plain
torch ops; `megatron-srft doctor` tells. What was tried and why it was left out is printed.

    SRFT_NATIVE=0         build nothing            SRFT_NATIVE=1   fail where it cannot be built
    SRFT_CUDA=0           leave CUDA out           SRFT_CUDA=1     fail where there is no CUDA toolkit
    SRFT_CUDA_ARCHS=80,90 machine code for these compute capabilities, and PTX of the last one

The extension uses torch's stable ABI and Python's limited one: a build serves any torch from 2.11 on, and any CPython
from 3.11 on.
"""

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
TORCH_VERSION = "0x020b000000000000"
"""The oldest torch whose stable ABI the extension may use: 2.11."""

CUDA_ARCHS = "80,90,100"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNEL_FLAGS = [*FLAGS, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
"""Not -ffast-math: the kernels compute with infinities."""

BINDING_FLAGS = [*FLAGS, "-Wno-unused-parameter", f"-DTORCH_TARGET_VERSION={TORCH_VERSION}"]


def torch_folder() -> Path | None:
    """torch's package folder; beside the interpreter if pip builds in an environment of its own, without torch."""
    try:
        import torch
    except ImportError:
        beside = Path(sysconfig.get_path("platlib")) / "torch"
        return beside if (beside / "include").is_dir() else None
    return Path(torch.__file__).parent


def cuda_home() -> Path | None:
    """The CUDA toolkit; the nvcc on the path may be a script far away from it, so that comes last."""
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", on_path and Path(on_path).resolve().parent.parent]
    return next((Path(c) for c in candidates if c and (Path(c) / "include/cuda_runtime.h").is_file()), None)


class BuildNative(build_ext):
    """Compiles file by file, as many at once as there are cores, and links them against torch."""

    def run(self):
        if os.environ.get("SRFT_NATIVE") == "0":
            print("SRFT_NATIVE=0: the compiled kernels are left out")
            return
        try:
            self.build()
        except (OSError, subprocess.CalledProcessError, BuildError) as error:
            if os.environ.get("SRFT_NATIVE") == "1" or os.environ.get("SRFT_CUDA") == "1":
                raise
            print(f"the compiled kernels are left out, the package works on its plain torch ops: {error}")

    def build(self):
        torch = torch_folder()
        if torch is None:
            raise BuildError("torch is not installed, whose headers are needed")
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if not compiler:
            raise BuildError("there is no C++ compiler (g++)")
        cuda = self.wanted_cuda()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        commands, objects = compile_commands(compiler, torch, cuda, folder)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(run, commands))
        target = Path(self.get_ext_fullpath("megatron_srft._native"))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")  # half a library would end a process that loads it
        run(link_command(compiler, torch, cuda, objects, partial))
        partial.replace(target)

    def wanted_cuda(self) -> Path | None:
        wanted = os.environ.get("SRFT_CUDA", "auto")
        found = None if wanted == "0" else cuda_home()
        if wanted == "1" and found is None:
            raise BuildError("SRFT_CUDA=1, but there is no CUDA toolkit: set CUDA_HOME")
        print(f"CUDA kernels: {f'compiled by {found}' if found else 'left out'}")
        return found


class BuildError(Exception):
    """Why there is nothing to build with."""


def compile_commands(compiler: str, torch: Path, cuda: Path | None, folder: Path) -> tuple[list, list[Path]]:
    define = ["-DSRFT_CUDA"] if cuda else []
    headers = [f"-isystem{torch / 'include'}"]
    commands, objects = [], []

    def add(source: Path, command: list) -> None:
        objects.append(folder / f"{source.parent.name}_{source.stem}.o")
        commands.append([*command, f"-I{SOURCES}", "-c", source, "-o", objects[-1]])

    for source in sorted(SOURCES.glob("cuda/*.cu")) if cuda else []:
        add(source, [cuda / "bin/nvcc", *nvcc_flags()])
    for source in sorted(SOURCES.glob("binding/*.cpp")):
        add(source, [compiler, *BINDING_FLAGS, *define, *headers])
    for source in sorted(SOURCES.glob("cpu/*.cpp")):
        add(source, [compiler, *KERNEL_FLAGS])
    return commands, objects


def nvcc_flags() -> list[str]:
    archs = os.environ.get("SRFT_CUDA_ARCHS", CUDA_ARCHS).split(",")
    machine = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    return ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *machine, portable]


def link_command(compiler: str, torch: Path, cuda: Path | None, objects: list[Path], target: Path) -> list:
    # No path of torch goes in: it is loaded before the extension, whichever version and place it is.
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]
    if cuda:
        library_folder = next(d for d in (cuda / "lib64", cuda / "lib") if (d / "libcudart_static.a").is_file())
        libraries += [f"-L{library_folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return [compiler, "-shared", "-o", target, *objects, "-Wl,--no-as-needed", *libraries]


def run(command: list) -> None:
    words = [str(word) for word in command]
    print(" ".join(words), flush=True)
    subprocess.run(words, check=True)


setup(
    ext_modules=[Extension("megatron_srft._native", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
