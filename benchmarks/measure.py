"""Measures several implementations of one piece of work side by side, each in a process of its own.

A benchmark names its sides and, for each, a function that returns the work to be timed; `compare` runs every side in a
fresh process (its own peak memory, its own compiled code), one after another, and prints one line per side with the
ratio to the first. The fastest of the repeats counts. On a busy machine compare the CPU seconds.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

Work = Callable[[], object]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def time_of(work: Work, repeats: int) -> tuple[float, float]:
    """Fastest (wall seconds, CPU seconds) of the repeats, after two rounds to warm up."""
    walls, cpus = [], []
    for number in range(repeats + 2):
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        synchronize()
        if number >= 2:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def reset_peak() -> None:
    """From here on `peak_bytes` counts; on a CPU the peak of the process so far is the least it can say."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(sides: Sequence[str], columns: Sequence[str]) -> dict[str, dict]:
    """Run this script once more per side, with `--side NAME`; a side prints a JSON object as its last line.

    Args:
        columns: timed parts; a side reports `<part>` as (wall seconds, CPU seconds). Other keys are printed as they
            are; `failed` instead of everything says why a side could not run.

    Returns:
        What each side reported.
    """
    print(f"{device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads; {' '.join(sys.argv[1:])}")
    print(f"{'':24}" + "".join(f"{f'{part} ms':>14}{'ratio':>8}{'CPU ms':>11}{'ratio':>8}" for part in columns))
    found: dict[str, dict] = {}
    for side in sides:
        result = subprocess.run([sys.executable, *sys.argv, "--side", side], stdout=subprocess.PIPE, text=True)
        found[side] = json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else {"failed": "see above"}
        print(f"{side:24}" + _line(found[side], found[sides[0]], columns), flush=True)
    return found


def _line(ours: dict, first: dict, columns: Sequence[str]) -> str:
    if "failed" in ours:
        return f"  {ours['failed']}"
    cells = ""
    for part in columns:
        for own, base, width in zip(ours[part], first[part], (14, 11), strict=True):
            cells += f"{own * 1e3:{width}.3f}{base / own:7.2f}x"
    return cells + "".join(f"  {key} {value}" for key, value in ours.items() if key not in columns)


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
