"""The stages of a run, and where a checkpoint stands among them."""

from dataclasses import dataclass

from megatron_srft.config import ConfigError, RunConfig
from megatron_srft.trainer.manifest import Progress


@dataclass(frozen=True, kw_only=True)
class Stage:
    number: int
    name: str
    config: RunConfig

    @property
    def samples_rollouts(self) -> bool:
        return self.config.samples_rollouts


def stages_of(config: RunConfig) -> list[Stage]:
    return [Stage(number=i, name=name, config=settings) for i, (name, settings) in enumerate(config.stage_configs())]


def stage_of(progress: Progress, stages: list[Stage]) -> Stage:
    """The stage in which a checkpoint stands.

    Raises:
        ConfigError: the stages up to there are not those that the checkpoint has been through.
    """
    stage = next((s for s in stages if s.name == progress.stage), None)
    if stage is None:
        raise ConfigError(
            f"the checkpoint of this run stands in stage {progress.stage}, and the config has "
            f"{', '.join(s.name for s in stages)}; name the stage as before, or choose another name for a new run"
        )
    done, before = progress.step - progress.stage_step, sum(s.config.steps for s in stages[: stage.number])
    if done != before:
        raise ConfigError(
            f"the checkpoint of this run has {done} steps before stage {stage.name}, and the config has {before}; keep "
            "the stages that are done as they were, or choose another name for a new run"
        )
    if progress.stage_step > stage.config.steps:
        raise ConfigError(
            f"the checkpoint of this run stands at step {progress.stage_step} of stage {stage.name}, and the config "
            f"has steps {stage.config.steps}; raise it, or choose another name for a new run"
        )
    return stage
