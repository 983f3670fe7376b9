"""The policy being trained: Megatron model, optimizer, and the few things the loop asks of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_srft.config import RunConfig
from megatron_srft.data.packing import pack, padded_length, plan_sequences
from megatron_srft.distributed import ProcessGroups, barrier, rank, size
from megatron_srft.hidden_reward import BaseModel, RewardHead, check_fits
from megatron_srft.objectives import scheduled
from megatron_srft.objectives.value import value_figures
from megatron_srft.ops import implementations
from megatron_srft.sample import PackedBatch, TrainingSequence, count
from megatron_srft.trainer.beside_reference import beside_reference
from megatron_srft.trainer.context import grain
from megatron_srft.trainer.conversion import export_policy, load_policy, read_hf_config
from megatron_srft.trainer.critic import Critic
from megatron_srft.trainer.hidden_score import describe_base, scored_statistics_pass, shared_fingerprint
from megatron_srft.trainer.model import PolicyModel, build_model
from megatron_srft.trainer.optimizer import build_optimizer, clip_and_step, learning_rate, wrap
from megatron_srft.trainer.parallel import device, seed_step
from megatron_srft.trainer.reference import Reference
from megatron_srft.trainer.step import Policy, SequenceStats, statistics_pass, train_pass
from megatron_srft.weights.folder import HfFolder, write_hf_folder


class Trainer:
    """In loop order:

    trainer = Trainer(config, groups)                 # weights from config.model.path
    trainer.begin_stage(config, steps)                # fresh optimizer, the stage's objective
    sequences = trainer.prepare(sequences)            # with what is to be measured before the step
    metrics = trainer.step(sequences, stage_step)     # one or more optimizer updates
    engine.update_weights(trainer.hf_weights(), trainer.policy_version)
    trainer.export_hf(folder)
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups):
        implementations.set_default(config.ops.implementation, device().type)
        self.groups = groups
        self.policy_version = 0
        """Optimizer updates since the run began."""
        self.source = HfFolder(config.model.path)
        hf_config = read_hf_config(config.model.path, config.model.trust_remote_code)
        chunks = build_model(hf_config, config, groups)
        load_policy(chunks, self.source, groups)
        self.policy = Policy(
            chunks=wrap(chunks, config.parallel),
            groups=groups,
            vocab_size=hf_config["vocab_size"],
            temperature=config.rollout.temperature,
            saved_logits_bytes=int(config.ops.saved_logits_gib * 2**30),
        )
        self.skipped_in_a_row = 0
        self._reward_head: RewardHead | None = None
        self.begin_stage(config, config.steps)

    def begin_stage(self, config: RunConfig, steps: int) -> None:
        """Take the stage's settings and start its optimizer from nothing."""
        self.config, self.stage_steps = config, steps
        self.policy = replace(self.policy, temperature=config.rollout.temperature)
        self.optimizer = build_optimizer(self.policy.chunks, config.optimizer, config.parallel)
        self.reference = Reference(self.models) if config.needs_reference else None
        self.critic = Critic(config, self.models, self.groups) if config.uses_critic else None

    @property
    def reward_head(self) -> RewardHead | None:
        """Scores what `measure` measures, in the same forward pass; None unless set.

        Raises, when set:
            ValueError: it is for a model of other sizes. Whether it was trained on these weights and prompts,
                `check_fits` with `base_model()` says.
        """
        return self._reward_head

    @reward_head.setter
    def reward_head(self, head: RewardHead | None) -> None:
        if head is not None:
            check_fits(head, describe_base(self.policy, str(self.source.path)), weights=False)
        self._reward_head = None if head is None else head.to(device())

    def base_model(self) -> BaseModel:
        """The policy as reward heads know it, with the fingerprint of its current weights (collective; reads all)."""
        fingerprint = shared_fingerprint(self.hf_weights(), self.groups)
        return describe_base(self.policy, str(self.source.path), fingerprint)

    def measure(self, sequences: Sequence[TrainingSequence]) -> list[SequenceStats]:
        """Log-probs and entropies of every sequence under the current weights, and with a reward head its score of
        them, on every rank.

        Raises:
            ValueError: with a reward head, hidden states that are not finite.
        """
        return self._measure(sequences, self.reward_head)

    def _measure(self, sequences: Sequence[TrainingSequence], head: RewardHead | None) -> list[SequenceStats]:
        for chunk in self.policy.chunks:
            chunk.eval()
        batches = self.microbatches(sequences)
        found = (
            statistics_pass(self.policy, batches)
            if head is None
            else scored_statistics_pass(self.policy, batches, head)
        )
        return [found[index] for index in range(len(sequences))]

    def refresh_reference(self, stage_step: int) -> None:
        """Make the current policy the reference where kl.refresh_every says so, before step `stage_step`."""
        every = self.config.kl.refresh_every
        if self.config.kl.needs_reference and every is not None and stage_step and stage_step % every == 0:
            self.reference.take()

    def prepare(
        self, sequences: Sequence[TrainingSequence], measured: Sequence[SequenceStats] | None = None
    ) -> list[TrainingSequence]:
        """The sequences with what the objective, a penalty and the advantages ask of the models before the step.

        Args:
            measured: what `measure` returned for these sequences, when it has been called already.
        """
        if measured is None and self._needs_measurement(sequences):
            measured = self.measure(sequences)
        if measured is not None:
            sequences = self._with_measurements(sequences, measured)
        if self.config.parity.old_logprobs == "engine":
            sequences = [s if s.is_demonstration else replace(s, old_logprobs=s.rollout_logprobs) for s in sequences]
        if self.config.kl.needs_reference:
            rollouts = [s for s in sequences if not s.is_demonstration]
            with self.reference.in_place():
                found = iter(self._measure(rollouts, None))
            sequences = [
                s if s.is_demonstration else replace(s, reference_logprobs=next(found).logprobs) for s in sequences
            ]
        if self.critic is not None:
            values = self.critic.values(self.microbatches(sequences))
            sequences = [replace(s, values=values[index]) for index, s in enumerate(sequences)]
        return list(sequences)

    def step(
        self,
        sequences: Sequence[TrainingSequence],
        stage_step: int,
        demonstrations: Sequence[TrainingSequence] = (),
    ) -> dict[str, float]:
        """Update the policy, and the critic where there is one, from one step's sequences.

        Args:
            sequences: all sequences of the step, prepared, the same list on every rank.
            stage_step: steps of this stage already made; sets the learning rate, and CHORD's mu.
            demonstrations: ReLIFT: of one more update, made after the others with the learning rate objective.sft_lr.

        Returns:
            Metrics of the step's updates put together (see `_over_updates`), equal on all ranks.
        """
        seed_step(self.config.seed, self.policy_version)
        of_critic = self._step_critic(sequences, stage_step) if self.critic is not None else {}
        if self.critic is not None and stage_step < self.config.critic.warmup_steps:
            return of_critic
        objective = scheduled(self.config.objective, stage_step)
        config = replace(self.config, objective=objective)
        lr = learning_rate(config.optimizer, stage_step, self.stage_steps)
        parts = self._parts(sequences, config.batch.updates_per_step)
        metrics = {**of_critic, **_over_updates([self._update(part, lr, config) for part in parts]), "lr": lr}
        if config.objective.kind == "chord":
            metrics["chord/mu"] = config.objective.mu
        if demonstrations:
            metrics = _with_supervised(metrics, self._update(demonstrations, config.objective.sft_lr, config))
        return metrics

    @property
    def models(self) -> list[PolicyModel]:
        """The model chunks without Megatron's DDP around them."""
        return [chunk.module for chunk in self.policy.chunks]

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors under Hugging Face names, one bounded bucket at a time, on every rank."""
        return export_policy([chunk.module for chunk in self.policy.chunks], self.groups)

    def export_hf(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder (collective; the world's first rank writes)."""
        write_hf_folder(folder, self.hf_weights(), self.source, write=rank(self.groups.world) == 0)
        barrier(self.groups.world)

    # ------------------------------------------------------------ one update

    def _update(self, sequences: Sequence[TrainingSequence], lr: float, config: RunConfig) -> dict[str, float]:
        policy, microbatches = self.policy, self.microbatches(sequences)
        if config.needs_reference_distribution:
            direction = config.objective.direction
            policy, microbatches = beside_reference(policy, self.reference, microbatches, direction)
        for chunk in policy.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = train_pass(policy, microbatches, count(list(sequences)), config)
        stepped, norm = clip_and_step(self.optimizer, self.config.optimizer, lr)
        self.policy_version += stepped
        self.skipped_in_a_row = 0 if stepped else self.skipped_in_a_row + 1
        return {**metrics, "grad_norm": norm, "accounting/skipped_updates": 0 if stepped else 1}

    def _step_critic(self, sequences: Sequence[TrainingSequence], stage_step: int) -> dict[str, float]:
        settings = self.config.critic
        lr = learning_rate(settings.optimizer, stage_step, self.stage_steps)
        parts = self._parts(sequences, settings.updates_per_step or self.config.batch.updates_per_step)
        updates = [self.critic.update(self.microbatches(part), count(part), lr) for part in parts]
        return {**_over_updates(updates), **value_figures(list(sequences)), "value/lr": lr}

    def microbatches(self, sequences: Sequence[TrainingSequence], *, shared: bool = True) -> list[PackedBatch]:
        """This data rank's packed share of the sequences; of all of them where they are its own (not `shared`)."""
        parallel = self.config.parallel
        lengths = [len(s.token_ids) for s in sequences]
        multiple = parallel.pipeline if parallel.virtual_pipeline else 1
        budget = self.config.batch.tokens_per_microbatch
        ranks, own = (size(self.groups.data), rank(self.groups.data)) if shared else (1, 0)
        plan = plan_sequences(sequences, budget, ranks, multiple)[own]
        unit = grain(parallel.context) * (parallel.tensor if parallel.sequence_parallel else 1)
        padded = [padded_length(sum(lengths[i] for i in indices), unit) for indices in plan]
        if parallel.pipeline > 1:
            # Stages exchange activations of a fixed shape.
            padded = [max(padded)] * len(padded)
        where = device()
        return [pack(sequences, indices, length).to(where) for indices, length in zip(plan, padded, strict=True)]

    def _parts(self, sequences: Sequence[TrainingSequence], updates: int) -> list[list[TrainingSequence]]:
        """The step's sequences cut into one share of whole groups for each update."""
        groups = max((s.group for s in sequences), default=0) + 1
        parts: list[list[TrainingSequence]] = [[] for _ in range(updates)]
        for sequence in sequences:
            parts[sequence.group * updates // groups].append(sequence)
        return parts

    # ------------------------------------------------------------ old log-probs and pooled entropy

    def _entropy_pool(self) -> str | None:
        objective = self.config.objective
        if objective.kind != "srft" or objective.entropy_level not in ("group", "batch"):
            return None
        return objective.entropy_level

    def _needs_measurement(self, sequences: Sequence[TrainingSequence]) -> bool:
        """With one update per step the current log-probs are the old ones, so the extra forward pass is saved, unless
        something else is read off it."""
        return (
            self._needs_old_logprobs(sequences)
            or self._entropy_pool() is not None
            or self.config.kl.in_reward
            or self._scores(sequences)
        )

    def _needs_old_logprobs(self, sequences: Sequence[TrainingSequence]) -> bool:
        """Whether any sequence is to get the log-probs of the policy before the step.

        With a single update, leaving them out makes the ratio exactly 1 instead of 1 up to rounding; but where rollouts
        have the engine's, the demonstrations beside them cannot go without.
        """
        of_engine = self.config.parity.old_logprobs == "engine"
        demonstrations, rollouts = ([s.is_demonstration == kind for s in sequences] for kind in (True, False))
        if of_engine and any(rollouts):
            return any(demonstrations)
        return self.config.batch.updates_per_step > 1

    def _scores(self, sequences: Sequence[TrainingSequence]) -> bool:
        """Whether a head is to score some of them here: all, or the demonstrations alone where the engine has scored
        what it sampled."""
        everything = not self.config.scored_by_engine
        return self.reward_head is not None and (everything or any(s.is_demonstration for s in sequences))

    def _with_measurements(
        self, sequences: Sequence[TrainingSequence], measured: Sequence[SequenceStats]
    ) -> list[TrainingSequence]:
        pools, needs_old = self._pooled_entropy(sequences, measured), self._needs_old_logprobs(sequences)
        return [
            replace(
                sequence,
                policy_logprobs=stats.logprobs,
                old_logprobs=stats.logprobs if needs_old else sequence.old_logprobs,
                pooled_entropy=pooled,
                hidden_score=stats.hidden_score,
            )
            for sequence, stats, pooled in zip(sequences, measured, pools, strict=True)
        ]

    def _pooled_entropy(
        self, sequences: Sequence[TrainingSequence], measured: Sequence[SequenceStats]
    ) -> list[float | None]:
        """Token-mean entropy over the sequence's own population in its group, or in the whole batch."""
        level = self._entropy_pool()
        if level is None:
            return [None] * len(sequences)
        keys = [(s.is_demonstration, s.group if level == "group" else 0) for s in sequences]
        pools: dict[tuple[bool, int], list[np.ndarray]] = {}
        for key, stats in zip(keys, measured, strict=True):
            pools.setdefault(key, []).append(stats.entropy)
        means = {key: float(np.concatenate(parts).mean()) for key, parts in pools.items()}
        return [means[key] for key in keys]


def _over_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """One value per metric from those of several updates: the sum of what is counted, the largest of maxima, else the
    mean over the updates that have it (one without demonstrations has no figures of them)."""
    values: dict[str, list[float]] = {}
    for update in updates:
        for key, value in update.items():
            values.setdefault(key, []).append(value)
    return {key: _combine(key, found) for key, found in values.items()}


def _with_supervised(step: dict[str, float], update: dict[str, float]) -> dict[str, float]:
    """A step's metrics with those of its supervised update: the demonstrations' figures as they are, its loss and
    gradient norm as relift/..., skipped updates added up."""
    return {
        **step,
        **{name: update[name] for name in ("nll/demonstrations", "entropy/demonstrations")},
        **{f"relift/{name}": update[name] for name in ("loss", "grad_norm")},
        "accounting/skipped_updates": step["accounting/skipped_updates"] + update["accounting/skipped_updates"],
    }


def _combine(key: str, values: list[float]) -> float:
    if key.startswith("accounting/"):
        return sum(values)
    return float(np.max(values) if key.endswith("/max") else np.mean(values))
