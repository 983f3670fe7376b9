"""Reward heads beside a plain probe: scikit-learn's logistic regression on each response's mean hidden state.

    python benchmarks/reward_probe.py MODEL ROLLOUTS ... [--lr 0.01] [--json FILE]

One table over the same held-out questions: shorter is better; the probe on all layers' mean states, and on the last
layer's; SWIFT's head with and without its gate, with other losses, on the last layer, on the logits. What the probe
gets is standardised, and so is what the heads read (`--plain`: as it is, as in the paper). The probe's strength of
regularisation is the best of four on the held-out questions, which is to its advantage.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from megatron_srft import errors
from megatron_srft.hidden_reward import HeadConfig
from megatron_srft.hidden_reward.fit import FitSettings, fit
from megatron_srft.hidden_reward.parts import check_labels, questions_of, split
from megatron_srft.hidden_reward.quality import Quality, quality
from megatron_srft.hidden_reward.states import StackedStates
from megatron_srft.reward_command.given import given
from megatron_srft.reward_command.responses import Verified, check_tokens, verified
from megatron_srft.trainer.hidden_features import Recomputed, lm_head

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""scikit-learn's C."""

Row = tuple[str, int, float, Quality]
"""Name, parameters, seconds of training, quality on the held-out questions."""


def main(options: argparse.Namespace) -> int:
    settings = FitSettings(lr=options.lr, standardise=not options.plain, epochs=options.epochs, seed=options.seed)
    shared = dict(config=None, hf_model=None, reward=None, answer_after="", tensor=1, pipeline=1,
                  sequence_parallel=False, max_questions=options.max_questions)  # fmt: skip
    with given(argparse.Namespace(model=options.model, rollouts=options.rollouts, **shared)) as start:
        known = verified(start.groups, [], least_tokens=2)
        check_tokens(known.sequences, known.responses.names, start.architecture)
        parts = split(known.responses.questions, settings.validation_share, settings.seed)
        check_labels(known.responses, *parts, "pairwise")
        trainer = start.load()
        layers = tuple(range(start.architecture.num_layers + 1))
        config = HeadConfig(base=trainer.base_model(), layers=layers, prompt_format=start.prompt_format)
        source = Recomputed(trainer, known.sequences, config)
        found = {}
        for question in questions_of(known.responses, np.arange(len(known.sequences))):
            local = source.read(question)
            for index, (first, end) in zip(question, local.sequences.tolist(), strict=True):
                found[index] = np.stack([layer[first:end].float().cpu().numpy() for layer in local.layers])
        states = [found[index] for index in range(len(found))]
        unembedding = lm_head(trainer).float().cpu()
    rows = compare(states, known, parts, settings, unembedding)
    print(table(rows))
    if options.json is not None:
        tree = [{"name": n, "parameters": p, "seconds": s, **asdict(q)} for n, p, s, q in rows]
        options.json.write_text(json.dumps(tree, indent=1) + "\n")
    return 0


def compare(states, known: Verified, parts, settings: FitSettings, unembedding) -> list[Row]:
    """All rows of the table."""
    whole = [torch.from_numpy(one) for one in states]
    last = [one[-1:] for one in whole]
    means = np.stack([one.mean(axis=1) for one in states])
    responses, lengths = known.responses, np.array([one.shape[1] for one in states])
    train, held_out = parts

    def judged(name: str, parameters: int, began: float, scores: np.ndarray) -> Row:
        seconds = time.perf_counter() - began
        of = (responses.labels[held_out], responses.questions[held_out], lengths[held_out])
        return name, parameters, seconds, quality(scores, *of)

    def probe(name: str, features: np.ndarray) -> Row:
        began, rows = time.perf_counter(), []
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
            model.fit(features[train], responses.labels[train])
            scores = model.decision_function(features[held_out])
            rows.append(judged(f"{name}, C {strength:g}", features.shape[1] + 1, began, scores))
        return max(rows, key=lambda row: row[3].within_auroc or 0.0)

    def head(name: str, of: list, lm=None, **changes) -> Row:
        began = time.perf_counter()
        fitted = fit(StackedStates(of), responses, replace(settings, **changes), parts=parts, lm_head=lm)
        inputs = of[0].shape[0] * of[0].shape[2] if lm is None else lm.shape[0]
        size = (2 if changes.get("gate", True) else 1) * (inputs + 1)
        assert np.array_equal(fitted.validation, held_out)
        return judged(name, size, began, fitted.validation_scores)

    rows: list[Callable[[], Row]] = [
        lambda: judged("shorter is better", 0, time.perf_counter(), -lengths[held_out].astype(float)),
        lambda: probe("probe, mean state of all layers", means.reshape(len(means), -1)),
        lambda: probe("probe, mean state of the last", means[:, -1]),
        lambda: head("head without a gate", whole, gate=False),
        lambda: head("head", whole),
        lambda: head("head, pairwise", whole, loss="pairwise"),
        lambda: head("head, infonca", whole, loss="infonca"),
        lambda: head("head, last layer", last),
        lambda: head("head, logits", last, unembedding, standardise=False),
    ]
    return [row() for row in rows]


def table(rows: list[Row]) -> str:
    """Markdown."""
    _, _, _, first = rows[0]
    about = (
        f"{first.responses} held-out responses to {first.questions} questions, {first.questions_with_both} with both"
    )
    lines = ["", "| | parameters | AUROC within | AUROC overall | ECE | seconds |", "|---|--:|--:|--:|--:|--:|"]
    for name, parameters, seconds, found in rows:
        figures = (found.within_auroc, found.overall_auroc, found.ece if parameters else None)
        shown = " | ".join("n/a" if value is None else f"{value:.3f}" for value in figures)
        lines.append(f"| {name} | {parameters} | {shown} | {seconds:.1f} |")
    return "\n".join([about, *lines])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rollouts", type=Path, nargs="+")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--plain", action="store_true", help="heads on states as they are")
    parser.add_argument("--max-questions", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given_options = parser.parse_args()
    raise SystemExit(errors.run(lambda: main(given_options)))
