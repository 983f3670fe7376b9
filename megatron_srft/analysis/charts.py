"""Plots that are not lines over steps: a histogram, and paths of several policies in a plane."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_srft.analysis.plots import COLOURS, INK, NUM_COLOURS, paint_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SQUARE_INCHES = (5.4, 4.2)


def histogram(edges: Sequence[float], counts: Sequence[int], marks: Sequence[float], x_label: str) -> str:
    """Bars on a logarithmic axis, since unchanged tokens are by far the most; dashed lines at `marks`.

    Args:
        edges: [bins + 1].
        counts: [bins].
    """

    def paint(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter

        axes.bar(edges[:-1], counts, [b - a for a, b in zip(edges, edges[1:], strict=False)], align="edge",
                 color=COLOURS[0], lw=0)  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        for mark in marks:
            axes.axvline(mark, color=INK, lw=0.8, ls=(0, (4, 3)))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(x_label)
        axes.set_ylabel("tokens")

    return paint_svg(paint, f"histogram of {x_label}")


def paths(lines: Mapping[str, Sequence[tuple[float, float, str]]], x_label: str, y_label: str) -> str:
    """Each line's points (x, y, text) joined by arrows; a point's text stands at the first and the last one."""

    def paint(axes: "Axes") -> None:
        for number, points in enumerate(lines.values()):
            colour = COLOURS[number % NUM_COLOURS]
            xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
            axes.scatter(xs, ys, s=14, color=colour, marker="o" if number < NUM_COLOURS else "s", zorder=3)
            for start, end in zip(points, points[1:], strict=False):
                arrow = {"arrowstyle": "->", "color": colour, "lw": 1.3, "shrinkA": 2, "shrinkB": 2}
                axes.annotate("", xy=end[:2], xytext=start[:2], arrowprops=arrow)
            for x, y, text in {points[0], points[-1]}:
                axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=INK)
        axes.margins(0.1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return paint_svg(paint, f"{y_label} against {x_label}: {', '.join(lines)}", SQUARE_INCHES)
