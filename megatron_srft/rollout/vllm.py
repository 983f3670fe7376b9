"""The vLLM engine: one vLLM for each `tensor_parallel_size` neighbouring ranks, in the trainer's own processes.

torchrun starts the processes, megatron cuts the world, then every rank makes its worker. An engine's ranks get the same
requests and sample the same completions; each keeps a share of them. Weights come from the trainer by the streaming
exporter, as for the local engine.

What is checked, each before the first update of the run:

    architecture    sizes, rope and windows as vLLM reads them are those of the trainer     when it starts
    tokenizer       vLLM's has the tokens of ours, where stop strings need one              when it starts
    names, shapes   every tensor arrives once, in its shape                                 every sync
    checksums       what vLLM computes with has the trainer's bits                          first and every Nth sync
    prompts         vLLM answered the tokens that it was sent                               every answer
    log-probs       parity.py                                                               parity.every
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from megatron_srft import distributed
from megatron_srft.config import ConfigError, RunConfig, SamplingConfig, require
from megatron_srft.deadline import Deadline
from megatron_srft.hidden_reward import BaseModel, RewardHead, check_fits
from megatron_srft.rollout import vllm_interface as interface
from megatron_srft.rollout.engine import Request, RolloutError
from megatron_srft.rollout.local import check_finite, end_token_ids
from megatron_srft.sample import Completion
from megatron_srft.weights.architecture import Architecture, read_architecture
from megatron_srft.weights.digest import digest
from megatron_srft.weights.tables import HEAD, hf_shapes

KEY = "rollout.vllm"
"""Where the native arguments stand in the config."""

GPU_SHARE = 0.4
"""Of a GPU's memory, for weights, keys and values of the engine; the trainer lives beside it. vLLM's own default of
0.92 is for a GPU of its own."""

HOST_CACHE_BYTES = 1 << 30
"""Keys and values on a CPU, where vLLM would otherwise take a share of the whole machine's memory."""


class SyncError(RuntimeError):
    """The engine does not hold the weights it was given; the message names rank and tensors."""


def check_engine(config: RunConfig, world_size: int) -> None:
    """Find the mistakes in `config.rollout.vllm` that can be found without loading a model.

    Raises:
        ConfigError: vLLM is missing, does not know an argument, or the ranks cannot be shared out.
    """
    interface.require_vllm()
    interface.check_arguments(config.rollout.vllm, KEY)
    ranks = config.rollout.engine_ranks
    require(
        world_size % ranks == 0,
        f"{KEY}.tensor_parallel_size {ranks} does not divide the {world_size} process(es) of this run; start more, or "
        "lower it",
    )


