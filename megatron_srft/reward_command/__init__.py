"""`megatron-srft reward WHAT ...`: options only; torch and megatron are imported when it runs."""

import argparse
from pathlib import Path

from megatron_srft import errors

MODEL = "checkpoint (RUN/checkpoints/step-NNNNNN) or Hugging Face folder that the rollouts were sampled from"
ENGINE = "vllm: by vLLM's token classification, for heads on the last layer alone (default: trainer)"
ROLLOUTS = "rollout dumps (RUN/rollouts/step-*, or of `generate`), or JSONL with prompt, responses and correct"


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Train a head, score with one, take one over, or write one for vLLM; the status as in `errors.run`."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _train(kinds)
    _score(kinds)
    _import(kinds)
    _export(kinds)
    options = parser.parse_args(arguments)

    def body() -> int:
        from megatron_srft.reward_command import commands

        return commands.COMMANDS[options.what](options)

    return errors.run(body, debug=options.debug)


def _train(kinds: argparse._SubParsersAction) -> None:
    text = (
        "Train a reward head on the model's own hidden states (SWIFT, arXiv 2505.12225) from verified responses: a "
        "gate and a reward for each token, linear in its states. A fifth of the questions is held out; the head with "
        "the least loss on them is kept. The defaults are the paper's."
    )
    parser = kinds.add_parser("train", help="a reward head from verified rollouts", description=text)
    parser.add_argument("model", type=Path, help=MODEL)
    parser.add_argument("rollouts", nargs="+", type=Path, help=ROLLOUTS)
    parser.add_argument("--output", type=Path, required=True, help="folder to make: the head, its figures and a page")
    reads = parser.add_argument_group("what the head reads")
    reads.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="L",
        help="0 is the embedding, the last one stands after the final norm (default: all)",
    )
    reads.add_argument("--logits", action="store_true", help="read the logits instead of hidden states")
    reads.add_argument("--no-gate", action="store_true", help="plain mean over the tokens")
    reads.add_argument(
        "--normalisation",
        choices=("none", "rms"),
        default="none",
        help="rms: divide each state by its root mean square (default: none)",
    )
    reads.add_argument(
        "--last-token",
        choices=("excluded", "included"),
        default="excluded",
        help="whether a response's last token counts, which an engine that scores while it generates does not see "
        "(default: excluded)",
    )
    reads.add_argument(
        "--demonstrations",
        action="store_true",
        help="train on verified demonstrations of rollout dumps too, which the model did not write",
    )
    fit = parser.add_argument_group("training")
    fit.add_argument("--loss", default="bce", help="bce (default), hinge, pairwise (or dpo), infonca, nca")
    fit.add_argument("--alpha", type=float, default=0.01, help="temperature of infonca and nca (default: 0.01)")
    fit.add_argument("--standardise", action="store_true", help="train on columns of mean 0 and deviation 1")
    fit.add_argument("--lr", type=float, default=1e-4, help="default: 1e-4")
    fit.add_argument("--weight-decay", type=float, default=1e-5, help="default: 1e-5")
    fit.add_argument("--epochs", type=int, default=40, help="at most (default: 40)")
    fit.add_argument("--patience", type=int, default=3, help="epochs without a better validation loss (default: 3)")
    fit.add_argument("--batch", type=int, default=16, help="responses to a step, in whole questions (default: 16)")
    fit.add_argument("--validation-share", type=float, default=0.2, help="of the questions (default: 0.2)")
    fit.add_argument("--seed", type=int, default=42, help="of split, start and order (default: 42)")
    cache = parser.add_argument_group("hidden states")
    cache.add_argument(
        "--cache-gib",
        type=float,
        default=16.0,
        help="keep the states on disk if they take at most this much, else recompute them every epoch (default: 16)",
    )
    cache.add_argument("--cache-dir", type=Path, help="where (default: beside the output)")
    _shared(parser)


def _score(kinds: argparse._SubParsersAction) -> None:
    text = (
        "Score responses with a reward head, in one forward pass of its model. Writes a JSONL row for each question, "
        '{"id": ..., "scores": {"swift": [...]}}, which `best-of-n --scores` reads. A score is a logit; a response '
        "without a token to score has null."
    )
    parser = kinds.add_parser("score", help="scores of rollouts under a head", description=text)
    parser.add_argument("model", type=Path, help=MODEL)
    parser.add_argument("head", type=Path, help="folder that `reward train` wrote")
    parser.add_argument("rollouts", nargs="+", type=Path, help=ROLLOUTS)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--name", default="swift", help="of the scores in the file (default: swift)")
    parser.add_argument(
        "--other-weights",
        action="store_true",
        help="score although the head was trained on other weights of this model, whose states may mean something else",
    )
    parser.add_argument("--engine", choices=("trainer", "vllm"), default="trainer", help=ENGINE)
    _shared(parser)


def _export(kinds: argparse._SubParsersAction) -> None:
    text = (
        "Write a head that reads the last layer alone as a Hugging Face folder in which vLLM classifies tokens: "
        'runner "pooling", task token_classify, use_activation false; labels are gate and reward. Pooling them over a '
        "response's tokens is left to the caller; `reward score --engine vllm` does it all."
    )
    parser = kinds.add_parser("export", help="a last-layer head as a token classifier for vLLM", description=text)
    parser.add_argument("model", type=Path, help="checkpoint or Hugging Face folder that the head was trained on")
    parser.add_argument("head", type=Path, help="folder that `reward train` wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--config", type=Path, help="data settings of its prompts (default: those of the run)")
    _model(parser)


def _import(kinds: argparse._SubParsersAction) -> None:
    text = (
        "Take over a head of the paper's released code: a pickled state dict with fused_layer or reward_layer, read "
        "without running anything in it. The file does not say what it was trained with; the options do."
    )
    parser = kinds.add_parser("import", help="a head of the paper's released code", description=text)
    parser.add_argument("model", type=Path, help="the model that it was trained on, as it was then")
    parser.add_argument("state_dict", type=Path, help="file that the released code wrote with torch.save")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="L", help="its --layers, in that order (default: all, as its default)"
    )
    parser.add_argument("--apply-norm", action="store_true", help="it was trained with --apply_norm")
    parser.add_argument("--logits", action="store_true", help="it was trained with --logits_mode")
    parser.add_argument(
        "--last-token",
        choices=("excluded", "included"),
        default="included",
        help="whether a response's last token counts (default: included, as in the released code)",
    )
    parser.add_argument("--config", type=Path, help="data settings of its prompts (default: those of the run)")
    _model(parser)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-questions", type=int, default=0, help="use only the first N; 0 uses all")
    parser.add_argument("--reward", choices=("math", "exact"), help="verifier where there is no verdict yet")
    parser.add_argument("--answer-after", default="", help="the answer stands behind the last occurrence of this text")
    parser.add_argument("--config", type=Path, help="data, rewards and batch settings (default: those of the run)")
    parser.add_argument("--sequence-parallel", action="store_true", help="with --tensor: cut tokens, not columns")
    _model(parser)


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-model", type=Path, help="Hugging Face folder behind a checkpoint (default: its run's)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size (under torchrun)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size (under torchrun)")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
