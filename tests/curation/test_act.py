"""`data act`: the state machine by hand, and whole traces from an endpoint and a local model."""

import re
from collections import Counter

import pytest
from chat_endpoint import says, status
from curation_files import counts_of, rows_of

from megatron_srft.config import DataConfig, SamplingConfig
from megatron_srft.curation.act import Actor
from megatron_srft.curation.actions import load_machine
from megatron_srft.curation.problems import Problem
from megatron_srft.curation.sources import LocalSource
from megatron_srft.data.schema import Record

PROBLEMS = [{"id": "a", "problem": "What is 7+15 (in {trace})?", "answer": "22"}]


@pytest.mark.parametrize(
    ("taken", "allowed"),
    [
        ([], ["clarify", "decompose", "solve"]),
        (["clarify"], ["decompose", "solve"]),
        (["clarify", "decompose"], ["solve"]),
        (["solve"], ["reflect", "answer", "solve"]),
        (["solve", "reflect"], ["answer", "solve", "decompose"]),
        (["decompose", "solve", "reflect", "decompose", "solve", "reflect"], ["answer", "solve"]),  # twice is enough
        (["solve", "reflect"] * 3 + ["solve"], ["answer", "solve"]),
        (["clarify"] + ["solve"] * 10, ["answer"]),  # the last of 12 steps
    ],
)
def test_what_may_follow(taken, allowed):
    assert load_machine().allowed(taken, 12) == allowed


def test_limits_that_leave_nothing_lead_to_the_answer(tmp_path):
    (tmp_path / "m.yaml").write_text("start: [clarify]\nactions: {clarify: {next: [clarify], limit: 2}}\n")
    machine = load_machine(tmp_path / "m.yaml")
    assert [machine.allowed(["clarify"] * n, 12) for n in range(3)] == [["clarify"], ["clarify"], ["answer"]]


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        ("solve", "solve"),
        ("**Reflect**", "reflect"),
        ("I would answer.\nBut first: decompose, then solve", "decompose"),
        ("solved", None),
        ("", None),
    ],
)
def test_the_choice_in_a_reply(reply, name):
    assert load_machine().read_choice(reply) == name


class Writer:
    """Chooses by a list, once each; writes `<action number>` for a step, and #22 for the answer."""

    def __init__(self, choices):
        self.choices, self.written = list(choices), 0

    def __call__(self, handler):
        text = handler.body["messages"][-1]["content"]
        if "Reply with the name of one" in text:
            says(self.choices.pop(0))(handler)
        elif "final answer" in text:
            says("So #22", tokens=3)(handler)
        else:
            self.written += 1
            says(f"<think>hm</think> piece {self.written}", tokens=10)(handler)


def remote(endpoint, *more):
    return ("--url", endpoint.url, "--model", "m", "--reward", "exact", "--answer-after", "#", *more)


def test_a_trace(endpoint, write, data, tmp_path):
    # "nonsense" is no action, clarify may not follow a reflection: both times the default is taken.
    output = tmp_path / "o.jsonl"
    endpoint.script = [Writer(["decompose", "nonsense", "clarify"])]
    code, out, _ = data("act", write("p.jsonl", PROBLEMS), "--output", output, *remote(endpoint))
    assert code == 0
    (row,) = rows_of(output)
    assert row["made"]["actions"] == [["decompose", "solve", "reflect", "answer"]]
    assert row["demonstrations"] == ["piece 1\n\npiece 2\n\npiece 3\n\nSo #22"]
    assert row["made"]["tokens"] == [33]
    counts = counts_of(out)
    expected = dict(prompts=1, samples=1, correct=1, kept=1, steps=4, choices=3, illegal=1, unreadable=1, forced=1)
    assert {name: n for name, n in counts.items() if n} == expected
    choices = [body for body in endpoint.asked if "Reply with the name" in body["messages"][-1]["content"]]
    assert {body["temperature"] for body in choices} == {0.0}
    last = endpoint.asked[-1]["messages"][-1]["content"]
    assert "What is 7+15 (in {trace})?" in last and "piece 1\n\npiece 2\n\npiece 3" in last and "hm" not in last
    assert "(nothing yet)" in endpoint.asked[0]["messages"][-1]["content"]


def test_the_last_step_is_the_answer(endpoint, write, data, tmp_path):
    endpoint.script = [Writer(["solve"] * 9)]
    output = tmp_path / "o.jsonl"
    code, out, _ = data("act", write("p.jsonl", PROBLEMS), "--output", output, *remote(endpoint, "--max-steps", 4))
    assert code == 0 and rows_of(output)[0]["made"]["actions"] == [["solve", "solve", "solve", "answer"]]
    assert counts_of(out)["forced"] == 1


