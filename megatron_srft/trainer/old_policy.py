"""The old policy of PSFT, of SFT-KL's k3, and of DPO: log-probs of all demonstrations that come until its next refresh.

Updates between two refreshes are a window. What each of them will see is a function of (seed, step), so one statistics
pass over the rest of the window, made at the refresh, replaces a second copy of the weights. Log-probs are kept under a
digest of the tokens that they belong to: no layout, order or epoch changes what is found, a demonstration that comes
again is measured once, and data that have changed under a resumed run are noticed. A checkpoint inside a window holds
them, since the weights they came from are gone by then.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_srft.config import ConfigError, DpoConfig, ObjectiveConfig, PsftConfig, RunConfig, SftKlConfig
from megatron_srft.sample import TrainingSequence
from megatron_srft.trainer.step import SequenceStats

log = logging.getLogger(__name__)

DIGEST_BYTES = 16

PATIENCE = 10
"""After so many windows without one clipped token a run is told."""


class OldPolicy:
    """Over the steps (each of one update) of one stage. Other objectives have none, and all of this is idle."""

    def __init__(self, config: RunConfig):
        self.objective, self.steps = config.objective, config.steps
        self.refresh_every, self.warmup_steps = _schedule(config.objective)
        self.logprobs: dict[bytes, np.ndarray] = {}
        """Digest of a sequence -> [response] float32."""
        self.clipped, self.windows_begun, self.told = 0.0, 0, False

    def window(self, stage_step: int) -> range | None:
        """The steps that share an old policy with this one; None where the old policy is the current one."""
        if stage_step < self.warmup_steps or self.refresh_every == 1:
            return None
        size = self.refresh_every or max(self.steps, stage_step + 1)
        start = stage_step - (stage_step - self.warmup_steps) % size
        # Not cut at the stage's end: a run can be resumed with more steps.
        return range(start, start + size if self.refresh_every else self.steps)

    def attach(
        self,
        sequences: list[TrainingSequence],
        stage_step: int,
        measure: Callable[[Sequence[TrainingSequence]], Sequence[SequenceStats]],
        upcoming: Callable[[int], Sequence[TrainingSequence]],
    ) -> list[TrainingSequence]:
        """The sequences of a step with their old log-probs; without, where the ratio is 1 because nothing has changed.

        Args:
            measure: gives statistics under the current weights.
            upcoming: gives the sequences of a step of the stage.

        Raises:
            ConfigError: a demonstration was not among those that were announced at the refresh.
        """
        window = self.window(stage_step)
        if window is None:
            return sequences
        if stage_step > window.start:
            return [replace(sequence, old_logprobs=self._find(sequence)) for sequence in sequences]
        self.logprobs, self.windows_begun = {}, self.windows_begun + 1
        for later in window[1:]:
            unknown = {key: s for s in upcoming(later) if (key := digest(s)) not in self.logprobs}
            if unknown:
                found = measure(list(unknown.values()))
                self.logprobs |= {key: stats.logprobs for key, stats in zip(unknown, found, strict=True)}
        return sequences

    def _find(self, sequence: TrainingSequence) -> np.ndarray:
        found = self.logprobs.get(digest(sequence))
        if found is None:
            raise ConfigError(
                "the checkpoint stands between two refreshes of the old policy, and it has no old log-probs of a "
                "demonstration that comes next; go on with the objective, data, batch and seed that it was made with "
                "(and the steps, where there is no refresh), or choose another name for a new run"
            )
        return found

    # ------------------------------------------------------------ checkpoints

    def arrays(self, stage_step: int) -> dict[str, np.ndarray]:
        """What a checkpoint after `stage_step` steps has to hold; nothing where the next step is a refresh."""
        window = self.window(stage_step)
        if window is None or stage_step == window.start:
            return {}
        values = list(self.logprobs.values())
        return {
            "digests": np.frombuffer(b"".join(self.logprobs), np.uint8).reshape(-1, DIGEST_BYTES),
            "lengths": np.array([len(v) for v in values], np.int64),
            "logprobs": np.concatenate([*values, np.zeros(0, np.float32)]),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `arrays` gave."""
        if "digests" not in arrays:
            return
        values = np.split(arrays["logprobs"], np.cumsum(arrays["lengths"])[:-1])
        self.logprobs = {d.tobytes(): v for d, v in zip(arrays["digests"], values, strict=True)}

    # ------------------------------------------------------------ is it SFT after all?

    def watch(self, stage_step: int, metrics: dict[str, float]) -> str | None:
        """A sentence, once, when PSFT turns out to clip nothing at all."""
        if self.window(stage_step) is None or getattr(self.objective, "clip", None) is None:
            return None
        self.clipped += metrics.get("clip_fraction/demonstrations", 0.0)
        due = self.windows_begun > PATIENCE or stage_step + 1 == self.steps
        if self.clipped or self.told or not due:
            return None
        self.told = True
        return (
            f"PSFT has clipped no token so far (ratio_demonstrations/max is {metrics['ratio_demonstrations/max']:.3f}, "
            f"objective.clip {self.objective.clip}): it has been SFT weighted by the ratio; raise optimizer.lr or "
            "objective.refresh_every, or lower objective.clip"
        )


def _schedule(objective: ObjectiveConfig) -> tuple[int | None, int]:
    """Updates from one refresh to the next (1: no old policy; None: one refresh), and updates before the first."""
    match objective:
        case PsftConfig():
            return objective.refresh_every, objective.warmup_steps
        case SftKlConfig(estimator="k3") | DpoConfig():
            return None, 0
    return 1, 0


def digest(sequence: TrainingSequence) -> bytes:
    """Of the prompt's and the response's tokens."""
    tokens = np.array([sequence.prompt_length, *sequence.token_ids], "<i8")
    return hashlib.blake2b(tokens.tobytes(), digest_size=DIGEST_BYTES).digest()


def remarks(config: RunConfig) -> list[str]:
    """What turns PSFT into SFT without a word, in a stage's settings."""
    objective = config.objective
    if objective.kind != "psft":
        return []
    if objective.refresh_every == 1:
        return [
            "objective.refresh_every is 1: the old policy is always the current one, and this is exactly SFT; the "
            "paper has 8"
        ]
    ratio_steps = config.steps - objective.warmup_steps - 1
    if config.steps and ratio_steps <= 0:
        return [
            f"objective.warmup_steps is {objective.warmup_steps} of {config.steps} steps, and the first update after a "
            "refresh has the ratio 1: this stage is exactly SFT"
        ]
    return []
