"""`reward train` and `reward score`."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_srft.analysis.sequences import sequence
from megatron_srft.config import ConfigError
from megatron_srft.distributed import is_main
from megatron_srft.errors import launched_rank
from megatron_srft.hidden_reward import HeadConfig, RewardHead, check_fits, load_head, save_head
from megatron_srft.hidden_reward.fit import Epoch, FitSettings, Fitted, fit
from megatron_srft.hidden_reward.head import HIDDEN, LOGITS
from megatron_srft.hidden_reward.losses import loss_name
from megatron_srft.hidden_reward.parts import Responses, check_labels, questions_of, split, teaching
from megatron_srft.hidden_reward.quality import quality
from megatron_srft.hidden_reward.states import States
from megatron_srft.reward_command import page
from megatron_srft.reward_command.classifier import export_head
from megatron_srft.reward_command.given import given
from megatron_srft.reward_command.published import import_head
from megatron_srft.reward_command.responses import check_tokens, dumped_groups, verified
from megatron_srft.rollout.vllm.tokens import check_classifier, score_by_classifier
from megatron_srft.sample import Group
from megatron_srft.trainer.hidden_features import Recomputed, lm_head
from megatron_srft.trainer.states_cache import Cached, cache_bytes


def train(options: argparse.Namespace) -> int:
    """`reward train`."""
    settings = _fit_settings(options)
    if options.output.exists():
        raise ConfigError(f"--output {options.output} is there already; name a folder that is to be made")
    if options.cache_gib < 0:
        raise ConfigError(f"--cache-gib must be at least 0, not {options.cache_gib:g}")
    extra = dumped_groups(options.rollouts) if options.demonstrations else []
    with given(options) as start:
        layers = _layers(options, start.architecture.num_layers)
        known = verified(start.groups, extra, least_tokens=2 if options.last_token == "excluded" else 1)
        check_tokens(known.sequences, known.responses.names, start.architecture)
        parts = split(known.responses.questions, settings.validation_share, settings.seed)
        check_labels(known.responses, teaching(known.responses, parts[0], settings.loss), parts[1], settings.loss)
        counts = known.counts | start.counts
        if is_main():
            print("\n".join(f"{name:<36}{number:>8}" for name, number in counts.items()), flush=True)
        trainer = start.load()
        config = HeadConfig(
            base=trainer.base_model(),
            layers=layers,
            trained_on=LOGITS if options.logits else HIDDEN,
            gate=settings.gate,
            normalisation=options.normalisation,
            last_token=options.last_token,
            prompt_format=start.prompt_format,
        )
        states = _states(options, Recomputed(trainer, known.sequences, config), known.responses)
        unembedding = lm_head(trainer) if config.trained_on == LOGITS else None
        fitted = fit(states, known.responses, settings, parts=parts, lm_head=unembedding, report=_tell)
    if launched_rank() > 0:
        return 0
    config = replace(config, training=_training(settings, fitted))
    save_head(RewardHead(config=config, weight=fitted.weight.cpu(), bias=fitted.bias.cpu()), options.output)
    page.write(options.output, options, config, fitted, counts)
    print(page.text_table({"training, as it went": fitted.best.train, "held out": fitted.best.validation}))
    print(f"epoch {fitted.best.number} of {len(fitted.epochs)}, {config.parameter_count} parameters: {options.output}")
    return 0


def score(options: argparse.Namespace) -> int:
    """`reward score`."""
    head = load_head(options.head)
    if options.engine == "vllm":
        check_classifier(head)
    if options.output.is_dir() or not options.output.parent.is_dir():
        raise ConfigError(f"--output {options.output}: name a file in a folder that is there")
    with given(options) as start:
        sequences = [
            sequence(group.prompt, completion.token_ids, place, is_demonstration=False)
            for place, group in enumerate(start.groups)
            for completion in group.completions
        ]
        check_tokens(sequences, [start.groups[one.group].prompt.id for one in sequences], start.architecture)
        trainer = start.load()
        check_fits(head, trainer.base_model(), start.prompt_format, weights=not options.other_weights)
        if options.engine == "vllm":
            found = score_by_classifier(sequences, trainer.hf_weights(), head, trainer.source, options.output.parent)
        else:
            trainer.reward_head = head
            found = [stats.hidden_score for stats in trainer.measure(sequences)]
    if launched_rank() > 0:
        return 0
    _write_scores(options, start.groups, found)
    without = sum(value is None for value in found)
    print(page.text_table({"all with a verdict": _quality(start.groups, found)}))
    print(
        f"{len(found)} responses of {len(start.groups)} questions, {without} without a token to score: {options.output}"
    )
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train,
    "score": score,
    "import": import_head,
    "export": export_head,
}


# ---------------------------------------------------------------- training


def _fit_settings(options: argparse.Namespace) -> FitSettings:
    names = ("alpha", "standardise", "lr", "weight_decay", "epochs", "patience", "batch", "validation_share", "seed")
    if options.logits and options.standardise:
        raise ConfigError("--standardise is for hidden states; leave it away with --logits")
    named = {name: getattr(options, name) for name in names}
    return FitSettings(loss=loss_name(options.loss), gate=not options.no_gate, **named)


def _layers(options: argparse.Namespace, last: int) -> tuple[int, ...]:
    """Raises ConfigError for layers that the model does not have."""
    if options.logits:
        if options.layers:
            raise ConfigError("--layers is for hidden states; leave it away with --logits")
        return (last,)
    layers = tuple(range(last + 1)) if options.layers is None else tuple(sorted(options.layers))
    if layers[0] < 0 or layers[-1] > last or len(set(layers)) < len(layers):
        raise ConfigError(
            f"--layers {' '.join(map(str, options.layers))}: each once, and within 0 (the embedding) and {last} (after "
            "the final norm) for this model"
        )
    return layers


def _states(options: argparse.Namespace, recomputed: Recomputed, responses: Responses) -> States:
    """On disk where the budget allows, else recomputed; says which."""
    needed = cache_bytes(recomputed) / 2**30
    tokens = int(recomputed.lengths.sum())
    fits = needed <= options.cache_gib
    if is_main():
        how = "kept on disk" if fits else f"more than --cache-gib {options.cache_gib:g}: recomputed every epoch"
        print(f"hidden states of {tokens} tokens: {needed:.3g} GiB, {how}", flush=True)
    if not fits:
        return recomputed
    output = options.output.resolve()
    folder = (output.parent if options.cache_dir is None else options.cache_dir) / f".{output.name}.states"
    return Cached(recomputed, questions_of(responses, np.arange(len(responses.labels))), folder)


def _tell(epoch: Epoch) -> None:
    if is_main():
        found = epoch.validation
        within = "n/a" if found.within_auroc is None else f"{found.within_auroc:.3f}"
        print(
            f"epoch {epoch.number:>3}  loss {epoch.train_loss:.4f}  held out: loss {epoch.validation_loss:.4f}  "
            f"AUROC within questions {within}  {epoch.seconds:.1f} s",
            flush=True,
        )


def _training(settings: FitSettings, fitted: Fitted) -> dict[str, float | int | str]:
    """How the head was trained and what came out, for its config."""
    best = fitted.best
    figures = {
        "validation_loss": best.validation_loss,
        "validation_within_auroc": best.validation.within_auroc,
        "validation_overall_auroc": best.validation.overall_auroc,
        "validation_within_auroc_by_length": best.validation.within_auroc_by_length,
        "validation_ece": best.validation.ece,
    }
    return {
        "epoch": best.number,
        "train_responses": len(fitted.train),
        "validation_responses": len(fitted.validation),
        **{name: value for name, value in vars(settings).items() if not isinstance(value, bool)},
        "standardise": int(settings.standardise),
        **{name: value for name, value in figures.items() if value is not None},
    }


# ---------------------------------------------------------------- scoring


def _write_scores(options: argparse.Namespace, groups: Sequence[Group], found: Sequence[float | None]) -> None:
    values = iter(found)
    rows = [
        {"id": group.prompt.id, "scores": {options.name: [next(values) for _ in group.completions]}} for group in groups
    ]
    options.output.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")


def _quality(groups: Sequence[Group], found: Sequence[float | None]):
    """Of the responses that have a score and a verdict."""
    values = iter(found)
    rows = [
        (value, score.correct, place, len(completion.token_ids))
        for place, group in enumerate(groups)
        for completion, score, value in zip(group.completions, group.scores, values, strict=False)
    ]
    kept = [row for row in rows if row[0] is not None and row[1] is not None]
    scores, labels, questions, lengths = (np.array(column) for column in zip(*kept, strict=True)) if kept else [()] * 4
    return quality(scores, labels, questions, lengths)
