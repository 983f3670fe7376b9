"""Servers for the tests of the engine on servers, started as a user starts them, and what is done with them."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tokenizer
from vllm_runs import ENGINE, TOKENS, write_run

from megatron_srft import config as configuration
from megatron_srft.config import RunConfig
from megatron_srft.rollout.vllm_http import Server, ServerFailed
from megatron_srft.rollout.vllm_server import VllmServerEngine
from megatron_srft.weights.folder import HfFolder

START_SECONDS = 600
"""Servers start in 20 s of CPU; on a busy machine that takes long."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Served:
    """A `megatron-srft serve` of the test's own, with every process it starts."""

    def __init__(self, config: Path, port: int, log: Path, *overrides: str):
        self.config, self.port, self.log, self.overrides = config, port, log, overrides
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        line = [sys.executable, "-m", "megatron_srft.cli", "serve", str(self.config), "--port", str(self.port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*line, *self.overrides], stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait(self) -> "Served":
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                Server(self.url, 5.0).check_health()
                return self
            except ServerFailed:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.5)

    def signal(self, number: int) -> None:
        """To the whole server: its API process and its engine."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.process.wait()


def write_server_run(folder: Path, ports: list[int], **settings: Any) -> Path:
    """A run of GRPO on these servers; see `vllm_runs.write_run`."""
    rollout = {
        "kind": "vllm_server",
        "servers": [f"http://127.0.0.1:{port}" for port in ports],
        "vllm": ENGINE | {"max_num_seqs": 4},
        "server_timeout": 60.0,
        "checksum_every": 1,
    } | settings.pop("rollout", {})
    return write_run(folder, rollout=rollout, **settings)


def engine_for(config: RunConfig, **rollout: Any) -> VllmServerEngine:
    return VllmServerEngine(replace(config, rollout=replace(config.rollout, **rollout)), make_tokenizer(), None)


def weights_of(config: RunConfig, factor: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    """The folder's own weights, or other ones."""
    folder = HfFolder(config.model.path)
    return [(name, folder.tensor(name) * factor) for name in folder.shapes()]


def load(path: Path) -> RunConfig:
    return configuration.load(path)


__all__ = ["TOKENS", "Served", "engine_for", "free_port", "load", "weights_of", "write_server_run"]
