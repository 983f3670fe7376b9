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

from collections.abc import Iterable
from math import isfinite

import torch
from transformers import PreTrainedTokenizerBase

from megatron_srft import distributed
from megatron_srft.config import ConfigError, RunConfig, SamplingConfig, require
from megatron_srft.deadline import Deadline
from megatron_srft.hidden_reward import BaseModel, RewardHead, check_fits, head_fingerprint
from megatron_srft.rollout.engine import Request, RolloutError
from megatron_srft.rollout.vllm import interface, versions
from megatron_srft.rollout.vllm.common import (
    KEY,
    SyncError,
    check_answer,
    check_known,
    check_model,
    check_room,
    engine_arguments,
    mismatch,
    read_model,
    seed,
    to_completions,
    watch,
)
from megatron_srft.sample import Completion
from megatron_srft.weights.architecture import read_architecture
from megatron_srft.weights.digest import digest
from megatron_srft.weights.tables import hf_shapes


def check_engine(config: RunConfig, world_size: int) -> None:
    """Find the mistakes in `config.rollout.vllm` that can be found without loading a model.

    Raises:
        ConfigError: vLLM is missing, does not know an argument, or the ranks cannot be shared out.
    """
    versions.require_vllm()
    versions.check_arguments(config.rollout.vllm, KEY)
    ranks = config.rollout.engine_ranks
    require(
        world_size % ranks == 0,
        f"{KEY}.tensor_parallel_size {ranks} does not divide the {world_size} process(es) of this run; start more, or "
        "lower it",
    )


class VllmEngine:
    """Samples with vLLM. Needs `update_weights` before the first `generate`."""

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, world: distributed.Group, *, scored: bool = False
    ):
        """
        Args:
            tokenizer: decodes responses and names the end token.
            scored: start vLLM so that a reward head can be set, see `score_with`.

        Raises:
            ConfigError: vLLM refuses an argument, or reads model or tokenizer differently.
        """
        self.settings, self.tokenizer, self.world = config.rollout, tokenizer, world
        self.ranks = config.rollout.engine_ranks
        hf_config, self.end_token_ids = read_model(config.model, tokenizer)
        self.architecture = read_architecture(hf_config)
        self.shapes = hf_shapes(self.architecture)
        architecture = hf_config.architectures[0] if scored else None
        self.llm = interface.start_engine(engine_arguments(config, self.architecture), KEY, architecture)
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
        self.hidden_head: str | None = None
        try:
            check_model(self.architecture, interface.model_settings(self.llm), "vLLM")
            if config.rollout.stop:
                self._check_tokenizer()
        except ConfigError:
            self.close()
            raise

    def take_metrics(self) -> dict[str, float]:
        """See `RolloutEngine`; there is nothing to tell."""
        return {}

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
            by_name = _by_name(parts)

            def note(name: str, tensor: torch.Tensor) -> None:
                sent.update((part, digest(tensor[part.part])) for part in by_name.get(name, ()))

            tied = self.architecture.tied
            interface.load(self.llm, watch(tensors, self.shapes, tied, deadline, "loading into vLLM", note))
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
        check_known(self.shapes, (part.name for part in parts))
        return parts

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
        named = [(part.name, part.place) for part in wrong]
        problem = mismatch(named, len(parts), f"rank {distributed.rank(self.world)}") if wrong else None
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
            ConfigError: the engine was not started for a head.
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
        self.hidden_head = None if head is None else head_fingerprint(head)

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
        check_room(requests, sampling.max_response_tokens, self.max_model_len)
        prompts = [request.token_ids.tolist() for request in requests]
        ends = sorted(self.end_token_ids)
        answers = interface.generate(self.llm, prompts, [seed(request) for request in requests], sampling, ends)
        for request, answer in zip(requests, answers, strict=True):
            check_answer(request, answer)
        scores = self._scores(requests, answers)
        return to_completions(answers, scores, self.tokenizer, self.policy_version, self.hidden_head)

    def _check_tokenizer(self) -> None:
        ours, theirs = self.tokenizer.get_vocab(), interface.vocabulary(self.llm)
        differ = sorted(set(ours.items()) ^ set(theirs.items()))
        require(
            not differ,
            f"vLLM and the trainer do not have the same tokenizer: {len(differ)} entries of their vocabularies differ, "
            f"{differ[:3]} for example; model.path must hold the tokenizer's files of one model",
        )


def _by_name(parts: list[interface.Held]) -> dict[str, list[interface.Held]]:
    places: dict[str, list[interface.Held]] = {}
    for part in parts:
        places.setdefault(part.name, []).append(part)
    return places
