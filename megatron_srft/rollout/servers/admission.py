"""Whether a server can be used for this run: asked at the start and at every sync, as it may be another one by then."""

import logging
import time

from transformers import PreTrainedTokenizerBase

from megatron_srft.config import ConfigError, RunConfig, require
from megatron_srft.rollout.servers.client import Refused, Server, ServerFailed
from megatron_srft.rollout.vllm import interface, versions
from megatron_srft.rollout.vllm.common import check_model
from megatron_srft.weights.architecture import Architecture

log = logging.getLogger(__name__)

RETURN_SECONDS = 5.0
"""In which a server that was dropped must say that it is well, when a sync asks whether it is back."""

START_POLL_SECONDS = 1.0


class Admission:
    def __init__(self, config: RunConfig, architecture: Architecture, tokenizer: PreTrainedTokenizerBase):
        self.architecture, self.tokenizer, self.stop = architecture, tokenizer, config.rollout.stop
        self.wanted = {
            "dtype": config.model.dtype,
            "logprobs_mode": interface.logprobs_mode(config.rollout),
            "transfer": config.rollout.transfer_engine,
        }
        """Settings that a server must have been started with."""

    def admit(self, server: Server) -> None:
        """Ask the server what it is, and note its size; one that still has the weights it was given last is known.

        Raises:
            ServerFailed: it cannot be asked.
            ConfigError: it cannot be used.
        """
        server.check_health(min(RETURN_SECONDS, server.timeout) if server.dead is not None else None)
        if server.version is not None and server.get("/weight_info") == {"weight_version": server.version}:
            return
        try:
            settings = server.call_workers("srft_settings")[0]
        except (Refused, ServerFailed) as error:
            keyless = isinstance(error, Refused) and error.status == 401
            hint = "" if keyless else " (has `megatron-srft serve` of this version started it?)"
            raise ConfigError(f"{error}{hint}") from None
        self._check(server, settings)
        server.workers, server.max_model_len = settings["workers"], settings["max_model_len"]

    def _check(self, server: Server, settings: dict) -> None:
        check_model(self.architecture, settings["hf_config"], "the server")
        version = settings["vllm"]
        fits = versions.SUPPORTED.contains(version, prereleases=True)
        require(fits, f"it runs vLLM {version}, and this project knows {versions.SUPPORTED}")
        for name, value in self.wanted.items():
            require(
                settings[name] == value,
                f"it was started with {name} {settings[name]}, and this run needs {value}; start it with this run's "
                "config",
            )
        if self.stop:
            self._check_tokenizer(server)

    def _check_tokenizer(self, server: Server) -> None:
        ours, theirs = self.tokenizer.get_vocab(), server.call_workers("srft_vocabulary")[0]
        differ = sorted(set(ours.items()) ^ set(theirs.items()))
        require(
            not differ,
            f"it does not have the trainer's tokenizer, which it needs for rollout.stop: {len(differ)} entries of "
            f"their vocabularies differ, {differ[:3]} for example; start it with this run's config",
        )


def wait_for(server: Server, deadline: float) -> None:
    """Raises ServerFailed when the server is not well by the deadline (of time.monotonic)."""
    told = False
    while True:
        try:
            return server.check_health()
        except ServerFailed:
            if time.monotonic() > deadline:
                raise
            if not told:
                log.warning("waiting for the server %s", server.url)
                told = True
            time.sleep(START_POLL_SECONDS)
