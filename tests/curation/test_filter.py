"""`data filter`: which rows are kept and why the others are not, with references and responses by hand."""

import pytest
from chat_endpoint import says, status
from curation_files import counts_of, rows_of

from megatron_srft.config import MathRewardConfig
from megatron_srft.curation.filter import readable
from megatron_srft.rewards import Scorer

ROWS = [
    {"id": "a", "problem": "1+1", "answer": "2", "extra": {"kept": [1]}, "responses": ["#2", "#3"]},
    {"id": "b", "problem": "1+2", "answer": None, "responses": ["#3"]},
    {"id": "c", "problem": "1+3", "answer": "four hundred and four", "responses": ["#4"]},
    {"id": "d", "problem": "1+4", "answer": 5, "responses": ["#6", "#7"]},
    {"id": "e", "problem": "1+5", "answer": "6", "responses": []},
    {"id": "f", "problem": "1+6", "answer": "7", "responses": ["#7", "#7", "#8"]},
]
EXACT = ("--reward", "exact", "--answer-after", "#")


def test_readable_references():
    good = ["2", r"\frac{1}{2}", "C", "Paris", r"x^2 + \sqrt{3}", "(1, 2)"]
    bad = ["np.arcsin(10/13)", r"\frac{1}{", "a because b is not c"]
    with Scorer((MathRewardConfig(timeout_seconds=60),)) as scorer:
        found = readable(good + bad, scorer)
    assert found == [True] * len(good) + [False] * len(bad)


def test_reasons_and_rows(write, data, tmp_path):
    rows, output, dropped = write("rows.jsonl", ROWS), tmp_path / "out.jsonl", tmp_path / "dropped.jsonl"
    arguments = ("filter", rows, "--output", output, "--dropped", dropped, "--max-answer-characters", 10, *EXACT)
    code, out, _ = data(*arguments)
    assert code == 0 and counts_of(out) == dict(
        rows=6, no_answer=1, long_answer=1, unreadable_answer=0, no_response=0, unmatched=0, kept=4
    )
    code, out, _ = data(*arguments, "--min-matched", 1, "--overwrite")
    assert code == 0 and counts_of(out) == dict(
        rows=6, no_answer=1, long_answer=1, unreadable_answer=0, no_response=1, unmatched=1, kept=2
    )
    assert rows_of(output) == [ROWS[0], ROWS[5]]  # every field as it was
    reasons = [(row["id"], row["reason"], row["where"]) for row in rows_of(dropped)]
    assert reasons == [("b", "no_answer", f"{rows}:2"), ("c", "long_answer", f"{rows}:3"),
                       ("d", "unmatched", f"{rows}:4"), ("e", "no_response", f"{rows}:5")]  # fmt: skip
    code, out, _ = data(*arguments, "--min-matched", 2, "--overwrite")
    assert code == 0 and [row["id"] for row in rows_of(output)] == ["f"]


def test_responses_of_a_file(write, data, tmp_path):
    responses = write("responses.jsonl", [
        {"id": "a", "responses": ["#3"]}, {"id": "d", "responses": ["#5"]}, {"id": "a", "responses": ["#2"]}
    ])  # fmt: skip
    output = tmp_path / "out.jsonl"
    arguments = ("filter", write("rows.jsonl", ROWS), "--output", output, *EXACT, "--responses", responses)
    code, out, _ = data(*arguments)
    assert code == 0 and [row["id"] for row in rows_of(output)] == ["a", "d"]
    assert counts_of(out)["no_response"] == 3
    write("responses.jsonl", [{"id": "a", "responses": "#2"}])
    code, _, error = data(*arguments, "--overwrite")
    assert code == 2 and "responses.jsonl:1: needs an id and a list of texts" in error


def test_sampled_responses(endpoint, write, data, tmp_path):
    def solver(handler):
        question = handler.body["messages"][-1]["content"]
        says("#2" if question == "1+1" else "#7", "length" if question == "1+6" else "stop")(handler)

    endpoint.script = [solver]
    output = tmp_path / "out.jsonl"
    model = ("--url", endpoint.url, "--model", "m", "--samples", 3)
    arguments = ("filter", write("rows.jsonl", ROWS), "--output", output, *EXACT, *model)
    code, out, _ = data(*arguments)
    assert code == 0 and [row["id"] for row in rows_of(output)] == ["a"]
    assert counts_of(out)["unmatched"] == 4  # one of them right, but cut off
    assert len(endpoint.asked) == 15  # nothing is asked about the row without an answer
    assert data(*arguments, "--resume")[:2] == (0, out) and len(endpoint.asked) == 15


def test_an_endpoint_that_never_answers(endpoint, write, data, tmp_path):
    endpoint.script = [status(404)]
    output = tmp_path / "out.jsonl"
    model = ("--url", endpoint.url, "--model", "m")
    code, _, error = data("filter", write("rows.jsonl", ROWS), "--output", output, *EXACT, *model)
    assert code == 1 and "m does not answer: HTTP status 404" in error and not output.exists()


def test_nothing_left_is_no_empty_file(write, data, tmp_path):
    output = tmp_path / "out.jsonl"
    code, _, error = data("filter", write("rows.jsonl", ROWS[1:2]), "--output", output, *EXACT)
    assert code == 1 and "no row is left" in error and counts_of(error)["no_answer"] == 1 and not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-answer-characters", "0"], "--max-answer-characters: must be a whole number of at least 1"),
        (
            ["--model", "m", "--url", "http://localhost:1", "--min-matched", "3"],
            "can never be reached with --samples 2",
        ),
        (["--model", "m", "--responses", "r.jsonl"], "--model draws responses and --responses gives them; choose one"),
        (["--url", "http://localhost:1"], "--url needs --model"),
        (["--responses", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--dropped", "d.txt"], "d.txt: the output is written as JSONL"),
    ],
)
def test_wrong_options(write, data, tmp_path, arguments, message):
    output = tmp_path / "out.jsonl"
    code, _, error = data("filter", write("rows.jsonl", ROWS), "--output", output, *EXACT, *arguments)
    assert code == 2 and message in error and not output.exists()


def test_responses_that_are_nowhere(write, data, tmp_path):
    rows = write("rows.jsonl", [{"problem": "1+1", "answer": "2"}])
    code, _, error = data("filter", rows, "--output", tmp_path / "o.jsonl", *EXACT, "--min-matched", 1)
    assert code == 2 and "no row has the field responses" in error
