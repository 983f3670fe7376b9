"""What training a head leaves for people: tables, curves, and a reliability diagram."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_srft.analysis import output
from megatron_srft.analysis.page import element, facts, table
from megatron_srft.analysis.plots import COLOURS, INK, Panel, draw, paint_svg
from megatron_srft.analysis.report import figure
from megatron_srft.hidden_reward import HeadConfig
from megatron_srft.hidden_reward.fit import Fitted
from megatron_srft.hidden_reward.quality import Quality, ReliabilityBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "training.html"
COLUMNS = {
    "responses": "responses",
    "right": "right",
    "questions": "questions",
    "questions_with_both": "with both",
    "within_auroc": "AUROC within",
    "within_auroc_by_length": "by length",
    "overall_auroc": "AUROC overall",
    "overall_auroc_by_length": "by length",
    "brier": "Brier",
    "ece": "ECE",
    "accuracy": "accuracy",
}
"""Field of `Quality` -> heading."""


def write(
    folder: Path, options: argparse.Namespace, config: HeadConfig, fitted: Fitted, counts: Mapping[str, int]
) -> None:
    """Write training.html and training.json into the head's folder."""
    best = fitted.best
    parts = {
        "Head": facts(_about(options, config) | {name: str(number) for name, number in counts.items()}),
        "Best epoch": quality_table({"training, as it went": best.train, "held out": best.validation}),
        "Curves": curves(fitted),
        "Calibration of the held-out responses": reliability(best.validation.bins),
        "Epochs": _epochs(fitted),
    }
    about = "A reward head on the model's hidden states; the epoch with the least validation loss was kept."
    tree = {
        "head": asdict(config),
        "counts": dict(counts),
        "best_epoch": best.number,
        "epochs": [asdict(epoch) for epoch in fitted.epochs],
    }
    output.write(folder / NAME, "Training of a reward head", about, parts, tree)


def _about(options: argparse.Namespace, config: HeadConfig) -> dict[str, str]:
    layers = ", ".join(map(str, config.layers))
    return {
        "Model": f"{config.base.name} ({config.base.fingerprint[:12]}, {config.base.dtype})",
        "Reads": "logits" if config.trained_on == "logits" else f"layers {layers} of 0 ... {config.base.num_layers}",
        "Gate": "yes" if config.gate else "no: plain mean",
        "Normalisation": config.normalisation,
        "Last token": config.last_token,
        "Parameters": str(config.parameter_count),
        "Rollouts": ", ".join(map(str, options.rollouts)),
        **{name: str(value) for name, value in config.training.items() if not name.startswith("validation_")},
    }


def cell(value: float | int | None) -> str:
    if value is None:
        return "n/a"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _rows(found: Mapping[str, Quality]) -> list[list[str]]:
    return [[name, *(cell(getattr(one, field)) for field in COLUMNS)] for name, one in found.items()]


def quality_table(found: Mapping[str, Quality]) -> str:
    return table(["", *COLUMNS.values()], _rows(found))


def text_table(found: Mapping[str, Quality]) -> str:
    """For the terminal: a figure to a line, a column for each of `found`."""
    names = list(found)
    width = max(12, *(len(name) + 2 for name in names))
    lines = ["".join([" " * 24, *(f"{name:>{width}}" for name in names)])]
    for field, heading in COLUMNS.items():
        label = f"  {heading}" if heading in ("by length", "with both") else heading
        lines.append("".join([f"{label:<24}", *(f"{cell(getattr(found[name], field)):>{width}}" for name in names)]))
    return "\n".join(lines)


def curves(fitted: Fitted) -> str:
    """Losses and figures over epochs; the training part's are taken before each step."""

    def line(get) -> list[tuple[int, float]]:
        return [(epoch.number, value) for epoch in fitted.epochs if (value := get(epoch)) is not None]

    panels = [
        Panel(
            title="Loss",
            unit="mean loss",
            lines={"training": line(lambda e: e.train_loss), "held out": line(lambda e: e.validation_loss)},
        ),
        Panel(
            title="AUROC within questions",
            unit="AUROC",
            lines={
                "training": line(lambda e: e.train.within_auroc),
                "held out": line(lambda e: e.validation.within_auroc),
                "held out, by length alone": line(lambda e: e.validation.within_auroc_by_length),
            },
            note="0.5 is chance.",
        ),
        Panel(
            title="Calibration of the held-out responses",
            unit="error",
            lines={"Brier": line(lambda e: e.validation.brier), "ECE": line(lambda e: e.validation.ece)},
        ),
    ]
    last = len(fitted.epochs)
    shown = [Panel(**{**vars(p), "kind": "exact", "x_label": "epoch"}) for p in panels if any(p.lines.values())]
    return element("div", *(figure(panel, draw(panel, last, [])) for panel in shown), class_="plots")


def reliability(bins: tuple[ReliabilityBin, ...]) -> str:
    """Share of right responses against the head's probability, a mark's size telling how many; with a table."""
    filled = [one for one in bins if one.responses]
    most = max((one.responses for one in filled), default=1)

    def paint(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=(0, (4, 3)))
        probabilities, shares = [one.mean_probability for one in filled], [one.share_right for one in filled]
        axes.plot(probabilities, shares, color=COLOURS[0], lw=1.2)
        axes.scatter(probabilities, shares, [12 + 88 * one.responses / most for one in filled], color=COLOURS[0])
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("mean probability")
        axes.set_ylabel("share right")

    rows = [
        [f"{one.low:.1f} to {one.high:.1f}", str(one.responses), cell(one.mean_probability), cell(one.share_right)]
        for one in bins
    ]
    drawing = element("figure", paint_svg(paint, "share of right responses against probability"))
    return element("div", drawing, class_="plots") + table(["probability", "responses", "mean", "share right"], rows)


def _epochs(fitted: Fitted) -> str:
    rows = [
        [f"{epoch.number}{' (kept)' if epoch is fitted.best else ''}", f"{epoch.train_loss:.4f}",
         f"{epoch.validation_loss:.4f}", cell(epoch.train.within_auroc), cell(epoch.validation.within_auroc),
         cell(epoch.validation.overall_auroc), cell(epoch.validation.ece), str(epoch.shut_gates),
         f"{epoch.seconds:.1f}"]
        for epoch in fitted.epochs
    ]  # fmt: skip
    heading = ["epoch", "loss", "held out", "AUROC within", "held out", "overall, held out", "ECE", "gates shut", "s"]
    return table(heading, rows)
