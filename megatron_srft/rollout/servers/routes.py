"""Everything this project knows of the interfaces of a `vllm serve`: its command line, its routes, and the JSON that
they take and give. `CONTRACT` is held against the installed vLLM by tests/rollout/vllm/test_interface.py.

    GET  /health                       200 while the engine lives
    POST /inference/v1/generate        tokens in, tokens and log-probs out; behind --enable-scale-out
    POST /pause /resume                no request is scheduled in between; pausing ends those that run
    POST /update_weight_version        a name for the weights that is stamped on every answer
    GET  /weight_info                  that name
    POST /start_weight_update /update_weights /finish_weight_update
    POST /reset_prefix_cache
    POST /collective_rpc               calls a method of every worker, see worker.py

All but the first two exist only under VLLM_SERVER_DEV_MODE=1; vLLM asks for no key there, guard.py does.
"""

from typing import Any

from megatron_srft.config import SamplingConfig
from megatron_srft.rollout.vllm.interface import Answer, sampling_arguments

TCP, NCCL = "srft_tcp", "nccl"
"""Names of weight transfer engines: ours (worker.py) and vLLM's."""

EXTENSION = "megatron_srft.rollout.servers.worker.ServerWorkerExtension"
"""What a server's workers import by name; in the trainer it must not be imported."""

MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""What `vllm serve` runs. That command itself does not start with vLLM's CPU build, whose package has another name than
the one that it looks up."""

ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}
"""Without it a server has no routes for weights."""

UNSET_LOGPROB = -9999.0
"""What the server writes for a log-prob that is NaN or -inf, which JSON does not have."""

FRESH = "default"
"""The version of the weights of a server that no trainer has sent any."""

CONTRACT: dict[str, tuple[str, ...]] = {
    f"{MODULE}.main": (),
    "vllm.envs.VLLM_SERVER_DEV_MODE": (),
    "vllm.entrypoints.scale_out.token_in_token_out.protocol.GenerateRequest": (
        *("token_ids", "sampling_params", "return_token_ids", "output_mode"),
    ),
    "vllm.entrypoints.scale_out.token_in_token_out.protocol.GenerateTokensChoice": (
        *("token_ids", "logprobs", "finish_reason", "weight_versions"),
    ),
    "vllm.entrypoints.scale_out.token_in_token_out.protocol.GenerateLogProbsContent": ("token_id", "logprob"),
    "vllm.outputs.WeightVersionSpan": ("version", "start", "end"),
    "vllm.entrypoints.rl.online.api_router.pause_generation": ("mode",),
    "vllm.entrypoints.rl.online.api_router.resume_generation": (),
    "vllm.entrypoints.rl.online.api_router.update_weight_version": ("new_version",),
    "vllm.entrypoints.rl.online.api_router.weight_info": (),
    "vllm.entrypoints.rl.online.api_router.start_weight_update": (),
    "vllm.entrypoints.rl.online.api_router.update_weights": ("update_info",),
    "vllm.entrypoints.rl.online.api_router.finish_weight_update": ("weight_version",),
    "vllm.entrypoints.serve.dev.cache.api_router.reset_prefix_cache": (),
    "vllm.entrypoints.serve.dev.rpc.api_router.collective_rpc": (),
    "vllm.distributed.weight_transfer.factory.WeightTransferEngineFactory.register_engine": (),
    "vllm.distributed.weight_transfer.base.WeightTransferEngine.parse_update_info": (),
    "vllm.distributed.weight_transfer.nccl_common.trainer_init": ("init_info",),
    "vllm.distributed.weight_transfer.nccl_common.NCCLWeightTransferInitInfo": (
        *("master_address", "master_port", "rank_offset", "world_size", "packed"),
    ),
    "vllm.distributed.weight_transfer.nccl_engine.NCCLWeightTransferUpdateInfo": ("names", "dtype_names", "shapes"),
    "vllm.distributed.device_communicators.pynccl.PyNcclCommunicator.broadcast": ("tensor", "src"),
    "vllm.distributed.device_communicators.pynccl.PyNcclCommunicator.destroy": (),
    "vllm.model_executor.model_loader.reload.initialize_layerwise_reload": (),
    "vllm.model_executor.model_loader.reload.finalize_layerwise_reload": (),
    "vllm.model_executor.model_loader.reload.layerwise.get_layerwise_info": (),
    "vllm.tokenizers.cached_tokenizer_from_config": (),
}
"""As in vllm/interface.py, for servers."""


def request_body(token_ids: list[int], seed: int, sampling: SamplingConfig, end_token_ids: list[int]) -> dict[str, Any]:
    """Of one completion, for /inference/v1/generate."""
    return {
        "token_ids": token_ids,
        "return_token_ids": True,
        "sampling_params": sampling_arguments(sampling, seed, end_token_ids),
    }


def read_answer(body: dict[str, Any]) -> tuple[Answer, list[str]]:
    """An answer, and the versions of all weights that sampled one of its tokens.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    (choice,) = body["choices"]
    token_ids, content = choice["token_ids"], choice["logprobs"]["content"]
    if [entry["token_id"] for entry in content] != token_ids:
        raise ValueError("the log-probs are of other tokens than the answer's")
    logprobs = [float("nan") if entry["logprob"] <= UNSET_LOGPROB else entry["logprob"] for entry in content]
    answer = Answer(token_ids, logprobs, choice["finish_reason"], body["prompt_token_ids"], body["request_id"])
    return answer, sorted({span["version"] for span in choice["weight_versions"] or []})
