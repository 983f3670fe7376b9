"""The comparison of trainer and rollout engine before an update: when it is due, and what comes of it."""

import logging
from collections.abc import Callable, Sequence

from megatron_srft.config import RunConfig
from megatron_srft.distributed import is_main
from megatron_srft.metrics import Timer
from megatron_srft.rollout.parity import check_parity, compare
from megatron_srft.sample import TrainingSequence
from megatron_srft.trainer.step import SequenceStats

log = logging.getLogger(__name__)


class ParityGate:
    """Due before the first step of a run or a stage, and then every parity.every steps."""

    def __init__(self, timer: Timer):
        self.timer = timer
        self.due = True
        self.metrics: dict[str, float] = {}
        """Of the latest comparison, until they are taken."""

    def check(
        self,
        sequences: Sequence[TrainingSequence],
        config: RunConfig,
        step: int,
        measure: Callable[[Sequence[TrainingSequence]], list[SequenceStats]],
        investigate: Callable[[], tuple[str, ...]],
        afresh: Callable[[], Sequence[TrainingSequence]] | None = None,
    ) -> list[SequenceStats] | None:
        """Compare log-probs where it is due; the measurement is handed on, as it may be of use.

        Args:
            step: steps of the run already made.
            measure: gives statistics under the current weights.
            investigate: finds out more before the run stops; see parity_probe.py.
            afresh: where the step's completions are not of the current weights, samples others that are.

        Raises:
            ParityError: they differ beyond the limits, and the config says to stop.
        """
        every = config.parity.every
        due = self.due or (every > 0 and step % every == 0)
        if not config.samples_rollouts or config.rollout.kind == "replay" or not due:
            return None
        with self.timer("parity"):
            compared = sequences if afresh is None else afresh()
            measured = measure(compared)
            pairs = [(m, s) for m, s in zip(measured, compared, strict=True) if not s.is_demonstration]
            report = compare([m.logprobs for m, _ in pairs], [s.rollout_logprobs for _, s in pairs])
            if not check_parity(report, config.parity, f"before step {step + 1}", investigate) and is_main():
                log.warning(
                    "before step %d: trainer and engine disagree beyond the limits (log-probs by %.3g on average and "
                    "%.3g at most); going on, as parity.on_failure is warn, with parity.correction %s",
                    *(step + 1, report.mean_difference, report.max_difference, config.parity.correction),
                )
        self.due, self.metrics = False, report.metrics()
        return measured if afresh is None else None

    def take(self) -> dict[str, float]:
        """The metrics, once."""
        metrics, self.metrics = self.metrics, {}
        return metrics
