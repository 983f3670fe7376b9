"""One server's part in a weight sync, in threads of its own, so that a server that hangs or dies holds up no other."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from megatron_srft.config import ConfigError
from megatron_srft.rollout.background import Call
from megatron_srft.rollout.engine import RolloutError
from megatron_srft.rollout.servers.client import Server, ServerFailed, ServerLost
from megatron_srft.rollout.servers.nccl import NcclGroup
from megatron_srft.rollout.servers.wire import Outlet, WireError
from megatron_srft.rollout.vllm.common import mismatch

EXPECTED = (ServerFailed, RolloutError, WireError, ConfigError, OSError)
"""What ends a server's part in the sync; anything else is a bug of ours, and ends the run."""

STEP_SECONDS = 0.2
"""How soon a wait notices that the other side has given up."""


class Feed:
    """Prepares the server at once; then it takes buckets, and `join` says how it went."""

    def __init__(
        self,
        server: Server,
        admit: Callable[[Server], None],
        label: str,
        *,
        check: bool,
        patience: float,
        nccl: bool = False,
    ):
        """
        Args:
            admit: raises when the server cannot be used, or serves another model.
            label: version of the weights.
            check: get checksums of what the server holds.
            patience: seconds that the server waits for the trainer's next tensor.
            nccl: buckets are those of nccl.py.
        """
        self.server, self.admit, self.label = server, admit, label
        self.check, self.patience, self.nccl = check, patience, nccl
        self.device = torch.cuda.current_device() if nccl else None
        self.problem: str | None = None
        """Why the server does not have the weights."""
        self.bug: BaseException | None = None
        self.parts: list[list[dict[str, Any]]] = []
        """For each worker what its layers hold, when `check`; see `ServerWorkerExtension.srft_parts`."""
        self.digests: list[list[int]] = []
        """For each worker, of its parts, after the sync."""
        self.ready = threading.Event()
        """Set when the server is prepared, or has failed."""
        self.over = threading.Event()
        self.queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        threading.Thread(target=self._run, daemon=True).start()

    # ------------------------------------------------------------ the thread that has the weights

    def put(self, item: Any) -> None:
        """Hand over a bucket, or at the end the number of tensors; waits while the server has one to take.

        So there are three at a time: one that is filled, one here, and one on its way.
        """
        while not self.over.is_set():
            try:
                return self.queue.put(item, timeout=STEP_SECONDS)
            except queue.Full:
                continue

    def cancel(self, problem: str) -> None:
        """There are no more weights."""
        self.problem = self.problem or problem
        self.over.set()

    def join(self) -> None:
        """Wait for the end. Raises what is no fault of the server's."""
        self.over.wait()
        if self.bug is not None:
            raise self.bug

    # ------------------------------------------------------------ this server's thread

    def _run(self) -> None:
        try:
            self._prepare()
            self.ready.set()
            self._transfer()
            self._finish()
        except EXPECTED as error:
            self.problem = self.problem or str(error)
            self.server.close_group()
        except BaseException as error:
            self.problem, self.bug = f"{type(error).__name__}: {error}", error
        finally:
            self.over.set()
            self.ready.set()

    def _prepare(self) -> None:
        """Stop what the server does, and make its answers tell until the end that its weights are of no version."""
        self.admit(self.server)
        self.server.post("/pause?mode=abort")
        self.server.post("/update_weight_version", {"new_version": f"{self.label} (incomplete)"})
        self.server.call_workers("srft_prepare")
        if self.check:
            self.parts = self.server.call_workers("srft_parts")
        self.server.post("/start_weight_update")

    def _transfer(self) -> None:
        if self.nccl:
            self._transfer_by_nccl()
        else:
            self._transfer_by_tcp()

    def _transfer_by_nccl(self) -> None:
        torch.cuda.set_device(self.device)  # every thread begins with the first
        if self.server.dead is not None:
            self.server.close_group()
        group = self.server.group or NcclGroup(self.server)
        self.server.group = group
        while not isinstance(item := self._next(), int):
            group.send(item, self.server.timeout)

    def _transfer_by_tcp(self) -> None:
        outlet = Outlet(self.server.own_address(), self.server.workers, self.server.timeout)
        invitation = {**outlet.invitation, "timeout": self.patience}
        taken = Call(lambda: self.server.post("/update_weights", {"update_info": invitation}, 2 * self.patience))
        try:
            try:
                outlet.accept(given_up=lambda: taken.over.is_set() or self.over.is_set())
                while not isinstance(item := self._next(), int):
                    outlet.send(item)
                outlet.end(item)
            except WireError:
                if taken.over.wait(STEP_SECONDS):  # the server's own words say more
                    taken.result()
                    self._check_taken()
                raise
            if not taken.over.wait(self.server.timeout):
                raise ServerLost(f"it has not taken the weights {self.server.timeout:g} s after the last one was sent")
            taken.result()
            self._check_taken()
        finally:
            outlet.close()

    def _check_taken(self) -> None:
        """Raises ServerFailed when a worker says that it does not have the weights."""
        for number, worker in enumerate(self.server.call_workers("srft_failure")):
            if worker["failure"] is not None:
                raise ServerFailed(f"worker {number} did not get the weights: {worker['failure']}")

    def _next(self) -> Any:
        while True:
            try:
                return self.queue.get(timeout=STEP_SECONDS)
            except queue.Empty:
                if self.over.is_set():
                    raise WireError("the sync was given up") from None

    def _finish(self) -> None:
        self.server.post("/finish_weight_update", {"weight_version": self.label})
        if self.server.post("/reset_prefix_cache") != {"success": True}:
            raise ServerFailed("does not forget the keys and values of the old weights")
        if self.check:
            self.digests = self.server.call_workers("srft_digests")
        self.server.post("/resume")


Part = tuple[str, tuple[tuple[int | None, int | None], ...]]
"""A tensor's name, and (start, stop) in each of its dimensions."""


def part_key(part: dict[str, Any]) -> Part:
    return part["name"], tuple((start, stop) for start, stop in part["part"])


def slices(part: Part) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in part[1])


def compare(feed: Feed, sent: dict[Part, torch.Tensor]) -> str | None:
    """What is wrong with the server's weights; None: nothing, or it has not got them.

    Args:
        sent: checksums of the trainer's tensors.
    """
    if feed.problem is not None or not feed.check:
        return None
    wrong = [
        (part["name"], part["place"])
        for worker, digests in zip(feed.parts, feed.digests, strict=True)
        for part, found in zip(worker, digests, strict=True)
        if int(sent[part_key(part)]) != found
    ]
    return mismatch(wrong, sum(map(len, feed.parts)), feed.server.url) if wrong else None
