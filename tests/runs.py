"""Starts whole training runs in processes of their own, which can be killed, and reads what they leave behind.

The processes are forked from one that has imported everything, so that a start costs a tenth of a second instead of
several; they run the command's `main` with its own arguments, standard streams and exit status.
"""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from spawning import FORKS, _free_port
from tiny_models import make_model

TIMEOUT_SECONDS = 120


class Run:
    """One or more ranks of `python -m megatron_srft.train CONFIG arguments...` (like torchrun, with `ranks` > 1).

    Args:
        log: file for the ranks' standard streams.
        event: (name, ending, signal) sends the signal to a rank when Python's audit event `name` (`open`, `os.rename`)
            happens to a path that ends so. It is there at exactly that moment, on any machine.
        max_file_bytes: no file can grow beyond this (EFBIG), as on a full disk.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        ranks: int = 1,
        event: tuple[str, str, int] | None = None,
        max_file_bytes: int | None = None,
    ):
        self.log = log
        port = _free_port()
        self.processes = [
            FORKS.Process(target=_run, args=(arguments, log, rank, ranks, port, event, max_file_bytes), daemon=False)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> int:
        """Exit status of the first rank that failed, or 0; -9 for one that was killed."""
        for process in self.processes:
            process.join(TIMEOUT_SECONDS)
        statuses = [process.exitcode for process in self.processes]
        self.kill()
        assert None not in statuses, f"timed out\n{self.output}"
        return next((status for status in statuses if status), 0)

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    @property
    def output(self) -> str:
        return self.log.read_text()


def _run(arguments, log, rank, ranks, port, event, max_file_bytes) -> None:
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if ranks > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if event is not None:
        sys.addaudithook(lambda name, values: _strike(event, name, values))
    from megatron_srft.train import main

    sys.exit(main(arguments))


def _strike(event: tuple[str, str, int], name: str, values: tuple) -> None:
    wanted, ending, number = event
    if name == wanted and any(str(value).endswith(ending) for value in values if isinstance(value, (str, Path))):
        os.kill(os.getpid(), number)


def write_inputs(folder: Path, **settings: Any) -> Path:
    """A two-layer model, twelve prompts with demonstrations, and a config over them; the config's path."""
    make_model("qwen2", folder / "model", tied=True, num_hidden_layers=2)
    rows = [
        {"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1), "demonstration": f"s{i}#{2 * i + 1}"} for i in range(12)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run_dir": str(folder / "runs"),
        "steps": 4,
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(folder / "train.jsonl")], "chat_template": "never", "max_prompt_tokens": 16},
        "batch": {"prompts_per_step": 3, "rollouts_per_prompt": 3, "tokens_per_microbatch": 64},
        "rollout": {"kind": "local", "max_response_tokens": 8, "dump_every": 1},
        "rewards": [
            {"kind": "exact", "answer_after": "#"},
            # A random model earns it now and then, so that advantages are not all zero.
            {"kind": "format", "pattern": "(?s).*[0-9].*", "matched": 1.0, "gate": False},
        ],
        "objective": {"kind": "srft", "preset": "srft-released"},
        "optimizer": {"lr": 0.01},
        "checkpoint": {"every": 1, "keep": 10},
        **settings,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def saved(run: Path) -> list[str]:
    """Everything in the run's folder of checkpoints, oldest first."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def rewind(run: Path, target: Path, step: int) -> Path:
    """Copy a run as it was when the checkpoint of `step` had been made and nothing after it, but its later metrics."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("hf", "report.html"))
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return target


def final_weights(run: Path) -> bytes:
    return (run / "hf" / "final" / "model.safetensors").read_bytes()


def history(run: Path) -> list[tuple]:
    """(step, loss, reward, gradient norm, mean length) of every line of a training step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "stage", "loss", "reward/mean", "grad_norm", "response_length/mean")
    return [tuple(line.get(key) for key in keys) for line in lines if "loss" in line]
