"""`megatron-srft best-of-n`: score candidates with a reward head, and see what choosing by it is worth."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_srft import distributed
from megatron_srft.analysis import output, sequences
from megatron_srft.analysis.policy import PolicyReader, PolicySource, measuring, reading
from megatron_srft.best_of_n import page
from megatron_srft.best_of_n.candidates import Candidates, read_candidates
from megatron_srft.best_of_n.cost import Costs, measure_costs
from megatron_srft.best_of_n.sweep import SWIFT, Question, Sweep, sweep
from megatron_srft.config import ConfigError, ParallelConfig, RunConfig, as_local
from megatron_srft.hidden_reward import RewardHead, check_fits, head_fingerprint, load_head, prompt_fingerprint
from megatron_srft.model_options import reward
from megatron_srft.policy_sources import find_settings, find_source
from megatron_srft.rewards import Scorer
from megatron_srft.rewards.over_ranks import score_over_ranks
from megatron_srft.rollout import load_tokenizer
from megatron_srft.rollout.vllm.tokens import check_classifier, score_by_classifier
from megatron_srft.sample import Group, TrainingSequence
from megatron_srft.trainer.trainer import Trainer
from megatron_srft.weights.architecture import Architecture


def main(options: argparse.Namespace) -> int:
    """Read, verify, score, choose, and write table, page and figures."""
    _check(options)
    head = load_head(options.head)
    if options.engine == "vllm":
        check_classifier(head)
    source = find_source(options.model, options.hf_model)
    settings = _settings(options, source)
    tokenizer = load_tokenizer(source.model)
    layout = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    with reading(settings, layout) as reader:
        candidates = _candidates(options, settings, tokenizer, reader)
        most = _most(candidates.groups, options.max_n)
        kept = [number for number, group in enumerate(candidates.groups) if len(group.completions) >= most]
        trainer = _fitting_trainer(reader, source, head, prompt_fingerprint(settings.data, tokenizer))
        texts = _texts(candidates.groups, trainer.models[0].architecture)
        found = stored_scores(candidates.groups, head)
        scores = _scores(trainer, head, texts, found, options)
        costs = _costs(trainer, head, [one for one in texts if one is not None], options.cost_candidates)
    if not distributed.is_main():
        return 0
    questions = _questions(candidates, scores)
    chosen = sweep(
        [questions[number] for number in kept], most, orders=options.orders, weights=options.weights, seed=options.seed
    )
    return _tell(options, source, candidates, questions, kept, chosen, costs, _sources(found, len(texts)))


def _check(options: argparse.Namespace) -> None:
    for name, least in (("orders", 1), ("cost_candidates", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(options, name)}")
    if options.max_n is not None and options.max_n < 1:
        raise ConfigError(f"--max-n must be at least 1, not {options.max_n}")


def _settings(options: argparse.Namespace, source: PolicySource) -> RunConfig:
    """Templates, limits and verifiers of the source's run or of --config; --reward in their place."""
    settings = find_settings(source, options.config)
    rollout = as_local(settings.rollout)
    if options.reward is not None:
        settings = replace(settings, rewards=(reward(options),))
    return measuring(settings, rollout)


# ---------------------------------------------------------------- candidates and their scores


def _candidates(
    options: argparse.Namespace, settings: RunConfig, tokenizer: object, reader: PolicyReader
) -> Candidates:
    def verify(groups: list[Group]) -> list[Group]:
        with Scorer(settings.resolved().rewards) as scorer:
            scorer.self_test()
            return score_over_ranks(scorer, groups, reader.groups.world)[0]

    found = read_candidates(options.candidates, settings.data, tokenizer, verify, options.scores)
    if found.ungraded == found.size:
        raise ConfigError(
            f"none of the {found.size} candidates has a verdict, so no choice can be right or wrong; give the rows an "
            "answer (with --reward math or exact), or the field correct"
        )
    wanted = 1 + len(found.external)
    if options.weights is not None and len(options.weights) != wanted:
        names = ", ".join([SWIFT, *found.external])
        raise ConfigError(f"--weights has {len(options.weights)} numbers; give {wanted}, for {names}")
    return found


def _most(groups: Sequence[Group], wanted: int | None) -> int:
    """The largest N: --max-n, or what every question has."""
    sizes = [len(group.completions) for group in groups]
    if wanted is None:
        return min(sizes)
    if wanted > max(sizes):
        raise ConfigError(
            f"--max-n is {wanted}, and no question has more than {max(sizes)} candidates; sample more "
            "(`megatron-srft generate --samples`), or lower it"
        )
    return wanted


def _fitting_trainer(reader: PolicyReader, source: PolicySource, head: RewardHead, prompt_format: str) -> Trainer:
    """The model with its weights; the head is known to be of these weights and prompts."""
    trainer = reader.trainer_with(source)
    trainer.reward_head = head  # refuses a head of other sizes, before all weights are read for their fingerprint
    trainer.reward_head = None
    check_fits(head, trainer.base_model(), prompt_format)
    return trainer


def _texts(groups: Sequence[Group], model: Architecture) -> list[TrainingSequence | None]:
    """One for each candidate of each group in order; None for a candidate without tokens.

    Raises:
        ValueError: a candidate does not fit the model; names its question.
    """
    found = []
    for one, group in zip(sequences.completions(groups), _owners(groups), strict=True):
        largest, length = int(one.token_ids.max()), len(one.token_ids)
        if largest >= model.vocab_size:
            raise ValueError(
                f"question {group.prompt.id}: a candidate has token {largest}, and the model's vocabulary ends at "
                f"{model.vocab_size - 1}; name the model that sampled it"
            )
        if length > model.max_positions:
            raise ValueError(
                f"question {group.prompt.id}: a candidate has {length} tokens with its prompt, more than the "
                f"{model.max_positions} positions of the model; leave it out"
            )
        found.append(one if one.response_length else None)
    return found


