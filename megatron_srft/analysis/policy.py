"""One model whose weights are exchanged: what several checkpoints say of the same tokens, and what each samples.

    with reading(layout, settings) as reader:
        stats = reader.teacher_forced(source, sequences)      # per token: log p(y_t | y_<t), entropy of p(. | y_<t)

The forward pass is the trainer's own (`Trainer.measure`), under any tensor- and pipeline-parallel layout.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_srft.config import (
    AdvantageConfig,
    BatchConfig,
    LocalRolloutConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SamplingConfig,
    SftConfig,
)
from megatron_srft.distributed import ProcessGroups
from megatron_srft.rollout import RolloutEngine, build_engine, collect, load_tokenizer
from megatron_srft.sample import Group, Prompt, TrainingSequence
from megatron_srft.trainer import checkpoint, manifest, parallel
from megatron_srft.trainer.conversion import load_policy, read_hf_config
from megatron_srft.trainer.manifest import CheckpointError
from megatron_srft.trainer.step import SequenceStats
from megatron_srft.trainer.trainer import Trainer
from megatron_srft.weights.architecture import Architecture, read_architecture
from megatron_srft.weights.folder import HfFolder

STREAM = -2
"""Takes the place of the step in the random streams; no training step and no evaluation has this number."""


@dataclass(frozen=True, kw_only=True)
class PolicySource:
    """Weights on disk, and the Hugging Face folder that says what they are weights of.

    Example: path=runs/math/checkpoints/step-000100, model.path=/models/Qwen2.5-1.5B, run="math", step=100.
    """

    path: Path
    """Checkpoint or Hugging Face folder."""
    model: ModelConfig
    """`path` has config.json and the tokenizer."""
    run: str
    """Name of the run, or of the Hugging Face folder."""
    step: int
    """Training steps behind the weights; 0 for a folder outside of a run."""

    @property
    def name(self) -> str:
        return f"{self.run}, step {self.step}"


class PolicyReader:
    """Holds the weights of one source at a time. Every method is collective, and gives every rank the same.

    Args:
        settings: made by `measuring`. Log-probs are of softmax(logits / temperature); at rollout.temperature 0, which
            samples greedily, they are taken at 1.
    """

    def __init__(self, settings: RunConfig, groups: ProcessGroups):
        self.groups, self.settings = groups, settings
        self.sampling: SamplingConfig = settings.rollout
        self.trainer: Trainer | None = None
        self.engine: RolloutEngine | None = None
        self.shape: tuple[Architecture, str] | None = None
        self.loaded: Path | None = None

    def trainer_with(self, source: PolicySource) -> Trainer:
        """The trainer, holding the weights of `source` until another one is asked for.

        Raises:
            ValueError, CheckpointError: as `teacher_forced`.
        """
        if self.loaded == source.path and self.trainer is not None:
            return self.trainer
        hf_config = read_hf_config(source.model.path, source.model.trust_remote_code)
        shape = (read_architecture(hf_config), source.model.dtype)
        is_checkpoint = manifest.is_checkpoint(source.path)
        self.loaded = None
        if self.trainer is None or shape != self.shape:
            self.trainer, self.engine = None, None  # two models at a time could be too many
            self.trainer, self.shape = Trainer(self._config(source), self.groups), shape
        elif not is_checkpoint:
            load_policy(self.trainer.models, HfFolder(source.path), self.groups)
        if is_checkpoint:
            problem = manifest.verify(source.path, self.groups)
            if problem is not None:
                raise CheckpointError(f"{source.path} is damaged ({problem}); use another checkpoint")
            checkpoint.load(source.path, self.trainer.models, None, self.groups)
        self.loaded = source.path
        return self.trainer

    def teacher_forced(self, source: PolicySource, sequences: Sequence[TrainingSequence]) -> list[SequenceStats]:
        """Log-probs and entropies of the response tokens of every sequence under the weights of `source`.

        Raises:
            ValueError: the source cannot be read, or is of a family that is not supported.
            CheckpointError: the checkpoint is damaged.
        """
        if not sequences:
            return []
        return self.trainer_with(source).measure(sequences)

    def sample(self, source: PolicySource, prompts: Sequence[Prompt], n: int) -> list[Group]:
        """n completions of every prompt by the local engine with the weights of `source`."""
        trainer = self.trainer_with(source)
        if self.engine is None:
            self.engine = build_engine(self._config(source), load_tokenizer(source.model), parallel.device())
        self.engine.update_weights(trainer.hf_weights(), 0)
        nothing, seed, world = [None] * len(prompts), self.settings.seed, self.groups.world
        return collect(self.engine, list(prompts), nothing, n, self.sampling, seed, STREAM, world)

    def _config(self, source: PolicySource) -> RunConfig:
        rollout = replace(self.sampling, temperature=self.sampling.temperature or 1.0)
        return replace(self.settings, model=source.model, rollout=rollout)


def measuring(config: RunConfig, rollout: LocalRolloutConfig) -> RunConfig:
    """What of a run's settings is about reading a policy; nothing of its method, which would ask for a whole run."""
    kept = {name: getattr(config, name) for name in ("model", "data", "ops", "seed", "megatron", "rewards")}
    return RunConfig(
        **kept,
        rollout=rollout,
        batch=BatchConfig(tokens_per_microbatch=config.batch.tokens_per_microbatch),
        advantage=AdvantageConfig() if config.uses_critic else config.advantage,
        objective=SftConfig(),
    )


@contextmanager
def reading(settings: RunConfig, layout: ParallelConfig) -> Iterator[PolicyReader]:
    """A reader in this layout, with the parallel machinery running around it."""
    groups = parallel.start(layout, settings.seed)
    try:
        yield PolicyReader(replace(settings, parallel=layout), groups)
    finally:
        parallel.stop()


def common_tokenizer(sources: Sequence[PolicySource]) -> Any:
    """The Hugging Face tokenizer of all sources.

    Raises:
        ValueError: two have different ones, so that a token of one is not a token of the other.
    """
    first, *others = dict.fromkeys(source.model.path for source in sources)
    tokenizer = load_tokenizer(ModelConfig(path=first))
    for path in others:
        other = load_tokenizer(ModelConfig(path=path))
        if other.get_vocab() != tokenizer.get_vocab() or other.eos_token_id != tokenizer.eos_token_id:
            raise ValueError(
                f"{first} and {path} have different tokenizers, so their probabilities are not of the same tokens; "
                "compare policies of one tokenizer (`analyze trajectory` takes another model's texts as a reference)"
            )
    return tokenizer
