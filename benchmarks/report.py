"""Figures of benchmarks as lines, as JSON, and as one Markdown page: the words around `measure.main`.

    python benchmarks/report.py WORK OUT     # OUT/results.json and results.md from what tools/gpu_suite.sh left in WORK

A benchmark's figures are {title, command, device, versions, parts, ceilings, settings: [{setting, sides: {name:
{part: [seconds, CPU seconds], figure: number or text} or {failed: why}}}]}. WORK holds them as *.json, the suite's
stages as lines of stages.tsv (name, outcome, seconds, command), and each stage's output as NAME.log.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

LAST_LINES = 40
"""What the page shows of a stage that failed."""


def new(title: str, device: str, parts: list[str]) -> dict:
    return {
        "title": title.rstrip("."),
        "command": shlex.join(["python", *_without_places(sys.argv)]),
        "device": device,
        "versions": {**_versions(), "threads": torch.get_num_threads()},
        "parts": parts,
        "ceilings": {},
        "settings": [],
    }


def _without_places(words: list[str]) -> list[str]:
    """A command line without the folders of one machine."""
    pairs = zip(["", *words], words, strict=False)
    named = [(option, "PEERS" if option == "--peers" else word) for option, word in pairs]
    return [word for option, word in named if "--json" not in (option, word)]


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


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
    lines = [f"# {run['facts']['GPU']}, {run['facts']['date']}", ""]
    lines += rows(["", ""], [[name, value] for name, value in run["facts"].items()])
    lines += ["", "## Stages", ""]
    lines += rows(
        ["stage", "outcome", "seconds", "last line of its output"],
        [[stage["name"], stage["outcome"], stage["seconds"], stage.get("last line", "")] for stage in run["stages"]],
    )
    lines += ["", "```", *[stage["command"] for stage in run["stages"]], "```"]
    for stage in run["stages"]:
        if "tail" in stage:
            lines += ["", f"The end of {stage['name']}:", "", "```", *stage["tail"], "```"]
    for benchmark in benchmarks:
        lines += ["", f"## {benchmark['title']}", "", f"`{benchmark['command']}`"]
        if benchmark["ceilings"]:
            lines += ["", f"Measured beforehand: {named(benchmark['ceilings'])}."]
        for setting in benchmark["settings"]:
            lines += ["", f"### {setting['setting']}", "", *table(benchmark["parts"], setting["sides"])]
    return "\n".join(lines) + "\n"


def table(parts: list[str], sides: dict[str, dict]) -> list[str]:
    """One row per side; `ratio` is how many times faster than the first side the last part is."""
    figures = list({name: None for own in sides.values() for name in own if name not in (*parts, "failed")})
    heads = ["side", *[f"{part} ms" for part in parts], "ratio", *figures]
    base = next(iter(sides.values()), {}).get(parts[-1])
    body = []
    for side, own in sides.items():
        if "failed" in own:
            body.append([side, own["failed"], *[""] * (len(heads) - 2)])
            continue
        ratio = f"{base[0] / own[parts[-1]][0]:.2f}x" if base else ""
        times = [f"{own[part][0] * 1e3:.3f}" for part in parts]
        body.append([side, *times, ratio, *[text(own.get(name, "")) for name in figures]])
    return rows(heads, body)


def rows(heads: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table."""
    cells = [heads, ["---"] * len(heads), *[[cell.replace("|", "/") for cell in row] for row in body]]
    return [f"| {' | '.join(row)} |" for row in cells]


# ---------------------------------------------------------------- a run of tools/gpu_suite.sh


def facts() -> dict[str, str]:
    """What the figures depend on."""
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    nvcc = _said(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"), "--version")
    commit = _said("git", "rev-parse", "HEAD")
    changed = " with changes" if commit and _said("git", "status", "--porcelain", "-uno") else ""
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver,
        "python": sys.version.split()[0],
        **_versions(),
        "CUDA of torch": torch.version.cuda,
        "nvcc": next((word for word in nvcc.split() if word.startswith("V")), ""),
        "git commit": (commit or os.environ.get("SRFT_COMMIT", "")) + changed,
    }
    return {name: str(value or "unknown") for name, value in found.items()}


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def stages(work: Path) -> list[dict]:
    """The suite's stages; those that did not pass with the last lines of their output."""
    found = []
    for line in (work / "stages.tsv").read_text(encoding="utf-8").splitlines():
        stage = dict(zip(("name", "outcome", "seconds", "command"), line.split("\t"), strict=True))
        log = work / f"{stage['name']}.log"
        if log.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            stage["last line"] = next((line for line in reversed(lines) if line.strip()), "")
            if stage["outcome"] != "passed":
                stage["tail"] = lines[-LAST_LINES:]
        found.append(stage)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    run = {"facts": facts(), "stages": stages(args.work)}
    paths = [args.work / f"{stage['name']}.json" for stage in run["stages"]]
    benchmarks = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    args.out.mkdir(parents=True, exist_ok=True)
    write(run | {"benchmarks": benchmarks}, args.out / "results.json")
    (args.out / "results.md").write_text(page(run, benchmarks), encoding="utf-8")


if __name__ == "__main__":
    main()
