"""What the vLLM engine in the trainer's processes and the one on servers do alike: arguments, seeds, checks."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from megatron_srft.config import ModelConfig, RunConfig, require
from megatron_srft.deadline import Deadline
from megatron_srft.rollout.engine import LOWER, Request, RolloutError, check_lengths
from megatron_srft.rollout.local import check_finite, end_token_ids
from megatron_srft.rollout.vllm import interface
from megatron_srft.sample import Completion
from megatron_srft.weights.architecture import Architecture, read_architecture
from megatron_srft.weights.tables import HEAD

KEY = "rollout.vllm"
"""Where the native arguments stand in the config."""

GPU_SHARE = 0.4
"""Of a GPU's memory, for weights, keys and values of the engine; the trainer lives beside it. vLLM's own default of
0.92 is for a GPU of its own."""

HOST_CACHE_BYTES = 1 << 30
"""Keys and values on a CPU, where vLLM would otherwise take a share of the whole machine's memory."""


class SyncError(RuntimeError):
    """The engine does not hold the weights it was given; the message says where, and which tensors."""


# ---------------------------------------------------------------- starting


def engine_arguments(config: RunConfig, model: Architecture) -> dict[str, object]:
    """What vLLM is started with: this project's defaults, the user's arguments over them, and what is not a choice."""
    rollout = config.rollout
    longest = min(config.data.max_prompt_tokens + rollout.max_response_tokens, model.max_positions)
    defaults: dict[str, object] = {"max_model_len": longest, "enable_prefix_caching": True}
    defaults |= beside_trainer()
    fixed = {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "skip_tokenizer_init": not rollout.stop,
        "logprobs_mode": interface.logprobs_mode(rollout),
        "seed": 0,
    }
    return {**defaults, **rollout.vllm, **fixed}


def beside_trainer() -> dict[str, object]:
    """Engine arguments for memory that is shared with a trainer."""
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": GPU_SHARE}
    return {"kv_cache_memory_bytes": HOST_CACHE_BYTES, "enforce_eager": True}


def read_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, frozenset[int]]:
    """The folder's transformers config, and the tokens that end a completion."""
    folder, trust = Path(config.path), config.trust_remote_code
    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    named = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if named else GenerationConfig.from_model_config(hf_config)
    return hf_config, end_token_ids(generation, tokenizer)


def check_model(ours: Architecture, settings: dict[str, Any], where: str) -> None:
    """Raises ConfigError when `settings`, vLLM's idea of config.json, is another model than ours.

    Args:
        where: whose idea, as in "vLLM".
    """
    theirs = read_architecture(settings)
    for field in dataclasses.fields(Architecture):
        own, other = getattr(ours, field.name), getattr(theirs, field.name)
        require(
            own == other,
            f"{where} and the trainer do not run the same model: {field.name} is {other} in {where} and {own} in the "
            f"trainer; look for {KEY}.hf_overrides, and for a changed config.json in model.path",
        )


# ---------------------------------------------------------------- sampling


def seed(request: Request) -> int:
    """A request's own number in [0, 2**63), whichever engine serves it and in whichever batch."""
    key = f"{request.seed}/{request.step}/{request.sample}/{request.prompt.id}"
    key += f"+{request.offset}" if request.offset else ""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def check_room(requests: Sequence[Request], max_response_tokens: int, max_model_len: int) -> None:
    """`check_lengths` for vLLM's room for prompt and response together."""
    room = f"{max_model_len} tokens that vLLM was started for"
    check_lengths(requests, max_response_tokens, max_model_len, room, f"raise {KEY}.max_model_len, or {LOWER}")


def check_answer(request: Request, answer: interface.Answer) -> None:
    """Raises RolloutError when vLLM did not answer what it was asked."""
    if answer.finish_reason not in ("stop", "length"):
        raise RolloutError(f"vLLM gave up on prompt {request.prompt.id}: its finish reason is {answer.finish_reason}")
    if answer.prompt_token_ids != request.token_ids.tolist():
        raise RolloutError(
            f"vLLM answered other tokens than those of prompt {request.prompt.id}: it has put them through a tokenizer"
        )


def to_completions(
    answers: Sequence[interface.Answer],
    scores: Sequence[float | None],
    tokenizer: PreTrainedTokenizerBase,
    policy_version: int,
    hidden_head: str | None = None,
) -> list[Completion]:
    """Raises RolloutError when log-probs are not finite.

    Args:
        hidden_head: fingerprint of the head that the scores are of.
    """
    logprobs = [np.array(answer.logprobs, np.float32) for answer in answers]
    check_finite(logprobs, policy_version)
    texts = tokenizer.batch_decode([answer.token_ids for answer in answers], skip_special_tokens=True)
    return [
        Completion(
            token_ids=np.array(answer.token_ids, np.int32),
            text=text,
            rollout_logprobs=row,
            finish_reason=answer.finish_reason,
            policy_version=policy_version,
            hidden_score=score,
            hidden_head=hidden_head,
        )
        for answer, row, text, score in zip(answers, logprobs, texts, scores, strict=True)
    ]


# ---------------------------------------------------------------- weights


def watch(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: dict[str, tuple[int, ...]],
    tied: bool,
    deadline: Deadline,
    phase: str,
    note: Callable[[str, torch.Tensor], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the tensors on after checking their names and shapes; a tied model's output layer is left out.

    Args:
        phase: what is done with a tensor that is passed on, for the deadline's message.
        note: is shown every tensor before it is passed on.

    Raises:
        ValueError: a tensor is unknown, came twice, has another shape or is missing.
    """
    missing = dict(shapes)
    deadline.at("gathering the trainer's shards")
    for name, tensor in tensors:
        if not (name == HEAD and tied):
            expected = missing.pop(name, None)
            if expected is None:
                problem = "came twice" if name in shapes else "does not exist in the rollout model"
                raise ValueError(f"weight '{name}' {problem}; check the export's name table")
            if tuple(tensor.shape) != expected:
                raise ValueError(f"weight '{name}' has shape {tuple(tensor.shape)}, vLLM needs {expected}")
            note(name, tensor)
            deadline.at(phase, name)
            yield name, tensor
        deadline.done += 1
        deadline.at("gathering the trainer's shards", f"after {name}")
    if missing:
        raise ValueError(f"{len(missing)} weights of the rollout model did not arrive: {', '.join([*missing][:5])}")
    deadline.at("finishing the load in vLLM")


def check_known(shapes: Iterable[str], held: Iterable[str]) -> None:
    """Raises SyncError when vLLM's layers hold not all of these tensors, so that they cannot be compared."""
    unknown = sorted(set(shapes) - set(held))
    if unknown:
        raise SyncError(
            f"cannot check weights in vLLM: none of its layers is known to hold {', '.join(unknown[:5])}; a model "
            "of this family may need another version of vLLM"
        )


def mismatch(wrong: Sequence[tuple[str, str]], count: int, where: str) -> str:
    """What is said of tensors that are not what they should be.

    Args:
        wrong: (tensor, layer of vLLM) of each.
        count: how many were compared.
        where: whose they are, as in "rank 0".
    """
    shown = ", ".join(f"{name} (in {place})" for name, place in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return (
        f"{where}: {len(wrong)} of {count} tensors are not in vLLM what the trainer sent: {shown}{more}. Few of "
        "them mean a tensor that was corrupted or not renewed, all of them a sync that did not arrive"
    )