def _owners(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups for _ in group.completions]


def stored_scores(groups: Sequence[Group], head: RewardHead) -> dict[int, float | None]:
    """The scores that the candidates bring along, by their number over all groups: those that an engine read with this
    very head off the weights that it was trained on, which no update lies behind."""
    own = head_fingerprint(head)
    completions = [completion for group in groups for completion in group.completions]
    return {
        number: completion.hidden_score
        for number, completion in enumerate(completions)
        if completion.hidden_head == own and completion.policy_version == 0
    }


def _scores(
    trainer: Trainer,
    head: RewardHead,
    texts: Sequence[TrainingSequence | None],
    stored: dict[int, float | None],
    options: argparse.Namespace,
) -> list[float | None]:
    """Of every text: stored, or measured in one pass over all that have none."""
    rest = [number for number in range(len(texts)) if number not in stored]
    some = [texts[number] for number in rest]
    if options.engine == "vllm" and any(some):
        full = [one for one in some if one is not None]
        weights, source, folder = trainer.hf_weights(), trainer.source, options.output.parent
        known = iter(score_by_classifier(full, weights, head, source, folder))
        measured = [None if one is None else next(known) for one in some]
    else:
        measured = swift_scores(trainer, head, some) if rest else []
    found = stored | dict(zip(rest, measured, strict=True))
    return [found[number] for number in range(len(texts))]


def _sources(stored: dict[int, float | None], candidates: int) -> str:
    """Where the head's scores come from, in words."""
    parts = {"scored while they were sampled": len(stored), "scored here": candidates - len(stored)}
    return ", ".join(f"{number} {how}" for how, number in parts.items() if number)


def swift_scores(trainer: Trainer, head: RewardHead, texts: Sequence[TrainingSequence | None]) -> list[float | None]:
    """The head's score of every text in one log-prob pass; None where there is no token to score. Collective."""
    trainer.reward_head = head
    measured = iter(trainer.measure([one for one in texts if one is not None]))
    trainer.reward_head = None
    return [None if one is None else next(measured).hidden_score for one in texts]


def _costs(trainer: Trainer, head: RewardHead, texts: Sequence[TrainingSequence], candidates: int) -> Costs | None:
    return measure_costs(trainer, head, texts[:candidates]) if candidates else None


def _questions(candidates: Candidates, scores: Sequence[float | None]) -> list[Question]:
    rest = iter(scores)
    found = []
    for number, group in enumerate(candidates.groups):
        keys: dict[str, int] = {}
        own = [next(rest) for _ in group.completions]
        found.append(
            Question(
                correct=np.array([score.correct is True for score in group.scores]),
                lengths=np.array([len(completion.token_ids) for completion in group.completions]),
                answers=np.array(
                    [-1 if s.answer is None else keys.setdefault(s.answer, len(keys)) for s in group.scores]
                ),
                scores={SWIFT: np.array([np.nan if value is None else value for value in own])}
                | {name: columns[number] for name, columns in candidates.external.items()},
            )
        )
    return found


# ---------------------------------------------------------------- telling


def _tell(
    options: argparse.Namespace,
    source: PolicySource,
    candidates: Candidates,
    questions: Sequence[Question],
    kept: Sequence[int],
    found: Sweep,
    costs: Costs | None,
    sources: str,
) -> int:
    counts = _counts(candidates, questions, kept)
    about = {
        "Model": f"{source.name} ({source.path})",
        "Head": str(options.head),
        "Candidates": ", ".join(map(str, options.candidates)),
        "Scores of the head": sources,
    } | {name.capitalize(): str(number) for name, number in counts.items()}
    print(", ".join(f"{name} {number}" for name, number in counts.items()))
    print(f"candidates by the head: {sources}\n")
    print(page.text(found, costs))
    tree = {"model": str(source.path), "head": str(options.head), "files": [str(p) for p in options.candidates]}
    tree |= {"counts": counts} | page.to_json(found, costs)
    sentence = "Which of N candidates each rule picks, and how often that one is right."
    for path in output.write(options.output, "Best of N", sentence, page.sections(found, costs, about), tree):
        print(path)
    return 0


def _counts(candidates: Candidates, questions: Sequence[Question], kept: Sequence[int]) -> dict[str, int]:
    """Sizes, then what is missing, where something is; final answers count only where some candidate has one."""
    some = [questions[number] for number in kept]
    total = sum(len(one.correct) for one in some)
    abstaining = sum(int((one.answers < 0).sum()) for one in some)
    missing = {
        "questions with too few candidates left out": len(questions) - len(kept),
        "rows with an overlong prompt dropped": candidates.dropped,
        "rows joined to a question of the same id": candidates.merged,
        "candidates without a verdict (counted as wrong)": candidates.ungraded,
        "candidates without a final answer": abstaining if abstaining < total else 0,
        "candidates without a token to score": sum(int(np.isnan(one.scores[SWIFT]).sum()) for one in some),
    } | {f"candidates without {name}": candidates.unscored(name) for name in candidates.external}
    sizes = {
        "questions": len(kept),
        "candidates": total,
        "questions with right and wrong candidates": sum(len(set(one.correct.tolist())) == 2 for one in some),
    }
    return sizes | {name: number for name, number in missing.items() if number}
