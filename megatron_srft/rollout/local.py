"""The embedded engine: a transformers causal language model with our own decoding loop.

    admit    put waiting requests into free rows; each distinct prompt is run once, its keys are copied to its samples
    step     one forward over the rows in use, one token each
    retire   finished rows make room: the last rows of the batch move into the gaps

The prompt's last token is not part of the prefill but the first token a row decodes, so every logit comes from the
same code. transformers' generate() would keep finished rows in the batch, repeat the prompt per sample and return no
log-probs at the sampling temperature.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from megatron_srft.config import SamplingConfig
from megatron_srft.rollout.cache import SlotCache
from megatron_srft.rollout.engine import LOWER, Request, RolloutError, check_lengths
from megatron_srft.rollout.sampling import sample, uniforms
from megatron_srft.sample import Completion

PREFILL_TOKENS = 16384
"""Padded tokens of one prefill forward."""

FIRST_SLOTS = 128
"""Response tokens the cache has room for before it grows."""


class LocalEngine:
    """Samples with a transformers model on this rank's device. Needs `update_weights` before the first `generate`."""

    ranks = 1

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_concurrent_sequences: int):
        """
        Args:
            model: built with the attention implementation SLOT_ATTENTION.
            tokenizer: decodes responses and names the end token.
            max_concurrent_sequences: rows of the batch; the key/value cache grows with it.
        """
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_concurrent_sequences = max_concurrent_sequences
        self.end_token_ids = end_token_ids(model.generation_config, tokenizer)
        self.policy_version: int | None = None

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """See `RolloutEngine`. Tensors are copied in place, one at a time; a tied output layer may be given or not."""
        self.policy_version = None
        own = self.model.state_dict(keep_vars=True)
        waiting = {tensor.data_ptr(): name for name, tensor in reversed(own.items())}
        for name, tensor in tensors:
            if name not in own:
                raise ValueError(f"weight '{name}' does not exist in the rollout model; check the export's name table")
            if own[name].shape != tensor.shape:
                expected, got = tuple(own[name].shape), tuple(tensor.shape)
                raise ValueError(f"weight '{name}' has shape {got}, the rollout model needs {expected}")
            own[name].data.copy_(tensor)
            waiting.pop(own[name].data_ptr(), None)
        if waiting:
            names = sorted(waiting.values())
            raise ValueError(f"{len(names)} weights of the rollout model did not arrive: {', '.join(names[:5])}")
        self.policy_version = policy_version

    def unlike(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """See `RolloutEngine`."""
        own = self.model.state_dict()
        return [name for name, tensor in tensors if name not in own or not torch.equal(own[name], tensor)]

    @torch.inference_mode()
    def generate(self, requests: list[Request], sampling: SamplingConfig) -> list[Completion]:
        """See `RolloutEngine`."""
        assert self.policy_version is not None, "update_weights must succeed before generate"
        positions = self.model.config.max_position_embeddings
        room, remedy = f"model's {positions} positions (max_position_embeddings)", LOWER
        check_lengths(requests, sampling.max_response_tokens, positions, room, remedy)
        decoding = Decoding(self, requests, sampling)
        decoding.run()
        check_finite([sampled.logprobs for sampled in decoding.finished], self.policy_version)
        texts = self.tokenizer.batch_decode([s.token_ids for s in decoding.finished], skip_special_tokens=True)
        return [
            Completion(
                token_ids=sampled.token_ids,
                text=text,
                rollout_logprobs=sampled.logprobs,
                finish_reason=sampled.finish_reason,
                policy_version=self.policy_version,
            )
            for sampled, text in zip(decoding.finished, texts, strict=True)
        ]

    def rest(self) -> bool:
        """Nothing: it keeps its weights."""
        return False

    def take_metrics(self) -> dict[str, float]:
        """See `RolloutEngine`; there is nothing to tell."""
        return {}

    def close(self) -> None:
        self.model = None


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """Tokens of one finished request; arrays as in `Completion`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


@dataclass(eq=False)
class Rows:
    """Host state of the rows in use; every array has one entry per row."""

    request: np.ndarray
    """Index of the request the row serves."""
    prompt_length: np.ndarray
    generated: np.ndarray
    """Response tokens so far."""
    token: np.ndarray
    """Next token to feed."""
    tokens: np.ndarray
    """[rows, max_response_tokens]"""
    logprobs: np.ndarray
    """[rows, max_response_tokens]"""
    uniforms: np.ndarray
    """[rows, max_response_tokens]"""

    @classmethod
    def empty(cls, rows: int, response: int) -> "Rows":
        numbers = {name: np.zeros(rows, np.int64) for name in ("request", "prompt_length", "generated", "token")}
        return cls(
            **numbers,
            tokens=np.zeros((rows, response), np.int32),
            logprobs=np.zeros((rows, response), np.float32),
            uniforms=np.zeros((rows, response), np.float32),
        )

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        for column in dataclasses.fields(self):
            array = self.__dict__[column.name]
            array[target] = array[source]


class Decoding:
    """One call of `generate`: rows 0 .. alive-1 are being decoded, requests from `next` on are waiting."""

    def __init__(self, engine: LocalEngine, requests: list[Request], sampling: SamplingConfig):
        self.model, self.tokenizer = engine.model, engine.tokenizer
        self.requests, self.sampling = requests, sampling
        self.capacity = min(engine.max_concurrent_sequences, len(requests))
        self.end_tokens = np.array(sorted(engine.end_token_ids), np.int64)
        self.stop_window = max((len(stop.encode()) for stop in sampling.stop), default=0) + 4
        self.rows = Rows.empty(self.capacity, sampling.max_response_tokens)
        self.cache = SlotCache(self.model.config.num_hidden_layers, self.model.device)
        prompt = max(len(request.token_ids) for request in requests)
        self.cache.reserve(prompt + min(sampling.max_response_tokens, FIRST_SLOTS), self.capacity)
        self.alive = 0
        self.next = 0
        self.finished: list[Sampled | None] = [None] * len(requests)

    def run(self) -> None:
        while True:
            waiting, free = len(self.requests) - self.next, self.capacity - self.alive
            # A prefill for every single free row would cost more than the row is worth.
            if waiting and free >= min(waiting, max(1, self.capacity // 8)):
                self.admit(min(waiting, free))
            if not self.alive:
                return
            self.step()
            self.retire()

    def admit(self, count: int) -> None:
        """Put the next `count` requests into rows alive .. alive+count-1."""
        same_prompt: dict[bytes, list[int]] = {}
        for row in range(self.alive, self.alive + count):
            request = self.requests[self.next]
            prompt = request.token_ids
            same_prompt.setdefault(prompt.tobytes(), []).append(row)
            self.rows.request[row] = self.next
            self.rows.prompt_length[row] = len(prompt)
            self.rows.generated[row] = 0
            self.rows.token[row] = prompt[-1]
            end = request.offset + self.sampling.max_response_tokens
            stream = uniforms(request.seed, request.step, request.prompt.id, request.sample, end)
            self.rows.uniforms[row] = stream[request.offset :]
            self.next += 1
        self.alive += count
        for chunk in prefill_chunks(list(same_prompt.values()), self.rows.prompt_length):
            self.prefill(chunk)

    def prefill(self, groups: list[list[int]]) -> None:
        """Run one prompt per group, without its last token, and copy its keys and values to the group's rows."""
        prompts = [self.requests[self.rows.request[group[0]]].token_ids[:-1] for group in groups]
        # Padding on the right needs no mask: causal attention never looks there, and decoding overwrites it.
        token_ids = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
        for line, prompt in zip(token_ids, prompts, strict=True):
            line[: len(prompt)] = prompt
        prefilled = DynamicCache()
        self.model.base_model(input_ids=self.to_device(token_ids), past_key_values=prefilled, use_cache=True)
        members = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self.cache.fill(self.to_device(np.concatenate(groups)), prefilled, self.to_device(members))

    def step(self) -> None:
        """Feed one token per row and sample the next."""
        rows, used = self.rows, np.arange(self.alive)
        generated = rows.generated[: self.alive]
        positions = rows.prompt_length[: self.alive] - 1 + generated
        on_device = self.to_device(positions)
        self.cache.reserve(int(positions.max()) + 1, self.capacity if self.next < len(self.requests) else self.alive)
        visible = self.cache.place(on_device, int(positions.max()))
        logits = self.model(
            input_ids=self.to_device(rows.token[: self.alive, None]),
            position_ids=on_device[:, None],
            attention_mask=visible,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        tokens, logprobs = sample(logits, self.to_device(rows.uniforms[used, generated]), self.sampling)
        rows.token[: self.alive] = tokens.cpu().numpy()
        rows.tokens[used, generated] = rows.token[: self.alive]
        rows.logprobs[used, generated] = logprobs.cpu().numpy()
        rows.generated[: self.alive] += 1

    def retire(self) -> None:
        """Take finished rows out of the batch and close the gaps."""
        stopped = np.isin(self.rows.token[: self.alive], self.end_tokens) | self.hit_stop_string()
        done = stopped | (self.rows.generated[: self.alive] == self.sampling.max_response_tokens)
        if not done.any():
            return
        for row in np.flatnonzero(done):
            length = self.rows.generated[row]
            self.finished[self.rows.request[row]] = Sampled(
                self.rows.tokens[row, :length].copy(),
                self.rows.logprobs[row, :length].copy(),
                "stop" if stopped[row] else "length",
            )
        remaining = int(self.alive - done.sum())
        source = remaining + np.flatnonzero(~done[remaining:])
        target = np.flatnonzero(done[:remaining])
        self.rows.move(source, target)
        self.cache.move(self.to_device(source), self.to_device(target))
        self.alive = remaining

    def hit_stop_string(self) -> np.ndarray:
        """[alive] bool: whether a row's text now contains a stop string.

        Only the newest tokens are decoded: a stop string of b bytes lies within b tokens unless some of them are
        empty, for which the window has a little room.
        """
        hit = np.zeros(self.alive, bool)
        if not self.sampling.stop:
            return hit
        ends = self.rows.generated[: self.alive]
        tails = [self.rows.tokens[row, max(0, end - self.stop_window) : end] for row, end in enumerate(ends)]
        for row, text in enumerate(self.tokenizer.batch_decode(tails, skip_special_tokens=True)):
            hit[row] = any(stop in text for stop in self.sampling.stop)
        return hit

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.model.device)


def prefill_chunks(groups: list[list[int]], prompt_length: np.ndarray) -> list[list[list[int]]]:
    """Groups of rows with a common prompt, cut into prefills of similar length and at most PREFILL_TOKENS tokens."""
    ordered = sorted(groups, key=lambda group: prompt_length[group[0]], reverse=True)
    chunks: list[list[list[int]]] = []
    for group in ordered:
        length = prompt_length[group[0]] - 1
        if length == 0:
            continue
        longest = prompt_length[chunks[-1][0][0]] - 1 if chunks else 0
        if not chunks or (len(chunks[-1]) + 1) * longest > PREFILL_TOKENS:
            chunks.append([])
        chunks[-1].append(group)
    return chunks


def check_finite(logprobs: list[np.ndarray], policy_version: int) -> None:
    """Raise RolloutError when a sampled token has a log-prob that is not finite."""
    bad = sum(not np.isfinite(row).all() for row in logprobs)
    if bad:
        raise RolloutError(
            f"{bad} of {len(logprobs)} completions have log-probs that are not finite, with the weights after "
            f"{policy_version} updates: the weights hold NaN or inf, or overflow. Look at loss and grad_norm in "
            "metrics.jsonl; go on from an earlier checkpoint with a lower optimizer.lr, or check the model's weights"
        )


def end_token_ids(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a response: the generation config's (one or a list) and the tokenizer's."""
    configured = generation_config.eos_token_id
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None)
