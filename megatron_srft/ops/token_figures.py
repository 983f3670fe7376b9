"""Per-token figures of one call of clipped_ratio: which there are, and where each lies in the op's one vector of them.

The vector is for adding up; a figure becomes a tensor of its own only where somebody reads it, because thirty scalars
cost more than the op.
"""

from typing import NamedTuple

from torch import Tensor

POPULATIONS = ("rollouts", "demonstrations")

POPULATION_FIGURES = (
    "nll", "entropy", "ratio", "k1", "k3", "clipped_low", "clipped_high", "mismatch", "mismatch_k3", "corrected",
    "max_ratio", "max_mismatch",
)  # fmt: skip
"""Figures of each population: means over its tokens, then largest values (`max_`; 0 where there is no token)."""

SUMS = 10
"""How many of them are means."""

TERM_FIGURES = ("loss", "weight", "max_weight")
"""Figures of each term: its part of the loss; mean and largest weight over its populations, whatever the sign of A."""

FIRST_TERM = len(POPULATIONS) * len(POPULATION_FIGURES)
"""Where the terms' figures begin."""

_PLACES = {
    population: {name: index * len(POPULATION_FIGURES) + place for place, name in enumerate(POPULATION_FIGURES)}
    for index, population in enumerate(POPULATIONS)
}


def place_of(population: str, figure: str) -> int:
    return _PLACES[population][figure]


def place_of_term(term: int, figure: str) -> int:
    return FIRST_TERM + len(TERM_FIGURES) * term + TERM_FIGURES.index(figure)


class Figures(NamedTuple):
    """Per-token figures of one call, scalars without gradient.

    Sums over the call's rows divided by the `tokens` given, so they add up over calls to the means of the whole;
    `max_` figures are the largest values.
    """

    values: Tensor
    """[figures]: of rollouts, of demonstrations (POPULATION_FIGURES each), then of each term (TERM_FIGURES)."""

    @property
    def rollouts(self) -> dict[str, Tensor]:
        return self._population("rollouts")

    @property
    def demonstrations(self) -> dict[str, Tensor]:
        return self._population("demonstrations")

    @property
    def terms(self) -> list[dict[str, Tensor]]:
        of_terms = self.values[FIRST_TERM:].view(-1, len(TERM_FIGURES))
        return [dict(zip(TERM_FIGURES, of_term.unbind(), strict=True)) for of_term in of_terms.unbind()]

    def _population(self, name: str) -> dict[str, Tensor]:
        first = _PLACES[name][POPULATION_FIGURES[0]]
        own = self.values[first : first + len(POPULATION_FIGURES)]
        return dict(zip(POPULATION_FIGURES, own.unbind(), strict=True))
