"""Where a step's groups come from: the engine, in step with the trainer, asked at once, a step ahead or in rounds."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_srft.ahead import RolloutsAhead
from megatron_srft.config import RunConfig
from megatron_srft.data import PromptStream, choose_demonstration
from megatron_srft.distributed import Group as Ranks
from megatron_srft.distributed import is_main
from megatron_srft.metrics import Timer
from megatron_srft.parity_probe import sample_afresh
from megatron_srft.rollout import InFlight, RolloutEngine, Share, assemble, build_engine, deal
from megatron_srft.sample import Group, Prompt, TrainingSequence
from megatron_srft.trainer import parallel
from megatron_srft.trainer.trainer import Trainer

log = logging.getLogger(__name__)


class Sampler:
    """The engine of a run and what it has begun. All ranks call all of it alike."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Any,
        trainer: Trainer,
        world: Ranks,
        timer: Timer,
        equip: Callable[[RolloutEngine], None],
    ):
        """
        Args:
            tokenizer: a Hugging Face tokenizer.
            equip: called with the engine before it samples, when it holds the current weights.

        Raises:
            ConfigError: the engine cannot be started as the config says.
        """
        self.config, self.tokenizer, self.trainer, self.world, self.timer = config, tokenizer, trainer, world, timer
        self.equip = equip
        self.ahead, self.in_flight = RolloutsAhead(world), self._nothing_in_flight()
        self.engine = self.build_engine()
        self.synced_version: int | None = None
        """Of the weights that the engine holds."""
        self.staleness = 0
        """Updates between the oldest weights that sampled the step's completions and the current ones."""

    def begin_stage(self, config: RunConfig) -> None:
        """Drop what is in flight, and start another engine if the stage has one."""
        before, self.config = self.config, config
        if is_main() and self.in_flight.flights:
            log.warning("%d prompts in flight at the end of the stage are dropped", len(self.in_flight.flights))
        self.in_flight = self._nothing_in_flight()
        if (config.rollout, config.scored_by_engine) != (before.rollout, before.scored_by_engine):
            self.engine.close()  # two engines at a time could be too many
            self.engine, self.synced_version = self.build_engine(), None

    def close(self) -> None:
        self.engine.close()

    # ------------------------------------------------------------ weights

    def sync(self) -> None:
        """Give the engine the current weights, if it does not hold them."""
        self.ahead.settle()
        if self.synced_version != self.trainer.policy_version:
            with self.timer("sync"):
                self.engine.update_weights(self.trainer.hf_weights(), self.trainer.policy_version)
            self.synced_version = self.trainer.policy_version
        self.equip(self.engine)

    def rest(self) -> None:
        """The step has its completions: the engine gives back what memory it can."""
        if not self.config.steps_ahead and self.engine.rest():
            self.synced_version = None

    # ------------------------------------------------------------ groups

    def prompts(self, stream: PromptStream, batch: int) -> list[Prompt]:
        """The prompts that a step takes up: batch number `batch` of the stream, or as many in flight beyond it."""
        count, partial = self.config.batch.prompts_per_step, self.config.partial
        if partial is None:
            return stream.batch(batch, count)
        # The extra ones are taken up in a stage's first step, and from then on there are always as many.
        begin = batch * count + (partial.extra_prompts if self.in_flight.flights else 0)
        return stream.stretch(begin, (batch + 1) * count + partial.extra_prompts - begin)

    def sample(
        self, prompts: list[Prompt], step: int, sampled: Sequence[Prompt] = (), upcoming: list[Prompt] | None = None
    ) -> list[Group]:
        """The step's groups, not scored: of these prompts, or with partial rollouts of those that are finished.

        Args:
            sampled: prompts of the step's earlier draws; one that comes again gets other completions.
            upcoming: prompts of the next step, to be sampled in the background from now on.
        """
        with self.timer("generate"):
            groups = self.ahead.take(prompts)
        self.sync()
        if groups is None:
            with self.timer("generate"):
                groups = self._sample(prompts, step, sampled)
        if upcoming is not None:
            self.ahead.launch(self.engine, self._share(upcoming, step + 1), self.config.rollout)
        self.staleness = max(self.trainer.policy_version - c.policy_version for g in groups for c in g.completions)
        return groups

    def afresh(self, prompts: Sequence[Prompt]) -> list[TrainingSequence]:
        """A few completions of the current weights, to be compared and no more."""
        self.ahead.settle()
        return sample_afresh(self.engine, prompts, self.config.rollout, self.config.seed, self.world)

    def metrics(self) -> dict[str, float]:
        """Of the latest step, once."""
        return self.ahead.metrics() | self.in_flight.metrics() | self.engine.take_metrics()

    def _sample(self, prompts: list[Prompt], step: int, sampled: Sequence[Prompt]) -> list[Group]:
        config, share = self.config, self._share(prompts, step, sampled)
        if config.partial is None:
            completions = self.engine.generate(share.requests, config.rollout) if share.requests else []
            return assemble(share, completions, self.world)
        self.in_flight.begin(prompts, share.demonstrations, config.batch.rollouts_per_prompt, step)
        wanted = config.batch.prompts_per_step
        return self.in_flight.advance(self.engine, config.rollout, config.seed, step, wanted)

    def _share(self, prompts: list[Prompt], step: int, sampled: Sequence[Prompt] = ()) -> Share:
        """This rank's part of sampling for these prompts, each with its demonstration of the step."""
        config, shown = self.config, self.config.uses_demonstrations
        demonstrations = [choose_demonstration(p, config.seed, step) if shown else None for p in prompts]
        n = config.batch.rollouts_per_prompt
        return deal(self.engine, prompts, demonstrations, n, config.seed, step, self.world, sampled=sampled)

    # ------------------------------------------------------------ checkpoints

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint has to hold; waits for what is being sampled ahead."""
        return self.ahead.arrays() | self.in_flight.arrays()

    def restore(self, arrays: dict[str, np.ndarray], source: Path) -> None:
        """Take what `arrays` gave. Raises ValueError when it is damaged."""
        self.ahead.restore(arrays, source)
        self.in_flight.restore(arrays, source)

    # ------------------------------------------------------------ parts

    def build_engine(self) -> RolloutEngine:
        scored = self.config.scored_by_engine
        return build_engine(self.config, self.tokenizer, parallel.device(), self.world, scored=scored)

    def _nothing_in_flight(self) -> InFlight:
        def decode(token_ids: np.ndarray) -> str:
            return self.tokenizer.decode(token_ids, skip_special_tokens=True)

        return InFlight(self.config.partial, decode, self.world)
