"""`data distil` on a real engine and on a real HTTP server: what is kept, what is counted, how it goes on."""

import json

import pytest
from chat_endpoint import says, status
from curation_files import counts_of, rows_of
from tiny_models import make_tokenizer

from megatron_srft.config import DataConfig, SamplingConfig
from megatron_srft.curation.sources import Ask, LocalSource
from megatron_srft.data import load_dataset

PROMPTS = [f"{i}+1=" for i in range(5)]
SAMPLING = SamplingConfig(temperature=1.0, top_p=0.9, max_response_tokens=24)
LOCAL = ("--reward", "exact", "--samples", 24, "--max-tokens", 24, "--top-p", 0.9, "--seed", 3)


@pytest.fixture(scope="module")
def drawn(model):
    """All samples of the local engine, problem by problem."""
    source = LocalSource(model, DataConfig())
    asks = [Ask(key=f"q{i}", messages=[{"role": "user", "content": p}], sample=s)
            for i, p in enumerate(PROMPTS) for s in range(24)]  # fmt: skip
    samples = source.ask(asks, SAMPLING, 3)
    return [samples[24 * i : 24 * (i + 1)] for i in range(len(PROMPTS))]


@pytest.fixture
def problems(drawn, write):
    """Problems whose answer is the whole text of the first sample that ended by itself; none for the last one."""
    answers = [next(s.text.strip() for s in samples if s.finish_reason == "stop") for samples in drawn[:-1]] + ["no"]
    rows = [{"id": f"q{i}", "prompt": p, "answer": a} for i, (p, a) in enumerate(zip(PROMPTS, answers, strict=True))]
    return write("problems.jsonl", rows)


def test_the_correct_samples_of_the_local_engine(drawn, problems, model, data, tmp_path):
    output = tmp_path / "out.jsonl"
    code, out, _ = data("distil", problems, "--output", output, "--model", model, *LOCAL)
    assert code == 0
    rows, expected = rows_of(output), []
    for i, samples in enumerate(drawn[:-1]):
        answer = rows_of(problems)[i]["answer"]
        same = [s for s in samples if s.finish_reason == "stop" and s.text.strip() == answer]
        expected.append(list(dict.fromkeys(s.text for s in same)))
        assert rows[i]["made"]["correct"] == len(same) and rows[i]["made"]["by"] == "model"
    assert [row["demonstrations"] for row in rows] == expected
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3"]
    counts = counts_of(out)
    stopped = sum(s.finish_reason == "stop" for samples in drawn for s in samples)
    assert (counts["prompts"], counts["samples"], counts["prompts_without_any"]) == (5, 120, 1)
    assert counts["truncated"] == 120 - stopped > 0 and counts["wrong"] + counts["correct"] == stopped
    # The project's own reader takes the file as it is.
    config = DataConfig(train=(str(output),), require_demonstration=True)
    dataset = load_dataset(config, SamplingConfig(max_response_tokens=64), make_tokenizer())
    assert [p.text for p in dataset.prompts] == PROMPTS[:4]
    assert [[d.text for d in p.demonstrations] for p in dataset.prompts] == expected


@pytest.mark.parametrize("cut", [0, 7])
def test_resumed_it_is_the_same_file(problems, model, data, tmp_path, cut):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    code, expected, _ = data("distil", problems, "--output", whole, "--model", model, *LOCAL)
    assert code == 0
    # Killed behind the second row, or while it wrote later ones and a line of the journal.
    lines = (tmp_path / "whole.jsonl.journal").read_text().splitlines(keepends=True)
    written = json.loads(lines[2])["bytes"]
    parts.write_bytes(whole.read_bytes()[:written] + b"x" * 999 * cut)
    (tmp_path / "parts.jsonl.journal").write_text("".join(lines[:3]) + lines[3][:cut])
    code, out, _ = data("distil", problems, "--output", parts, "--model", model, *LOCAL, "--resume")
    assert (code, out) == (0, expected)
    assert parts.read_bytes() == whole.read_bytes()
    code, out, error = data("distil", problems, "--output", parts, "--model", model, *LOCAL, "--resume", "--seed", 4)
    assert code == 2 and "begun with other settings (seed was 3, is 4)" in error
    code, out, error = data("distil", problems, "--output", parts, "--model", model, *LOCAL)
    assert code == 2 and "is already there; give --overwrite, or --resume" in error
    code, out, _ = data("distil", problems, "--output", parts, "--model", model, *LOCAL, "--overwrite")
    assert (code, out) == (0, expected)


