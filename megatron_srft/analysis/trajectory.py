"""Where checkpoints stand between reference policies.

    d_R(M) = mean over the tokens of R's texts of -log p_M(y_t | y_<t)      measure nll, nats per token
                                               or 1 - p_M(y_t | y_<t)       measure miss, a share

after SRFT (arXiv 2506.19767, section 3.1.2 and appendix E), which plots checkpoints by their distance to the texts of
several references and does not say which distance. A reference with another tokenizer has no per-token probabilities
to compare with, so its texts are tokenised anew and only M's probabilities count. nll of a reference's own samples is
not 0 at the reference: it is its cross-entropy with M, whose least value is the reference's entropy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from typing import Any, Literal

import numpy as np

from megatron_srft.analysis.charts import paths
from megatron_srft.analysis.page import element, table
from megatron_srft.analysis.report import chip
from megatron_srft.trainer.step import SequenceStats

Measure = Literal["nll", "miss"]

UNITS = {"nll": "nats per token", "miss": "1 - probability"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One policy."""

    run: str
    step: int
    path: str
    distances: dict[str, float]
    """By reference."""


def distance(measured: Sequence[SequenceStats], measure: Measure) -> float:
    """Mean over all tokens of all texts."""
    logprobs = np.concatenate([stats.logprobs for stats in measured]).astype(np.float64)
    return float((-logprobs if measure == "nll" else -np.expm1(logprobs)).mean())


def to_json(points: Sequence[Point], measure: Measure, references: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything as a plain tree; `references` tells of each where its texts came from and how many they are."""
    return {"measure": measure, "unit": UNITS[measure], "references": references, "points": [vars(p) for p in points]}


def sections(points: Sequence[Point], measure: Measure, references: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Parts of the page."""
    runs = list(dict.fromkeys(point.run for point in points))
    parts = {}
    if len(references) > 1:
        plots = [_plot(points, runs, x, y, measure) for x, y in combinations(references, 2)]
        parts["Trajectories"] = _legend(runs) + element("div", *plots, class_="plots")
    rows = [[p.run, str(p.step), *(f"{p.distances[name]:.4f}" for name in references)] for p in points]
    parts[f"Distances, {UNITS[measure]}"] = table(["run", "step", *references], rows, text_columns=1)
    about = [[name, str(r["texts"]), str(r["tokens"]), str(r["from"])] for name, r in references.items()]
    parts["References"] = table(["reference", "texts", "tokens", "from"], about, text_columns=4)
    return parts


def _plot(points: Sequence[Point], runs: Sequence[str], x: str, y: str, measure: Measure) -> str:
    lines = {
        run: [
            (p.distances[x], p.distances[y], str(p.step)) for p in sorted(points, key=lambda p: p.step) if p.run == run
        ]
        for run in runs
    }
    return element("figure", paths(lines, f"distance to {x} ({UNITS[measure]})", f"distance to {y}"))


def _legend(runs: Sequence[str]) -> str:
    marks = (element("span", element("i", style=chip(number)), escape(run)) for number, run in enumerate(runs))
    return element("div", *marks, class_="legend")
