"""What a run does with the head of its hidden-state reward: does it belong to the policy, how old is it, and when is it
trained on?

A head is made for one set of weights. Those must be the weights that the run began with (or, when a run is resumed with
another head, the ones that it has then); from there on the policy moves away, and the head's age in optimizer updates
is logged and limited. Stages that name the same head go on with it as it is.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_srft.config import ConfigError, RunConfig, SwiftRewardConfig, refreshes_after
from megatron_srft.hidden_reward import RewardHead, check_fits, weights_fingerprint
from megatron_srft.hidden_stream.heads import stream_of
from megatron_srft.hidden_stream.merge import engine_difference, merge, of_engine, scores_by_group, unscored
from megatron_srft.hidden_stream.refresh import Refresher, sequences_of
from megatron_srft.hidden_stream.watch import Watch, figures
from megatron_srft.hidden_stream.window import Window
from megatron_srft.metrics import Timer
from megatron_srft.rollout import RolloutEngine
from megatron_srft.sample import Group, TrainingSequence
from megatron_srft.trainer.hidden_features import Recomputed
from megatron_srft.trainer.parallel import device
from megatron_srft.trainer.trainer import Trainer

START, ORIGIN, VERSION, FITTED, WEIGHT, BIAS = (
    f"swift_{name}" for name in ("start", "origin", "version", "fitted", "weight", "bias")
)
"""Names of a checkpoint's arrays."""


