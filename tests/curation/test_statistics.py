"""`data statistics`: every figure by hand, on demonstrations, rollout dumps and samples.jsonl."""

import json
import tracemalloc

import numpy as np
import pytest

from megatron_srft.analysis.samples import log_samples
from megatron_srft.curation.statistics import Answer, describe
from megatron_srft.rollout import dump
from megatron_srft.sample import Completion, Group, Prompt, Score

TEXTS = ["Wait, 1 2. Alternatively, alternatively 3", "x ```python y``` however", "a b a b a b", "7"]
"""6, 4, 6 and 1 words."""


def test_figures_in_words():
    figures = describe([Answer(text=text) for text in TEXTS], ngram=2)
    assert (figures["answers"], figures["unit"]) == (4, "words")
    lengths = [figures[f"length/{name}"] for name in ("mean", "median", "p90", "max")]
    assert lengths == [4.25, 5, 6, 6]
    assert figures["wait/per_response"] == 0.25 and figures["alternatively/per_response"] == 0.5
    assert figures["alternatively/per_1k"] == pytest.approx(2000 / 17)
    assert figures["reflection/per_response"] == 1.0 and figures["reflection/per_1k"] == pytest.approx(4000 / 17)
    assert (figures["reflection/share"], figures["branching/share"], figures["code_fence/share"]) == (0.5, 0.25, 0.25)
    # a b | b a | a b | b a | a b: 3 of 5 stood there before; nothing in the other texts does
    assert figures["repetition/mean"] == pytest.approx(0.6 / 4) and figures["repetition/share"] == 0.25


def test_tokens_where_all_answers_have_them():
    answers = [Answer(text="Wait", token_ids=(5, 5, 5, 5)), Answer(text="x y z", token_ids=(1,))]
    figures = describe(answers, ngram=2)
    assert (figures["unit"], figures["length/mean"], figures["wait/per_1k"]) == ("tokens", 2.5, 200.0)
    assert figures["repetition/mean"] == pytest.approx((2 / 3) / 2)
    assert describe([*answers, Answer(text="a b")], ngram=2)["unit"] == "words"


@pytest.mark.parametrize(("number", "p90"), [(1, 1), (9, 9), (10, 9), (11, 10), (20, 18), (100, 90)])
def test_nine_of_ten_are_no_longer_than_p90(number, p90):
    answers = [Answer(text="w " * length) for length in range(1, number + 1)]
    assert describe(answers, ngram=40)["length/p90"] == p90
    assert np.mean(np.arange(1, number + 1) <= p90) >= 0.9


@pytest.fixture
def run(tmp_path):
    """A run folder with a dump and samples.jsonl of one step."""
    prompt = Prompt(id="p", text="q", token_ids=np.zeros(1, np.int32), answer="1", source="s")
    completions = tuple(
        Completion(token_ids=np.arange(n, dtype=np.int32), text=text, rollout_logprobs=np.zeros(n, np.float32),
                   finish_reason="stop", policy_version=0)
        for n, text in ((3, "Wait"), (5, "Retry: wait"))
    )  # fmt: skip
    group = Group(prompt=prompt, completions=completions, scores=(Score(reward=0.0), Score(reward=1.0)))
    dump([group], tmp_path / "rollouts" / "step-000000.jsonl.zst")
    log_samples(tmp_path, 0, [group], 4)
    return tmp_path


def test_files_of_every_kind(run, write, model, data):
    rows = [{"prompt": "q", "demonstrations": TEXTS[:2]}, {"prompt": "r", "target": TEXTS[2]}]
    demonstrations = write("d.jsonl", rows)
    files = [demonstrations, run / "rollouts" / "step-000000.jsonl.zst", run / "samples.jsonl"]
    code, out, _ = data("statistics", *files, "--json", run / "figures.json", "--ngram", 2)
    figures = [json.loads((run / "figures.json").read_text())[str(file)] for file in files]
    assert code == 0
    assert [(f["rows"], f["answers"]) for f in figures] == [(2, 3), (1, 2), (2, 2)]
    assert [f["length/mean"] for f in figures] == [pytest.approx(16 / 3), 4.0, 1.5]
    assert [f["reflection/per_response"] for f in figures] == [pytest.approx(4 / 3), 1.5, 1.5]
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert lines["answers"] == ["3", "2", "2"] and lines["unit"] == ["words", "tokens", "words"]
    assert lines["wait/per_1k"] == ["62.5", "250", "666.7"]


def test_words_are_not_kept_in_memory():
    """As an item of a list a word takes ten times the room that it has in its text."""
    answers = [Answer(text=" ".join(f"{number}w{word:05}" for word in range(2000))) for number in range(100)]
    size = sum(len(answer.text) for answer in answers)
    tracemalloc.start()
    figures = describe(answers, ngram=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert figures["length/mean"] == 2000 and figures["repetition/mean"] == 0
    assert peak < size, f"{peak / 1e6:.1f} MB beside texts of {size / 1e6:.1f} MB"


def test_lengths_in_tokens_of_a_tokenizer(write, model, data):
    rows = write("d.jsonl", [{"demonstration": "7+15=22#22"}, {"demonstration": "22"}])
    code, out, _ = data("statistics", rows, "--tokenizer", model)  # one token per character
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert code == 0 and (lines["length/max"], lines["length/mean"], lines["unit"]) == (["10"], ["6"], ["tokens"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "q", "answer": "1"}], "none of its 1 rows has a demonstration"),
        ([{"demonstration": "x"}, {"demonstration": 7}], "rows.jsonl:2: a demonstration must be a string"),
        ([{"prompt": {"id": "a"}, "completions": [{"text": "x"}]}], "rows.jsonl:1: not a dumped group"),
        ([{"prompt": {"id": "a"}, "completions": [{"text": "x", "token_ids": [2**40]}]}], "not a dumped group"),
        ([{"prompt": {"id": "a"}, "completions": [{"text": "x", "token_ids": ["5"]}]}], "not a dumped group"),
        ([], "the file is empty"),
    ],
)
def test_wrong_rows(write, data, rows, message):
    code, _, error = data("statistics", write("rows.jsonl", rows))
    assert code == 2 and message in error


def test_wrong_options(write, data, tmp_path):
    rows = write("rows.jsonl", [{"demonstration": "x"}])
    assert data("statistics", rows, rows)[0] == data("statistics", rows, "--ngram", 0)[0] == 2
    code, _, error = data("statistics", rows, "--tokenizer", tmp_path)
    assert code == 2 and "must name a Hugging Face folder" in error
