"""The limits of `accounting`: when a step's doubtful share is too large to go on."""

from megatron_srft.config import AccountingConfig


class RunStopped(RuntimeError):
    """A guard of `accounting` ended the run; the message names it."""


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
