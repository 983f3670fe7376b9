"""The study: every method of methods.py with several seeds on one task, then a table and a page.

    python examples/study/study.py                     # make study: at most 3 hours on 2 cores
    python examples/study/study.py --quick             # make study-quick: minutes
    python examples/study/study.py --methods grpo,luffy --seeds 2

Each run is the ordinary training command on a config file written to <folder>/configs, so it can be repeated by hand. A
finished run is not run again, an interrupted one goes on from its checkpoint, one that fails does not stop the others.
The results (<folder>/results.md, .json, comparison.html) are written from the runs that are finished.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bar over written weights obeys it too

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(HERE))

import base_model  # noqa: E402
import task  # noqa: E402
from methods import METHODS, QUICK, Budget, Settings  # noqa: E402
from tables import write_results  # noqa: E402

from megatron_srft.config import merge  # noqa: E402
from megatron_srft.data_command import number  # noqa: E402

ENDED_BY_SIGNAL = (-signal.SIGTERM, -signal.SIGINT, 130)
"""Status of a run that was asked to end before its first step, so with nothing to save. Ctrl-C reaches it as well."""

FULL, SHORT = Budget(), Budget(steps=40)
"""What a run may spend in the full and in the quick form."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where things are, and what one run may spend."""

    folder: Path
    base: Path
    data: Path
    budget: Budget

    def settings(self, method: str, seed: int) -> Settings:
        """The config of one run: config.yaml, the method's own settings, and where things are."""
        common = yaml.safe_load((HERE / "config.yaml").read_text(encoding="utf-8"))
        here = {
            "name": run_name(method, seed),
            "run_dir": str(self.folder),
            "seed": seed,
            "model": {"path": str(self.base)},
            "data": {"train": [str(self.data / "train.jsonl")]},
            "evaluation": {"files": [str(self.data / f"{name}.jsonl") for name in task.HELD_OUT]},
        }
        return merge(merge(common, METHODS[method](self.budget)), here)

    def config_file(self, method: str, seed: int) -> Path:
        return self.folder / "configs" / f"{run_name(method, seed)}.yaml"

    def cost_file(self, method: str, seed: int) -> Path:
        return self.folder / "costs" / f"{run_name(method, seed)}.json"

    def run_folder(self, method: str, seed: int) -> Path:
        return self.folder / run_name(method, seed)

    def is_finished(self, method: str, seed: int) -> bool:
        """The trainer writes this folder last."""
        return (self.run_folder(method, seed) / "hf" / "final" / "config.json").exists()


def run_name(method: str, seed: int) -> str:
    return f"{method}-s{seed}"


def prepare(study: Study, plan: list[tuple[str, int]]) -> None:
    """Data, base model, and a config file for each run.

    Raises:
        SystemExit: the folder holds runs with other settings.
    """
    if not (study.data / "train.jsonl").exists():
        task.make(study.data, task.Setting())
    if not (study.base / "config.json").exists():
        print("making the base model: a minute or two", flush=True)
        base_model.make(study.base)
    for name in ("configs", "costs", "logs"):
        (study.folder / name).mkdir(parents=True, exist_ok=True)
    for method, seed in plan:
        path, text = study.config_file(method, seed), yaml.safe_dump(study.settings(method, seed), sort_keys=False)
        if path.exists() and path.read_text(encoding="utf-8") != text and study.run_folder(method, seed).exists():
            sys.exit(
                f"study: {study.run_folder(method, seed)} was run with other settings (its config is {path}); "
                "name another --folder, or remove both"
            )
        path.write_text(text, encoding="utf-8")


def run_one(study: Study, method: str, seed: int, deadline: float, stop: threading.Event) -> str | None:
    """Train one run if it is not finished; returns what went wrong, or None.

    At the deadline, or when asked to stop, the run gets SIGTERM: it saves its state, and the next call resumes it.
    """
    name = run_name(method, seed)
    if study.is_finished(method, seed):
        return None
    if stop.is_set():
        return "not started: the study was interrupted"
    if time.monotonic() >= deadline:
        return "not started: the time is up"
    log = study.folder / "logs" / f"{name}.log"
    command = [sys.executable, "-m", "megatron_srft.train", str(study.config_file(method, seed))]
    # One thread each: the model is too small for a second one, and runs side by side would wait for each other.
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        cpu_seconds = wait(process, deadline, stop)
    attempt = {
        "wall_seconds": time.monotonic() - start,
        "cpu_seconds": cpu_seconds,
        "status": process.returncode,
    }
    path = study.cost_file(method, seed)
    attempts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    task.write_whole(path, json.dumps([*attempts, attempt], indent=2) + "\n")
    return None if study.is_finished(method, seed) else unfinished(process.returncode, log)


