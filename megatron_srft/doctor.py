"""What is installed and what works on this machine: `megatron-srft doctor`.

Every line is a fact or a trial. A trial of something required that fails makes the exit status 1 and says what to do;
what is optional is only reported.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from megatron_srft import __version__
from megatron_srft.config import MathRewardConfig
from megatron_srft.ops import implementations

OPTIONAL = {
    "transformer-engine": "fused layers on CUDA",
    "flash-attn": "used by TransformerEngine",
    "apex": "fused optimizer and norms on CUDA",
    "wandb": "logging.wandb_project",
    "triton": "the ops' kernels on CUDA where the compiled extension has none",
}
"""Packages that are detected and never required, and what they are for."""

COMPILERS = ("c++", "ninja", "nvcc")


@dataclass(frozen=True)
class Finding:
    """One line of the report. Example: Finding("numpy", "missing", "pip install numpy")."""

    name: str
    text: str
    remedy: str = ""
    """What to do; empty when nothing is wrong."""


def main() -> int:
    """Print the report; 0 if everything required works, else 1."""
    wrong = []
    for title, section in SECTIONS.items():
        print(title)
        for finding in section():
            print(f"  {finding.name:22} {finding.text}", flush=True)
            wrong += [finding] if finding.remedy else []
    if not wrong:
        print("everything required works")
        return 0
    print("not working:")
    for finding in wrong:
        print(f"  {finding.name}: {finding.remedy}")
    return 1


# ---------------------------------------------------------------- facts


def required_packages() -> Iterator[Finding]:
    """This project's own requirements, each with the installed version."""
    yield Finding("python", f"{platform.python_version()} ({platform.python_implementation()})")
    yield Finding("megatron_srft", __version__)
    for text in importlib.metadata.requires("megatron-srft") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _required(requirement)


def _required(requirement: Requirement) -> Finding:
    version = _version(requirement.name)
    if version is None:
        return Finding(requirement.name, "missing", f"pip install '{requirement}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, f"{version}, needs {requirement.specifier}", f"pip install '{requirement}'")
    return Finding(requirement.name, version)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def optional_packages() -> Iterator[Finding]:
    for package, purpose in OPTIONAL.items():
        yield Finding(package, f"{_version(package) or 'not installed'} ({purpose})")
    yield _vllm()
    for compiler in COMPILERS:
        yield Finding(compiler, shutil.which(compiler) or "not found")


def _vllm() -> Finding:
    """Whether rollout.kind vllm can be used; importing vllm itself would take ten seconds."""
    from megatron_srft.rollout.vllm import versions

    version = versions.installed_version()
    fits = version is None or versions.SUPPORTED.contains(version, prereleases=True)
    text = version or "not installed"
    return Finding("vllm", f"{text} (rollout.kind vllm{'' if fits else f', which needs {versions.SUPPORTED}'})")


def devices() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("CPU", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}, {memory / 2**30:.1f} GiB memory")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding("threads per process", f"{torch.get_num_threads()} (OMP_NUM_THREADS {threads}; use cores / ranks)")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield Finding("CUDA", f"none: torch is {built}; runs use the CPU and gloo")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")


def ops() -> Iterator[Finding]:
    """Which implementations of the ops there are for each kind of device here, and which one `auto` takes."""
    built = [device for device in implementations.DEVICES if implementations.reason_against("native", device) is None]
    yield Finding("compiled kernels", f"for {' and '.join(built)}" if built else implementations.load_native())
    for device in implementations.DEVICES if torch.cuda.is_available() else ("cpu",):
        for name in implementations.IMPLEMENTATIONS:
            yield Finding(f"{name} on {device}", implementations.reason_against(name, device) or "works")
        yield Finding(f"auto on {device}", f"takes {implementations.preferred(device)}")


# ---------------------------------------------------------------- trials


def trials() -> Iterator[Finding]:
    yield _try("process group", _join_a_world, "torch.distributed cannot start here; is the loopback interface up?")
    yield _try("megatron.core", _import_megatron, "pip install 'megatron-core>=0.16.1,<0.20' (0.16.1 on Python 3.11)")
    yield _try("math verifier", _verify_an_answer, "pip install 'math-verify>=0.9'; it runs in processes of its own")


def _try(name: str, trial: Callable[[], str], remedy: str) -> Finding:
    """Run a trial; whatever it raises is what the user needs to see."""
    try:
        return Finding(name, trial())
    except Exception as error:
        return Finding(name, f"FAILED: {type(error).__name__}: {error}", remedy)


def _join_a_world() -> str:
    """Sum a number over a world of one, with the backend that a run would take."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        number = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(number)
        assert number.item() == 1
    finally:
        dist.destroy_process_group()
    available = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()]
    return f"{backend} works (available: {', '.join(available)})"


def _import_megatron() -> str:
    from megatron_srft.trainer import host

    host.install()
    importlib.import_module("megatron.core.models.gpt")
    return "imports" if torch.cuda.is_available() else "imports, with the CPU in the place of CUDA (trainer/host.py)"


def _verify_an_answer() -> str:
    from megatron_srft.rewards import Scorer

    with Scorer((MathRewardConfig(),)) as scorer:
        scorer.self_test()
    return "tells right answers from wrong ones"


SECTIONS = {
    "required packages": required_packages,
    "optional parts": optional_packages,
    "devices": devices,
    "ops": ops,
    "trials": trials,
}