def test_prompts_that_do_not_fit_are_counted_not_fatal(write, drawn, model, data, tmp_path):
    answer = next(s.text.strip() for s in drawn[0] if s.finish_reason == "stop")
    rows = [{"id": "long", "prompt": "7" * 500, "answer": "7"}, {"id": "q0", "prompt": PROMPTS[0], "answer": answer}]
    output = tmp_path / "out.jsonl"
    code, out, _ = data("distil", write("p.jsonl", rows), "--output", output, "--model", model, *LOCAL)
    assert code == 0 and counts_of(out)["failed"] == 24
    assert [row["id"] for row in rows_of(output)] == ["q0"]


# ---------------------------------------------------------------- endpoint

PROBLEMS = [
    {"id": "a", "problem": "1+1", "answer": "2", "demonstration": "an old one"},
    {
        "id": "b",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2"}],
        "answer": 3,
    },
    {"id": "c", "question": "1+3", "answer": "4"},
]


def teacher(handler):
    """Right on 1+1 (thinking apart), cut off on 1+2 in every other sample, wrong on 1+3."""
    question, seed = handler.body["messages"][-1]["content"], handler.body["seed"]
    if question == "1+1":
        says("So #2", tokens=9, reasoning_content=f"one and one, {seed}")(handler)
    elif question == "1+2":
        says(f"{seed} #3", "length" if seed % 2 else "stop", tokens=seed % 100)(handler)
    else:
        says("#5", tokens=5)(handler)


def remote(endpoint, *more):
    verifier = ("--reward", "exact", "--answer-after", "#")
    return ("--url", endpoint.url, "--model", "teacher", "--samples", 6, "--max-tokens", 99, *verifier, *more)


def test_samples_of_an_endpoint(endpoint, write, data, tmp_path):
    endpoint.script = [teacher]
    output = tmp_path / "out.jsonl"
    code, out, _ = data("distil", write("p.jsonl", PROBLEMS), "--output", output, *remote(endpoint))
    assert code == 0
    seeds = {p: [b["seed"] for b in endpoint.asked if b["messages"][-1]["content"] == p] for p in ("1+1", "1+2")}
    even = [seed for seed in seeds["1+2"] if seed % 2 == 0]
    a, b = rows_of(output)
    assert sorted(a["demonstrations"]) == sorted(f"<think>\none and one, {s}\n</think>\n\nSo #2" for s in seeds["1+1"])
    assert (a["prompt"], a["answer"], len(set(seeds["1+1"]))) == ("1+1", "2", 6)
    assert b["prompt"] == PROBLEMS[1]["prompt"]
    assert sorted(b["demonstrations"]) == sorted(f"{s} #3" for s in even)
    counts = counts_of(out)
    assert (counts["samples"], counts["correct"], counts["wrong"]) == (18, 6 + len(even), 6)
    assert counts["truncated"] == 6 - len(even) and counts["prompts_without_any"] == 1
    asked = endpoint.asked[0]
    assert (asked["model"], asked["temperature"], asked["top_p"], asked["max_tokens"]) == ("teacher", 1.0, 0.95, 99)
    assert asked["path"] == "/v1/chat/completions"


def test_a_template_is_asked_and_not_kept(endpoint, write, data, tmp_path):
    endpoint.script = [says("#2")]
    config = tmp_path / "config.yaml"
    config.write_text("data: {prompt_template: 'Think long. {prompt}', system_prompt: Hello}\n")
    output, settings = tmp_path / "out.jsonl", remote(endpoint, "--config", config)
    assert data("distil", write("p.jsonl", PROBLEMS[:1]), "--output", output, *settings)[0] == 0
    roles = [(m["role"], m["content"]) for m in endpoint.asked[0]["messages"]]
    assert roles == [("system", "Hello"), ("user", "Think long. 1+1")]
    assert rows_of(output)[0]["prompt"] == "1+1"


def test_an_endpoint_that_goes_down_and_comes_back(endpoint, write, data, tmp_path):
    problems = write("p.jsonl", [{"id": str(i), "prompt": "1+1", "answer": "2"} for i in range(12)])
    right, output = says("#2"), tmp_path / "out.jsonl"
    options = remote(endpoint, "--concurrency", 3, "--retries", 0)
    endpoint.script = [right] * 12 + [status(503)]
    code, _, error = data("distil", problems, "--output", output, *options)
    assert code == 1 and "teacher does not answer: HTTP status 503" in error and "what is done (2) is written" in error
    assert len(endpoint.asked) < 20
    endpoint.script, before = [right], len(endpoint.asked)
    code, out, _ = data("distil", problems, "--output", output, *options, "--resume")
    assert code == 0 and len(endpoint.asked) == before + 60
    assert [row["id"] for row in rows_of(output)] == [str(i) for i in range(12)]
    assert counts_of(out)["samples"] == 72


