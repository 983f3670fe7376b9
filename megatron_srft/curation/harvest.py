"""The loop behind `data distil` and `data act`: sample, verify, keep the correct ones, write, count."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from megatron_srft.config import VERIFIERS, RewardConfig
from megatron_srft.curation.output import Output
from megatron_srft.curation.problems import Problem
from megatron_srft.curation.progress import Progress
from megatron_srft.curation.selection import Selection, select, table
from megatron_srft.curation.sources import CurationError, Sample, Source
from megatron_srft.rewards import Scorer
from megatron_srft.sample import Completion, Group, Prompt, Score

Produce = Callable[[Sequence[Problem]], list[list[Sample]]]
"""Samples of each problem."""

REASONS = 3
"""Reasons of failed samples that are told, the most common ones."""

NO_TOKENS = np.zeros(0, np.int32)


def verifiers(rewards: Sequence[RewardConfig]) -> tuple[RewardConfig, ...]:
    """Those of a config's rewards that make the verdict: verifiers and format gates."""
    return tuple(reward for reward in rewards if reward.kind in (*VERIFIERS, "format"))


def harvest(
    problems: Sequence[Problem],
    produce: Produce,
    source: Source,
    scorer: Scorer,
    selection: Selection,
    output: Output,
    per_problem: int,
) -> Counter[str]:
    """Make demonstrations for every problem that `output` does not hold yet.

    Args:
        per_problem: samples that `produce` draws for a problem; with source.batch it sizes the portions.

    Returns:
        The counts of all problems of `output`, earlier ones included.

    Raises:
        CurationError: the source answers nobody, or there is no demonstration at the end.
    """
    waiting = [problem for problem in problems if problem.id not in output.done]
    progress, reasons = Progress(len(problems), "prompts"), Counter()
    portion, spoken = max(1, source.batch // per_problem), False
    for start in range(0, len(waiting), portion):
        some = waiting[start : start + portion]
        answers = produce(some)
        spoken = refuse_silence(answers, spoken, source, len(output.done))
        reasons.update(sample.reason for each in answers for sample in each if sample.finish_reason == "failed")
        for problem, samples, scores in zip(some, answers, verify(some, answers, scorer), strict=True):
            kept, counts = select(samples, scores, selection)
            row = problem.row([sample.text for sample in kept]) | {"made": _made(source, kept, counts)}
            output.add(problem.id, row if kept else None, counts)
        progress.show(len(output.done), f"{output.counts['kept']:,} demonstrations")
    for reason, number in reasons.most_common(REASONS):
        print(f"{number:,} failed this time: {reason}", file=sys.stderr)
    if not output.counts["kept"]:
        raise CurationError(
            f"no demonstration could be kept, so {output.path} is not written:\n{table(output.counts)}\nAsk a stronger "
            "model, draw more samples, or check --reward and --answer-after against what the model writes"
        )
    return output.counts


def verify(
    problems: Sequence[Problem], answers: Sequence[Sequence[Sample]], scorer: Scorer
) -> list[list[Score | None]]:
    """A score for every sample that ended by itself, None for the others."""
    groups = [
        Group(
            prompt=Prompt(
                id=problem.id, text=problem.messages[-1]["content"], token_ids=NO_TOKENS, answer=problem.record.answer,
                source=problem.record.source,
            ),
            completions=tuple(_completion(sample) for sample in samples if sample.finish_reason == "stop"),
        )
        for problem, samples in zip(problems, answers, strict=True)
    ]  # fmt: skip
    scored = []
    for group, samples in zip(scorer.score(groups), answers, strict=True):
        scores = iter(group.scores)
        scored.append([next(scores) if sample.finish_reason == "stop" else None for sample in samples])
    return scored


def _completion(sample: Sample) -> Completion:
    logprobs = np.zeros(0, np.float32)
    return Completion(
        token_ids=NO_TOKENS, text=sample.text, rollout_logprobs=logprobs, finish_reason="stop", policy_version=0
    )


def refuse_silence(answers: Sequence[Sequence[Sample]], spoken: bool, source: Source, done: int) -> bool:
    """Raise CurationError when the source is down, or has not answered once; True when it has.

    Args:
        spoken: it has answered before.
        done: problems or rows that are written.
    """
    samples = [sample for some in answers for sample in some]
    silent = [sample for sample in samples if sample.failure in ("endpoint", "not_asked")]
    spoken = spoken or len(silent) < len(samples)
    if not silent or (spoken and not any(sample.failure == "not_asked" for sample in silent)):
        return spoken
    reason = next((sample.reason for sample in silent if sample.failure == "endpoint"), silent[0].reason)
    kept = f"; what is done ({done}) is written, and --resume goes on behind it" if done else ""
    raise CurationError(f"{source.name} does not answer: {reason}{kept}")


def _made(source: Source, kept: Sequence[Sample], counts: Counter[str]) -> dict[str, object]:
    """Where a row's demonstrations come from."""
    made = {"by": source.name, "samples": counts["samples"], "correct": counts["correct"]}
    made["tokens"] = [sample.tokens for sample in kept]
    return made | ({"actions": [list(sample.actions) for sample in kept]} if kept and kept[0].actions else {})
