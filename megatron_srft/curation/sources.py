"""Models that answer chat messages: a Hugging Face folder in this process, or an OpenAI-compatible endpoint."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from megatron_srft.config import DataConfig, ModelConfig, SamplingConfig
from megatron_srft.data import schema
from megatron_srft.data.templates import prompt_format
from megatron_srft.rewards.endpoint import ChatEndpoint, ChatReply
from megatron_srft.rollout import Request, load_local_engine, load_tokenizer
from megatron_srft.sample import Prompt

STREAM = -2
"""Takes the place of the step in the random streams; no training step or evaluation has this number."""

LOCAL_SEQUENCES = 64
"""Sequences that the local engine decodes together."""


class CurationError(RuntimeError):
    """The tool cannot go on or has nothing to show; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One answer to sample. Example: key="train/17", sample=3 is the fourth answer to that problem."""

    key: str
    messages: list[dict[str, str]]
    sample: int = 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer. Example: text="7+15=22, so 22.", finish_reason="stop", tokens=14."""

    text: str = ""

    finish_reason: Literal["stop", "length", "other", "failed"]
    """stop: ended by itself. length: cut at the limit. other: ended for a reason of the endpoint (a content filter, a
    tool call). failed: there is no answer, and `reason` says why."""

    tokens: int | None = None
    """Length with its end token; None where an endpoint does not count."""

    failure: Literal["", "prompt", "endpoint", "not_asked"] = ""
    """Of a failed one: whether this problem or its answer is to blame, or the endpoint; not_asked: it is down."""

    reason: str = ""

    actions: tuple[str, ...] = ()
    """The steps that made it, for `data act`."""


def failed(reason: str, failure: Literal["prompt", "endpoint", "not_asked"] = "prompt") -> Sample:
    return Sample(finish_reason="failed", failure=failure, reason=reason)


class Source(Protocol):
    """Something that answers."""

    name: str
    """The model, as it is written into the rows."""

    batch: int
    """Answers worth asking for at a time."""

    def ask(self, asks: Sequence[Ask], sampling: SamplingConfig, seed: int) -> list[Sample]:
        """One answer per ask, in order; what cannot be answered is a failed sample, never an exception."""

    def close(self) -> None: ...


class LocalSource:
    """The project's own engine on a Hugging Face folder, on the first GPU of this process or on the CPU.

    The answers depend on the seed, the ask's key and its sample number, not on what else is asked. With
    data.generation_prefix an answer begins with that text.

    Raises:
        ConfigError, ValueError: the folder is no Hugging Face folder, or its tokenizer lacks what `data` asks for.
    """

    def __init__(self, folder: Path, data: DataConfig, batch: int = LOCAL_SEQUENCES):
        self.name, self.batch, self.prefix = folder.name, batch, data.generation_prefix
        model = ModelConfig(path=str(folder))
        self.tokenizer = load_tokenizer(model)
        self.format = prompt_format(data, self.tokenizer)
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
        self.engine = load_local_engine(model, self.tokenizer, device, batch)
        self.positions = self.engine.model.config.max_position_embeddings

    def ask(self, asks: Sequence[Ask], sampling: SamplingConfig, seed: int) -> list[Sample]:
        prompts = [self._prompt(ask) for ask in asks]
        room = self.positions - sampling.max_response_tokens
        fits = [0 < len(prompt.token_ids) <= room for prompt in prompts]
        requests = [
            Request(prompt=prompt, sample=ask.sample, seed=seed, step=STREAM)
            for ask, prompt, fit in zip(asks, prompts, fits, strict=True)
            if fit
        ]
        completions = iter(self.engine.generate(requests, sampling) if requests else [])
        samples = []
        for prompt, fit in zip(prompts, fits, strict=True):
            if fit:
                done = next(completions)
                text, length = self.prefix + done.text, len(done.token_ids)
                samples.append(Sample(text=text, finish_reason=done.finish_reason, tokens=length))
            else:
                samples.append(failed(self._misfit(prompt, sampling)))
        return samples

    def close(self) -> None:
        """Nothing to end."""

    def _prompt(self, ask: Ask) -> Prompt:
        text = self.format.text(ask.messages, ask.key)
        (token_ids,) = self.format.tokens([text])
        return Prompt(id=ask.key, text=text, token_ids=token_ids, answer=None, source="")

    def _misfit(self, prompt: Prompt, sampling: SamplingConfig) -> str:
        return (
            f"a prompt of {len(prompt.token_ids)} tokens and {sampling.max_response_tokens} of the answer do not fit "
            f"into the model's {self.positions} positions; lower the limit on the answer's tokens"
        )


class EndpointSource:
    """A model behind `POST <url>/chat/completions`.

    A chain of thought that the endpoint hands out apart is put before the answer as <think>...</think>. Each ask has a
    seed of its own, from `seed`, key and sample number; whether the endpoint heeds it is up to the endpoint.
    """

    def __init__(self, endpoint: ChatEndpoint, model: str, system_prompt: str | None = None):
        self.endpoint, self.name, self.system_prompt = endpoint, model, system_prompt
        self.batch = 4 * endpoint.concurrency

    def ask(self, asks: Sequence[Ask], sampling: SamplingConfig, seed: int) -> list[Sample]:
        return [_sample(reply) for reply in self.endpoint.ask([self._body(ask, sampling, seed) for ask in asks])]

    def close(self) -> None:
        self.endpoint.close()

    def _body(self, ask: Ask, sampling: SamplingConfig, seed: int) -> dict[str, Any]:
        messages = ask.messages
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return {
            "model": self.name,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_response_tokens,
            "seed": _seed(seed, ask),
        }


def _seed(seed: int, ask: Ask) -> int:
    digest = hashlib.blake2b(f"{seed}/{ask.sample}/{ask.key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def _sample(reply: ChatReply) -> Sample:
    if reply.failure:
        return failed(reply.reason, "not_asked" if reply.failure == "not_asked" else "endpoint")
    text = reply.content
    if not isinstance(text, str):
        return failed(f"the answer's content is no text but {schema.short(text)}")
    if reply.reasoning:
        text = f"<think>\n{reply.reasoning.strip()}\n</think>\n\n{text}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return failed("the answer holds half of a surrogate pair")
    reason = reply.finish_reason if reply.finish_reason in ("stop", "length") else "other"
    if not text.strip() and reason == "stop":
        return failed("the answer is empty")
    return Sample(text=text, finish_reason=reason, tokens=reply.completion_tokens)
