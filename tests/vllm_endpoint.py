"""An HTTP server on this machine that speaks the routes of a `vllm serve` (rollout/servers/routes.py) without vLLM.

It takes weights over the same wire as a real server's workers, holds them, and answers requests with tokens that depend
on prompt and seed alone. It can misbehave in every way that the tests need.
"""

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from megatron_srft.rollout.servers import wire
from megatron_srft.weights.digest import digest

END = 1
"""The token that ends an answer."""


def expected_tokens(prompt: list[int], seed: int, limit: int) -> list[int]:
    """What every endpoint answers: between 1 and 8 tokens, the last one END unless the limit comes first."""
    numbers = hashlib.blake2b(json.dumps([prompt, seed]).encode()).digest()
    return [3 + number % 40 for number in numbers[: numbers[-1] % 8]][: limit - 1] + [END]


class Endpoint(ThreadingHTTPServer):
    daemon_threads, request_queue_size, allow_reuse_address = True, 256, True

    def __init__(self, model: Path, port: int = 0, **settings: Any):
        """
        Args:
            model: folder with the config.json that it claims to run.
            settings: in place of what a server for a default config says of itself.
        """
        super().__init__(("127.0.0.1", port), Handler)
        self.settings = {
            "hf_config": json.loads((model / "config.json").read_text()),
            "dtype": "float32",
            "max_model_len": 64,
            "logprobs_mode": "raw_logprobs",
            "transfer": "srft_tcp",
            "workers": 1,
            "vllm": "0.32.0",
        } | settings
        self.key = ""
        """What it asks for on every route but /health."""
        self.version, self.weights, self.incoming = "default", {}, {}
        self.failure: str | None = None
        self.asked: Counter = Counter()
        """How often each (prompt, seed) was answered."""
        self.calls: list[str] = []
        """Paths, in order."""
        self.busy = self.most_busy = 0
        self.on_generate = self.on_update = self.on_pause = lambda endpoint: None
        """Called before an answer, in the middle of an update, and when it is paused; may misbehave."""
        self.finish_reason = "stop"
        self.corrupted: str | None = None
        """A tensor that changes on its way."""
        self.silent = threading.Event()
        """While it is set nothing is answered, as by a stopped process."""
        self.lock, self.open = threading.Lock(), set()
        self.dead = False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """As kill -9 does: nobody listens any more, and all connections end."""
        self.dead = True
        self.shutdown()
        self.server_close()
        with self.lock:
            for connection in self.open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def handle_error(self, request: Any, address: Any) -> None:
        """Connections that end early are what the tests are about."""

    # ------------------------------------------------------------ what the routes do

    def answer(self, path: str, body: dict) -> dict:
        match path:
            case "/kill":
                threading.Thread(target=self.kill).start()
            case "/pause":
                self.on_pause(self)
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/start_weight_update":
                self.incoming, self.failure = {}, None
            case "/update_weights":
                try:
                    self.take_weights(body["update_info"])
                except Exception as error:
                    self.failure = f"{type(error).__name__}: {error}"
            case "/finish_weight_update":
                self.weights, self.version = self.incoming, body["weight_version"]
            case "/reset_prefix_cache":
                return {"success": True}
            case "/collective_rpc":
                return {"results": [getattr(self, body["method"])()] * self.settings["workers"]}
            case "/inference/v1/generate":
                return self.generate(body)
        return {}

    def take_weights(self, info: dict) -> None:
        for number, (name, tensor) in enumerate(wire.receive(**info)):
            if number == 3:
                self.on_update(self)
            self.incoming[name] = tensor * 1.5 if name == self.corrupted else tensor

    def generate(self, body: dict) -> dict:
        self.on_generate(self)
        sampling, prompt = body["sampling_params"], body["token_ids"]
        tokens = expected_tokens(prompt, sampling["seed"], sampling["max_tokens"])
        with self.lock:
            self.asked[tuple(prompt), sampling["seed"]] += 1
        choice = {
            "token_ids": tokens,
            "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in tokens]},
            "finish_reason": self.finish_reason,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
        }
        if self.finish_reason == "abort":
            choice |= {"token_ids": [], "logprobs": {"content": []}, "weight_versions": None}
        return {"choices": [choice], "prompt_token_ids": prompt, "request_id": "r"}

    def srft_settings(self) -> dict:
        return self.settings

    def srft_prepare(self) -> None:
        return None

    def srft_failure(self) -> dict:
        return {"failure": self.failure}

    def srft_parts(self) -> list[dict]:
        shapes = {name: tensor.shape for name, tensor in self.weights.items()} or self.settings["shapes"]
        return [{"name": n, "place": f"layer of {n}", "part": [[None, None]] * len(s)} for n, s in shapes.items()]

    def srft_digests(self) -> list[int]:
        return [int(digest(self.weights[part["name"]])) for part in self.srft_parts()]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.open.add(self.connection)

    def do_GET(self) -> None:
        known = self.path == "/weight_info"
        if known and not self.has_key():
            return self.reply(401, b"")
        self.reply(200, json.dumps({"weight_version": self.server.version}).encode() if known else b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")
        path, server = self.path.partition("?")[0], self.server
        if not self.has_key():
            return self.reply(401, b"")
        with server.lock:
            server.calls.append(self.path)
            server.busy += path == "/inference/v1/generate"
            server.most_busy = max(server.most_busy, server.busy)
        try:
            status, data = 200, json.dumps(server.answer(path, body)).encode()
        except Exception as error:
            status, data = 500, json.dumps({"error": {"message": f"{type(error).__name__}: {error}"}}).encode()
        with server.lock:
            server.busy -= path == "/inference/v1/generate"
        self.reply(status, data)

    def has_key(self) -> bool:
        return self.server.key in ("", self.headers.get("Authorization", "").removeprefix("Bearer "))

    def reply(self, status: int, data: bytes) -> None:
        while self.server.silent.is_set():
            time.sleep(0.02)
        if self.server.dead:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
