"""Chat completions of an OpenAI-compatible endpoint (`POST <url>/chat/completions`), with the standard library only.

Timeouts, lost connections, statuses 408, 425, 429 and 5xx, and garbled replies are tried again, after a pause that
doubles. After as many failures in a row as there are requests at a time the endpoint counts as down, and the rest of
the call is not asked. Ctrl-C does not wait for replies that are under way.
"""

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

TRY_AGAIN = {408, 425, 429}
"""Statuses below 500 that a later attempt can mend."""

MAX_REPLY_BYTES, MAX_PAUSE_SECONDS = 1 << 20, 30.0

Failure = Literal["", "timeouts", "http_errors", "not_asked"]


class EndpointError(RuntimeError):
    """An attempt that failed; `again` says whether another one may do better."""

    def __init__(self, message: str, *, again: bool = True, timeout: bool = False):
        super().__init__(message)
        self.again, self.timeout = again, timeout


@dataclass(frozen=True, kw_only=True)
class ChatReply:
    """What came of one request. Example: content="The answer is 7.", finish_reason="stop", completion_tokens=6."""

    content: Any = None
    """The message's text as the endpoint sent it ("" for null); None after a failure."""

    reasoning: str = ""
    """The chain of thought, where the endpoint hands it out apart (reasoning_content or reasoning)."""

    finish_reason: str | None = None
    completion_tokens: int | None = None
    """As the endpoint counts them; None when it does not say."""

    failure: Failure = ""
    retries: int = 0
    reason: str = ""
    """What went wrong, for a person."""


class ChatEndpoint:
    """Sends requests, `concurrency` at a time. Use: endpoint.ask(bodies) as often as wanted, endpoint.close().

    Args:
        owner: whose endpoint it is, for the message about a missing key.
        api_key_variable: environment variable with the key; "" sends none.
        timeout_seconds: deadline of one attempt, from the connection to the last byte.
        retries: further attempts; backoff_seconds: the pause before the first one.

    Raises ValueError when the key's variable is not set.
    """

    def __init__(
        self,
        owner: str,
        url: str,
        *,
        api_key_variable: str = "",
        timeout_seconds: float,
        retries: int,
        backoff_seconds: float,
        concurrency: int,
    ):
        self.url, self.timeout_seconds, self.retries = url, timeout_seconds, retries
        self.backoff_seconds, self.concurrency = backoff_seconds, concurrency
        self._headers = _headers(owner, api_key_variable)
        self._closed = threading.Event()
        self._lines: set[socket.socket] = set()
        self._failed_in_a_row = 0

    def close(self) -> None:
        """Requests that are under way are broken off."""
        self._closed.set()
        for line in list(self._lines):
            _hang_up(line)

    def ask(self, bodies: Sequence[dict[str, Any]]) -> list[ChatReply]:
        """One reply per request body, in order; never raises for what the endpoint does."""
        self._failed_in_a_row = 0
        with ThreadPoolExecutor(self.concurrency) as threads:
            try:
                return list(threads.map(self._ask, bodies))
            except KeyboardInterrupt:
                self.close()  # else the threads would be waited for, which may take timeout * attempts
                raise

    def _ask(self, body: dict[str, Any]) -> ChatReply:
        if self._closed.is_set() or self._failed_in_a_row >= self.concurrency:
            return ChatReply(failure="not_asked", reason="the endpoint is down")
        for attempt in range(self.retries + 1):
            try:
                values = self._complete(body)
            except EndpointError as error:
                last = error
            else:
                self._failed_in_a_row = 0
                return ChatReply(**values, retries=attempt)
            pause = min(self.backoff_seconds * 2**attempt, MAX_PAUSE_SECONDS)
            if not last.again or attempt == self.retries or self._closed.wait(pause):
                break
        self._failed_in_a_row += last.again
        failure = "timeouts" if last.timeout else "http_errors"
        return ChatReply(failure=failure, reason=str(last), retries=attempt)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The fields of a reply. Raises EndpointError."""
        address = self.url.rstrip("/") + "/chat/completions"
        status, data = _post(address, json.dumps(body).encode(), self._headers, self.timeout_seconds, self._lines)
        if status != 200:
            again = status in TRY_AGAIN or status >= 500
            raise EndpointError(f"HTTP status {status}: {data[:200].decode(errors='replace')}", again=again)
        try:
            tree = json.loads(data)
            choice = tree["choices"][0]
            message = choice["message"]
            content, reason = message["content"] or "", choice.get("finish_reason")
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            tokens = (tree.get("usage") or {}).get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise EndpointError(f"no chat completion: {data[:200].decode(errors='replace')}") from None
        return {
            "content": content,
            "reasoning": reasoning if isinstance(reasoning, str) else "",
            "finish_reason": reason if isinstance(reason, str) else None,
            "completion_tokens": tokens if isinstance(tokens, int) else None,
        }


def _post(
    url: str, body: bytes, headers: dict[str, str], seconds: float, lines: set[socket.socket]
) -> tuple[int, bytes]:
    """Status and body of the reply, all of it within `seconds`; its line is among `lines` while it is open.

    Raises EndpointError.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=seconds)
    late, timer, line, start = threading.Event(), None, None, time.monotonic()

    def too_late() -> None:
        late.set()
        _hang_up(line)

    try:
        connection.connect()
        line = connection.sock
        lines.add(line)
        # A socket's own timeout starts again with every byte that a slow server sends.
        timer = threading.Timer(max(seconds - (time.monotonic() - start), 0), too_late)
        timer.start()
        connection.request("POST", parts.path + ("?" + parts.query if parts.query else ""), body, headers)
        response = connection.getresponse()
        data = response.read(MAX_REPLY_BYTES)
        # read(n) hands out a body cut short without complaint; one that ends early is not a reply.
        if late.is_set() or (response.length or 0) > 0:
            raise http.client.IncompleteRead(data)
        return response.status, data
    except (OSError, http.client.HTTPException, ValueError) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise EndpointError(f"no complete reply within {seconds:g} s", timeout=True) from None
        raise EndpointError(f"{type(error).__name__}: {error}") from None
    finally:
        if timer is not None:
            timer.cancel()
        lines.discard(line)
        connection.close()


def _hang_up(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _headers(owner: str, api_key_variable: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if api_key_variable:
        key = os.environ.get(api_key_variable)
        if not key:
            raise ValueError(f"{owner}: the environment has no {api_key_variable}; set it to the key")
        headers["Authorization"] = f"Bearer {key}"
    return headers
