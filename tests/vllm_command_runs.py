"""What the tests of commands that answer with vLLM do inside their process."""

import contextlib
import io
from pathlib import Path

from vllm_runs import prepare_process

from megatron_srft import cli
from megatron_srft import config as configuration
from megatron_srft.evaluate import evaluate_folder


def told(*arguments: object) -> tuple[int, str]:
    """Status of a command, and what it says on both streams."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = cli.main([str(argument) for argument in arguments])
    return status, out.getvalue()


def commands(folder: Path) -> dict[str, tuple[int, str]]:
    """Answers of a Hugging Face folder and of a checkpoint by both engines, scored by the one and by the trainer."""
    prepare_process()
    model, problems, dump, head = folder / "model", folder / "problems.jsonl", folder / "dump.jsonl", folder / "head"
    checkpoint = folder / "converted" / "checkpoints" / "step-000000"
    config = ["--config", folder / "config.yaml"]
    sampled = [*config, "--samples", 4, "--output", dump, "--head"]
    best = [*config, "--cost-candidates", 0, "--reward", "exact", "--output", folder / "best.html"]
    local = [*config, "--engine", "local", "--json", folder / "local.json"]
    classified = [*config, "--engine", "vllm", "--output", folder / "classified.jsonl"]
    of_checkpoint = [*config, "--hf-model", model, "--json", folder / "checkpoint.json"]
    found = evaluate_folder(model, configuration.load(folder / "config.yaml", [f"evaluation.files=[{problems}]"]))
    found.write_json(folder / "library.json")
    return {
        "generate": told("generate", model, problems, *sampled, head),
        "score": told("reward", "score", model, head, dump, *config, "--output", folder / "scores.jsonl"),
        "best-of-n": told("best-of-n", model, head, dump, *best),
        "other head": told("best-of-n", model, folder / "other", dump, *best),
        "last": told("reward", "score", model, folder / "last", dump, *config, "--output", folder / "last.jsonl"),
        "classified": told("reward", "score", model, folder / "last", dump, *classified),
        "classified best": told("best-of-n", model, folder / "last", dump, *best, "--engine", "vllm"),
        "vllm": told("evaluate", model, problems, *config, "--json", folder / "vllm.json"),
        "local": told("evaluate", model, problems, *local),
        "convert": told("convert", model, folder / "converted"),
        "checkpoint": told("evaluate", checkpoint, problems, *of_checkpoint),
        "other weights": told("generate", model, problems, *sampled, folder / "alien"),
    }
