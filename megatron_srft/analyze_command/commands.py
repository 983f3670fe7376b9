"""The analyses: from options to sources and texts, from there to a page and its figures."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_srft.analysis import clipped as clipping
from megatron_srft.analysis import entropies, output, probabilities, probability_page, sequences, trajectory
from megatron_srft.analysis.compare import compare_runs, group_runs
from megatron_srft.analysis.comparison_page import write_comparison
from megatron_srft.analysis.page import facts, table
from megatron_srft.analysis.policy import PolicyReader, PolicySource, common_tokenizer, measuring, reading
from megatron_srft.analyze_command.references import read_references
from megatron_srft.config import ConfigError, ParallelConfig, RunConfig, as_local, require
from megatron_srft.distributed import is_main
from megatron_srft.errors import launched_rank
from megatron_srft.policy_sources import find_settings, find_source, find_sources
from megatron_srft.sample import TrainingSequence


def compare(options: argparse.Namespace) -> int:
    """`analyze compare`."""
    comparison = compare_runs(group_runs(options.runs, options.group), options.target)
    print(comparison.to_markdown())
    return _tell(write_comparison(options.output, comparison))


def show_probabilities(options: argparse.Namespace) -> int:
    """`analyze probabilities`."""
    probabilities.check_thresholds(options.lower, options.higher)
    before, after = (find_source(path, options.hf_model) for path in (options.before, options.after))
    tokenizer, settings = common_tokenizer([before, after]), _settings(options, after)
    with reading(settings, _layout(options)) as reader:
        texts = _texts(options, reader, {"before": before, "after": after}, tokenizer)
        found = probabilities.change(texts, reader.teacher_forced(before, texts), reader.teacher_forced(after, texts))
    if launched_rank() > 0:
        return 0
    words = [_words(tokenizer, one) for one in texts]
    parts = {"Policies": facts(_about(options, settings, before=before, after=after, texts=_writer(options)))}
    parts |= probability_page.sections(
        found, words, lambda token: tokenizer.decode([token]),
        lower=options.lower, higher=options.higher, show=options.show, min_count=options.min_count,
    )  # fmt: skip
    tree = {"before": str(before.path), "after": str(after.path), "texts_by": _writer(options)}
    tree |= probabilities.to_json(found, words, options.lower, options.higher)
    part = probabilities.shares(found.all, options.lower, options.higher)
    print(f"{len(found.all)} tokens: {part.changed:.2%} changed, {part.lower:.2%} lower, {part.higher:.2%} higher")
    about = "How the probability of each token changed, by teacher forcing on the same texts."
    return _tell(output.write(options.output, "Change of token probabilities", about, parts, tree))


def show_trajectory(options: argparse.Namespace) -> int:
    """`analyze trajectory`."""
    policies = find_sources(options.sources, options.hf_model)
    tokenizer, settings = common_tokenizer(policies), _settings(options, policies[0])
    with reading(settings, _layout(options)) as reader:
        references = read_references(options, settings, tokenizer, reader)
        points = []
        for policy in policies:
            distances = {
                name: trajectory.distance(reader.teacher_forced(policy, texts), options.measure)
                for name, (texts, _) in references.items()
            }
            _progress(policy, distances)
            points.append(
                trajectory.Point(run=policy.run, step=policy.step, path=str(policy.path), distances=distances)
            )
    if launched_rank() > 0:
        return 0
    described = {
        name: {"from": str(origin), "texts": len(texts), "tokens": sum(t.response_length for t in texts)}
        for name, (texts, origin) in references.items()
    }
    parts = trajectory.sections(points, options.measure, described)
    tree = trajectory.to_json(points, options.measure, described)
    about = "Mean teacher-forced distance of each policy to the texts of the references."
    return _tell(output.write(options.output, "Training trajectory", about, parts, tree))


def show_clipped(options: argparse.Namespace) -> int:
    """`analyze clipped`."""
    clipping.check_clips(options.clip_low, options.clip_high)
    old, new = (find_source(path, options.hf_model) for path in (options.old, options.new))
    tokenizer, settings = common_tokenizer([old, new]), _settings(options, new)
    with reading(settings, _layout(options)) as reader:
        texts = _given_texts(options, settings, tokenizer)
        measured = [reader.teacher_forced(source, texts) for source in (old, new)]
        found = clipping.clipped_tokens(texts, *measured, options.clip_low, options.clip_high)
    if launched_rank() > 0:
        return 0
    words = {row.token: tokenizer.decode([row.token]) for row in found.by_token}
    rows = [
        [repr(words[row.token]), str(row.above), str(row.below), str(row.count), f"{row.share:.1%}",
         f"{row.mean_ratio:.3f}", f"{row.mean_clipped_ratio:.3f}"]
        for row in found.by_token[: options.show] if row.mean_clipped_ratio is not None
    ]  # fmt: skip
    sizes = {
        "Clipped above": f"{found.above:.2%} (ratio over {1 + options.clip_high:g}, positive advantage)",
        "Clipped below": f"{found.below:.2%} (ratio under {1 - options.clip_low:g}, negative advantage)",
        "Tokens": f"{found.tokens}, and {found.without_advantage} more without an advantage",
        "Mean ratio": f"{found.mean_ratio:.4f}",
    }
    heading = ["token", "clipped above", "below", "occurrences", "share clipped", "mean ratio", "of the clipped"]
    parts = {"Policies": facts(_about(options, settings, old=old, new=new) | sizes), "Tokens": table(heading, rows)}
    tree = {"old": str(old.path), "new": str(new.path)}
    tree |= clipping.to_json(found, words, options.clip_low, options.clip_high)
    print(f"{found.tokens} tokens: {found.above:.2%} clipped above, {found.below:.2%} below")
    for row in rows[:10]:
        print(f"  {row[0]:<16} clipped {int(row[1]) + int(row[2])} of {row[3]}, mean ratio {row[5]}")
    about = "Tokens whose gradient the clip of the importance ratio removes."
    return _tell(output.write(options.output, "Clipped tokens", about, parts, tree))


def show_entropy(options: argparse.Namespace) -> int:
    """`analyze entropy`."""
    policies = find_sources(options.sources, options.hf_model)
    tokenizer, settings = common_tokenizer(policies), _settings(options, policies[0])
    with reading(settings, _layout(options)) as reader:
        prompts = sequences.read_prompts([options.file], settings, tokenizer, options.max_problems)
        shown = sequences.demonstrations(prompts, [options.file]) if options.on != "samples" else []
        points = []
        for policy in policies:
            texts = {"demonstrations": shown} if shown else {}
            if options.on != "demonstrations":
                texts["samples"] = sequences.completions(reader.sample(policy, prompts, options.samples))
            found = {kind: entropies.entropy(reader.teacher_forced(policy, some)) for kind, some in texts.items()}
            _progress(policy, {kind: value for kind, (value, _) in found.items()})
            points.append(
                entropies.Point(
                    run=policy.run,
                    step=policy.step,
                    path=str(policy.path),
                    entropy={kind: value for kind, (value, _) in found.items()},
                    tokens={kind: number for kind, (_, number) in found.items()},
                )
            )
    if launched_rank() > 0:
        return 0
    about = "Two definitions that are not comparable: on the same demonstrations, and on each policy's own samples."
    tree = entropies.to_json(points) | {"temperature": settings.rollout.temperature or 1.0}
    return _tell(output.write(options.output, "Entropy", about, entropies.sections(points), tree))


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "probabilities": show_probabilities,
    "trajectory": show_trajectory,
    "clipped": show_clipped,
    "entropy": show_entropy,
    "compare": compare,
}

# ---------------------------------------------------------------- settings and texts


def _layout(options: argparse.Namespace) -> ParallelConfig:
    return ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)


def _settings(options: argparse.Namespace, source: PolicySource) -> RunConfig:
    """Settings of the source's run (or of --config), with what the command line says in their place."""
    settings = find_settings(source, options.config)
    rollout = as_local(settings.rollout)
    named = {"temperature": options.temperature, "max_response_tokens": getattr(options, "max_response_tokens", None)}
    rollout = replace(rollout, **{key: value for key, value in named.items() if value is not None})
    for name in ("samples", "show", "max_problems"):
        least = 1 if name == "samples" else 0
        if getattr(options, name, least) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(options, name)}")
    if options.what == "clipped" and (settings.kl.in_reward or settings.uses_critic) and _are_dumps(options.files):
        raise ConfigError(
            "the run's advantages hold a critic's values or a divergence (kl.place reward), which its rollout dumps do "
            "not; a --config without them takes those of the scores alone"
        )
    return replace(measuring(settings, rollout), seed=getattr(options, "seed", settings.seed))


