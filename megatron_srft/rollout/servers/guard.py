"""The key of a server, asked for on every route but the one for its health.

vLLM's own check leaves its development routes open, and those are the ones that change weights and call methods of the
workers. `megatron-srft serve` names `KeyGuard` on the server's command line (`--middleware`) when the server has a key.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

MIDDLEWARE = f"{__name__}.KeyGuard"
VARIABLE = "VLLM_API_KEY"
"""Where vLLM and this guard find the key. Not on the command line, which every user of the machine can read."""

OPEN = "/health"

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class KeyGuard:
    """ASGI middleware: answers with status 401 unless the request has `Authorization: Bearer KEY`."""

    def __init__(self, app: App):
        """Raises KeyError when the environment has no key."""
        self.app, self.expected = app, f"Bearer {os.environ[VARIABLE]}".encode()

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan" or scope["path"] == OPEN or self._has_key(scope):
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        body = json.dumps({"error": {"message": "this server asks for its key on every route"}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self.expected)
