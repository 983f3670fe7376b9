"""What runs inside the workers of a `vllm serve` that `megatron-srft serve` has started.

vLLM imports this module by its name (`--worker-extension-cls`) before it makes the workers' weight transfer engine,
which is registered below. Nothing else imports it, so it may import vllm at once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.tokenizers import cached_tokenizer_from_config

from megatron_srft.rollout.servers import wire
from megatron_srft.rollout.servers.routes import TCP
from megatron_srft.rollout.vllm.versions import installed_version
from megatron_srft.rollout.vllm.worker import WorkerExtension, _pack_again, _without_warnings
from megatron_srft.weights.digest import digest


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing: a connection lives for one update."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Where the trainer waits; see `wire.receive`."""

    host: str
    port: int
    token: str
    timeout: float


class TcpEngine(WeightTransferEngine):
    """Takes the trainer's tensors from a socket, layer by layer."""

    init_info_cls, update_info_cls = Init, Update

    def init_transfer_engine(self, init_info: Init) -> None:
        pass

    failure: str | None = None
    """Why the latest update did not arrive."""

    def start_weight_update(self) -> None:
        self.failure = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Raises nothing: when several workers raise in one call, vLLM (0.32) takes the second one's answer for that to
        the next call, and so on for ever. `srft_failure` tells.
        """
        # The base class goes on to wait for an accelerator, which a CPU build does not have.
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def receive_weights(self, update_info: Update) -> None:
        tensors = wire.receive(update_info.host, update_info.port, update_info.token, update_info.timeout)
        self.model.load_weights(tensors)

    def finish_weight_update(self) -> None:
        with _without_warnings(finalize_layerwise_reload.__module__):  # of a tied output layer
            finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _pack_again(self.model)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine(TCP, TcpEngine)


class ServerWorkerExtension(WorkerExtension):
    """Methods that the trainer calls by name over /collective_rpc. Arguments and results are what JSON can carry."""

    def srft_settings(self) -> dict[str, Any]:
        """What this worker was started as."""
        config, parallel = self.model_config, self.parallel_config
        return {
            "hf_config": config.hf_config.to_dict(),
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "logprobs_mode": config.logprobs_mode,
            "transfer": self.vllm_config.weight_transfer_config.backend,
            "workers": parallel.world_size_across_dp,
            "vllm": installed_version(),
        }

    def srft_prepare(self) -> None:
        """Before a weight update: leave the one that a trainer has begun and not finished, if there is one.

        vLLM would go on with what it holds of half-loaded layers, and take it for part of the new weights.
        """
        model = self.model_runner.get_model()
        if any(get_layerwise_info(layer).can_load() for layer in model.modules()):
            with set_current_vllm_config(self.vllm_config):
                finalize_layerwise_reload(model, self.model_config)
        self.weight_transfer_engine.reset_weight_update_target()
        self._weight_update_active = False

    def srft_failure(self) -> dict[str, str | None]:
        """Why the latest weights did not arrive, if they did not."""
        return {"failure": getattr(self.weight_transfer_engine, "failure", None)}

    def srft_parts(self) -> list[dict[str, Any]]:
        """What this worker's layers hold, see `Held`; slices as [start, stop]."""
        return [
            {"name": held.name, "place": held.place, "part": [[cut.start, cut.stop] for cut in held.part]}
            for held in self.srft_held()
        ]

    def srft_digests(self) -> list[int]:
        """Checksums of what the layers compute with, in the order of `srft_parts`."""
        return [int(digest(held.read())) for held in self.srft_held()]

    def srft_vocabulary(self) -> dict[str, int]:
        """The tokens of the tokenizer that stop strings are looked for with."""
        return cached_tokenizer_from_config(self.model_config).get_vocab()
