"""The page of a comparison: tables, curves with a band over the seeds of a method, and how the settings differ."""

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from megatron_srft import config as configuration
from megatron_srft.analysis.compare import Comparison, over_seeds, tables
from megatron_srft.analysis.page import element, navigation, page, section, table
from megatron_srft.analysis.plots import Panel, draw
from megatron_srft.analysis.report import figure, muted
from megatron_srft.analysis.run_figures import rollout_tokens, seconds, spent
from megatron_srft.analysis.runs import Run, Series

CURVES = {
    "Reward and accuracy": (
        ("Accuracy of rollouts", "share correct", "accuracy"),
        ("Reward", "reward", "reward/mean"),
    ),
    "Length": (
        ("Response length", "tokens", "response_length/mean"),
        ("Cut at the length limit", "share of responses", "truncated_share"),
    ),
    "Entropy": (
        ("Entropy on own samples", "nats per token", "entropy/rollouts"),
        ("Entropy on demonstrations (teacher-forced)", "nats per token", "entropy/demonstrations"),
    ),
    "Clipping": (
        ("Rollout tokens clipped above", "share of tokens", "clip_fraction/high"),
        ("Rollout tokens clipped below", "share of tokens", "clip_fraction/low"),
        ("Demonstration tokens clipped", "share of tokens", "clip_fraction/demonstrations"),
    ),
}
"""Section -> (title, unit, metric) of its plots."""

LEFT_OUT = ("name", "run_dir", "seed")
"""Settings that say nothing about a method."""


def write_comparison(path: str | Path, comparison: Comparison, title: str = "Comparison of runs") -> list[Path]:
    """Write one self-contained page, and beside it its figures as .json and .md; returns the three paths."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        path: render(comparison, title),
        path.with_suffix(".json"): json.dumps(comparison.to_json(), indent=2, allow_nan=False) + "\n",
        path.with_suffix(".md"): comparison.to_markdown(),
    }
    for file, text in found.items():
        file.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    return list(found)


def render(comparison: Comparison, title: str) -> str:
    """The page's HTML."""
    parts = {"Figures": _tables(comparison), "Held-out accuracy": _held_out(comparison)}
    for name, plans in CURVES.items():
        parts[name] = _plots([_curve(comparison, *plan) for plan in plans], plans)
    parts["Runs"] = _runs(comparison)
    number = sum(len(runs) for runs in comparison.methods.values())
    head = element("p", "megatron_srft comparison", class_="overline") + element("h1", escape(title))
    head += muted(
        f"Methods: {len(comparison.methods)}, runs: {number}. Lines are means over a method's runs, bands mean "
        "\N{PLUS-MINUS SIGN} standard deviation, at the steps that all of its runs have."
    )
    body = head + navigation(parts) + "".join(section(name, content) for name, content in parts.items())
    return page(title, body)


def _tables(comparison: Comparison) -> str:
    parts = [element("h3", escape(title)) + table(heading, rows) for title, heading, rows in tables(comparison)]
    if not comparison.files:
        parts.insert(0, muted("No run was evaluated; name held-out files under evaluation.files."))
    return "".join([*parts, *(muted(remark) for remark in comparison.remarks())])


def _held_out(comparison: Comparison) -> str:
    """Accuracy and length of each file over steps, and accuracy over what it cost."""
    figures = []
    for file in comparison.files:
        metric = next(f.metric for method in comparison.methods for f in comparison.on_file(method, file))
        title = f"{file}: {metric}"
        key = f"eval/{file}/{metric}"
        figures.append(_curve(comparison, title, "share correct", key))
        for label, cost in (("rollout tokens before it", rollout_tokens), ("training seconds before it", seconds)):
            figures.append(_curve(comparison, title, "share correct", key, label, cost))
        figures.append(_curve(comparison, f"{file}: length", "tokens", f"eval/{file}/length"))
    return _plots(figures, ())


def _plots(panels: list[Panel | None], plans: tuple[tuple[str, str, str], ...]) -> str:
    drawn = [figure(panel, draw(panel, _end(panel), [])) for panel in panels if panel is not None]
    if not drawn:
        return muted(f"Not logged in these runs: {', '.join(key for _, _, key in plans) or 'eval/*'}.")
    return element("div", *drawn, class_="plots")


def _end(panel: Panel) -> float:
    return max(x for line in panel.lines.values() for x, _ in line)


def _curve(
    comparison: Comparison,
    title: str,
    unit: str,
    key: str,
    x_label: str = "step",
    cost: Callable[[Run], Series] | None = None,
) -> Panel | None:
    """One metric of all methods, over steps or over the mean cost of the steps before; None where no run has it.

    Every method keeps its colour on all plots, so one without the metric is an empty line.
    """
    lines, bands = {}, {}
    for method, runs in comparison.runs.items():
        having = [run for run in runs if run.series(key)]
        mean, band = over_seeds([run.series(key) for run in having])
        if cost is not None:
            costs = [cost(run) for run in having]
            place = {step: sum(spent(c, step) for c in costs) / len(costs) for step, _ in mean}
            mean, *edges = ([(place[step], value) for step, value in line] for line in (mean, *(band or ())))
            band = tuple(edges) or None
        lines[method] = mean
        if band is not None:
            bands[method] = band
    if not any(lines.values()):
        return None
    return Panel(title=title, unit=unit, lines=lines, bands=bands, x_label=x_label)


# ---------------------------------------------------------------- settings


def _runs(comparison: Comparison) -> str:
    """Where the runs are, and in which settings the methods differ."""
    folders = [[m, str(run.seed), str(run.steps), run.folder] for m, runs in comparison.methods.items() for run in runs]
    listed = table(["method", "seed", "steps", "folder"], folders, text_columns=4)
    differences = setting_differences(comparison.runs)
    rows = [[key, *values] for key, values in differences.items()]
    if rows:
        listed += element("h3", "Settings that are not the same in all runs (a method's first run)")
        listed += table(["key", *comparison.runs], rows, text_columns=1 + len(comparison.runs))
    return listed


def setting_differences(runs: dict[str, list[Run]]) -> dict[str, list[str]]:
    """Config key -> its value in each method's first run ('-' where it has none), where not all are the same."""
    trees = [_flat(configuration.to_dict(some[0].config)) for some in runs.values()]
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in LEFT_OUT)
    values = {key: [tree.get(key, "-") for tree in trees] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        items = enumerate(tree)
    else:
        return {prefix.removesuffix("."): json.dumps(tree) if isinstance(tree, (list, bool)) else str(tree)}
    return {key: value for name, inner in items for key, value in _flat(inner, f"{prefix}{name}.").items()}
