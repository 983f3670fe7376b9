"""Several runs side by side, and several seeds of one method as one. Spread is the unbiased standard deviation (n - 1).

comparison = compare_runs({"psft": [Path("runs/psft-0"), Path("runs/psft-1")], "sft": [...]}, target=0.9)
comparison.to_json(), comparison.to_markdown()
write_comparison(Path("comparison.html"), comparison)       # comparison_page.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megatron_srft.analysis.run_figures import LATE_KEYS, LATE_SHARE, FileFigures, RunFigures, run_figures
from megatron_srft.analysis.runs import Run, Series, load_run

Table = tuple[str, list[str], list[list[str]]]
"""Title, heading, rows."""

LATE_COLUMNS = {
    "reward/mean": ("reward", "{:.3f}"),
    "accuracy": ("accuracy of rollouts", "{:.1%}"),
    "response_length/mean": ("length", "{:.1f}"),
    "entropy/rollouts": ("entropy of rollouts", "{:.3f}"),
    "entropy/demonstrations": ("entropy on demonstrations", "{:.3f}"),
    "nll/demonstrations": ("NLL of demonstrations", "{:.3f}"),
    "clip_fraction/high": ("clipped above", "{:.2%}"),
    "clip_fraction/demonstrations": ("clipped demonstrations", "{:.2%}"),
}

SIZE_COLUMNS = {"steps": "{:,.0f}", "rollout_tokens": "{:,.0f}", "seconds": "{:,.1f}"}
REACHED_COLUMNS = {
    "reached_step": "{:,.0f}",
    "reached_rollout_tokens": "{:,.0f}",
    "reached_seconds": "{:,.1f}",
}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the seeds that have it."""

    mean: float
    deviation: float | None
    """Unbiased standard deviation; None with a single value."""
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None of nothing."""
        if not values:
            return None
        return cls(mean=fmean(values), deviation=stdev(values) if len(values) > 1 else None, values=tuple(values))


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What `compare_runs` found. `runs` are the folders as read, for the plots."""

    target: float | None
    methods: dict[str, list[RunFigures]]
    runs: dict[str, list[Run]]

    @property
    def files(self) -> list[str]:
        """All evaluation files, in the order in which they first appear."""
        return list(dict.fromkeys(name for runs in self.methods.values() for run in runs for name in run.files))

    def on_file(self, method: str, file: str) -> list[FileFigures]:
        return [run.files[file] for run in self.methods[method] if file in run.files]

    def spread(self, method: str, file: str, figure: str) -> Spread | None:
        """Over the seeds: `first`, `final` or `best` accuracy, `best_step`; or, of those that reached the target,
        `reached_step`, `reached_rollout_tokens`, `reached_seconds`."""
        found = self.on_file(method, file)
        if figure.startswith("reached_"):
            name = figure.removeprefix("reached_")
            return Spread.of([getattr(f.reached, name) for f in found if f.reached])
        return Spread.of([getattr(f, figure) for f in found])

    def num_reached(self, method: str, file: str) -> int:
        return sum(f.reached is not None for f in self.on_file(method, file))

    def late(self, method: str, key: str) -> Spread | None:
        return Spread.of([run.late[key] for run in self.methods[method] if key in run.late])

    def remarks(self) -> list[str]:
        """What makes a spread or a comparison doubtful."""
        found = []
        for method, runs in self.methods.items():
            seeds = [run.seed for run in runs]
            if len(set(seeds)) < len(seeds):
                found.append(f"{method}: several runs have the same seed ({', '.join(map(str, seeds))}), so the spread "
                             "is not one over seeds")  # fmt: skip
            steps = sorted({run.steps for run in runs})
            if len(steps) > 1:
                found.append(
                    f"{method}: its runs have {' and '.join(map(str, steps))} steps; 'final' is of different steps"
                )
        for file in self.files:
            without = [m for m, runs in self.methods.items() if len(self.on_file(m, file)) < len(runs)]
            if without:
                found.append(f"{file}: not all runs of {', '.join(without)} were evaluated on it")
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything as a plain tree: per method its runs, and the spread of each figure over them."""
        return {
            "target": self.target,
            "late_share": LATE_SHARE,
            "remarks": self.remarks(),
            "methods": {
                method: {"runs": [asdict(run) for run in runs], "summary": self._summary(method)}
                for method, runs in self.methods.items()
            },
        }

    def _summary(self, method: str) -> dict[str, Any]:
        figures = ["first", "final", "best", "best_step"]
        figures += ["reached_step", "reached_rollout_tokens", "reached_seconds"] * (self.target is not None)
        files = {
            file: {"runs": len(self.on_file(method, file)), "reached": self.num_reached(method, file)}
            | {figure: _plain(self.spread(method, file, figure)) for figure in figures}
            for file in self.files
        }
        return {"files": files, "late": {key: _plain(self.late(method, key)) for key in LATE_KEYS}}

    def to_markdown(self) -> str:
        """One table per evaluation file and one of the figures of training, and the remarks."""
        parts = [f"**{title}**\n\n{markdown(heading, rows)}" for title, heading, rows in tables(self)]
        return "\n\n".join([*parts, *(f"- {remark}" for remark in self.remarks())]) + "\n"


def compare_runs(runs: Mapping[str, Sequence[str | Path]], target: float | None = None) -> Comparison:
    """Read run folders and take their figures.

    Args:
        runs: method -> the folders of its runs (seeds).
        target: accuracy (a share) of which steps, tokens and seconds are asked for.

    Raises:
        ValueError: a folder is no run or has no metrics yet; a method without runs; a folder named twice; the target
            is no share.
    """
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"the target accuracy must be a share in (0, 1], not {target}")
    if not runs or not all(runs.values()):
        raise ValueError("nothing to compare: " + (f"no run of {next(m for m in runs if not runs[m])}" if runs else ""))
    folders = [Path(folder).resolve() for method in runs.values() for folder in method]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise ValueError(f"the run {twice} is named twice; a run that counts as two seeds would narrow the spread")
    loaded = {method: [load_run(folder) for folder in some] for method, some in runs.items()}
    methods = {method: [run_figures(run, target) for run in some] for method, some in loaded.items()}
    return Comparison(target=target, methods=methods, runs=loaded)


def over_seeds(series: Sequence[Series]) -> tuple[Series, tuple[Series, Series] | None]:
    """Mean over several runs at the steps that all of them have, and mean -+ standard deviation (None for one run)."""
    tables = [dict(one) for one in series if one]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    values = {step: [table[step] for table in tables] for step in steps}
    mean = [(step, fmean(values[step])) for step in steps]
    if len(tables) < 2:
        return mean, None
    spread = {step: stdev(values[step]) for step in steps}
    low, high = ([(step, value + sign * spread[step]) for step, value in mean] for sign in (-1, 1))
    return mean, (low, high)


def group_runs(folders: Sequence[Path], prefixes: Sequence[str]) -> dict[str, list[Path]]:
    """Runs whose folder's name starts with a prefix are seeds of one method; others stand for themselves.

    Raises:
        ValueError: no run has a prefix, or two runs that stand for themselves have one name.
    """
    methods: dict[str, list[Path]] = {prefix: [] for prefix in prefixes}
    for folder in folders:
        # The longest prefix: sft_kl-1 belongs to sft_kl, not to sft.
        owner = max((p for p in prefixes if folder.resolve().name.startswith(p)), key=len, default=None)
        label = folder.resolve().name if owner is None else owner
        if owner is None and label in methods:
            raise ValueError(f"two runs are called {label}; put them into one --group, or rename a folder")
        methods.setdefault(label, []).append(folder)
    unused = [prefix for prefix in prefixes if not methods[prefix]]
    if unused:
        raise ValueError(f"--group {unused[0]}: no run folder's name starts with it")
    return methods


# ---------------------------------------------------------------- tables


def tables(comparison: Comparison) -> list[Table]:
    """One table per evaluation file, and one of the figures of training."""
    return [file_table(comparison, file) for file in comparison.files] + [training_table(comparison)]


def file_table(comparison: Comparison, file: str) -> Table:
    """Accuracy on one file; a figure over several seeds is mean +- standard deviation."""
    target = comparison.target
    heading = ["method", "runs", "before", "final", "best", "best at step"]
    if target is not None:
        heading += [f"reached {target:.0%}", "steps to it", "rollout tokens to it", "seconds to it"]
    rows = []
    for method in comparison.methods:
        found = comparison.on_file(method, file)
        row = [method, str(len(found))]
        row += [cell(comparison.spread(method, file, figure), "{:.1%}") for figure in ("first", "final", "best")]
        row.append(cell(comparison.spread(method, file, "best_step"), "{:.0f}"))
        if target is not None:
            row.append(f"{comparison.num_reached(method, file)} of {len(found)}")
            for figure, pattern in REACHED_COLUMNS.items():
                row.append(cell(comparison.spread(method, file, figure), pattern))
        rows.append(row)
    metrics = list(dict.fromkeys(f.metric for method in comparison.methods for f in comparison.on_file(method, file)))
    return f"{file}: {' and '.join(metrics)}", heading, rows


def training_table(comparison: Comparison) -> Table:
    """What the end of training looked like; columns that no run has are left out."""
    columns = {
        key: column
        for key, column in LATE_COLUMNS.items()
        if any(comparison.late(method, key) for method in comparison.methods)
    }
    heading = ["method", "runs", "steps", "rollout tokens", "seconds", *(name for name, _ in columns.values())]
    rows = []
    for method, runs in comparison.methods.items():
        sizes = (Spread.of([getattr(run, name) for run in runs]) for name in SIZE_COLUMNS)
        figures = (cell(comparison.late(method, key), pattern) for key, (_, pattern) in columns.items())
        rows.append([method, str(len(runs)), *map(cell, sizes, SIZE_COLUMNS.values()), *figures])
    return "Training: sizes, and means over the last tenth of the steps", heading, rows


def cell(spread: Spread | None, pattern: str) -> str:
    """'91.5% +- 2.1%', the mean alone for one run, '-' for none."""
    if spread is None:
        return "-"
    mean = pattern.format(spread.mean)
    return mean if spread.deviation is None else f"{mean} \N{PLUS-MINUS SIGN} {pattern.format(spread.deviation)}"


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    lines = [heading, ["---", *(["--:"] * (len(heading) - 1))], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else asdict(spread)
