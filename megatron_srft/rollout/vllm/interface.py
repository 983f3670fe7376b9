"""Everything this project knows of vLLM's interfaces from outside: versions, starting, sampling, calls of its workers.
What it knows of servers stands in servers/routes.py, of a worker's insides in worker.py and servers/worker.py.
vllm is imported only inside functions, but for the last, which vLLM itself imports.

For which versions stands in versions.py.

Two things vLLM's own documentation does not say:

- `logprobs_mode` decides for the whole engine: raw log-probs are those before the temperature, processed ones those
  after temperature, top-k and top-p. See `logprobs_mode`.
- An engine under an external launcher (torchrun) has one scheduler per rank; they agree because all get the same
  requests in the same order.
"""

import contextlib
import gc
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_srft.config import ConfigError, SamplingConfig
from megatron_srft.hidden_reward import RewardHead
from megatron_srft.rollout.vllm import model as own_model
from megatron_srft.rollout.vllm.versions import set_environment
from megatron_srft.rollout.vllm.worker import WORKER_EXTENSION, Held

TOKEN_CLASSIFY = "token_classify"
"""vLLM's name of the task."""

# ---------------------------------------------------------------- starting an engine


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
        own = {"architectures": [own_model.register(scored)]}
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
