"""Servers for the tests of the engine on servers, started as a user starts them, and what is done with them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM
from vllm_runs import (
    ENGINE,
    TOKENS,
    largest_difference,
    logprobs,
    make_prompts,
    plain,
    prepare_process,
    reference_logprobs,
    requests_for,
    write_run,
)

from megatron_srft import config as configuration
from megatron_srft.config import RunConfig, SamplingConfig
from megatron_srft.rollout import load_local_engine
from megatron_srft.rollout.background import Call
from megatron_srft.rollout.servers import routes
from megatron_srft.rollout.servers.client import Server, ServerFailed
from megatron_srft.rollout.servers.engine import VllmServerEngine
from megatron_srft.rollout.servers.wire import Outlet, buckets
from megatron_srft.train import train
from megatron_srft.weights.folder import HfFolder

os.environ["KEY_OF_SERVERS"] = KEY = "a key of the tests"
"""Here, so that every process of a test has it that imports this file."""

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
            process = subprocess.Popen(
                [*line, *self.overrides], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.log.with_suffix(".group").write_text(str(process.pid))

    @property
    def group(self) -> int:
        """Number of the process group; in a file, since another process may have started the server anew."""
        return int(self.log.with_suffix(".group").read_text())

    def wait(self) -> "Served":
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                Server(self.url, 5.0).check_health()
                return self
            except ServerFailed:
                assert time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.5)

    def signal(self, number: int) -> None:
        """To the whole server: its API process and its engine."""
        os.killpg(self.group, number)

    def kill(self) -> None:
        """Whether or not it is running."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)


def write_server_run(folder: Path, ports: list[int], **settings: Any) -> Path:
    """A run of GRPO on these servers; see `vllm_runs.write_run`."""
    rollout = {
        "kind": "vllm_server",
        "servers": [f"http://127.0.0.1:{port}" for port in ports],
        "vllm": ENGINE | {"max_num_seqs": 4},
        "server_timeout": 60.0,
        "checksum_every": 1,
        "api_key_variable": "KEY_OF_SERVERS",
    } | settings.pop("rollout", {})
    return write_run(folder, rollout=rollout, **settings)


def engine_for(config: RunConfig, **rollout: Any) -> VllmServerEngine:
    return VllmServerEngine(replace(config, rollout=replace(config.rollout, **rollout)), make_tokenizer(), None)


def weights_of(config: RunConfig, factor: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    """The folder's own weights, or other ones."""
    folder = HfFolder(config.model.path)
    return [(name, folder.tensor(name) * factor) for name in folder.shapes()]


# ---------------------------------------------------------------- what the tests find out in one go


def first_answers(engine: VllmServerEngine, config: RunConfig) -> dict[str, Any]:
    """Completions beside those of transformers and the local engine."""
    requests = requests_for(make_prompts())
    reference = AutoModelForCausalLM.from_pretrained(config.model.path)
    local = load_local_engine(config.model, engine.tokenizer, torch.device("cpu"), 64)
    greedy = SamplingConfig(max_response_tokens=TOKENS, temperature=0.0)
    found = {
        "plain": engine.generate(requests, config.rollout),
        "cut": engine.generate(requests, SamplingConfig(max_response_tokens=TOKENS, top_p=0.8, top_k=30)),
        "greedy": engine.generate(requests, greedy),
    }
    differences = {
        name: largest_difference(logprobs(done), reference_logprobs(reference, requests, done, 1.0))
        for name, done in found.items()
    }
    stopping = replace(greedy, stop=("no such", found["greedy"][9].text[5:7]))
    return {
        **{name: plain(done) for name, done in found.items()},
        "differences": differences,
        "local greedy": plain(local.generate(requests, greedy)),
        "stopped": plain(engine.generate(requests, stopping)),
        "local stopped": plain(local.generate(requests, stopping)),
    }


@contextlib.contextmanager
def after_answers(engine: VllmServerEngine, served: Served, count: int, action: Callable[[], None]) -> Iterator[None]:
    """Act when this server has given its count-th answer, while it has others to give."""
    ask, left, lock = engine._ask, iter(range(count - 1)), threading.Lock()

    def asking(server: Server, *arguments: Any) -> Any:
        answer = ask(server, *arguments)
        with lock:
            if server.url == served.url and next(left, None) is None and engine.servers[0].dead is None:
                action()
        return answer

    engine._ask = asking
    try:
        yield
    finally:
        engine._ask = ask


def acting(weights: list[tuple[str, torch.Tensor]], number: int, action: Callable[[], None]) -> Iterator:
    """The weights; the action comes before one of them."""
    for i, pair in enumerate(weights):
        if i == number:
            action()
        yield pair


def half_an_update(served: Served, weights: list[tuple[str, torch.Tensor]], count: int) -> list[dict[str, str | None]]:
    """What a trainer leaves that dies when it has sent `count` tensors; returns what the workers say of it."""
    server = Server(served.url, 60.0, KEY)
    server.post("/pause?mode=abort")
    server.post("/start_weight_update")
    outlet = Outlet("127.0.0.1", 1, 60.0)
    taken = Call(lambda: server.post("/update_weights", {"update_info": outlet.invitation | {"timeout": 60.0}}))
    outlet.accept()
    for bucket in buckets(weights[:count], 1 << 20):
        outlet.send(bucket)
    outlet.close()
    taken.result()
    return server.call_workers("srft_failure")


def train_on_servers(path: Path, doomed: Served | None) -> None:
    """Train to the end. Rank 0 kills the server in the midst of step 1, and starts it anew before step 3."""
    prepare_process()
    from megatron_srft.session import Session
    from megatron_srft.trainer import parallel

    config = configuration.load(path)
    groups = parallel.start(config.parallel, config.seed)
    with Session(config, groups) as run:
        if doomed is not None and groups.world.rank() == 0:
            _disturb(run, doomed)
        train(run)
    parallel.stop()


def versions_of(served: Served, config: RunConfig) -> list[str]:
    """What a server says of its weights in an answer."""
    body = routes.request_body([5, 6, 7], 1, config.rollout, [1])
    return routes.read_answer(Server(served.url, 60.0, KEY).post("/inference/v1/generate", body))[1]


def _disturb(run: Any, doomed: Served) -> None:
    draw, generate = run.next_prompts, run.sampler.engine.generate

    def next_prompts() -> list:
        if run.step == 3:
            doomed.start()
            doomed.wait()
            doomed.log.with_suffix(".versions").write_text(" ".join(versions_of(doomed, run.config)))
        return draw()

    def generating(requests: list, sampling: Any) -> list:
        if run.step != 1:
            return generate(requests, sampling)
        with after_answers(run.sampler.engine, doomed, 1, lambda: os.killpg(doomed.group, signal.SIGKILL)):
            return generate(requests, sampling)

    run.next_prompts, run.sampler.engine.generate = next_prompts, generating
