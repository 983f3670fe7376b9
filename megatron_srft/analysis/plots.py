"""Line plots of metric series as inline SVG that takes its colours and fonts from the page around it."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from megatron_srft.analysis.runs import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (5.4, 2.7)
MAX_POINTS = 800
"""A longer series is drawn as means over equal runs of steps."""
SMOOTH_FROM = 60
"""A series of at least this many points is drawn faint, with a running mean over it."""

NUM_COLOURS = 8
INK, GRID = "#010101", "#020202"
COLOURS = tuple(f"#0101{number + 16:02x}" for number in range(NUM_COLOURS))
"""Stand-ins that `_adopt_page_style` replaces by the page's CSS variables, so that a plot follows light and dark."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_srft",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: a title, what the y axis shows, and named lines."""

    title: str
    unit: str
    lines: dict[str, Series]
    """Name in the legend (the metric key) -> values; line i has colour i, modulo NUM_COLOURS."""
    kind: str = "lines"
    """lines, exact (lines without smoothing), log (logarithmic y axis) or stacked (areas on top of each other)."""
    note: str = ""
    """One sentence under the plot."""
    x_label: str = "step"
    bands: dict[str, tuple[Series, Series]] = field(default_factory=dict)
    """Name of a line -> lower and upper edge of the area shaded behind it."""


def draw(panel: Panel, last_step: float, stage_starts: list[tuple[int, str]]) -> str:
    """Return the panel's plot as one <svg> element without ids or addresses that could leave the page.

    Args:
        last_step: where the x axis ends, in its own unit.
    """

    def paint(axes: "Axes") -> None:
        if panel.kind == "stacked":
            _draw_areas(axes, panel.lines)
        else:
            _draw_lines(axes, panel)
        _dress(axes, panel, last_step, stage_starts)

    return paint_svg(paint, f"{panel.title}: {', '.join(panel.lines)}")


def paint_svg(paint: Callable[["Axes"], None], label: str, size_inches: tuple[float, float] = SIZE_INCHES) -> str:
    """What `paint` draws on fresh axes, in the colours of the page, as one <svg> element that reads as `label`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size_inches, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return _adopt_page_style(text.getvalue(), label)


def _draw_lines(axes: "Axes", panel: Panel) -> None:
    for number, series in enumerate(panel.lines.values()):
        colour = COLOURS[number % NUM_COLOURS]
        if panel.kind == "log":
            series = [(step, value) for step, value in series if value > 0]
        points = thin(series)
        steps, values = [step for step, _ in points], [value for _, value in points]
        smooth = len(points) >= SMOOTH_FROM and panel.kind != "exact"
        # A line that lies on an earlier one, or has an earlier one's colour, is dashed, so that both are seen.
        seen = number >= NUM_COLOURS or series in list(panel.lines.values())[:number]
        dashes = (0, (4, 4)) if seen else "solid"
        marker = "o" if len(points) <= 25 else ""
        axes.plot(steps, values, color=colour, lw=0.8 if smooth else 1.6, alpha=0.35 if smooth else 1.0,
                  marker=marker, markersize=3, ls=dashes)  # fmt: skip
        if smooth:
            axes.plot(steps, running_mean(values, max(len(values) // 25, 3)), color=colour, lw=1.8, ls=dashes)
    for number, name in enumerate(panel.lines):
        if name in panel.bands:
            low, high = (thin(edge) for edge in panel.bands[name])
            axes.fill_between([x for x, _ in low], [y for _, y in low], [y for _, y in high],
                              color=COLOURS[number % NUM_COLOURS], alpha=0.15, lw=0)  # fmt: skip


def _draw_areas(axes: "Axes", lines: dict[str, Series]) -> None:
    tables = [dict(series) for series in lines.values()]
    steps = sorted({step for table in tables for step in table})
    filled = [thin([(step, table.get(step, 0.0)) for step in steps]) for table in tables]
    x = [step for step, _ in filled[0]]
    colours = [COLOURS[number % NUM_COLOURS] for number in range(len(lines))]
    axes.stackplot(x, [[value for _, value in series] for series in filled], colors=colours, alpha=0.85, lw=0)


def _dress(axes: "Axes", panel: Panel, last_step: float, stage_starts: list[tuple[int, str]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    if panel.kind == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=_subdivisions(panel)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    end = last_step or 1
    axes.set_xlim(-0.012 * end, 1.012 * end)
    axes.margins(y=0.08)
    if panel.kind == "stacked" or panel.unit.startswith("share"):
        axes.set_ylim(bottom=0)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.unit)
    for step, name in stage_starts if len(stage_starts) > 1 else []:
        axes.axvline(step, color=INK, lw=0.8, ls=(0, (4, 3)), alpha=0.6)
        axes.annotate(name, (step, 1), xycoords=("data", "axes fraction"), xytext=(3, 1), textcoords="offset points",
                      fontsize=8, annotation_clip=False)  # fmt: skip


def _subdivisions(panel: Panel) -> tuple[float, ...]:
    """Ticks within a decade of a logarithmic axis: more of them where the values span less."""
    values = [value for series in panel.lines.values() for _, value in series if value > 0] or [1.0]
    span = max(values) / min(values)
    return (1.0,) if span > 1e3 else (1.0, 3.0) if span > 10 else (1.0, 2.0, 3.0, 5.0)


def thin(series: Series) -> Series:
    """At most MAX_POINTS points: means over equal runs of neighbouring points, at their middle step."""
    width = -(-len(series) // MAX_POINTS)
    if width <= 1:
        return series
    runs = [series[start : start + width] for start in range(0, len(series), width)]
    return [(run[len(run) // 2][0], sum(value for _, value in run) / len(run)) for run in runs]


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean over a centred window of about `width` values, shorter at the ends."""
    half = width // 2
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _adopt_page_style(svg: str, label: str) -> str:
    """Cut what only a stand-alone SVG needs, and replace the stand-in colours and fonts by the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r' id="(figure|axes|patch|line2d|text|xtick|ytick|matplotlib|FillBetween)[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    view = re.search(r'viewBox="([^"]*)"', svg)[1]
    svg = f'<svg viewBox="{view}" role="img" aria-label="{escape(label)}">' + svg[svg.index(">") + 1 :]
    variables = {INK: "var(--muted)", GRID: "var(--line)"}
    variables |= {colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)}
    return re.sub("|".join(variables), lambda match: variables[match[0]], svg)