class VllmEngine:
    """Samples with vLLM. Needs `update_weights` before the first `generate`."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, world: distributed.Group):
        """
        Args:
            tokenizer: decodes responses and names the end token.

        Raises:
            ConfigError: vLLM refuses an argument, or reads model or tokenizer differently.
        """
        self.settings, self.tokenizer, self.world = config.rollout, tokenizer, world
        self.ranks = config.rollout.engine_ranks
        folder, trust = Path(config.model.path), config.model.trust_remote_code
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        self.architecture = read_architecture(hf_config)
        self.shapes = hf_shapes(self.architecture)
        named = (folder / "generation_config.json").is_file()
        generation = (
            GenerationConfig.from_pretrained(folder) if named else GenerationConfig.from_model_config(hf_config)
        )
        self.end_token_ids = end_token_ids(generation, tokenizer)
        self.llm = interface.start_engine(engine_arguments(config, self.architecture), KEY)
        self.max_model_len = interface.max_model_len(self.llm)
        self.policy_version: int | None = None
        self.sleeps, self.asleep = bool(config.rollout.vllm.get("enable_sleep_mode")), False
        self.syncs = 0
        self.base = BaseModel(
            name=config.model.path,
            fingerprint="",
            num_layers=self.architecture.num_layers,
            hidden_size=self.architecture.hidden_size,
            vocab_size=self.architecture.vocab_size,
            dtype=config.model.dtype,
        )
        self.reward_head: RewardHead | None = None
        try:
            self._check_model()
            if config.rollout.stop:
                self._check_tokenizer()
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        interface.stop_engine(self.llm)
        self.llm = None

    def rest(self) -> bool:
        """See `RolloutEngine`. With rollout.vllm.enable_sleep_mode weights, keys and values go; the graphs stay."""
        if self.sleeps and not self.asleep:
            interface.sleep(self.llm)
            self.asleep, self.policy_version = True, None
        return self.asleep

    # ------------------------------------------------------------ weights

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """See `RolloutEngine`. Collective over the engine's ranks; a rank that waits too long ends itself.

        Raises:
            SyncError: on every rank, when a checksum differs on any.
        """
        self.policy_version = None
        check, self.syncs = self._checksums_due(), self.syncs + 1
        remedy = "A slow machine needs a higher rollout.sync_timeout."
        work = f"weight sync of policy version {policy_version}"
        with Deadline(self.settings.sync_timeout, work, distributed.rank(self.world), remedy) as deadline:
            if self.asleep:
                deadline.at("waking vLLM for the weights")
                interface.wake(self.llm, "weights")
            parts, sent = self._parts() if check else [], {}
            interface.load(self.llm, self._watch(tensors, deadline, _by_name(parts), sent))
            if self.asleep:
                deadline.at("waking vLLM for its keys and values")
                interface.wake(self.llm, "kv_cache")
                self.asleep = False
            if check:
                self._compare(parts, sent, deadline)
        self.policy_version = policy_version

    def _checksums_due(self) -> bool:
        every = self.settings.checksum_every
        return self.syncs == 0 or (every > 0 and self.syncs % every == 0)

    def _parts(self) -> list[interface.Held]:
        """What this rank's worker holds of every tensor."""
        parts = interface.held(self.llm)
        unknown = sorted(set(self.shapes) - {part.name for part in parts})
        if unknown:
            raise SyncError(
                f"cannot check weights in vLLM: none of its layers is known to hold {', '.join(unknown[:5])}; a model "
                "of this family may need another version of vLLM"
            )
        return parts

    def _watch(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        deadline: Deadline,
        parts: dict[str, list[interface.Held]],
        sent: dict[interface.Held, torch.Tensor],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the tensors on after checking their names; `sent` gets the checksum of each of the parts."""
        missing = dict(self.shapes)
        deadline.at("gathering the trainer's shards")
        for name, tensor in tensors:
            if not (name == HEAD and self.architecture.tied):
                expected = missing.pop(name, None)
                if expected is None:
                    problem = "came twice" if name in self.shapes else "does not exist in the rollout model"
                    raise ValueError(f"weight '{name}' {problem}; check the export's name table")
                if tuple(tensor.shape) != expected:
                    raise ValueError(f"weight '{name}' has shape {tuple(tensor.shape)}, vLLM needs {expected}")
                sent |= {part: digest(tensor[part.part]) for part in parts.get(name, ())}
                deadline.at("loading into vLLM", name)
                yield name, tensor
            deadline.done += 1
            deadline.at("gathering the trainer's shards", f"after {name}")
        if missing:
            raise ValueError(f"{len(missing)} weights of the rollout model did not arrive: {', '.join([*missing][:5])}")
        deadline.at("finishing the load in vLLM")

    def unlike(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """See `RolloutEngine`."""
        parts = _by_name(self._parts())
        pairs = [(part, digest(tensor[part.part])) for name, tensor in tensors for part in parts.get(name, ())]
        return [f"{part.name} (in {part.place})" for part, given in pairs if int(given) != int(digest(part.read()))]

    def _compare(
        self, parts: list[interface.Held], sent: dict[interface.Held, torch.Tensor], deadline: Deadline
    ) -> None:
        """Hold what the engine computes with against what was sent."""
        wrong = []
        for part in parts:
            deadline.at("comparing checksums", part.name)
            if int(digest(part.read())) != int(sent[part]):
                wrong.append(part)
        deadline.at("telling the other ranks about checksums")
        problem = _mismatch(wrong, len(parts), distributed.rank(self.world)) if wrong else None
        problems = [text for text in distributed.all_gather_objects(problem, self.world) if text]
        if problems:
            raise SyncError("; ".join(problems))

    # ------------------------------------------------------------ reward head

    def score_with(self, head: RewardHead | None) -> None:
        """Give every completion the head's score from now on, whatever weights arrive; None: no more scores.

        Collective over the engine's ranks. Whether the head was trained on these weights and prompts, `check_fits`
        says.

        Raises:
            ValueError: it is for a model of other sizes, or scores a response's last token.
            ConfigError: the engine was not started so that hidden states can be read.
        """
        if head is not None:
            check_fits(head, self.base, weights=False)
            require(
                head.config.last_token == "excluded",
                f"{head.source} scores the last token of a response too (last_token {head.config.last_token}), which "
                "an engine never feeds to the model; train a head with last_token excluded, or score the responses "
                "with `megatron-srft reward score`",
            )
        interface.read_states(self.llm, head)
        self.reward_head = head

    def _scores(self, requests: list[Request], answers: list[interface.Answer]) -> list[float | None]:
        """Of each answer; None without a head, and for an answer of one token."""
        if self.reward_head is None:
            return [None] * len(answers)
        responses = {answer.request: (len(answer.prompt_token_ids), answer.token_ids[:-1]) for answer in answers}
        found = interface.take_scores(self.llm, responses)
        scores = [found[answer.request] for answer in answers]
        broken = [r for r, score in zip(requests, scores, strict=True) if score is not None and not isfinite(score)]
        if broken:
            raise RolloutError(
                f"the hidden states of {len(broken)} of {len(scores)} responses give no finite reward, the first to "
                f"prompt {broken[0].prompt.id}; the weights have overflowed, or the head's numbers are too large"
            )
        return scores

    # ------------------------------------------------------------ sampling

    def generate(self, requests: list[Request], sampling: SamplingConfig) -> list[Completion]:
        """See `RolloutEngine`. All ranks of an engine pass the same requests in the same order."""
        assert self.policy_version is not None, "update_weights must succeed before generate"
        self._check_lengths(requests, sampling.max_response_tokens)
        prompts = [request.token_ids.tolist() for request in requests]
        ends = sorted(self.end_token_ids)
        answers = interface.generate(self.llm, prompts, [seed(request) for request in requests], sampling, ends)
        for request, prompt, answer in zip(requests, prompts, answers, strict=True):
            _check_answer(request, prompt, answer)
        logprobs = [np.array(answer.logprobs, np.float32) for answer in answers]
        check_finite(logprobs, self.policy_version)
        scores = self._scores(requests, answers)
        texts = self.tokenizer.batch_decode([answer.token_ids for answer in answers], skip_special_tokens=True)
        return [
            Completion(
                token_ids=np.array(answer.token_ids, np.int32),
                text=text,
                rollout_logprobs=row,
                finish_reason=answer.finish_reason,
                policy_version=self.policy_version,
                hidden_score=score,
            )
            for answer, row, text, score in zip(answers, logprobs, texts, scores, strict=True)
        ]

    def _check_lengths(self, requests: list[Request], max_response_tokens: int) -> None:
        for request in requests:
            length = len(request.token_ids)
            if length == 0:
                raise ValueError(f"prompt {request.prompt.id} has no tokens; give it some text or a chat template")
            if length + max_response_tokens > self.max_model_len:
                raise ValueError(
                    f"prompt {request.prompt.id} has {length} tokens; with rollout.max_response_tokens "
                    f"{max_response_tokens} that exceeds the {self.max_model_len} tokens that vLLM was started for: "
                    f"raise {KEY}.max_model_len, or lower data.max_prompt_tokens or rollout.max_response_tokens"
                )

    # ------------------------------------------------------------ what vLLM makes of the folder

    def _check_model(self) -> None:
        theirs = read_architecture(interface.model_settings(self.llm))
        for field in dataclasses.fields(Architecture):
            ours, other = getattr(self.architecture, field.name), getattr(theirs, field.name)
            require(
                ours == other,
                f"vLLM and the trainer do not run the same model: {field.name} is {other} in vLLM and {ours} in the "
                f"trainer; look for {KEY}.hf_overrides, and for a changed config.json in model.path",
            )

    def _check_tokenizer(self) -> None:
        ours, theirs = self.tokenizer.get_vocab(), interface.vocabulary(self.llm)
        differ = sorted(set(ours.items()) ^ set(theirs.items()))
        require(
            not differ,
            f"vLLM and the trainer do not have the same tokenizer: {len(differ)} entries of their vocabularies differ, "
            f"{differ[:3]} for example; model.path must hold the tokenizer's files of one model",
        )


def engine_arguments(config: RunConfig, model: Architecture) -> dict[str, object]:
    """What vLLM is started with: this project's defaults, the user's arguments over them, and what is not a choice."""
    rollout = config.rollout
    longest = min(config.data.max_prompt_tokens + rollout.max_response_tokens, model.max_positions)
    defaults: dict[str, object] = {"max_model_len": longest, "enable_prefix_caching": True}
    if torch.cuda.is_available():
        defaults["gpu_memory_utilization"] = GPU_SHARE
    else:
        defaults |= {"kv_cache_memory_bytes": HOST_CACHE_BYTES, "enforce_eager": True}
    fixed = {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "skip_tokenizer_init": not rollout.stop,
        "logprobs_mode": interface.logprobs_mode(rollout),
        "seed": 0,
    }
    return {**defaults, **rollout.vllm, **fixed}


def seed(request: Request) -> int:
    """A request's own number in [0, 2**63), whichever engine serves it and in whichever batch."""
    key = f"{request.seed}/{request.step}/{request.sample}/{request.prompt.id}"
    key += f"+{request.offset}" if request.offset else ""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def _check_answer(request: Request, prompt: list[int], answer: interface.Answer) -> None:
    if answer.finish_reason not in ("stop", "length"):
        raise RolloutError(f"vLLM gave up on prompt {request.prompt.id}: its finish reason is {answer.finish_reason}")
    if answer.prompt_token_ids != prompt:
        raise RolloutError(
            f"vLLM answered other tokens than those of prompt {request.prompt.id}: it has put them through a tokenizer"
        )


def _by_name(parts: list[interface.Held]) -> dict[str, list[interface.Held]]:
    places: dict[str, list[interface.Held]] = {}
    for part in parts:
        places.setdefault(part.name, []).append(part)
    return places


def _mismatch(wrong: list[interface.Held], count: int, rank: int) -> str:
    shown = ", ".join(f"{part.name} (in {part.place})" for part in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return (
        f"rank {rank}: {len(wrong)} of {count} tensors are not in vLLM what the trainer sent: {shown}{more}. Few of "
        "them mean a tensor that was corrupted or not renewed, all of them a sync that did not arrive"
    )
