"""One `vllm serve` as a rank of the trainer sees it: HTTP to it, and whether it is alive."""

import contextlib
import http.client
import json
import os
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

from megatron_srft.config import VllmServerRolloutConfig, require
from megatron_srft.rollout.engine import RolloutError

START_AGAIN = "start the servers again, then the same command: it waits for them and goes on from its last checkpoint"
"""What to do when no server is left."""

SHOWN = 300
"""Characters of a server's own words in a message."""


class ServerFailed(RuntimeError):
    """The server did not do what it was asked; another one may. The message is the reason alone."""


class ServerLost(ServerFailed):
    """Nor will it before the next sync, even if it says that it is well."""


class Refused(RolloutError):
    """The server finds the request itself wrong (a status of 400 to 499); no other one would take it. The message is
    the reason alone."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def server_key(config: VllmServerRolloutConfig) -> str:
    """The servers' key; empty when they have none. Raises ConfigError when the environment does not hold it."""
    name = config.api_key_variable
    require(
        not name or bool(os.environ.get(name)),
        f"rollout.api_key_variable: the environment has no {name}; export the servers' key under that name",
    )
    return os.environ[name] if name else ""


class Server:
    """Calls block; any number of threads may call at a time.

    Connections are kept open between calls that may be repeated, which those that sample may: a server closes idle ones
    when it likes, and a call that finds its connection closed is made again over a new one.
    """

    def __init__(self, url: str, timeout: float, key: str = ""):
        """
        Args:
            url: http://host:port.
            timeout: seconds of silence, unless a call says otherwise.
            key: see guard.py; empty for a server without one.
        """
        self.url, self.timeout = url, timeout
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port
        self.has_key = bool(key)
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.dead: str | None = None
        """Why it is not used; None while it is."""
        self.version: str | None = None
        """Of the weights that it was given last, as its answers must name it."""
        self.workers = self.max_model_len = 0
        """As the server says, see `ServerWorkerExtension.srft_settings`."""
        self.group: Any = None
        """The NCCL group with it, where weights travel so and this rank feeds it; see nccl.py."""
        self.lock = threading.Lock()
        self.idle: list[http.client.HTTPConnection] = []
        self.busy: set[http.client.HTTPConnection] = set()
        self.cuts = 0

    # ------------------------------------------------------------ calls

    def get(self, path: str) -> Any:
        """See `post`."""
        return self._json("GET", path, None, self.timeout, repeatable=False)

    def post(self, path: str, body: Any = None, timeout: float | None = None, *, repeatable: bool = False) -> Any:
        """The answer's JSON; None when it has none.

        Raises:
            ServerLost: silence for `timeout` seconds.
            ServerFailed: no connection, or a status of 500 and above.
            Refused: a status of 400 to 499.
        """
        return self._json("POST", path, body, timeout or self.timeout, repeatable)

    def _json(self, method: str, path: str, body: Any, timeout: float, repeatable: bool) -> Any:
        status, text = self._exchange(method, path, body, timeout, repeatable)
        if status == 401:
            words = "it has another key than this one" if self.has_key else "it asks for a key"
            raise Refused(status, f"{words}; rollout.api_key_variable names the variable that holds it")
        if 400 <= status < 500:
            raise Refused(status, f"it refuses {path} with status {status}: {_shown(text)}")
        if status != 200:
            raise ServerFailed(f"{path} answers with status {status}: {_shown(text)}")
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise ServerFailed(f"{path} answers no JSON: {_shown(text)}") from None

    def call_workers(self, method: str, arguments: list[Any] | None = None) -> list[Any]:
        """What the method of `ServerWorkerExtension` returns on each worker; errors as of `post`."""
        answer = self.post("/collective_rpc", {"method": method, "args": arguments or []})
        try:
            return answer["results"]
        except (KeyError, TypeError):
            raise ServerFailed(f"/collective_rpc answers {_shown(json.dumps(answer).encode())}") from None

    def check_health(self, timeout: float | None = None) -> None:
        """Raises ServerFailed when the server does not say that it is well."""
        status, text = self._exchange("GET", "/health", None, timeout or self.timeout, repeatable=False)
        if status != 200:
            raise ServerFailed(f"/health answers with status {status}: {_shown(text)}")

    def _exchange(self, method: str, path: str, body: Any, timeout: float, repeatable: bool) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        kept = self._kept(timeout) if repeatable else None
        if kept is not None:
            cuts = self.cuts
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self._over(kept, method, path, data, timeout, repeatable)
            if self.cuts != cuts:
                raise ServerFailed(f"{path}: given up")
        fresh = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        try:
            fresh.connect()
            fresh.sock.settimeout(timeout)
            return self._over(fresh, method, path, data, timeout, repeatable)
        except TimeoutError:
            raise ServerLost(f"{path}: no connection within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailed(f"{path}: {error or type(error).__name__}") from None

    def _over(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        data: bytes | None,
        timeout: float,
        droppable: bool,
    ) -> tuple[int, bytes]:
        """Exchange over this connection, and keep it for the next call if the server does."""
        with self.lock:
            if droppable and self.dead is not None:
                raise ServerFailed(self.dead)
            self.busy.add(connection)
        try:
            connection.request(method, path, data, self.headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except TimeoutError:
            connection.close()
            raise ServerLost(f"{path}: no answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException):
            connection.close()
            raise
        finally:
            with self.lock:
                self.busy.discard(connection)
        if connection.sock is not None:  # http.client has closed it when the server asked for that
            with self.lock:
                self.idle.append(connection)
        return status, text

    def _kept(self, timeout: float) -> http.client.HTTPConnection | None:
        with self.lock:
            connection = self.idle.pop() if self.idle else None
        if connection is not None:
            connection.sock.settimeout(timeout)
        return connection

    # ------------------------------------------------------------ life and death

    def drop(self, reason: str) -> None:
        """Use it no more; see also `cut_calls`."""
        with self.lock:
            self.dead = reason
        self.cut_calls()
        self.forget_connections()

    def cut_calls(self) -> None:
        """Calls that wait for an answer fail at once, in their own threads."""
        with self.lock:
            self.cuts += 1
            for connection in self.busy:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def forget_connections(self) -> None:
        """Close those that nobody uses."""
        with self.lock:
            idle, self.idle = self.idle, []
        for connection in idle:
            connection.close()

    def close_group(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = None

    def own_address(self) -> str:
        """The address of this machine from which it reaches the server, where the server can reach it too."""
        with socket.create_connection((self.host, self.port), self.timeout) as probe:
            return probe.getsockname()[0]


def _shown(text: bytes) -> str:
    words = " ".join(text.decode(errors="replace").split())
    return words[:SHOWN] + ("..." if len(words) > SHOWN else "") or "(nothing)"