def unfinished(status: int, log: Path) -> str:
    """Why a run has ended without its model."""
    if status in (0, *ENDED_BY_SIGNAL):
        return "interrupted; the same command goes on with it"
    return f"failed with status {status}; {last_line(log)} (all of it: {log})"


def wait(process: subprocess.Popen, deadline: float, stop: threading.Event) -> float:
    """Wait for a process, ask it to end when it is time; its processor seconds, those of its own children included."""
    asked, pid = False, 0
    while not pid:
        time.sleep(0.2)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if not pid and not asked and (stop.is_set() or time.monotonic() >= deadline):
            process.terminate()
            asked = True
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def run_all(study: Study, plan: list[tuple[str, int]], jobs: int, hours: float) -> dict[str, str]:
    """Train all runs, `jobs` at a time; what went wrong, by run."""
    deadline, stop = time.monotonic() + 3600 * hours, threading.Event()
    done, lock = 0, threading.Lock()

    def one(item: tuple[str, int]) -> tuple[str, str | None]:
        nonlocal done
        start = time.monotonic()
        problem = run_one(study, *item, deadline, stop)
        with lock:
            done += 1
            seconds = time.monotonic() - start
            print(f"[{done}/{len(plan)}] {run_name(*item):<22} {seconds:5.0f} s  {problem or 'done'}", flush=True)
        return run_name(*item), problem

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        started = [pool.submit(one, item) for item in plan]
        try:
            results = [each.result() for each in started]
        except KeyboardInterrupt:
            print("study: stopping the runs; they save their state, and the same command goes on", file=sys.stderr)
            stop.set()
            raise
    return {name: problem for name, problem in results if problem}


def conduct(study: Study, methods: list[str], seeds: int, jobs: int, hours: float, target: float) -> int:
    """Train what is not finished, write the results of what is; 1 when something went wrong or was left undone."""
    # All methods with the first seed, then with the second: a study that is cut short still compares like with like.
    plan = [(method, seed) for seed in range(seeds) for method in methods]
    prepare(study, plan)
    problems = run_all(study, plan, jobs, hours)
    for name, problem in problems.items():
        print(f"{name}: {problem}", file=sys.stderr)
    finished = {m: [s for s in range(seeds) if study.is_finished(m, s)] for m in methods}
    finished = {method: done for method, done in finished.items() if done}
    if not finished:
        print("study: no run is finished, so there is nothing to compare", file=sys.stderr)
        return 1
    runs = {method: [study.run_folder(method, seed) for seed in done] for method, done in finished.items()}
    costs = {method: [study.cost_file(method, seed) for seed in done] for method, done in finished.items()}
    print(write_results(study.folder, runs, costs, study.base, study.data, target))
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"one seed, {SHORT.steps} steps, of " + ", ".join(QUICK))
    parser.add_argument("--folder", type=Path, help="where runs and results go [runs/study, runs/study-quick]")
    parser.add_argument("--methods", help="names separated by commas [all]: " + ", ".join(METHODS))
    parser.add_argument("--seeds", type=number(int, 1), help="seeds of each method [5, quick: 1]")
    parser.add_argument("--jobs", type=number(int, 1), default=2, help="runs side by side, one thread each [2]")
    parser.add_argument(
        "--hours", type=number(float, 0), default=3.0, help="then stop and save the runs; 0: results only [3]"
    )
    parser.add_argument(
        "--target", type=number(float, 0, 1, above=True), default=0.75, help="accuracy whose cost is compared [0.75]"
    )
    options = parser.parse_args()
    named = dict.fromkeys(options.methods.split(",")) if options.methods else None
    methods = list(named or (QUICK if options.quick else METHODS))
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]}; there are {', '.join(METHODS)}")
    folder = Path(os.path.relpath(options.folder, ROOT)) if options.folder else None
    os.chdir(ROOT)
    study = Study(
        folder=folder or Path("runs") / ("study-quick" if options.quick else "study"),
        base=HERE.relative_to(ROOT) / "base",
        data=HERE.relative_to(ROOT) / "data",
        budget=SHORT if options.quick else FULL,
    )
    seeds = options.seeds or (1 if options.quick else 5)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's way to interrupt
    try:
        return conduct(study, methods, seeds, options.jobs, options.hours, options.target)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
