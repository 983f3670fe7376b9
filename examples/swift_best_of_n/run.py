"""SWIFT as a chooser of answers, from nothing to a table, on two tasks: arithmetic chains and advice.

    python examples/swift_best_of_n/run.py                   # minutes on 2 cores
    python examples/swift_best_of_n/run.py --quick           # smaller; only to see that it runs
    python examples/swift_best_of_n/run.py --tasks chains

For each task: a policy is pre-trained, its answers are sampled and judged (`megatron-srft generate`), heads are trained
on some (`reward train`) and choose among the others (`best-of-n`). What is finished is not done again; the commands are
printed, and can be repeated by hand.
"""

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(HERE))

import advice  # noqa: E402
import chains  # noqa: E402
import lessons  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402
import torch  # noqa: E402

from megatron_srft import cli  # noqa: E402
from megatron_srft.analysis.compare import markdown  # noqa: E402
from megatron_srft.rollout import dump, load_dump  # noqa: E402

EMBEDDING = "embedding"
"""Name of the scores of a head on layer 0 alone, which sees which words a response has and nothing else."""
SHOWN = ("random", "shortest", "longest", "majority", EMBEDDING, "probe", "swift", "swift vote", "oracle")
"""Rules of the table, in its order, where a task has them."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    single_steps: int = 420
    """Updates of the lesson in single steps of arithmetic."""
    chain_steps: int = 450
    advice_steps: int = 500
    train: int = 300
    """Questions whose answers the heads learn from."""
    test: int = 150
    advice_train: int = 120
    advice_test: int = 60
    train_samples: int = 8
    test_samples: int = 16
    epochs: int = 12


QUICK = Sizes(single_steps=20, chain_steps=30, advice_steps=220, train=24, test=12, advice_train=24, advice_test=12,
              train_samples=4, test_samples=4, epochs=2)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to see that it runs; its figures mean nothing"
    )
    parser.add_argument("--tasks", default="chains,advice", help="[chains,advice]")
    parser.add_argument("--folder", type=Path, help="[runs/swift_best_of_n, with --quick runs/swift_best_of_n-quick]")
    parser.add_argument("--seed", type=int, default=0, help="of policies, samples and heads [0]")
    options = parser.parse_args()
    tasks = options.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"unknown task {unknown[0]}; there are {', '.join(TASKS)}")
    folder = (options.folder or ROOT / "runs" / ("swift_best_of_n" + "-quick" * options.quick)).resolve()
    torch.set_num_threads(1)  # the models are too small for a second one to help
    start = time.monotonic()
    results = {}
    for task in tasks:
        results |= TASKS[task](folder / task, QUICK if options.quick else Sizes(), options.seed)
    text = "\n\n".join(f"**{title}**\n\n{table(figures)}" for title, figures in results.items()) + "\n"
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{time.monotonic() - start:.0f} s; tables: {folder / 'results.md'}")
    print("pages: " + ", ".join(str(page) for page in sorted(folder.rglob("best_of_n.html"))))
    return 0


# ---------------------------------------------------------------- tasks


def run_chains(folder: Path, sizes: Sizes, seed: int) -> dict[str, dict]:
    """Right and wrong by the verifier."""
    policy = folder / "policy"
    if not (policy / "config.json").exists():
        print("chains: pre-training the policy", flush=True)
        torch.manual_seed(seed)
        generator = random.Random(seed)
        tokenizer = lessons.make_tokenizer(("".join(chains.document(generator)) for _ in range(500)), vocabulary=0)
        model = pretrain.make_model("tiny", tokenizer)
        lessons.teach(model, tokenizer, chains.single_step, steps=sizes.single_steps, batch=96, seed=seed)
        lessons.teach(model, tokenizer, chains.document, steps=sizes.chain_steps, seed=seed + 1)
        pretrain.save(model, tokenizer, policy)
    chains.write_problems(folder / "data", sizes.train, sizes.test, seed)
    verifier = ("--reward", "exact", "--answer-after", "#")
    for part, samples in (("train", sizes.train_samples), ("test", sizes.test_samples)):
        generate(folder, part, samples, seed, *verifier, "--max-response-tokens", "64")
    rollouts = [folder / f"{part}.jsonl.zst" for part in ("train", "test")]
    return {"Arithmetic chains": choose(policy, *rollouts, folder, sizes, seed)}


def run_advice(folder: Path, sizes: Sizes, seed: int) -> dict[str, dict]:
    """Helpful and harmless by rules on the text: one set of samples, two sets of labels, two heads."""
    policy = folder / "policy"
    if not (policy / "config.json").exists():
        print("advice: pre-training the policy", flush=True)
        torch.manual_seed(seed)
        generator = random.Random(seed)
        tokenizer = lessons.make_tokenizer(" ".join(advice.document(generator)) for _ in range(2000))
        model = pretrain.make_model("tiny", tokenizer)
        lessons.teach(model, tokenizer, advice.document, steps=sizes.advice_steps, batch=32, seed=seed)
        pretrain.save(model, tokenizer, policy)
    advice.write_problems(folder / "data", sizes.advice_train, sizes.advice_test, seed)
    for part, samples in (("train", sizes.train_samples), ("test", sizes.test_samples)):
        generate(folder, part, samples, seed, "--max-response-tokens", "32")
    found = {}
    for name, rule in advice.RULES.items():
        labelled = [label(folder / f"{part}.jsonl.zst", folder / name, rule) for part in ("train", "test")]
        found[f"Advice, {name}"] = choose(policy, *labelled, folder / name, sizes, seed)
    return found


TASKS = {"chains": run_chains, "advice": run_advice}


def label(rollouts: Path, folder: Path, rule: Callable[[str, str], bool]) -> Path:
    """The rollouts with verdicts by a rule of prompt and response."""
    target, groups = folder / rollouts.name, []
    for group in load_dump(rollouts):
        verdicts = [rule(group.prompt.text, completion.text) for completion in group.completions]
        scores = [
            replace(score, reward=float(verdict), correct=verdict, status="verified")
            for score, verdict in zip(group.scores, verdicts, strict=True)
        ]
        groups.append(replace(group, scores=tuple(scores)))
    dump(groups, target)
    right = sum(score.correct for group in groups for score in group.scores)
    print(f"{target}: {right / sum(len(group.scores) for group in groups):.1%} {folder.name}", flush=True)
    return target


# ---------------------------------------------------------------- the commands


def generate(folder: Path, part: str, samples: int, seed: int, *more: str) -> None:
    output = folder / f"{part}.jsonl.zst"
    if not output.exists():
        problems = folder / "data" / f"{part}.jsonl"
        arguments = ("--samples", samples, "--temperature", "1", "--seed", seed, "--output", output)
        command("generate", folder / "policy", problems, *arguments, *more)


def choose(policy: Path, train: Path, test: Path, folder: Path, sizes: Sizes, seed: int) -> dict:
    """Train heads on `train`, choose among `test`; the figures of `best-of-n`."""
    scores = folder / "scores.jsonl"
    head, shallow = train_head(policy, train, folder / "head", sizes, seed), folder / "head-embedding"
    if not scores.exists():
        train_head(policy, train, shallow, sizes, seed, "--layers", "0")
        parts = [folder / f"scores-{EMBEDDING}.jsonl", folder / "scores-probe.jsonl"]
        command("reward", "score", policy, shallow, test, "--name", EMBEDDING, "--output", parts[0])
        if importlib.util.find_spec("sklearn") is not None:
            print(f"\nprobe.py {train} {test}", flush=True)
            probe.write_scores(policy, train, test, parts[1])
        else:
            print("no scikit-learn here, so no probe; pip install -r requirements/probe.txt adds it", flush=True)
        join_scores([part for part in parts if part.exists()], scores)
    page = folder / "best_of_n.html"
    command("best-of-n", policy, head, test, "--scores", scores, "--output", page)
    return json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))


def train_head(policy: Path, train: Path, head: Path, sizes: Sizes, seed: int, *more: str) -> Path:
    if not (head / "reward_head.json").exists():
        how = ("--standardise", "--lr", "0.003", "--epochs", sizes.epochs, "--seed", seed)
        command("reward", "train", policy, train, "--output", head, *how, *more)
    return head


def join_scores(parts: Sequence[Path], target: Path) -> None:
    """One row for each question, with the scores of all files."""
    rows: dict[str, dict] = {}
    for part in parts:
        for line in part.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault(row["id"], {}).update(row["scores"])
    text = "".join(json.dumps({"id": name, "scores": found}) + "\n" for name, found in rows.items())
    target.write_text(text, encoding="utf-8")


def command(*words: object) -> None:
    """One of megatron_srft's commands, in this process: a fresh one would import everything anew. End here when it
    fails."""
    arguments = [str(word) for word in words]
    print("\n$ megatron-srft " + " ".join(arguments), flush=True)
    status = cli.main(arguments)
    if status:
        sys.exit(f"run.py: the command above failed with status {status}")


def table(figures: dict) -> str:
    """Accuracy by rule and N, the gain over a random choice with its interval, and AUROC."""
    sweep = figures["sweep"]
    sizes = [point["n"] for point in sweep["curves"]["random"]]
    middle = sizes.index(4) if 4 in sizes else len(sizes) - 1
    heading = ["rule", *(f"N = {n}" for n in sizes), f"gain at {sizes[middle]}, points", "AUROC within"]
    rows = []
    for name in SHOWN:
        if name not in sweep["curves"]:
            continue
        curve, auroc = sweep["curves"][name], sweep["auroc"].get(name)
        point = curve[middle]
        gain = f"{100 * point['gain']:+.1f} ({100 * point['gain_low']:+.1f} to {100 * point['gain_high']:+.1f})"
        cells = [f"{point['accuracy']:.1%}" for point in curve]
        rows.append([name, *cells, "" if name == "random" else gain, "" if auroc is None else f"{auroc:.3f}"])
    return markdown(heading, rows)


if __name__ == "__main__":
    sys.exit(main())
