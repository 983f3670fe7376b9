"""When a run is not to go on: a step's doubtful share passes a limit of `accounting`, or a signal asks for the end."""

import os
import signal
import time

from megatron_srft.config import AccountingConfig


class RunStopped(RuntimeError):
    """A guard of `accounting` ended the run; the message names it."""


SAME_KEY_SECONDS = 1.0
"""torchrun passes on the Ctrl-C that the ranks get from the terminal too; both come well within this time."""


class StopRequest:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C set `asked` instead of ending the process; a second Ctrl-C ends it."""

    def __init__(self):
        self.asked = False
        self._interrupted: float | None = None

    def __enter__(self) -> "StopRequest":
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: object) -> None:
        self.asked = True
        if number != signal.SIGINT:
            return
        if self._interrupted is None:
            self._interrupted = time.monotonic()
            # Not print: the signal may have come in the middle of one, which cannot be entered twice.
            os.write(2, b"\nCtrl-C: the run is saved and ends after this step; again to end at once\n")
        elif time.monotonic() - self._interrupted > SAME_KEY_SECONDS:
            raise KeyboardInterrupt

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def find_problem(metrics: dict[str, float], skipped_in_a_row: int, step: int, limits: AccountingConfig) -> str | None:
    """What is beyond its limit, in a sentence that names the config key; None when nothing is.

    Args:
        metrics: the step's, equal on all ranks, so that all ranks reach the same verdict.
        skipped_in_a_row: latest optimizer updates that were skipped for a gradient that was not finite.
        step: steps finished.
    """
    scored = metrics.get("accounting/scored", 0)
    failed = sum(metrics.get(f"accounting/{name}", 0) for name in ("timeout", "crash", "unverifiable"))
    if failed > limits.max_verifier_failure_share * scored:
        return (
            f"{failed:.0f} of {scored:.0f} answers got no verdict in step {step} "
            "(accounting.max_verifier_failure_share); look at accounting/timeout, crash and unverifiable in "
            "metrics.jsonl"
        )
    if metrics.get("truncated_share", 0) > limits.max_truncated_share:
        return (
            f"{metrics['truncated_share']:.0%} of the completions of step {step} were cut at "
            "rollout.max_response_tokens (accounting.max_truncated_share)"
        )
    if skipped_in_a_row > limits.max_skipped_updates:
        return (
            f"{skipped_in_a_row} updates in a row had a gradient that was not finite "
            "(accounting.max_skipped_updates); lower optimizer.lr, or look at the losses in metrics.jsonl"
        )
    return None
