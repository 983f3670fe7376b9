"""Results of the study from its finished runs: results.md, results.json, and the page of `compare_runs`.

Aggregation over seeds and curves are those of `megatron_srft.analysis`; what this adds are the figures of the final
models (measure.py), the budget as it was really spent, and cost relative to the two-stage way.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import measure
from methods import BASELINE
from task import HELD_OUT, write_whole

from megatron_srft.analysis.compare import Comparison, Spread, cell, compare_runs, markdown
from megatron_srft.analysis.comparison_page import write_comparison
from megatron_srft.analysis.runs import load_run

Figures = dict[str, float]
MAX_NEW_TOKENS = 64
TARGET_FILE = "harder"
"""The file whose accuracy is asked for; on the easy one every method that works at all has it at once."""
BASE = "base model"
BUDGET = {
    "updates": "{:,.0f}",
    "completions": "{:,.0f}",
    "rollout tokens": "{:,.0f}",
    "demonstrations": "{:,.0f}",
    "seconds": "{:,.0f}",
    "CPU seconds": "{:,.0f}",
}


def measured(model_folder: Path, data: Path, kept_in: Path) -> Figures:
    """The figures of a model, kept in a file beside it, since a finished run does not change."""
    if not kept_in.exists():
        figures = measure(model_folder, data, MAX_NEW_TOKENS)
        write_whole(kept_in, json.dumps(figures, indent=2) + "\n")
    return json.loads(kept_in.read_text(encoding="utf-8"))


def spent(run_folder: Path, cost_file: Path) -> Figures:
    """What a run used, from its metrics; its processor time with start-up and evaluations, over all attempts.

    There is no processor time of an attempt that outlived a killed study.
    """
    run = load_run(run_folder)
    totals = {name: sum(v for _, v in run.series(f"count/{name}")) for name in ("completions", "demonstrations")}
    totals["updates"] = run.steps_done
    if cost_file.exists():
        attempts = json.loads(cost_file.read_text(encoding="utf-8"))
        totals["CPU seconds"] = sum(attempt["cpu_seconds"] for attempt in attempts)
    return totals


def write_results(
    folder: Path,
    runs: Mapping[str, Sequence[Path]],
    costs: Mapping[str, Sequence[Path]],
    base: Path,
    data: Path,
    target: float,
) -> str:
    """Write results.md, results.json and comparison.html into `folder`; returns the Markdown."""
    comparison = compare_runs(runs, target)
    print("measuring the final models ...", flush=True)
    finals = {m: [measured(f / "hf" / "final", data, f / "measured.json") for f in some] for m, some in runs.items()}
    finals = {BASE: [measured(base, data, folder / "base_measured.json")]} | finals
    budgets = {m: [spent(*pair) for pair in zip(some, costs[m], strict=True)] for m, some in runs.items()}
    for method, some in budgets.items():
        for one, figures in zip(some, comparison.methods[method], strict=True):
            one |= {"rollout tokens": figures.rollout_tokens, "seconds": figures.seconds}
    results = {
        "target": target,
        "methods": comparison.to_json()["methods"],
        "final_models": finals,
        "spent": budgets,
        "relative_cost": {method: relative_cost(comparison, method) for method in runs},
    }
    parts = [accuracy_table(comparison), final_table(finals), cost_table(comparison), budget_table(budgets)]
    text = "\n\n".join(f"**{title}**\n\n{markdown(heading, rows)}" for title, heading, rows in parts) + "\n"
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(text, encoding="utf-8")
    page, *_ = write_comparison(folder / "comparison.html", comparison, "Fine-tuning methods on arithmetic chains")
    return f"{text}\nresults: {folder / 'results.md'}\npage:    {page}"


def over(runs: Sequence[Figures], name: str, pattern: str) -> str:
    return cell(Spread.of([run[name] for run in runs if name in run]), pattern)


def accuracy_table(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    heading = ["method", "runs", *HELD_OUT]
    rows = [
        [m, str(len(some)), *(cell(comparison.spread(m, file, "final"), "{:.1%}") for file in HELD_OUT)]
        for m, some in comparison.methods.items()
    ]
    return "Greedy accuracy at the end, mean and standard deviation over seeds", heading, rows


def final_table(finals: Mapping[str, Sequence[Figures]]) -> tuple[str, list[str], list[list[str]]]:
    columns = {
        "sampled, heldout": ("sampled/heldout", "{:.1%}"),
        "sampled, harder": ("sampled/harder", "{:.1%}"),
        "entropy, heldout": ("entropy/heldout", "{:.3f}"),
        "entropy, harder": ("entropy/harder", "{:.3f}"),
        "entropy, demonstrations": ("entropy/demonstrations", "{:.3f}"),
        "NLL, demonstrations": ("nll/demonstrations", "{:.3f}"),
        "length, heldout": ("length/heldout", "{:.1f}"),
        "length, harder": ("length/harder", "{:.1f}"),
    }
    rows = [[m, *(over(some, *column) for column in columns.values())] for m, some in finals.items()]
    title = "Final models at temperature 1: accuracy, nats per token on own samples and on demonstrations, tokens"
    return title, ["method", *columns], rows


def relative_cost(comparison: Comparison, method: str) -> dict[str, float | None]:
    """BASELINE's mean cost of the target over this method's, on TARGET_FILE: 2 is twice as fast.

    None where a seed of either did not reach it, since a mean over the others would flatter.
    """
    names = ("reached_step", "reached_rollout_tokens", "reached_seconds")
    if any(not _all_reached(comparison, m) for m in (method, BASELINE)):
        return dict.fromkeys(names)
    pairs = {n: (comparison.spread(BASELINE, TARGET_FILE, n), comparison.spread(method, TARGET_FILE, n)) for n in names}
    return {n: theirs.mean / own.mean if theirs and own and own.mean else None for n, (theirs, own) in pairs.items()}


def _all_reached(comparison: Comparison, method: str) -> bool:
    runs = comparison.methods.get(method, [])
    return bool(runs) and comparison.num_reached(method, TARGET_FILE) == len(runs)


def cost_table(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    times: Callable[[Any], str] = lambda ratio: "-" if ratio is None else f"{ratio:.2f}x"  # noqa: E731
    heading = ["method", "reached", "steps", "rollout tokens", "seconds"]
    heading += [f"{what} than {BASELINE}" for what in ("fewer steps", "fewer tokens", "faster")]
    rows = []
    for method, runs in comparison.methods.items():
        row = [method, f"{comparison.num_reached(method, TARGET_FILE)} of {len(runs)}"]
        for figure in ("reached_step", "reached_rollout_tokens", "reached_seconds"):
            row.append(cell(comparison.spread(method, TARGET_FILE, figure), "{:,.0f}"))
        rows.append([*row, *map(times, relative_cost(comparison, method).values())])
    return f"Cost of {comparison.target:.0%} greedy on {TARGET_FILE}, over the seeds that reached it", heading, rows


def budget_table(budgets: Mapping[str, Sequence[Figures]]) -> tuple[str, list[str], list[list[str]]]:
    rows = [[m, *(over(some, name, pattern) for name, pattern in BUDGET.items())] for m, some in budgets.items()]
    return "What a run spent; CPU seconds include start-up and evaluations", ["method", *BUDGET], rows