@pytest.mark.parametrize("number", [401, 500])
def test_an_endpoint_that_never_answers(endpoint, write, data, tmp_path, number):
    endpoint.script = [status(number)]
    problems = write("p.jsonl", PROBLEMS)
    code, _, error = data("distil", problems, "--output", tmp_path / "o.jsonl", *remote(endpoint, "--retries", 0))
    assert code == 1 and f"teacher does not answer: HTTP status {number}" in error
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl"}


def test_why_samples_have_failed_is_told(endpoint, write, data, tmp_path):
    """Here the endpoint hands out parts in place of a text, and once nothing at all."""
    endpoint.script = [says("#2"), says("")] + [says([{"type": "text", "text": "#2"}])]
    output = tmp_path / "o.jsonl"
    settings = remote(endpoint, "--concurrency", 1)
    code, out, error = data("distil", write("p.jsonl", PROBLEMS[:1]), "--output", output, *settings)
    assert code == 0 and (counts_of(out)["failed"], counts_of(out)["kept"]) == (5, 1)
    assert error.splitlines() == [
        "4 failed this time: the answer's content is no text but [{'type': 'text', 'text': '#2'}]",
        "1 failed this time: the answer is empty",
    ]


def test_nothing_right_is_no_empty_file(endpoint, write, data, tmp_path):
    endpoint.script = [says("#77")]
    output = tmp_path / "o.jsonl"
    code, _, error = data("distil", write("p.jsonl", PROBLEMS), "--output", output, *remote(endpoint))
    assert code == 1 and "no demonstration could be kept" in error and not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "1.5"], "--top-p: must be a number above 0 and at most 1, not 1.5"),
        (["--samples", "0"], "--samples: must be a whole number of at least 1, not 0"),
        (["--temperature", "nan"], "--temperature: must be a number of at least 0, not nan"),
        (["--temperature", "0"], "--samples above 1 needs --temperature above 0"),
        (["--min-tokens", "9", "--max-kept-tokens", "8"], "--max-kept-tokens 8 is below --min-tokens 9"),
        (["--url", "localhost"], "--url must look like http://localhost:8000/v1"),
        (["--output", "x.parquet"], "the output is written as JSONL"),
        (["--api-key-variable", "NO_SUCH_KEY"], "the environment has no NO_SUCH_KEY"),
    ],
)
def test_wrong_options(endpoint, write, data, tmp_path, arguments, message):
    problems, output = write("p.jsonl", PROBLEMS), tmp_path / "o.jsonl"
    code, _, error = data("distil", problems, "--output", output, *remote(endpoint), *arguments)
    assert code == 2 and message in error
    assert endpoint.asked == [] and not output.exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "no such file"),
        ([{"prompt": "x", "answer": "1"}, {"answer": "1"}], "p.jsonl:2: no prompt"),
        ([{"prompt": "x"}], "p.jsonl:1: no answer to verify samples against"),
        ([{"id": 1, "prompt": "x", "answer": "1"}] * 2, "p.jsonl:2: id '1' stands already at"),
    ],
)
def test_wrong_rows(endpoint, write, data, tmp_path, rows, message):
    problems = tmp_path / "missing.jsonl" if rows is None else write("p.jsonl", rows)
    code, _, error = data("distil", problems, "--output", tmp_path / "o.jsonl", *remote(endpoint))
    assert code == 2 and message in error and endpoint.asked == []


def test_a_marker_needs_a_verifier(write, data, tmp_path):
    options = ("--output", tmp_path / "o.jsonl", "--model", "m", "--answer-after", "#")
    code, _, error = data("distil", write("p.jsonl", PROBLEMS), *options)
    assert code == 2 and "--answer-after needs --reward" in error


def test_a_folder_that_is_no_model(write, data, tmp_path):
    code, _, error = data("distil", write("p.jsonl", PROBLEMS), "--output", tmp_path / "o.jsonl", "--model", tmp_path)
    assert code == 2 and "must name a Hugging Face folder" in error
