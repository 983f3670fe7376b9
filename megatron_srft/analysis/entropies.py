"""Entropy of several checkpoints, by two definitions that are not comparable with each other.

    on demonstrations   mean over the tokens of the demonstrations of H(p(. | y_<t)), teacher-forced: how unsure the
                        policy is along the expert's text. PSFT (arXiv 2508.17784) plots this one.
    on own samples      the same mean over texts that the policy sampled itself: how much it explores. SRFT, GRPO and
                        DAPO plot this one.

H is in nats, of softmax(logits / temperature). The texts of the first are the same at every checkpoint, those of the
second change with the policy, and so does their number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_srft.analysis.page import element, table
from megatron_srft.analysis.plots import Panel, draw
from megatron_srft.analysis.report import figure
from megatron_srft.trainer.step import SequenceStats

TITLES = {
    "demonstrations": "On demonstrations (teacher-forced)",
    "samples": "On own samples",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One policy."""

    run: str
    step: int
    path: str
    entropy: dict[str, float]
    """`demonstrations`, `samples`: nats per token, of those that were asked for."""
    tokens: dict[str, int]
    """What each was averaged over."""


def entropy(measured: Sequence[SequenceStats]) -> tuple[float, int]:
    """(mean over all tokens of all texts, their number)."""
    values = np.concatenate([stats.entropy for stats in measured]).astype(np.float64)
    return float(values.mean()), len(values)


def to_json(points: Sequence[Point]) -> dict[str, Any]:
    """Everything as a plain tree."""
    return {"unit": "nats per token", "definitions": TITLES, "points": [vars(point) for point in points]}


def sections(points: Sequence[Point]) -> dict[str, str]:
    """Parts of the page."""
    kinds = [kind for kind in TITLES if any(kind in point.entropy for point in points)]
    runs = list(dict.fromkeys(point.run for point in points))
    panels = []
    for kind in kinds:
        lines = {
            run: sorted((p.step, p.entropy[kind]) for p in points if p.run == run and kind in p.entropy) for run in runs
        }
        panels.append(Panel(title=TITLES[kind], unit="nats per token", lines=lines, kind="exact"))
    last = max(point.step for point in points)
    curves = element("div", *(figure(panel, draw(panel, last, [])) for panel in panels), class_="plots")
    heading = ["run", "step", *(head for kind in kinds for head in (TITLES[kind], "tokens"))]
    rows = [
        [p.run, str(p.step), *(cell for kind in kinds for cell in (f"{p.entropy[kind]:.4f}", str(p.tokens[kind])))]
        for p in points
    ]
    return {"Curves": curves, "Figures": table(heading, rows)}
