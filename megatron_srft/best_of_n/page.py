"""Results of Best-of-N as text for a terminal, as a self-contained page with a plot, and as JSON."""

import dataclasses
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from megatron_srft.analysis.page import element, facts, table
from megatron_srft.analysis.plots import COLOURS, INK, NUM_COLOURS, paint_svg
from megatron_srft.best_of_n.cost import MARGINAL, TEXT, Costs
from megatron_srft.best_of_n.sweep import LEVEL, MAJORITY, ORACLE, RANDOM, Point, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_INCHES = (7.6, 4.4)
UNDRAWN = ("shortest", "longest")
"""Rules that stand in the tables only; the plot has enough lines."""


def text(sweep: Sweep, costs: Costs | None) -> str:
    """For a terminal: accuracy by rule and N, and costs."""
    lines = _aligned([_heading(sweep), *_accuracy_rows(sweep)])
    if costs is not None:
        lines += ["", *_aligned([_cost_heading(costs), *_cost_rows(costs)])]
    return "\n".join(lines)


def sections(sweep: Sweep, costs: Costs | None, about: Mapping[str, str]) -> dict[str, str]:
    """Title of each part of the page -> its HTML."""
    note = (
        f"Accuracy of the chosen candidate, mean over {sweep.questions} questions and {sweep.orders} orders of their "
        f"candidates; bands and intervals: {LEVEL:.0%} bootstrap over questions."
    )
    parts = {
        "Best of N": facts(dict(about))
        + element("figure", plot(sweep), legend(sweep), element("figcaption", note))
        + table(_heading(sweep), _accuracy_rows(sweep)),
        "First N candidates": table(_heading(sweep, auroc=False), _rows(sweep, lambda point: f"{point.first:.1%}")),
        "Gain over a random candidate": _gains(sweep),
    }
    if sweep.over_majority:
        parts["Gain over the majority"] = table(
            _heading(sweep, auroc=False),
            [[name, *(_gap(*gap) for gap in gaps)] for name, gaps in sweep.over_majority.items()],
        )
    if costs is not None:
        parts["Cost of a candidate"] = table(_cost_heading(costs), _cost_rows(costs))
    return parts


def to_json(sweep: Sweep, costs: Costs | None) -> dict[str, Any]:
    """Every figure, finite numbers only."""
    return {"sweep": dataclasses.asdict(sweep), "costs": None if costs is None else dataclasses.asdict(costs)}


# ---------------------------------------------------------------- tables


def _heading(sweep: Sweep, auroc: bool = True) -> list[str]:
    last = sweep.curves[RANDOM][-1].n
    more = [f"{LEVEL:.0%} interval at {last}", "AUROC within"] if auroc else []
    return ["rule", *(f"N = {point.n}" for point in sweep.curves[RANDOM]), *more]


def _accuracy_rows(sweep: Sweep) -> list[list[str]]:
    rows = _rows(sweep, lambda point: f"{point.accuracy:.1%}")
    for row in rows:
        last, value = sweep.curves[row[0]][-1], sweep.auroc.get(row[0])
        row += [f"{last.low:.1%} to {last.high:.1%}", "" if value is None else f"{value:.3f}"]
    return rows


def _rows(sweep: Sweep, cell: Callable[[Point], str]) -> list[list[str]]:
    return [[name, *map(cell, curve)] for name, curve in sweep.curves.items()]


def _gains(sweep: Sweep) -> str:
    rows = [
        [name, *(_gap(point.gain, point.gain_low, point.gain_high) for point in curve)]
        for name, curve in sweep.curves.items()
        if name != RANDOM
    ]
    return table(_heading(sweep, auroc=False), rows)


def _gap(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _cost_heading(costs: Costs) -> list[str]:
    ranks = "" if costs.ranks == 1 else f", rank 0 of {costs.ranks}"
    return [f"one candidate ({costs.clock}{ranks})", "seconds", "quartiles", "FLOP", "of text RM: time", "FLOP"]


def _cost_rows(costs: Costs) -> list[list[str]]:
    reference = costs.of[TEXT]
    return [
        [
            name,
            f"{cost.seconds:.2e}",
            f"{cost.lower:.1e} to {cost.upper:.1e}",
            f"{cost.flops:.2e}",
            "below noise" if name == MARGINAL and cost.lower <= 0 else f"{cost.seconds / reference.seconds:.2%}",
            f"{cost.flops / reference.flops:.3%}",
        ]
        for name, cost in costs.of.items()
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


# ---------------------------------------------------------------- plot


def plot(sweep: Sweep) -> str:
    """Accuracy over N on a logarithmic axis, as one <svg> element."""

    def paint(axes: "Axes") -> None:
        for name, colour, style in _styles(sweep):
            points = sweep.curves[name]
            sizes = [point.n for point in points]
            axes.plot(sizes, [100 * point.accuracy for point in points], color=colour, ls=style, lw=1.6, marker="o",
                      markersize=3)  # fmt: skip
            if name not in (RANDOM, ORACLE):
                axes.fill_between(sizes, [100 * point.low for point in points], [100 * point.high for point in points],
                                  color=colour, alpha=0.1, lw=0)  # fmt: skip
        sizes = [point.n for point in sweep.curves[RANDOM]]
        if len(sizes) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        axes.set_xlabel("N")
        axes.set_ylabel("accuracy, %")

    return paint_svg(paint, f"accuracy over N: {', '.join(sweep.curves)}", PLOT_INCHES)


def legend(sweep: Sweep) -> str:
    entries = (
        element("span", element("i", style=f"background: {_page_colour(colour)}"), escape(name))
        for name, colour, _ in _styles(sweep)
    )
    return element("div", *entries, class_="legend")


def _styles(sweep: Sweep) -> list[tuple[str, str, str]]:
    """(rule, colour, line style) of what is drawn; the bounds in grey."""
    drawn = [name for name in sweep.curves if name not in (*UNDRAWN, RANDOM, ORACLE)]
    styles = [(name, COLOURS[i % (NUM_COLOURS - 1)], "--" if name == MAJORITY else "-") for i, name in enumerate(drawn)]
    return [(ORACLE, INK, ":"), *styles, (RANDOM, INK, "--")]


def _page_colour(colour: str) -> str:
    """The page's variable behind a stand-in colour of a plot."""
    return "var(--muted)" if colour == INK else f"var(--c{COLOURS.index(colour)})"
