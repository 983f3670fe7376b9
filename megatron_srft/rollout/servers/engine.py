"""The engine on servers: any number of `vllm serve`, on other GPUs or machines, that `megatron-srft serve` has started.

Every rank sends its own share of the requests to all servers; rank i feeds the weights to servers i, i + ranks, ... A
server that dies or falls silent is dropped, its requests go to the others, and the next sync takes it back if it is
there again. When weights are given to a server, they get a version that no other run uses, and every answer names the
version that it was sampled with.

What is checked is what the docstring of vllm/engine.py lists, what admission.py asks of a server at every sync, and for
every answer that all its tokens were sampled with this step's weights of this run.
"""

import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_srft import distributed
from megatron_srft.config import ConfigError, RunConfig, SamplingConfig
from megatron_srft.deadline import Deadline
from megatron_srft.rollout.engine import Request, RolloutError
from megatron_srft.rollout.servers import routes
from megatron_srft.rollout.servers.admission import Admission, wait_for
from megatron_srft.rollout.servers.client import START_AGAIN, Refused, Server, ServerFailed, ServerLost, server_key
from megatron_srft.rollout.servers.dispatch import Dispatch
from megatron_srft.rollout.servers.feed import Feed, Part, compare, part_key, slices
from megatron_srft.rollout.servers.nccl import device_buckets
from megatron_srft.rollout.servers.wire import buckets
from megatron_srft.rollout.vllm import interface
from megatron_srft.rollout.vllm.common import (
    SyncError,
    check_answer,
    check_known,
    check_room,
    read_model,
    seed,
    to_completions,
    watch,
)
from megatron_srft.sample import Completion
from megatron_srft.weights.architecture import read_architecture
from megatron_srft.weights.digest import digest
from megatron_srft.weights.tables import hf_shapes

log = logging.getLogger(__name__)


def check_engine(config: RunConfig) -> None:
    """Raises ConfigError for a mistake in `config.rollout` that can be found without asking a server."""
    server_key(config.rollout)


@dataclass(frozen=True, eq=False)
class Launched:
    """Requests on their way."""

    requests: list[Request]
    dispatch: Dispatch


