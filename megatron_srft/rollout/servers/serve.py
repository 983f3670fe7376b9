"""`megatron-srft serve`: become a `vllm serve` that a run with rollout.kind vllm_server can use."""

import json
import os
import socket
import sys
from typing import Any

import torch
from transformers import AutoConfig

from megatron_srft.config import ConfigError, RunConfig, require
from megatron_srft.rollout.servers import guard, routes
from megatron_srft.rollout.servers.client import server_key
from megatron_srft.rollout.vllm import versions
from megatron_srft.rollout.vllm.common import KEY, engine_arguments
from megatron_srft.weights.architecture import read_architecture

SERVER_GPU_SHARE = 0.9
"""Of a GPU's memory: the server has it to itself."""

QUIET = ("--disable-uvicorn-access-log",)
"""Otherwise every completion is a line."""


def command(config: RunConfig, host: str, port: int) -> list[str]:
    """The server as a command line.

    Raises:
        ConfigError: the config has no servers, vLLM does not know one of `rollout.vllm`, or the key is not there.
    """
    rollout = config.rollout
    require(rollout.kind == "vllm_server", f"megatron-srft serve needs rollout.kind vllm_server, not {rollout.kind}")
    versions.require_vllm()
    versions.check_arguments(rollout.vllm, KEY)
    folder = config.model.path
    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    arguments = engine_arguments(config, read_architecture(hf_config))
    if torch.cuda.is_available() and "gpu_memory_utilization" not in rollout.vllm:
        arguments["gpu_memory_utilization"] = SERVER_GPU_SHARE
    arguments |= {
        "load_format": "dummy",  # weights come from the trainer
        "generation_config": "vllm",
        "worker_extension_cls": routes.EXTENSION,
        "weight_transfer_config": {"backend": rollout.transfer_engine},
    }
    if environment(config).get(guard.VARIABLE):
        arguments["middleware"] = guard.MIDDLEWARE
    flags = [part for name, value in arguments.items() for part in flag(name, value)]
    return [
        sys.executable,
        "-m",
        routes.MODULE,
        "--host",
        host,
        "--port",
        str(port),
        "--enable-scale-out",
        *QUIET,
        *flags,
    ]


def flag(name: str, value: Any) -> list[str]:
    """An engine argument on vLLM's command line; null leaves it out."""
    dashed = "--" + name.replace("_", "-")
    match value:
        case None:
            return []
        case bool():
            return [dashed if value else dashed.replace("--", "--no-", 1)]
        case dict():
            return [dashed, json.dumps(value)]
        case list() | tuple():
            return [dashed, *map(str, value)]
    return [dashed, str(value)]


def environment(config: RunConfig) -> dict[str, str]:
    """What vLLM reads from its environment; what the user has set stays, but for the key and for the routes that the
    trainer needs. Raises ConfigError when the key is not there."""
    key = server_key(config.rollout)
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if not torch.cuda.is_available():
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return {**defaults, **os.environ, **({guard.VARIABLE: key} if key else {}), **routes.ENVIRONMENT}


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when nothing can listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = error.strerror.partition(" (while")[0]  # what Python adds says host and port again
        raise ConfigError(
            f"a server cannot listen on {host}:{port} ({reason}); end what listens there, or choose another "
            "--port or --host"
        ) from None


def main(config: RunConfig, host: str, port: int) -> int:
    """Turn this process into the server. Returns only by raising.

    Raises:
        ConfigError: the port is taken, or see `command`.
    """
    check_port(host, port)
    line = command(config, host, port)
    print(
        f"serving {config.model.path} at http://{host}:{port}; it has no weights until a trainer sends them", flush=True
    )
    os.execve(line[0], line, environment(config))