def _texts(
    options: argparse.Namespace, reader: PolicyReader, sources: dict[str, PolicySource], tokenizer: Any
) -> list[TrainingSequence]:
    """What --texts asks for; rollout dumps are taken as they are. Raises ConfigError when there is no text."""
    if options.texts == "demonstrations" or _are_dumps(options.files):
        return _given_texts(options, reader.settings, tokenizer)
    prompts = sequences.read_prompts(options.files, reader.settings, tokenizer, options.max_problems)
    return sequences.completions(reader.sample(sources[options.texts], prompts, options.samples))


def _given_texts(options: argparse.Namespace, settings: RunConfig, tokenizer: Any) -> list[TrainingSequence]:
    """Demonstrations of data files, or completions of rollout dumps. Raises ConfigError when there are none."""
    if _are_dumps(options.files):
        found = sequences.dumped(options.files, settings, options.max_problems)
        require(bool(found), f"{', '.join(map(str, options.files))}: no completion in these dumps; take other ones")
        return found
    prompts = sequences.read_prompts(options.files, settings, tokenizer, options.max_problems)
    return sequences.demonstrations(prompts, options.files)


def _are_dumps(files: Sequence[Path]) -> bool:
    dumps = [sequences.is_dump(path) for path in files]
    if any(dumps) and not all(dumps):
        raise ConfigError(f"{files[dumps.index(False)]} is a data file beside rollout dumps; analyze them apart")
    return all(dumps)


def _writer(options: argparse.Namespace) -> str:
    return "rollout dumps" if _are_dumps(options.files) else options.texts


def _words(tokenizer: Any, one: TrainingSequence) -> dict[str, str]:
    return {
        "prompt": tokenizer.decode(one.token_ids[: one.prompt_length]),
        "response": tokenizer.decode(sequences.response(one)),
    }


# ---------------------------------------------------------------- telling


def _about(
    options: argparse.Namespace, settings: RunConfig, texts: str = "", **policies: PolicySource
) -> dict[str, str]:
    rows = {name.capitalize(): f"{source.name} ({source.path})" for name, source in policies.items()}
    rows["Files"] = ", ".join(map(str, options.files))
    rows |= {"Texts": f"written by: {texts}"} if texts else {}
    return rows | {"Temperature": f"{settings.rollout.temperature or 1.0:g} (of the probabilities)"}


def _progress(policy: PolicySource, figures: dict[str, float]) -> None:
    if is_main():
        print(policy.name, *(f"{name} {value:.4f}" for name, value in figures.items()), sep="  ", flush=True)


def _tell(written: Sequence[Path]) -> int:
    for path in written:
        print(path)
    return 0
