"""Per-token figures that objectives report, each a share of the update's mean (see ObjectiveOutput).

kl/k1 and kl/k3 estimate KL(policy before the step || policy) by -log r and r - 1 - log r, with r the importance ratio.
mismatch/* compares the policy before the step with the rollout engine: mean |difference| of the log-probs in nats, k3,
and the share of tokens whose importance weight was truncated or masked. clip_fraction/* is the share of tokens whose
gradient the clip removed. Names with `demonstrations` are of demonstration tokens; only PSFT and SFT-KL have ratios
of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_srft.ops.token_figures import FIRST_TERM, TERM_FIGURES, place_of, place_of_term
from megatron_srft.sample import Counts

Place = int | slice
"""Where a metric lies in the vector of figures; of a slice it is the sum."""

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


@dataclass(frozen=True, slots=True, eq=False)
class Metrics(Mapping[str, Tensor]):
    """Metrics by name, as one vector to add up; a scalar is made of it where it is read."""

    figures: Tensor
    """[figures] of an op's call, see ops/token_figures.py."""

    places: dict[str, Place]

    def __getitem__(self, name: str) -> Tensor:
        return self.figures[self.places[name]].sum()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __or__(self, more: dict[str, Tensor]) -> "Metrics":
        """With further scalars, which come in place of those of the same name."""
        end = len(self.figures)
        places = self.places | {name: end + index for index, name in enumerate(more)}
        return Metrics(torch.cat([self.figures, torch.stack(list(more.values()))]), places)


def term_places(terms: list[str], weights: dict[str, str]) -> dict[str, Place]:
    """The loss, the parts of several terms, and weights (name of the metric -> name of the term)."""
    end = FIRST_TERM + len(TERM_FIGURES) * len(terms)
    places: dict[str, Place] = {"loss": slice(FIRST_TERM + TERM_FIGURES.index("loss"), end, len(TERM_FIGURES))}
    if len(terms) > 1:
        places |= {f"loss/{name}": place_of_term(index, "loss") for index, name in enumerate(terms)}
    for metric, name in weights.items():
        places[f"weight/{metric}"] = place_of_term(terms.index(name), "weight")
        places[f"max/weight_{metric}"] = place_of_term(terms.index(name), "max_weight")
    return places


def rollout_places(counts: Counts, *, clips: bool, corrected: bool) -> dict[str, Place]:
    """Of the rollout tokens; nothing if the update has none."""
    if not counts.rollout_tokens:
        return {}
    wanted = ROLLOUTS | (CLIPS if clips else {}) | (CORRECTION if corrected else {})
    return {metric: place_of("rollouts", name) for metric, name in wanted.items()}


def demonstration_places(counts: Counts, *, ratios: bool, clips: bool) -> dict[str, Place]:
    """Of the demonstration tokens; nothing if the update has none."""
    if not counts.demonstration_tokens:
        return {}
    wanted = DEMONSTRATIONS | (DEMONSTRATION_RATIOS if ratios else {}) | (DEMONSTRATION_CLIPS if clips else {})
    return {metric: place_of("demonstrations", name) for metric, name in wanted.items()}
