"""The checkpoints of a run as the loop sees them: found at the start, restored, written when they are due."""

import logging

import numpy as np

from megatron_srft.config import ConfigError, RunConfig
from megatron_srft.distributed import ProcessGroups, is_main
from megatron_srft.presence import claim_folder
from megatron_srft.trainer import checkpoint, manifest, publish
from megatron_srft.trainer.manifest import CheckpointError, Progress
from megatron_srft.trainer.trainer import Trainer

log = logging.getLogger(__name__)


class Saves:
    """The run folder is this process's own until `close`.

    Raises on construction:
        CheckpointError: the folder cannot be written, or another process trains in it.
        ConfigError: it holds checkpoints, and the config says not to go on from them.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups):
        self.run_folder, self.folder = config.folder, config.folder / "checkpoints"
        self.groups, self.keep = groups, config.checkpoint.keep
        problem = publish.attempt(self._claim, groups, main_only=True)
        if problem is not None:
            raise CheckpointError(f"checkpoints cannot be written: {problem}")
        self.found = manifest.newest_intact(self.folder, groups) if config.checkpoint.resume else None
        if not config.checkpoint.resume and manifest.checkpoints(self.folder):
            raise ConfigError(
                f"{self.folder} already holds checkpoints and checkpoint.resume is false; choose another name, or "
                "remove the folder"
            )
        self.saved_step = self.found[1].step if self.found else None

    @property
    def progress(self) -> Progress | None:
        """Where the run stood; None at its beginning."""
        return self.found[1] if self.found else None

    def restore(self, trainer: Trainer) -> dict[str, np.ndarray]:
        """Fill the trainer from the checkpoint that was found; returns the numbers that were saved beside it."""
        assert self.found is not None
        path, progress = self.found
        checkpoint.load(path, trainer.models, trainer.optimizer, self.groups, trainer.reference, trainer.critic)
        trainer.policy_version = progress.policy_version
        trainer.skipped_in_a_row = progress.skipped_in_a_row
        if is_main():
            log.warning("resumed from %s", path)
        return checkpoint.read_arrays(path)

    def write(self, trainer: Trainer, progress: Progress, arrays: dict[str, np.ndarray]) -> None:
        """Save, unless this step has been saved."""
        if self.saved_step == progress.step:
            return
        checkpoint.save(
            self.folder,
            trainer.models,
            trainer.optimizer,
            progress,
            self.groups,
            self.keep,
            arrays,
            trainer.reference,
            trainer.critic,
        )
        self.saved_step = progress.step

    def close(self) -> None:
        if is_main():
            self.lock.close()

    def _claim(self) -> None:
        self.lock = claim_folder(self.run_folder)
        publish.check_writable(self.folder)
