"""Per-token figures that objectives report, each a share of the update's mean (see ObjectiveOutput).

kl/k1 and kl/k3 estimate KL(policy before the step || policy) by -log r and r - 1 - log r, with r the importance ratio.
mismatch/* compares the policy before the step with the rollout engine: mean |difference| of the log-probs in nats, k3,
and the share of tokens whose importance weight was truncated or masked. clip_fraction/* is the share of tokens whose
gradient the clip removed. Names with `demonstrations` are of demonstration tokens; only PSFT and SFT-KL have ratios
of them.
"""

from torch import Tensor

from megatron_srft.ops.clipped_ratio import Figures
from megatron_srft.sample import Counts

ROLLOUTS = {
    "nll/rollouts": "nll",
    "entropy/rollouts": "entropy",
    "ratio/mean": "ratio",
    "max/ratio": "max_ratio",
    "kl/k1": "k1",
    "kl/k3": "k3",
    "mismatch/mean": "mismatch",
    "mismatch/k3": "mismatch_k3",
    "max/mismatch": "max_mismatch",
}
CORRECTION = {"mismatch/corrected_share": "corrected"}
CLIPS = {"clip_fraction/low": "clipped_low", "clip_fraction/high": "clipped_high"}
DEMONSTRATIONS = {"nll/demonstrations": "nll", "entropy/demonstrations": "entropy"}
DEMONSTRATION_RATIOS = {
    "ratio/demonstrations": "ratio",
    "max/ratio_demonstrations": "max_ratio",
    "kl/demonstrations_k1": "k1",
    "kl/demonstrations_k3": "k3",
}
DEMONSTRATION_CLIPS = {"clip_fraction/demonstrations": "clipped_high"}


def rollout_metrics(figures: Figures, counts: Counts, *, clips: bool, corrected: bool) -> dict[str, Tensor]:
    """Of the rollout tokens; nothing if the update has none."""
    if not counts.rollout_tokens:
        return {}
    wanted = ROLLOUTS | (CLIPS if clips else {}) | (CORRECTION if corrected else {})
    return {metric: figures.rollouts[name] for metric, name in wanted.items()}


def demonstration_metrics(figures: Figures, counts: Counts, *, ratios: bool, clips: bool) -> dict[str, Tensor]:
    """Of the demonstration tokens; nothing if the update has none."""
    if not counts.demonstration_tokens:
        return {}
    wanted = DEMONSTRATIONS | (DEMONSTRATION_RATIOS if ratios else {}) | (DEMONSTRATION_CLIPS if clips else {})
    return {metric: figures.demonstrations[name] for metric, name in wanted.items()}