@pytest.mark.parametrize(
    ("action", "fate"),
    [
        (says("piece", "length"), "truncated"),
        (says("<think>x"), "failed"),
        (says("x", "content_filter"), "unfinished"),
    ],
)
def test_a_broken_step_breaks_the_trace(endpoint, write, data, tmp_path, action, fate):
    script = Writer(["clarify", "solve", "reflect", "answer"])
    endpoint.script = [lambda h: (action if "Do\nnot solve" in h.body["messages"][-1]["content"] else script)(h)]
    output = tmp_path / "o.jsonl"
    code, _, error = data("act", write("p.jsonl", PROBLEMS), "--output", output, *remote(endpoint))
    assert code == 1 and counts_of(error)[fate] == 1 and not output.exists()
    assert len(endpoint.asked) == 2  # the choice of clarify and its piece


def test_an_endpoint_that_is_down(endpoint, write, data, tmp_path):
    endpoint.script = [status(404)]
    code, _, error = data("act", write("p.jsonl", PROBLEMS), "--output", tmp_path / "o.jsonl", *remote(endpoint))
    assert code == 1 and "m does not answer: HTTP status 404" in error


def test_wording_of_ones_own(endpoint, write, data, tmp_path):
    actions = tmp_path / "mine.yaml"
    actions.write_text(
        """
system: Sei genau.
start: [probe]
actions:
  probe: {means: x, prompt: 'P {problem}', next: [], limit: 1}
  answer: {prompt: 'A {problem}: {trace}'}
"""
    )
    endpoint.script = [says("#1"), says("#22")]
    output = tmp_path / "o.jsonl"
    settings = remote(endpoint, "--actions", actions)
    assert data("act", write("p.jsonl", PROBLEMS), "--output", output, *settings)[0] == 0
    asked = [[m["content"] for m in body["messages"]] for body in endpoint.asked]
    question = PROBLEMS[0]["problem"]
    assert asked == [["Sei genau.", f"P {question}"], ["Sei genau.", f"A {question}: #1"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strat: [solve]", "unknown key strat; choose from system, choose, start, actions"),
        ("start: [sovle]", "start names ['sovle']; the actions are clarify"),
        ("start: [answer]", "start needs actions other than answer"),
        ("actions: {solve: {prompt: hello}}", "actions.solve.prompt has no {problem}"),
        ("actions: {solve: {limit: 0}}", "actions.solve.limit must be at least 1"),
        ("actions: {solve: {limit: two}}", "actions.solve.limit has the wrong type (str)"),
        ("actions: {mine: {means: x}}", "actions.mine lacks limit, next, prompt"),
        ("choose: '{problem}'", "choose needs {problem}, {choices}"),
        ("actions: {1: {means: x, prompt: '{problem}', next: [], limit: 1}}", "actions: the name 1 is no word"),
        ("actions: {on: {means: x, prompt: '{problem}', next: [], limit: 1}}", "actions: the name True is no word"),
        ("start: [[solve]]", "start names [['solve']]; the actions are clarify"),
        ("[1]", "the file must hold a mapping"),
        ("a: b: c", "not a YAML file"),
    ],
)
def test_wrong_files_of_actions(endpoint, write, data, tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    settings = remote(endpoint, "--actions", tmp_path / "m.yaml")
    code, _, error = data("act", write("p.jsonl", PROBLEMS), "--output", tmp_path / "o.jsonl", *settings)
    assert code == 2 and message in error and "m.yaml" in error and endpoint.asked == []


def test_the_local_engine_writes_traces(model):
    """A random model: its choices are unreadable, so the traces that no limit cuts follow the defaults."""
    messages = [{"role": "user", "content": "1+1"}]
    whence = dict(file="f", source="f", where="f:1")
    record = Record(id="q", messages=messages, answer="2", answer_parts=1, demonstrations=(), **whence)
    problems = [Problem(record=record, messages=messages)]

    def traces():
        # Short wording leaves room among the 512 positions.
        machine = load_machine()
        source = LocalSource(model, DataConfig())
        short = {n: type(a)(means=a.means, prompt="{problem}|{trace}", next=a.next, limit=a.limit)
                 for n, a in machine.actions.items()}  # fmt: skip
        machine = type(machine)(system="s", choose="{problem}{choices}", start=machine.start, actions=short)
        sampling = SamplingConfig(temperature=1.0, max_response_tokens=64)
        actor = Actor(machine, source, sampling, max_steps=4, samples=12, seed=1)
        return actor.produce(problems)[0], actor.counts

    samples, counts = traces()
    done = [sample for sample in samples if sample.finish_reason == "stop"]
    assert len(samples) == 12 and Counter(s.finish_reason for s in samples)["length"] > 0
    assert counts["choices"] == counts["unreadable"] + counts["illegal"] > 0
    assert all(sample.actions == ("clarify", "decompose", "solve", "answer") for sample in done)
    assert [s.text for s in traces()[0]] == [s.text for s in samples]


def test_the_built_in_wording_is_complete():
    machine = load_machine()
    assert set(machine.actions) == {"clarify", "decompose", "solve", "reflect", "answer"}
    for action in machine.actions.values():
        assert set(re.findall(r"\{(\w+)\}", action.prompt)) == {"problem", "trace"}
