"""Accuracy on held-out problems: greedy, and avg@k, pass@k, majority@k over sampled answers, per file.

Greedy answers are always measured; sampled ones when the temperature is above 0. The random streams depend on the seed
and the problem only, so two evaluations of a run differ by their weights and nothing else.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_srft import distributed
from megatron_srft.config import EvaluationConfig, RunConfig, SamplingConfig, require
from megatron_srft.data import Dataset, load_problems
from megatron_srft.hidden_reward import RewardHead
from megatron_srft.rewards import Scorer
from megatron_srft.rewards.statistics import average_at_k, majority_at_k, pass_at_k
from megatron_srft.rollout import RolloutEngine, collect, load_local_engine, load_tokenizer, load_vllm_engine
from megatron_srft.sample import Group

STREAM = -1
"""Takes the place of the step in the random streams of sampled answers; no training step has this number."""


@dataclass(frozen=True, kw_only=True)
class FileResult:
    """Accuracies of one file, each the mean over its problems.

    Example: problems=200, greedy=0.41, samples=2, average=0.38, pass_at={1: 0.38, 2: 0.51}, majority_at={2: 0.38}.
    """

    problems: int
    greedy: float
    samples: int = 0
    """Sampled answers per problem; 0 when only greedy ones were measured."""
    average: float | None = None
    pass_at: dict[int, float] = field(default_factory=dict)
    majority_at: dict[int, float] = field(default_factory=dict)
    mean_length: float
    """Tokens per answer, of the sampled ones if there are any."""
    truncated_share: float
    """Of those, the share cut at rollout.max_response_tokens."""
    unverified_share: float
    """Of all answers, the share without a verdict; they count as wrong."""

    def columns(self) -> dict[str, float]:
        """The figures under their usual names, most telling first."""
        values = {"greedy": self.greedy}
        if self.average is not None:
            values[f"avg@{self.samples}"] = self.average
        values |= {f"pass@{k}": value for k, value in self.pass_at.items() if k > 1}
        values |= {f"majority@{k}": value for k, value in self.majority_at.items()}
        return values | {
            "length": self.mean_length,
            "truncated": self.truncated_share,
            "unverified": self.unverified_share,
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    files: dict[str, FileResult]
    settings: dict[str, Any]
    """How the answers were made: samples, temperature, top_p, max_response_tokens, stop, seed."""
    greedy_answers: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """For each file, in its order: id, prompt and greedy response of each problem."""

    def metrics(self) -> dict[str, float]:
        """eval/<file>/<figure>, for the metric sink."""
        return {f"eval/{name}/{key}": v for name, file in self.files.items() for key, v in file.columns().items()}

    def table(self) -> str:
        """One line per file."""
        rows = [
            {"file": name, "problems": str(file.problems)} | {k: _figure(k, v) for k, v in file.columns().items()}
            for name, file in self.files.items()
        ]
        heads = list(dict.fromkeys(key for row in rows for key in row))
        widths = {head: max(len(head), *(len(row.get(head, "")) for row in rows)) for head in heads}
        lines = [{head: head for head in heads}, *rows]
        return "\n".join(
            "  ".join(
                line.get(h, "").ljust(widths[h]) if h == "file" else line.get(h, "").rjust(widths[h]) for h in heads
            )
            for line in lines
        )

    def write_json(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def load_held_out(config: RunConfig, tokenizer: Any) -> list[tuple[str, Dataset]]:
    """(name, problems) of each of evaluation.files; at most evaluation.max_problems of each.

    Raises:
        ConfigError, ValueError: two files have one name, or one cannot be read.
    """
    names = [Path(path).stem for path in config.evaluation.files]
    require(len(set(names)) == len(names), f"evaluation.files: two files are called {names}; rename one")
    return [
        (name, load_problems((path,), config.data, tokenizer, config.evaluation.max_problems))
        for name, path in zip(names, config.evaluation.files, strict=True)
    ]


def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    datasets: Sequence[tuple[str, Dataset]],
    config: EvaluationConfig,
    sampling: SamplingConfig,
    seed: int,
    world: distributed.Group,
) -> EvaluationResult:
    """Answer every problem with the engine's current weights and score the answers.

    Args:
        datasets: (name, problems) of each file, the same on every rank.
        sampling: gives the length limit and the stop strings; temperature and top_p come from `config`.
        world: shares the problems; every rank returns the same result.
    """
    greedy = SamplingConfig(temperature=0.0, max_response_tokens=sampling.max_response_tokens, stop=sampling.stop)
    sampled = dataclasses.replace(greedy, temperature=config.temperature, top_p=config.top_p)
    files, greedy_answers = {}, {}
    for name, dataset in datasets:
        prompts = list(dataset.prompts)
        passes = [(1, greedy), (config.samples, sampled)] if config.temperature else [(1, greedy)]
        answers = [
            collect(engine, prompts, [None] * len(prompts), n, how, seed, STREAM, world, score=scorer.score)
            for n, how in passes
        ]
        files[name] = summarise(*answers)
        greedy_answers[name] = [
            {"id": group.prompt.id, "prompt": group.prompt.text, "response": group.completions[0].text}
            for group in answers[0]
        ]
    settings = {"samples": config.samples, "seed": seed} | dataclasses.asdict(sampled)
    return EvaluationResult(files=files, settings=settings, greedy_answers=greedy_answers)


def summarise(greedy: list[Group], sampled: Sequence[Group] = ()) -> FileResult:
    """Figures of one file from its scored groups: one greedy answer each, and n sampled ones each (or none)."""
    completions = [c for group in sampled or greedy for c in group.completions]
    scores = [score for group in [*greedy, *sampled] for score in group.scores]
    return FileResult(
        problems=len(greedy),
        greedy=_mean([average_at_k(_verdicts(group)) for group in greedy]),
        mean_length=_mean([len(c.token_ids) for c in completions]),
        truncated_share=_mean([c.finish_reason == "length" for c in completions]),
        unverified_share=_mean([not score.is_judged for score in scores]),
        **(_sampled_figures(sampled) if sampled else {}),
    )


def _sampled_figures(groups: Sequence[Group]) -> dict[str, Any]:
    samples = len(groups[0].completions)
    verdicts = [_verdicts(group) for group in groups]
    answers = [[score.answer for score in group.scores] for group in groups]
    ks = ballot_sizes(samples)
    return dict(
        samples=samples,
        average=_mean([average_at_k(verdict) for verdict in verdicts]),
        pass_at={k: _mean([pass_at_k(samples, sum(verdict), k) for verdict in verdicts]) for k in ks},
        majority_at={
            k: _mean([majority_at_k(a, v, k) for a, v in zip(answers, verdicts, strict=True)]) for k in ks if k > 1
        },
    )


def ballot_sizes(samples: int) -> list[int]:
    """1, 2, 4, ... below the number of samples, and that number."""
    return [2**i for i in range(samples.bit_length()) if 2**i < samples] + [samples]


def evaluate_folder(
    model_folder: str | Path,
    config: RunConfig,
    world: distributed.Group = None,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> EvaluationResult:
    """Evaluate a Hugging Face folder on config.evaluation.files, on the first GPU of this process or on the CPU.

    Needs neither megatron nor a run: of `config` it uses data, rollout, rewards, evaluation, seed and model.dtype.

    Args:
        world: the ranks that share the problems; with vLLM, those of torch.distributed.
        weights: take the place of the folder's own, for example those of a checkpoint.

    Raises:
        ConfigError, ValueError: the folder or a file is missing or wrong, or problems exceed the model's positions.
        VerifierError: the rewards' self-test fails.
    """
    require(bool(config.evaluation.files), "evaluation.files names no file to evaluate on")
    require(config.rollout.kind != "replay", "rollout.kind replay cannot answer in an evaluation; set it to local")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(model_folder)))
    tokenizer = load_tokenizer(config.model)
    datasets = load_held_out(config, tokenizer)
    with answering(config, tokenizer, weights, world) as (engine, scorer):
        return evaluate(engine, scorer, datasets, config.evaluation, config.rollout, config.seed, world)


@contextmanager
def answering(
    config: RunConfig,
    tokenizer: Any,
    weights: Iterable[tuple[str, torch.Tensor]] | None,
    world: distributed.Group = None,
    head: RewardHead | None = None,
) -> Iterator[tuple[RolloutEngine, Scorer]]:
    """An engine with the weights of config.model.path (or those given), and a scorer that passed its self-test.

    Args:
        head: scores the answers while they are sampled; vLLM alone can.

    Raises:
        ConfigError, VerifierError: the folder cannot be read, or the self-test fails.
    """
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    with Scorer(config.resolved().rewards) as scorer:
        scorer.self_test()
        if config.rollout.kind != "local":
            with distributed.joined(device):
                engine = load_vllm_engine(config, tokenizer, device, world, weights, head)
                yield engine, scorer
                engine.close()  # not after a failure, when other ranks may not come to it
            return
        engine = load_local_engine(config.model, tokenizer, device, config.rollout.max_concurrent_sequences)
        if weights is not None:
            engine.update_weights(weights, 0)
        yield engine, scorer


def _verdicts(group: Group) -> list[bool]:
    return [score.correct is True for score in group.scores]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _figure(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "length" else f"{100 * value:.1f} %"
