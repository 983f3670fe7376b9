"""`megatron-srft analyze WHAT ...`: options only; torch and megatron are imported when an analysis runs."""

import argparse
from pathlib import Path

from megatron_srft import errors

PAGES = (".html", ".htm")
SOURCE = "checkpoint (RUN/checkpoints/step-NNNNNN) or Hugging Face folder"


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Run one analysis; the status as in `errors.run`."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for add in (_probabilities, _trajectory, _clipped, _entropy, _compare):
        add(kinds)
    options = parser.parse_args(arguments)

    def body() -> int:
        if options.output.suffix not in PAGES:
            raise ValueError(f"--output {options.output} is a page, with its figures beside it; end its name in .html")
        from megatron_srft.analyze_command import commands

        return commands.COMMANDS[options.what](options)

    return errors.run(body, debug=options.debug)


def _probabilities(kinds: argparse._SubParsersAction) -> None:
    text = (
        "How fine-tuning changed the probability of each token: p_after - p_before of the same texts, teacher-forced. "
        "A page with coloured tokens, a histogram, and the share of changed tokens."
    )
    parser = kinds.add_parser(
        "probabilities", help="token-probability change between two checkpoints", description=text
    )
    parser.add_argument("before", type=Path, help=SOURCE)
    parser.add_argument("after", type=Path, help=SOURCE)
    parser.add_argument("files", nargs="+", type=Path, help="prompts (JSONL or parquet); or rollout dumps of a run")
    parser.add_argument(
        "--texts",
        choices=("before", "after", "demonstrations"),
        default="after",
        help="who writes the texts: a policy samples them, or the files' demonstrations (default: after); "
        "rollout dumps bring their own",
    )
    parser.add_argument("--lower", type=float, default=-0.1, help="a change below this is lower (default: -0.1)")
    parser.add_argument("--higher", type=float, default=0.1, help="a change above this is higher (default: 0.1)")
    parser.add_argument("--show", type=int, default=8, help="texts shown on the page (default: 8)")
    parser.add_argument("--min-count", type=int, default=5, help="occurrences of a token in the tables (default: 5)")
    _sampling(parser, samples=1)
    _model(parser)


def _trajectory(kinds: argparse._SubParsersAction) -> None:
    text = (
        "Each checkpoint as a point whose coordinates are its distances to the texts of reference policies: the mean "
        "negative log-likelihood (or 1 - p) it gives to their tokens, re-tokenised with its own tokenizer."
    )
    parser = kinds.add_parser("trajectory", help="training as a path between reference policies", description=text)
    parser.add_argument("sources", nargs="+", type=Path, help=f"run folder (all its checkpoints and exports), {SOURCE}")
    parser.add_argument(
        "--reference",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a Hugging Face folder that answers --prompts, or a file whose demonstrations are its answers; repeat it",
    )
    parser.add_argument("--prompts", action="append", default=[], type=Path, help="prompts that the references answer")
    parser.add_argument("--measure", choices=("nll", "miss"), default="nll", help="-log p (default), or 1 - p")
    _sampling(parser, samples=1)
    _model(parser)


def _clipped(kinds: argparse._SubParsersAction) -> None:
    text = (
        "Which tokens the clip of PSFT or GRPO leaves alone. A run keeps no token-level ratios, so they are computed "
        "here from two checkpoints, exactly: ratio = p_new / p_old, clipped above 1 + clip_high where the advantage is "
        "positive (demonstrations: 1) and below 1 - clip_low where it is negative. With OLD and NEW the checkpoints at "
        "both ends of a window (objective.refresh_every, or one step) these are the run's own clipped tokens of its "
        "last update; further apart they are those that a policy so old would clip."
    )
    parser = kinds.add_parser("clipped", help="the tokens that a ratio clip leaves alone", description=text)
    parser.add_argument("old", type=Path, help=SOURCE)
    parser.add_argument("new", type=Path, help=SOURCE)
    parser.add_argument("files", nargs="+", type=Path, help="demonstrations, or rollout dumps (RUN/rollouts/step-*)")
    parser.add_argument("--clip-high", type=float, default=0.28, help="default: 0.28")
    parser.add_argument("--clip-low", type=float, default=0.2, help="default: 0.2; acts on negative advantages only")
    parser.add_argument("--show", type=int, default=40, help="tokens in the table (default: 40)")
    _sampling(parser, samples=None)
    _model(parser)


def _entropy(kinds: argparse._SubParsersAction) -> None:
    text = (
        "Entropy over training by both definitions, which are not comparable: teacher-forced on the file's "
        "demonstrations, and on texts that each checkpoint samples itself."
    )
    parser = kinds.add_parser("entropy", help="entropy on demonstrations and on own samples", description=text)
    parser.add_argument("sources", nargs="+", type=Path, help=f"run folder (all its checkpoints and exports), {SOURCE}")
    parser.add_argument("file", type=Path, help="prompts with demonstrations (JSONL or parquet)")
    parser.add_argument("--on", choices=("both", "demonstrations", "samples"), default="both", help="default: both")
    _sampling(parser, samples=1)
    _model(parser)


def _compare(kinds: argparse._SubParsersAction) -> None:
    text = "Reward, accuracy, length, entropy and clipping of several runs on one page, and what a given accuracy cost."
    parser = kinds.add_parser("compare", help="several runs, and several seeds, on one page", description=text)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="PREFIX",
        help="runs whose folder name starts with PREFIX are seeds of one method: mean and spread; repeat it",
    )
    parser.add_argument("--target", type=float, help="accuracy (a share) whose steps, tokens and seconds are asked for")
    _output(parser, "comparison.html")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _sampling(parser: argparse.ArgumentParser, samples: int | None) -> None:
    parser.add_argument("--max-problems", type=int, default=0, help="use only the first N prompts; 0 uses all")
    parser.add_argument("--temperature", type=float, help="of log-probs and samples (default: the run's; 0 is greedy)")
    if samples is not None:
        parser.add_argument("--samples", type=int, default=samples, help=f"texts per prompt (default: {samples})")
        parser.add_argument("--max-response-tokens", type=int, help="longest sampled text (default: the run's)")
        parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")


def _model(parser: argparse.ArgumentParser) -> None:
    what = parser.prog.rpartition(" ")[2]
    _output(parser, f"{what}.html")
    parser.add_argument("--config", type=Path, help="data and sampling settings (default: those of the first run)")
    parser.add_argument("--hf-model", type=Path, help="Hugging Face folder behind a checkpoint (default: its run's)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size (under torchrun)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size (under torchrun)")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _output(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--output", type=Path, default=Path(name), help=f"page; figures beside it (default: {name})")