class HiddenStream:
    """Over the stages of a run. One without a hidden-state reward has none, and all of this is idle.

    stream = HiddenStream(heads, trainer)             # while the trainer has the weights of model.path
    stream.begin(config, arrays)                      # after a checkpoint, if any, has been restored
    stream.equip(engine)                              # before it samples
    groups = stream.merge(groups, sequences, stage_step)
    metrics |= stream.end_step(stage_step)
    """

    def __init__(self, heads: dict[str, RewardHead], trainer: Trainer):
        self.heads, self.trainer = heads, trainer
        self.versions: dict[str, int] = {}
        """Optimizer updates of the run behind the weights that each head was trained for before the run."""
        self.start = trainer.base_model().fingerprint if heads else ""
        """Fingerprint of the weights that the run began with."""
        self.swift: SwiftRewardConfig | None = None
        self.window: Window | None = None
        self.refresher: Refresher | None = None
        self.path: str | None = None
        """Folder of the head in use; a later stage that names it goes on with the head as it is."""
        self.head: RewardHead | None = None
        self.fitted = 0
        """Optimizer updates behind the weights that the head in use was trained for, in a refresh if there was one."""
        self.figures: dict[str, float] = {}
        self.watch = Watch()

    def begin(self, config: RunConfig, arrays: dict[str, np.ndarray]) -> None:
        """Check what the heads were trained for, and take what a checkpoint holds, before the first stage.

        Args:
            arrays: what `arrays` gave; empty for a new run.

        Raises:
            ConfigError: a head was trained for other weights than those that the run began with or has now.
        """
        if START in arrays:
            self.start = bytes(arrays[START]).hex()
        restored = self._restore_head(config, arrays)
        self.versions |= {path: self._version(path) for path in self.heads if path not in self.versions}
        self.begin_stage(config)
        if self.swift is not None:
            self.window.restore(arrays)
            self.refresher.restore(arrays if self.path == restored else {})

    def begin_stage(self, config: RunConfig) -> None:
        """Take the stage's settings; the window starts empty, and the head's optimizer from nothing."""
        self.swift, self.seed = stream_of(config), config.seed
        self.trainer.reward_head = None
        if self.swift is None:
            return
        if self.swift.head != self.path:
            self._take(self.swift.head, self.heads[self.swift.head], self.versions[self.swift.head])
        self.window, self.refresher = Window(self.swift), Refresher(self.head, self.swift)
        self.trainer.reward_head = self.head

    # ------------------------------------------------------------ one step

    @property
    def staleness(self) -> int:
        """Optimizer updates since the weights that the head was trained for."""
        return self.trainer.policy_version - self.fitted

    def equip(self, engine: RolloutEngine) -> None:
        """Give the engine the head as it is now, if it is to score what it samples and has another one."""
        if self.swift is not None and self.swift.scored_by == "engine" and engine.reward_head is not self.head:
            engine.score_with(self.head)

    def merge(self, groups: list[Group], sequences: Sequence[TrainingSequence], stage_step: int) -> list[Group]:
        """The step's groups with the stream in their scores.

        Args:
            groups: scored by the other rewards.
            sequences: of these groups, measured.
        """
        if self.swift is None:
            return groups
        found = scores_by_group(sequences, len(groups))
        compared = {}
        if self.swift.scored_by == "engine":
            compared, found = engine_difference(groups, found), of_engine(groups, found)
        self.figures = {
            **figures(groups, found),
            **compared,
            "swift/staleness": float(self.staleness),
            "accounting/unscored_responses": unscored(groups, found),
        }
        self.window.add(groups, stage_step)
        return merge(groups, found, self.swift)

    def end_step(self, stage_step: int, timer: Timer) -> dict[str, float]:
        """The step's figures, behind it the head's refresh where that is due."""
        if self.swift is None:
            return {}
        if refreshes_after(self.swift, stage_step + 1):
            with timer("refresh"):
                self.figures |= self._refresh(stage_step)
        return self.figures

    def _refresh(self, stage_step: int) -> dict[str, float]:
        sequences, responses = sequences_of(self.window.judged, self.head.config)
        states = Recomputed(self.trainer, sequences, self.head.config)
        found = self.refresher.train(states, responses, self.seed, stage_step // self.swift.refresh_every)
        if not found["accounting/skipped_refreshes"]:
            self.head = self.trainer.reward_head = self.refresher.head(self.head)
            self.fitted = self.trainer.policy_version
        return found

    def remark(self) -> str | None:
        """A sentence, once, when the head no longer tells right from wrong."""
        return self.watch.look(self.figures) if self.swift is not None else None

    def problem(self) -> str | None:
        """Why the head is too old for another step; None when it is not."""
        limit = self.swift.max_staleness if self.swift is not None else None
        if limit is None or self.staleness <= limit:
            return None
        return (
            f"the policy is {self.staleness} optimizer updates past the weights that its reward head was trained for, "
            f"and rewards: swift.max_staleness is {limit}; raise it, or train a head for the policy as it is now and "
            "name that in swift.head"
        )

    # ------------------------------------------------------------ checkpoints

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint has to hold: the run's beginning, the head as it is, and what a refresh learns from."""
        if not self.heads:
            return {}
        held = {START: np.frombuffer(bytes.fromhex(self.start), np.uint8)}
        if self.head is not None:
            held |= {
                ORIGIN: np.frombuffer(bytes.fromhex(_digest(self.heads[self.path])), np.uint8),
                VERSION: np.array(self.versions[self.path]),
                FITTED: np.array(self.fitted),
                WEIGHT: self.head.weight.cpu().numpy(),
                BIAS: self.head.bias.cpu().numpy(),
            }
        return held | (self.window.arrays() | self.refresher.arrays() if self.swift is not None else {})

    def _restore_head(self, config: RunConfig, arrays: dict[str, np.ndarray]) -> str | None:
        """The checkpoint's head in the place of the one that it was read as, whose path is returned; a head of another
        origin is a new one."""
        origin = bytes(arrays.get(ORIGIN, b"")).hex()
        paths = [path for path, head in self.heads.items() if _digest(head) == origin]
        if not paths:
            return None
        swift = stream_of(config)
        path = swift.head if swift is not None and swift.head in paths else paths[0]
        numbers = {name: torch.from_numpy(arrays[key]) for name, key in (("weight", WEIGHT), ("bias", BIAS))}
        self._take(path, replace(self.heads[path], **numbers), int(arrays[FITTED]))
        self.versions[path] = int(arrays[VERSION])
        return path

    def _take(self, path: str, head: RewardHead, fitted: int) -> None:
        self.path, self.head, self.fitted = path, head.to(device()), fitted

    # ------------------------------------------------------------ which weights

    def _version(self, path: str) -> int:
        """Optimizer updates of the run behind the weights that a head was trained for.

        Raises:
            ConfigError: it was trained for others.
        """
        head, trainer = self.heads[path], self.trainer
        if head.config.base.fingerprint == self.start:
            return 0
        base = trainer.base_model()
        if head.config.base == replace(base, name=head.config.base.name):
            return trainer.policy_version
        try:
            check_fits(head, replace(base, fingerprint=self.start))
        except ValueError as error:
            raise ConfigError(f"rewards: swift.head: {error}") from None
        return 0


def _digest(head: RewardHead) -> str:
    return weights_fingerprint([("weight", head.weight), ("bias", head.bias)])
