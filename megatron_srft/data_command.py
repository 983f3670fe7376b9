"""`megatron-srft data TOOL ...`: the options of the data tools, and what each tool does with them."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def number(kind: type, least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """A parser of option values: an int or float from `least` (or above it) to `most`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= most or value == math.inf:
            start = f"{'above' if above else 'of at least'} {least:g}"
            end = f" and at most {most:g}" if most < math.inf else ""
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {start}{end}, not {text}")
        return value

    return parse


def add_tools(parser: argparse.ArgumentParser) -> None:
    """The subcommands and their options."""
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name, (add, _) in TOOLS.items():
        tool = tools.add_parser(name, help=add.__doc__, description=add.__doc__)
        tool.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        add(tool)


def main(options: argparse.Namespace) -> int:
    """Run the tool; the exit status."""
    return TOOLS[options.tool][1](options)


# ---------------------------------------------------------------- options that several tools share


def _output(parser: argparse.ArgumentParser, *, resumable: bool) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help="where the rows go")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.set_defaults(resume=False)
    if resumable:
        modes.add_argument("--resume", action="store_true", help="go on with the output if it is there")


def _problems(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", help="problems with answers, JSONL or parquet")
    parser.add_argument("--max-problems", type=number(int, 1), help="use only the first N of each file")
    _verifier(parser)


def _verifier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="take the sections data and rewards from this file")
    parser.add_argument("--reward", choices=("math", "exact"), help="how answers are verified (default: math)")
    parser.add_argument("--answer-after", default="", help="the answer stands behind the last occurrence of this text")


def _source(parser: argparse.ArgumentParser, *, required: bool, samples: int, tokens: int) -> None:
    group = parser.add_argument_group("the model that answers")
    group.add_argument("--model", required=required, help="Hugging Face folder, or with --url the endpoint's model")
    group.add_argument("--url", help="OpenAI-compatible endpoint, for example http://localhost:8000/v1")
    group.add_argument("--api-key-variable", default="", help="environment variable with the endpoint's key")
    group.add_argument("--concurrency", type=number(int, 1), default=16, help="requests under way (default: 16)")
    group.add_argument("--timeout", type=number(float, 0, above=True), default=600.0, help="seconds per request")
    group.add_argument("--retries", type=number(int, 0), default=3, help="further attempts of a request (default: 3)")
    group.add_argument("--samples", type=number(int, 1), default=samples, help=f"per prompt (default: {samples})")
    group.add_argument("--temperature", type=number(float, 0), default=1.0, help="default: 1; 0 is greedy")
    group.add_argument("--top-p", type=number(float, 0, 1, above=True), default=0.95, help="nucleus (default: 0.95)")
    group.add_argument("--max-tokens", type=number(int, 1), default=tokens, help=f"per answer (default: {tokens})")
    group.add_argument("--seed", type=number(int, 0), default=0, help="of the random streams (default: 0)")


def _kept(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is kept of the correct answers")
    group.add_argument("--keep", choices=("all", "first", "shortest", "longest"), default="all", help="default: all")
    group.add_argument("--keep-count", type=number(int, 1), help="how many per prompt (default: 1; with all, no limit)")
    group.add_argument("--min-tokens", type=number(int, 0), default=0, help="shortest answer that is kept")
    group.add_argument("--max-kept-tokens", type=number(int, 1), help="longest answer that is kept")


# ---------------------------------------------------------------- the tools


def _add_distil(parser: argparse.ArgumentParser) -> None:
    """Sample answers to every problem and keep the correct ones as demonstrations."""
    _problems(parser)
    _output(parser, resumable=True)
    _source(parser, required=True, samples=8, tokens=8192)
    _kept(parser)


def _distil(options: argparse.Namespace) -> int:
    from megatron_srft.curation import distil

    return distil.main(options)


def _add_act(parser: argparse.ArgumentParser) -> None:
    """Build demonstrations action by action: clarify, decompose, solve, reflect, answer."""
    _problems(parser)
    _output(parser, resumable=True)
    _source(parser, required=True, samples=1, tokens=1024)
    parser.add_argument("--max-steps", type=number(int, 2), default=12, help="pieces of a demonstration (default: 12)")
    parser.add_argument("--actions", type=Path, metavar="FILE.yaml", help="wording and order of the actions")
    _kept(parser)


def _act(options: argparse.Namespace) -> int:
    from megatron_srft.curation import act

    return act.main(options)


def _add_filter(parser: argparse.ArgumentParser) -> None:
    """Keep rows whose reference answer can be read, is short enough, and is matched by responses."""
    _problems(parser)
    _output(parser, resumable=True)
    parser.add_argument("--dropped", type=Path, metavar="FILE.jsonl", help="write the rows left out, with the reason")
    parser.add_argument("--max-answer-characters", type=number(int, 1), help="longest reference answer")
    parser.add_argument("--min-matched", type=number(int, 1), help="responses that must match (default with some: 1)")
    parser.add_argument("--responses", metavar="FILE", help="rows of an id and a list of responses to match")
    _source(parser, required=False, samples=2, tokens=8192)


def _filter(options: argparse.Namespace) -> int:
    from megatron_srft.curation import filter

    return filter.main(options)


def _add_duplicates(parser: argparse.ArgumentParser) -> None:
    """Leave out rows that nearly repeat an earlier row, or a row of a benchmark."""
    parser.add_argument("files", nargs="+", help="JSONL or parquet")
    _output(parser, resumable=False)
    parser.add_argument("--pairs", type=Path, metavar="FILE.jsonl", help="list which row repeats which")
    parser.add_argument("--against", nargs="+", default=[], metavar="FILE", help="also leave out what repeats these")
    parser.add_argument("--field", help="compare this field (default: the prompt)")
    parser.add_argument("--config", type=Path, help="take the section data from this file, for the prompt's field")
    parser.add_argument(
        "--threshold", type=number(float, 0, 1, above=True), default=0.5, help="Jaccard similarity (default: 0.5)"
    )
    parser.add_argument("--shingle", type=number(int, 1), default=3, help="words of an n-gram (default: 3)")
    parser.add_argument("--permutations", type=number(int, 1, 4096), default=128, help="of MinHash (default: 128)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the permutations (default: 0)")


def _duplicates(options: argparse.Namespace) -> int:
    from megatron_srft.curation import duplicates

    return duplicates.main(options)


def _add_statistics(parser: argparse.ArgumentParser) -> None:
    """Lengths, reflection keywords, code fences and repetition of demonstrations, rollout dumps or samples.jsonl."""
    parser.add_argument("files", nargs="+", help="demonstration files, rollouts/*.jsonl.zst or samples.jsonl of a run")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="count its tokens (default: words)")
    parser.add_argument("--config", type=Path, help="take the section data from this file, for the fields' names")
    parser.add_argument("--ngram", type=number(int, 1), default=40, help="length of repeated runs (default: 40)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def _statistics(options: argparse.Namespace) -> int:
    from megatron_srft.curation import statistics

    return statistics.main(options)


TOOLS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "distil": (_add_distil, _distil),
    "act": (_add_act, _act),
    "filter": (_add_filter, _filter),
    "duplicates": (_add_duplicates, _duplicates),
    "statistics": (_add_statistics, _statistics),
}
"""Each tool's options and what runs it."""
