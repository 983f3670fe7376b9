"""Long demonstrations by rejection sampling: several answers per problem, the correct ones kept.

Source: "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), section 3.1 and appendix E.2: a long-chain
model at temperature 1, top-p 0.95, 8,192 tokens and 32 to 256 answers per problem.
"""

import argparse
from collections.abc import Sequence

from megatron_srft.config import SamplingConfig
from megatron_srft.curation import settings
from megatron_srft.curation.harvest import Produce, harvest
from megatron_srft.curation.output import Output, check_outputs
from megatron_srft.curation.problems import Problem, read_problems
from megatron_srft.curation.selection import table
from megatron_srft.curation.sources import Ask, Sample, Source


def sampler(source: Source, sampling: SamplingConfig, samples: int, seed: int) -> Produce:
    """Draws `samples` answers to each problem."""

    def produce(problems: Sequence[Problem]) -> list[list[Sample]]:
        asks = [Ask(key=p.id, messages=p.messages, sample=number) for p in problems for number in range(samples)]
        answers = source.ask(asks, sampling, seed)
        return [answers[place * samples : (place + 1) * samples] for place in range(len(problems))]

    return produce


def main(options: argparse.Namespace) -> int:
    """`megatron-srft data distil`: print the counts; see data_command.py for the options."""
    config, mode = settings.read_config(options), settings.mode(options)
    selection = settings.selection(options)
    check_outputs([options.output], mode, options.files)
    problems = read_problems(options.files, config.data, options.max_problems or 0)
    with (
        settings.open_source(options, config.data) as source,
        settings.open_scorer(config.rewards) as scorer,
        Output(options.output, settings.recorded(options, config), mode) as output,
    ):
        produce = sampler(source, settings.sampling(options), options.samples, options.seed)
        counts = harvest(problems, produce, source, scorer, selection, output, options.samples)
    print(table(counts))
    return 0
