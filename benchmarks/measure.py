"""Measures several implementations of one piece of work side by side, each in a process of its own.

A benchmark names its sides and a function that measures one of them; `main` runs every side in a fresh process (its
own peak memory, its own compiled code), one after another, and prints one line per side with the ratio to the first.
A side that cannot run, or fails, is a line that says so. `--json FILE` keeps the figures, see report.py.

On a CPU the fastest of the repeats counts, and on a busy machine CPU seconds compare better. On a GPU it is the median
of times between events, each after a sweep over the L2 cache; the CPU seconds are then what launching costs.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from math import inf
from pathlib import Path

import report
import torch
from memory import peak_bytes

from megatron_srft.ops.implementations import IMPLEMENTATIONS

Work = Callable[[], object]
Time = tuple[float, float]
"""(seconds, CPU seconds)"""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CEILINGS = "ceilings"
"""Name of the side that measures the machine itself."""


def time_of(work: Work, repeats: int) -> Time:
    return times_of([work], repeats)[0]


def times_of(stages: Sequence[Work], repeats: int) -> list[Time]:
    """Times of the stages of one piece of work, and of all together; two rounds warm up."""
    measured = _on_gpu if DEVICE == "cuda" else _on_cpu
    rounds = [measured(stages) for _ in range(repeats + 2)][2:]
    middle = statistics.median if DEVICE == "cuda" else min
    wholes = [[*stages_of_round, tuple(map(sum, zip(*stages_of_round, strict=True)))] for stages_of_round in rounds]
    return [tuple(middle(own) for own in zip(*times, strict=True)) for times in zip(*wholes, strict=True)]


def _on_cpu(stages: Sequence[Work]) -> list[Time]:
    marks = [(time.perf_counter(), time.process_time())]
    for stage in stages:
        stage()
        marks.append((time.perf_counter(), time.process_time()))
    return [(later[0] - mark[0], later[1] - mark[1]) for mark, later in pairwise(marks)]


def _on_gpu(stages: Sequence[Work]) -> list[Time]:
    _sweep_cache()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
    clocks = [time.process_time()]
    events[0].record()
    for stage, event in zip(stages, events[1:], strict=True):
        stage()
        event.record()
        clocks.append(time.process_time())
    torch.cuda.synchronize()
    times = [event.elapsed_time(later) / 1e3 for event, later in pairwise(events)]
    return list(zip(times, [later - clock for clock, later in pairwise(clocks)], strict=True))


def _sweep_cache() -> None:
    _swept().zero_()


@cache
def _swept() -> torch.Tensor:
    size = 4 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.int8, device=DEVICE)


def start_memory() -> int:
    """From here on the peak counts; on a CPU the peak of the process so far is the least that can be told."""
    if DEVICE == "cuda":
        _swept()  # else its memory would count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return _peak()


def memory_over(start: int) -> float:
    """MiB of the peak over what `start_memory` returned."""
    return (_peak() - start) / 2**20


def _peak() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_bytes()


def ceilings(dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """What this device gives the largest matrix products (on a CPU in float32) and copies, of random numbers."""
    size, copied = (8192, 1 << 32) if DEVICE == "cuda" else (1024, 1 << 27)
    dtype = dtype if DEVICE == "cuda" else torch.float32
    left, right = (torch.randn(size, size, dtype=dtype, device=DEVICE) for _ in range(2))
    product, _ = time_of(lambda: left @ right, repeats)
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds, _ = time_of(lambda: target.copy_(source), repeats)
    return {"matmul TFLOP/s": 2 * size**3 / product / 1e12, "copy GB/s": 2 * copied / seconds / 1e9}


# ---------------------------------------------------------------- sides in processes of their own


def main(
    parser: argparse.ArgumentParser,
    run: Callable[[str, argparse.Namespace], dict],
    sides: Callable[[argparse.Namespace], dict[str, str | None]],
    parts: Sequence[str],
    vary: str,
    derive: Callable[[argparse.Namespace, dict, dict], dict] | None = None,
) -> None:
    """Parse the options and measure every side, or be the process that measures one; exits with status 1 if one of
    ours fails.

    Args:
        parser: its description is the benchmark's title; must have `--repeats`.
        run: measures one side with a single value in `vary` (all of them are in `values`); returns {part: Time, any
            other figure: number or text}.
        sides: name -> why it cannot run here, or None; gets all values. The ratios are to the first.
        parts: what is timed.
        vary: an option that takes several values. On a GPU a side measures all of them in one process, on a CPU,
            where a process has a single peak of memory, each in its own.
        derive: further figures from those of a side and from `ceilings`, which are measured if this is given; takes
            the options with a single value in `vary`.
    """
    parser.add_argument("--json", type=Path, help="file that gets the figures, too")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a side is given up")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.values = getattr(args, vary)
    if args.side:
        _measure_here(run, args, vary)
        return
    failed, found = False, report.new(parser.description, device_name(), list(parts))
    for values in [args.values] if DEVICE == "cuda" else [[value] for value in args.values]:
        if derive is not None and not found["ceilings"]:
            found["ceilings"] = next(_measured(CEILINGS, args, vary, values[:1]))
        for value in values:
            found["settings"].append({"setting": f"{vary} {value}", "sides": {}})
        new = found["settings"][-len(values) :]
        for side, reason in sides(args).items():
            figures = _measured(side, args, vary, values) if reason is None else ({"failed": reason} for _ in values)
            for value, setting, own in zip(values, new, figures, strict=True):
                if derive is not None and "failed" not in own and "failed" not in found["ceilings"]:
                    own |= derive(_with(args, vary, value), own, found["ceilings"])
                setting["sides"][side] = own
                report.print_line(found, setting, side)
                report.write(found, args.json)
                failed |= side.split()[0] in IMPLEMENTATIONS and reason is None and "failed" in own
    sys.exit(int(failed))


def _measure_here(run: Callable, args: argparse.Namespace, vary: str) -> None:
    for value in args.values:
        torch.compiler.reset()  # otherwise a second size is compiled for any size
        try:
            if args.side == CEILINGS:
                dtype = getattr(torch, getattr(args, "dtype", "float32"))
                found = ceilings(dtype, args.repeats)
            else:
                found = run(args.side, _with(args, vary, value))
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        found = {name: str(own) if own in (inf, -inf) or own != own else own for name, own in found.items()}  # for JSON
        print(json.dumps({vary: value} | found), flush=True)


def _with(args: argparse.Namespace, vary: str, value: object) -> argparse.Namespace:
    single = copy.copy(args)
    setattr(single, vary, value)
    return single


def _measured(side: str, args: argparse.Namespace, vary: str, values: Sequence[object]) -> Iterator[dict]:
    """What this script reports with `--side`, for each value."""
    option = "--" + vary.replace("_", "-")
    command = [sys.executable, *sys.argv, "--side", side, option, *map(str, values)]
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=args.limit)
        output, fate = ended.stdout, f"ended with status {ended.returncode}, see its output"
    except subprocess.TimeoutExpired as expired:
        output, fate = (expired.stdout or b"").decode(), f"took longer than {args.limit:g} s"
    found = {}
    for line in output.splitlines():
        if line.startswith(f'{{"{vary}":'):
            figures = json.loads(line)
            found[figures.pop(vary)] = figures
    yield from (found.get(value, {"failed": fate}) for value in values)


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
