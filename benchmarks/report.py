"""Figures of benchmarks as lines, as JSON, and as one Markdown page: the words around `measure.main`.

    python benchmarks/report.py FOLDER --run RUN.json     # FOLDER/results.json and results.md from FOLDER/parts/*.json

A benchmark's figures are {title, command, device, versions, parts, ceilings, settings: [{setting, sides: {name:
{part: [seconds, CPU seconds], figure: number or text} or {failed: why}}}]}. A run is what tools/gpu_suite.sh says of
itself: the date, what it ran on, and what became of its stages.
"""

import argparse
import importlib.metadata
import json
import shlex
import sys
from pathlib import Path

import torch


def new(title: str, device: str, parts: list[str]) -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton") if _installed(name)}
    return {
        "title": title,
        "command": shlex.join(["python", *sys.argv]),
        "device": device,
        "versions": versions | {"threads": torch.get_num_threads()},
        "parts": parts,
        "ceilings": {},
        "settings": [],
    }


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def write(found: dict, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- on the terminal


def print_line(found: dict, setting: dict, side: str) -> None:
    """One line for a side; before the first one what was measured, on what."""
    if len(setting["sides"]) == 1 and setting is found["settings"][0]:
        facts = (found["device"], named(found["versions"]), named(found["ceilings"]), found["command"])
        print("; ".join(filter(None, facts)))
        heads = "".join(f"{f'{part} ms':>14}{'ratio':>8}{'CPU ms':>11}{'ratio':>8}" for part in found["parts"])
        print(f"{'':40}{heads}")
    print(f"{setting['setting']:16}{side:24}{_line(found, setting, setting['sides'][side])}", flush=True)


def _line(found: dict, setting: dict, own: dict) -> str:
    if "failed" in own:
        return f"  {own['failed']}"
    first, cells = next(iter(setting["sides"].values())), ""
    for part in found["parts"]:
        for seconds, base, width in zip(own[part], first.get(part, (0, 0)), (14, 11), strict=True):
            cells += f"{seconds * 1e3:{width}.3f}" + (f"{base / seconds:7.2f}x" if base and seconds else " " * 8)
    return cells + "  " + named({name: value for name, value in own.items() if name not in found["parts"]})


def named(figures: dict) -> str:
    return ", ".join(f"{name} {text(value)}" for name, value in figures.items())


def text(value: object) -> str:
    """A figure with three digits that matter, or more before the point."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---------------------------------------------------------------- as a page


def page(run: dict, benchmarks: list[dict]) -> str:
    """The whole run in Markdown."""
    facts = [f"| {name} | {value} |" for name, value in run["facts"].items()]
    lines = [f"# {run['facts'].get('GPU', 'Benchmarks')}, {run['facts'].get('date', '')}", ""]
    lines += ["| | |", "|---|---|", *facts, "", "## Stages", "", "| stage | came out | seconds | command |"]
    lines += ["|---|---|---|---|"]
    lines += [f"| {s['name']} | {s['status']} | {s['seconds']} | `{s['command']}` |" for s in run["stages"]]
    for stage in run["stages"]:
        if stage.get("tail"):
            lines += ["", f"Last lines of {stage['name']}:", "", "```", *stage["tail"], "```"]
    for benchmark in benchmarks:
        lines += ["", f"## {benchmark['title']}", "", f"`{benchmark['command']}`"]
        if benchmark["ceilings"]:
            lines += ["", f"Measured beforehand: {named(benchmark['ceilings'])}."]
        for setting in benchmark["settings"]:
            lines += ["", f"### {setting['setting']}", "", *table(benchmark["parts"], setting["sides"])]
    return "\n".join(lines) + "\n"


def table(parts: list[str], sides: dict[str, dict]) -> list[str]:
    """One row per side; `ratio` is how many times faster than the first side the last part is."""
    figures = {name: None for own in sides.values() for name in own if name not in (*parts, "failed")}
    heads = ["side", *[f"{part} ms" for part in parts], "ratio", *figures]
    rows = [heads, ["---"] * len(heads)]
    base = next(iter(sides.values()), {}).get(parts[-1])
    for side, own in sides.items():
        if "failed" in own:
            rows.append([side, own["failed"].replace("|", "/"), *[""] * (len(heads) - 2)])
            continue
        ratio = f"{base[0] / own[parts[-1]][0]:.2f}x" if base else ""
        times = [f"{own[part][0] * 1e3:.3f}" for part in parts]
        rows.append([side, *times, ratio, *[text(own[name]) if name in own else "" for name in figures]])
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    args = parser.parse_args()
    run = json.loads(args.run.read_text(encoding="utf-8"))
    parts = sorted((args.folder / "parts").glob("*.json"))
    benchmarks = [json.loads(path.read_text(encoding="utf-8")) for path in parts]
    write(run | {"benchmarks": benchmarks}, args.folder / "results.json")
    (args.folder / "results.md").write_text(page(run, benchmarks), encoding="utf-8")


if __name__ == "__main__":
    main()
