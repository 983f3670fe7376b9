"""Requests over servers that can die: who gets which, and who gets those of a server that is dropped.

A prompt's requests go to one server together, so that its prefix is computed once; a server without work takes a whole
prompt from one that has more than it can begin. A request is always in one place: in a server's queue, in the hands of
one thread, or answered. When a server is dropped, what waits in its queue moves on at once, and each of its threads
hands its own request on as its call fails; so none is lost and none is answered twice.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from megatron_srft.rollout.engine import RolloutError
from megatron_srft.rollout.servers.client import START_AGAIN, Server, ServerFailed, ServerLost

log = logging.getLogger(__name__)

CHECKS_PER_TIMEOUT = 3
"""How often a busy server is asked for its health within the time after which its silence counts as death."""


class Dispatch:
    """Starts its threads at once; `wait` gives the answers."""

    def __init__(
        self,
        servers: Sequence[Server],
        ask: Callable[[Server, int], Any],
        prompts: Sequence[Hashable],
        *,
        concurrent: int,
        retries: int,
    ):
        """
        Args:
            servers: to choose from; those with `dead` set are left out.
            ask: gets the answer to request i from a server. A ServerFailed sends the request on, whatever else it
                raises ends everything.
            prompts: of each request; neighbours with equal ones stay together.
            concurrent: requests that a server has at a time.
            retries: times that one request may be sent again.
        """
        self.servers, self.ask = list(servers), ask
        self.concurrent, self.retries = concurrent, retries
        self.answers: list[Any] = [None] * len(prompts)
        self.left = len(prompts)
        self.tries = [0] * len(prompts)
        self.resent = 0
        """Requests that were sent again."""
        self.dropped: dict[str, str] = {}
        """URL and reason of each server that was dropped."""
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        self.waiting: dict[Server, deque[deque[int]]] = {s: deque() for s in self.servers if s.dead is None}
        self.running = dict.fromkeys(self.waiting, 0)
        numbers = range(len(prompts))
        for _, together in itertools.groupby(numbers, key=lambda i: prompts[i]):
            self._assign(deque(together))
        for server in list(self.waiting):
            count = min(concurrent, len(prompts))
            for work in [self._work] * count + [self._watch] * (len(prompts) > 0):
                threading.Thread(target=work, args=(server,), daemon=True).start()

    def wait(self) -> list[Any]:
        """Every request's answer, in order.

        Raises:
            RolloutError: no server is left, or a request was sent too often.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.over)
        if self.error is not None:
            for server in self.servers:
                server.cut_calls()  # the servers then end these requests
            raise self.error
        return self.answers

    @property
    def over(self) -> bool:
        return self.left == 0 or self.error is not None

    def stop(self, error: BaseException) -> None:
        """End everything with this error."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    # ------------------------------------------------------------ who gets what; under the lock

    def _load(self, server: Server) -> int:
        return self.running[server] + self._queued(server)

    def _queued(self, server: Server) -> int:
        return sum(len(group) for group in self.waiting[server])

    def _assign(self, group: deque[int]) -> None:
        """Give the requests to the server with least to do."""
        if not self.waiting:
            reasons = "; ".join(f"{s.url}: {s.dead}" for s in self.servers)
            lost = f"none of rollout.servers is left to sample completions: {reasons}"
            self.error = self.error or RolloutError(f"{lost}; {START_AGAIN}")
            return
        self.waiting[min(self.waiting, key=self._load)].append(group)

    def _next(self, server: Server) -> int | None:
        """A request for a thread of this server."""
        own = self.waiting[server]
        if not own:
            other = max(self.waiting, key=self._queued)
            if self._load(other) <= self.concurrent or not self.waiting[other]:
                return None  # it can begin all that it has
            own.append(self.waiting[other].pop())
        group = own[0]
        number = group.popleft()
        if not group:
            own.popleft()
        return number

    # ------------------------------------------------------------ threads

    def _work(self, server: Server) -> None:
        while (number := self._take(server)) is not None:
            try:
                answer = self.ask(server, number)
            except ServerFailed as failure:
                if self.over:  # what becomes of the server now is not this dispatch's concern
                    return
                self._failed(server, number, failure)
            except BaseException as error:
                self.stop(error)
            else:
                with self.changed:
                    self.answers[number] = answer
                    self.left -= 1
                    self.running[server] -= 1
                    if self.left == 0:
                        self.changed.notify_all()

    def _take(self, server: Server) -> int | None:
        """A request to ask this server, when there is one; None when its threads can end."""
        with self.changed:
            while not self.over and server in self.waiting:
                number = self._next(server)
                if number is not None:
                    self.running[server] += 1
                    return number
                self.changed.wait()
        return None

    def _failed(self, server: Server, number: int, reason: ServerFailed) -> None:
        """Send a request again: to this server too, if it says that it is well, or else to another one."""
        if isinstance(reason, ServerLost):
            self.drop(server, str(reason))
        elif server.dead is None:
            try:
                server.check_health()
            except ServerFailed:
                self.drop(server, str(reason))
        with self.changed:
            self.running[server] -= 1
            self.tries[number] += 1
            if self.tries[number] > self.retries:
                self.error = self.error or RolloutError(
                    f"a request was sent {self.tries[number]} times without an answer (rollout.retries), at last to "
                    f"{server.url}: {reason}"
                )
            else:
                self.resent += 1
                self._assign(deque([number]))
            self.changed.notify_all()

    def drop(self, server: Server, reason: str) -> None:
        """Take a server out; the others get its requests."""
        with self.changed:
            if server not in self.waiting or self.over:
                return
            groups = self.waiting.pop(server)
            self.dropped[server.url] = reason
            server.drop(reason)
            log.warning("dropped server %s: %s; its requests go to %d others", server.url, reason, len(self.waiting))
            for group in groups:
                self._assign(group)
            self.changed.notify_all()

    def _watch(self, server: Server) -> None:
        """Drop the server when it falls silent while it has requests."""
        while True:
            with self.changed:
                self.changed.wait_for(
                    lambda: self.over or server not in self.waiting, server.timeout / CHECKS_PER_TIMEOUT
                )
                if self.over or server not in self.waiting:
                    return
            try:
                server.check_health()
            except ServerFailed as failure:
                self.drop(server, str(failure))
