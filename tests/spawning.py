"""Runs a test function in several processes that talk through gloo, and brings back results and tracebacks."""

import importlib.util
import inspect
import multiprocessing
import os
import queue
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_SECONDS = 300

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["megatron_srft.train", "transformers.models.qwen2.modeling_qwen2"])
"""Processes are forked from one that has imported everything and started nothing; an import takes seconds."""


def spawn(world_size: int, function: Callable, *args: Any) -> list[Any]:
    """Call `function(*args)` in `world_size` new processes and return the results in rank order.

    The processes find RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in their environment, as torchrun sets
    them. `function` is a module-level function of a test file; arguments and results must be picklable without it.
    The first failing rank's traceback fails the test.
    """
    reports = FORKS.Queue()
    where = (inspect.getfile(function), function.__qualname__)
    port = _free_port()
    processes = [
        FORKS.Process(target=_run, args=(rank, world_size, port, where, args, reports), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, reports)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes: list, reports) -> list[Any]:
    results: dict[int, Any] = {}
    waited = 0
    while len(results) < len(processes):
        try:
            rank, result, failure = reports.get(timeout=1)
        except queue.Empty:
            waited += 1
            dead = [p for i, p in enumerate(processes) if i not in results and p.exitcode not in (None, 0)]
            if dead or waited > TIMEOUT_SECONDS:
                pytest.fail(f"{'a rank died: ' + str(dead) if dead else 'timed out'}; finished: {sorted(results)}")
            continue
        if failure:
            pytest.fail(f"rank {rank} failed:\n{failure}", pytrace=False)
        results[rank] = result
    return [results[rank] for rank in range(len(processes))]


def _run(rank: int, world_size: int, port: int, where: tuple[str, str], args: tuple, reports) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        file, name = where
        sys.path.insert(0, str(Path(__file__).parent))
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        reports.put((rank, getattr(module, name)(*args), None))
    except BaseException:
        reports.put((rank, None, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