class VllmServerEngine:
    """Samples on servers. Needs `update_weights` before the first `generate`."""

    ranks = 1

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, world: distributed.Group):
        """Waits until every server is there. Collective.

        Raises:
            ConfigError: on every rank, when a server does not come, or is not what this run needs.
        """
        self.settings, self.tokenizer, self.world = config.rollout, tokenizer, world
        hf_config, self.end_token_ids = read_model(config.model, tokenizer)
        self.architecture = read_architecture(hf_config)
        self.shapes = hf_shapes(self.architecture)
        self.admission = Admission(config, self.architecture, tokenizer)
        key = server_key(self.settings)
        self.servers = [Server(url, self.settings.server_timeout, key) for url in self.settings.servers]
        self.run = distributed.broadcast_object(secrets.token_hex(8), world)
        """Tells this run's weights from those of others."""
        self.nccl = self.settings.transfer_engine == routes.NCCL
        self.policy_version: int | None = None
        self.syncs = self.resent = 0
        self.dropped: set[str] = set()
        """Since the last `take_metrics`."""
        self.counted: set[str] = set()
        """Dropped, counted, and not back yet; the same on every rank. One that has not used a server since it died
        learns of it in the next sync."""
        self.launched: Launched | None = None
        self._wait_for_servers()

    @property
    def live(self) -> list[Server]:
        return [server for server in self.servers if server.dead is None]

    def rest(self) -> bool:
        """Nothing: no memory of the trainer's machines is taken."""
        return False

    def close(self) -> None:
        """The servers go on, for whoever started them."""
        for server in self.servers:
            server.forget_connections()
            server.close_group()

    # ------------------------------------------------------------ servers

    def _own(self) -> list[Server]:
        """The servers that this rank feeds."""
        return self.servers[distributed.rank(self.world) :: distributed.size(self.world)]

    def _wait_for_servers(self) -> None:
        deadline = time.monotonic() + self.settings.start_timeout
        problems = {}
        for server in self._own():
            try:
                wait_for(server, deadline)
                self.admission.admit(server)
            except (ServerFailed, RolloutError, ConfigError) as error:
                problems[server.url] = str(error)
        facts = {s.url: (s.workers, s.max_model_len, s.dead) for s in self._own()}
        everyone = distributed.all_gather_objects((facts, problems), self.world)
        problems = {url: text for _, found in everyone for url, text in found.items()}
        if problems:
            raise ConfigError(
                "cannot start with these servers of rollout.servers: "
                + "; ".join(f"{url}: {text}" for url, text in sorted(problems.items()))
            )
        self._take_over({url: fact for found, _ in everyone for url, fact in found.items()})

    def _take_over(self, facts: dict[str, tuple[int, int, str | None]]) -> None:
        """What the rank that feeds a server knows of it."""
        for server in self.servers:
            server.workers, server.max_model_len, server.dead = facts[server.url]

    # ------------------------------------------------------------ weights

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """See `RolloutEngine`. Collective over all ranks; a rank that waits too long ends itself.

        Servers that fail are dropped, and those that were dropped are tried again.

        Raises:
            SyncError: on every rank, when a checksum differs on any server.
            RolloutError: no server has the weights.
        """
        assert self.launched is None, "completions must be gathered before the weights change"
        self.policy_version = None
        check, self.syncs = self._checksums_due(), self.syncs + 1
        label = f"{self.run}:{policy_version}"
        remedy = "A slow machine or network needs a higher rollout.sync_timeout."
        work = f"weight sync of policy version {policy_version}"
        patience = self.settings.sync_timeout
        with Deadline(patience, work, distributed.rank(self.world), remedy) as deadline:
            deadline.at("preparing servers")
            options = {"check": check, "patience": patience, "nccl": self.nccl}
            feeds = [Feed(server, self.admission.admit, label, **options) for server in self._own()]
            sent = self._send(tensors, feeds, deadline)
            deadline.at("telling the other ranks about servers")
            wrong = [text for feed in feeds if (text := compare(feed, sent))]
            facts = {f.server.url: (f.server.workers, f.server.max_model_len, f.problem) for f in feeds}
            everyone = distributed.all_gather_objects((facts, wrong), self.world)
        self._agree({url: fact for found, _ in everyone for url, fact in found.items()}, label)
        if problems := [text for _, found in everyone for text in found]:
            raise SyncError("; ".join(problems))
        self.policy_version = policy_version

    def _checksums_due(self) -> bool:
        every = self.settings.checksum_every
        return self.syncs == 0 or (every > 0 and self.syncs % every == 0)

    def _send(
        self, tensors: Iterable[tuple[str, torch.Tensor]], feeds: list[Feed], deadline: Deadline
    ) -> dict[Part, torch.Tensor]:
        """Give every feed all weights; returns checksums of the parts that their servers hold."""
        for feed in feeds:
            feed.ready.wait()
        wanted: dict[str, set[Part]] = {}
        for part in (part for feed in feeds for worker in feed.parts for part in worker):
            wanted.setdefault(part["name"], set()).add(part_key(part))
        sent: dict[Part, torch.Tensor] = {}

        def note(name: str, tensor: torch.Tensor) -> None:
            sent.update((part, digest(tensor[slices(part)])) for part in wanted.get(name, ()))

        stream = watch(tensors, self.shapes, self.architecture.tied, deadline, "handing on to servers", note)
        try:
            cut = device_buckets if self.nccl else buckets
            for bucket in cut(stream, self.settings.bucket_bytes):
                for feed in feeds:
                    feed.put(bucket)
        except BaseException as error:
            for feed in feeds:
                feed.cancel(f"the trainer could not give its weights: {error}")
            raise
        for feed in feeds:
            feed.put(len(self.shapes))
        deadline.at("waiting until servers have taken the weights")
        for feed in feeds:
            feed.join()
        if any(feed.parts for feed in feeds):
            check_known(self.shapes, wanted)
        return sent

    def _agree(self, facts: dict[str, tuple[int, int, str | None]], label: str) -> None:
        """All ranks use the servers whose feeding rank says that they have the weights."""
        before = {server.url: server.dead for server in self.servers}
        self._take_over(facts)
        for server in self.servers:
            server.version = label if server.dead is None else None
            if server.dead is not None and before[server.url] is None:
                self.dropped.add(server.url)
                if distributed.is_main(self.world):
                    log.warning("dropped server %s in the weight sync: %s", server.url, server.dead)
            if server.dead is None and before[server.url] is not None and distributed.is_main(self.world):
                log.warning("server %s is back (it was dropped: %s)", server.url, before[server.url])
        if not self.live:
            reasons = "; ".join(f"{server.url}: {server.dead}" for server in self.servers)
            raise RolloutError(f"none of rollout.servers has taken the weights: {reasons}; {START_AGAIN}")

    def unlike(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """See `RolloutEngine`; each rank answers for the servers that it feeds."""
        own = [server for server in self._own() if server.dead is None]
        parts = {server: server.call_workers("srft_parts") for server in own}
        held = {server: server.call_workers("srft_digests") for server in own}
        wanted = {part_key(part) for workers in parts.values() for worker in workers for part in worker}
        given = {part: int(digest(t[slices(part)])) for name, t in tensors for part in wanted if part[0] == name}
        return [
            f"{part['name']} (in {part['place']} of {server.url})"
            for server in own
            for worker, digests in zip(parts[server], held[server], strict=True)
            for part, found in zip(worker, digests, strict=True)
            if given[part_key(part)] != found
        ]

    # ------------------------------------------------------------ sampling

    def generate(self, requests: list[Request], sampling: SamplingConfig) -> list[Completion]:
        """See `RolloutEngine`."""
        return self.gather(self.launch(requests, sampling))

    def launch(self, requests: list[Request], sampling: SamplingConfig) -> Launched:
        """Send the requests, in threads of their own; `gather` waits for the completions."""
        assert self.policy_version is not None, "update_weights must succeed before generate"
        assert self.launched is None, "the completions before have not been gathered"
        if not self.live:
            raise RolloutError("none of rollout.servers is alive")
        check_room(requests, sampling.max_response_tokens, min(server.max_model_len for server in self.live))
        ends = sorted(self.end_token_ids)

        def ask(server: Server, number: int) -> interface.Answer:
            request = requests[number]
            body = routes.request_body(request.token_ids.tolist(), seed(request), sampling, ends)
            return self._ask(server, request, body)

        dispatch = Dispatch(
            self.servers,
            ask,
            [request.prompt.id for request in requests],
            concurrent=max(1, self.settings.max_concurrent_requests // distributed.size(self.world)),
            retries=self.settings.retries,
        )
        self.launched = Launched(requests, dispatch)
        return self.launched

    def gather(self, launched: Launched) -> list[Completion]:
        """One completion per request, in their order. Raises what `generate` raises."""
        assert launched is self.launched
        try:
            answers = launched.dispatch.wait()
        finally:
            self.launched = None
            self.resent += launched.dispatch.resent
            self.dropped |= set(launched.dispatch.dropped)
        return to_completions(answers, [None] * len(answers), self.tokenizer, self.policy_version)

    def _ask(self, server: Server, request: Request, body: dict[str, Any]) -> interface.Answer:
        """
        Raises:
            ServerFailed: another server should be asked.
            RolloutError: none should.
        """
        try:
            given = server.post("/inference/v1/generate", body, self.settings.request_timeout, repeatable=True)
        except Refused as error:
            raise RolloutError(f"{server.url}: {error}") from None
        try:
            answer, versions = routes.read_answer(given)
        except (KeyError, TypeError, ValueError) as error:
            raise ServerFailed(f"its answer cannot be read: {error!r}") from None
        if answer.finish_reason not in ("stop", "length"):
            raise ServerFailed(f"it gave up on a request (finish reason {answer.finish_reason})")
        self._check_versions(server, versions)
        check_answer(request, answer)
        return answer

    def _check_versions(self, server: Server, versions: list[str]) -> None:
        """Raises ServerLost when the server has lost its weights, RolloutError when another run has changed them."""
        if not versions:
            raise ServerLost("its answer does not say which weights it was sampled with")
        for version in versions:
            if version == routes.FRESH:
                raise ServerLost("it was started anew, and has no weights until the next sync")
            if version != server.version:
                raise RolloutError(
                    f"{server.url} answered with weights of version {version} instead of {server.version}: another "
                    "run sends its weights to this server; give every run servers of its own"
                )

    # ------------------------------------------------------------ accounting

    def take_metrics(self) -> dict[str, float]:
        """See `RolloutEngine`. Collective."""
        own = (self.resent, self.dropped, {server.url for server in self.live})
        self.resent, self.dropped = 0, set()
        everyone = distributed.all_gather_objects(own, self.world)
        dropped = set().union(*(dropped for _, dropped, _ in everyone))
        live = set.intersection(*(live for _, _, live in everyone))
        new, self.counted = dropped - self.counted, (self.counted | dropped) - live
        return {
            "count/servers": len(live),
            "count/servers_dropped": len(new),
            "count/requests_resent": sum(resent for resent, _, _ in everyone),
        }
