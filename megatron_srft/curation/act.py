"""Long demonstrations built by action prompting: the model picks the next kind of step, and writes it.

    start -> clarify -> decompose -> solve -> reflect -> ... -> answer

Source: "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), appendix E.8, whose actions these are; its
code is not released and its prompts are not used. Here a choice is made greedily, a step is sampled; what is not
allowed is replaced by the default (actions.py). A trace is kept when the verifier accepts its answer.
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_srft import config as configuration
from megatron_srft.config import SamplingConfig
from megatron_srft.curation import settings
from megatron_srft.curation.actions import FINAL, Machine, load_machine
from megatron_srft.curation.harvest import harvest
from megatron_srft.curation.output import Output, check_outputs
from megatron_srft.curation.problems import Problem, read_problems
from megatron_srft.curation.selection import table
from megatron_srft.curation.sources import Ask, Sample, Source, failed

CHOICE_TOKENS = 64
"""Longest reply that names an action."""

THOUGHTS = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)\s*", re.DOTALL)
"""What a reasoning model thinks about its piece is not part of the trace."""

COUNTS = {
    "steps": "written",
    "choices": "made by the model",
    "illegal": "of them not allowed at that place; the default was taken",
    "unreadable": "of them naming no action; the default was taken",
    "forced": "steps for which only one action was allowed",
}


@dataclass(eq=False)
class Trace:
    """A demonstration in the making."""

    problem: Problem
    number: int
    actions: list[str] = field(default_factory=list)
    pieces: list[Sample] = field(default_factory=list)
    broken: Sample | None = None
    """The sample that ended it before its answer."""

    @property
    def text(self) -> str:
        return "\n\n".join(piece.text for piece in self.pieces)

    @property
    def unfinished(self) -> bool:
        return self.broken is None and self.actions[-1:] != [FINAL]

    def sample(self) -> Sample:
        if self.broken is not None:
            return self.broken
        lengths = [piece.tokens for piece in self.pieces]
        tokens = None if None in lengths else sum(lengths)
        return Sample(text=self.text, finish_reason="stop", tokens=tokens, actions=tuple(self.actions))


class Actor:
    """Runs the state machine for many problems side by side, one action of each at a time."""

    def __init__(
        self, machine: Machine, source: Source, sampling: SamplingConfig, *, max_steps: int, samples: int, seed: int
    ):
        self.machine, self.source, self.sampling = machine, source, sampling
        self.max_steps, self.samples, self.seed = max_steps, samples, seed
        self.choosing = replace(sampling, temperature=0.0, max_response_tokens=CHOICE_TOKENS)
        self.counts: Counter[str] = Counter()

    def produce(self, problems: Sequence[Problem]) -> list[list[Sample]]:
        """`samples` traces of every problem."""
        traces = [Trace(problem, number) for problem in problems for number in range(self.samples)]
        while active := [trace for trace in traces if trace.unfinished]:
            self._choose(active)
            self._write([trace for trace in active if trace.broken is None])
        done = [trace.sample() for trace in traces]
        return [done[place * self.samples : (place + 1) * self.samples] for place in range(len(problems))]

    def _choose(self, traces: Sequence[Trace]) -> None:
        """Add the next action to each trace."""
        allowed = [self.machine.allowed(trace.actions, self.max_steps) for trace in traces]
        self.counts["forced"] += sum(len(choices) == 1 for choices in allowed)
        asked = [(trace, choices) for trace, choices in zip(traces, allowed, strict=True) if len(choices) > 1]
        asks = [
            self._ask(trace, "choice", self.machine.choice_request(_question(trace), trace.text, choices))
            for trace, choices in asked
        ]
        replies = dict(zip((trace for trace, _ in asked), self.source.ask(asks, self.choosing, self.seed), strict=True))
        for trace, choices in zip(traces, allowed, strict=True):
            reply = replies.get(trace)
            if reply is not None and reply.finish_reason == "failed":
                trace.broken = reply
            else:
                trace.actions.append(choices[0] if reply is None else self._chosen(reply, choices))

    def _chosen(self, reply: Sample, choices: Sequence[str]) -> str:
        name = self.machine.read_choice(THOUGHTS.sub("", reply.text))
        self.counts["choices"] += 1
        self.counts["unreadable"] += name is None
        self.counts["illegal"] += name is not None and name not in choices
        return name if name in choices else choices[0]

    def _write(self, traces: Sequence[Trace]) -> None:
        """Add the text of its last action to each trace."""
        asks = [
            self._ask(trace, "step", self.machine.step_request(trace.actions[-1], _question(trace), trace.text))
            for trace in traces
        ]
        for trace, sample in zip(traces, self.source.ask(asks, self.sampling, self.seed), strict=True):
            text = THOUGHTS.sub("", sample.text).strip()
            if sample.finish_reason != "stop":
                trace.broken = sample
            elif not text:
                trace.broken = failed(f"the step {trace.actions[-1]} is empty")
            else:
                trace.pieces.append(replace(sample, text=text))
                self.counts["steps"] += 1

    def _ask(self, trace: Trace, purpose: str, messages: list[dict[str, str]]) -> Ask:
        key = f"{trace.problem.id}/{purpose}/{len(trace.pieces)}"
        return Ask(key=key, messages=messages, sample=trace.number)


def _question(trace: Trace) -> str:
    return "\n\n".join(message["content"] for message in trace.problem.messages)


def main(options: argparse.Namespace) -> int:
    """`megatron-srft data act`: print the counts; see data_command.py for the options."""
    config, mode = settings.read_config(options), settings.mode(options)
    selection, machine = settings.selection(options), load_machine(options.actions)
    check_outputs([options.output], mode, options.files)
    problems = read_problems(options.files, config.data, options.max_problems or 0)
    recorded = settings.recorded(options, config) | {"actions": configuration.to_dict(machine)}
    # The machine has its own system message, and a prefix such as <think> would open every piece.
    data = replace(config.data, system_prompt=None, generation_prefix="")
    with (
        settings.open_source(options, data) as source,
        settings.open_scorer(config.rewards) as scorer,
        Output(options.output, recorded, mode) as output,
    ):
        actor = Actor(
            machine, source, settings.sampling(options),
            max_steps=options.max_steps, samples=options.samples, seed=options.seed,
        )  # fmt: skip
        counts = harvest(problems, actor.produce, source, scorer, selection, output, options.samples)
    print(table(counts))
    print("\nThis time:")
    print(table(actor.counts, COUNTS))
    return 0
