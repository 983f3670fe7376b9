"""Candidates from dumps and JSONL: tokens, verdicts, external scores, and every bad row by file and line."""

import json

import numpy as np
import pytest
from tiny_models import make_tokenizer

from megatron_srft.best_of_n.candidates import read_candidates
from megatron_srft.config import DataConfig, ExactRewardConfig
from megatron_srft.rewards import Scorer
from megatron_srft.rollout import dump
from megatron_srft.sample import Completion, Group, Prompt, Score

TOKENIZER = make_tokenizer()
ROW = {"id": "q", "prompt": "1+1=", "answer": "2", "responses": ["is#2", "is#3", "none"]}


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(*files, scores=None, data=None):
    with Scorer((ExactRewardConfig(answer_after="#"),)) as scorer:
        return read_candidates(files, data or DataConfig(), TOKENIZER, scorer.score, scores)


def ids(text, end=True):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"] + ([1] if end else [])


def test_a_row_becomes_tokens_and_verdicts(tmp_path):
    cut = ROW | {"finish_reasons": ["stop", "stop", "length"]}
    found = read(lines(tmp_path / "c.jsonl", cut))
    (group,) = found.groups
    assert group.prompt.token_ids.tolist() == ids("1+1=", end=False)
    assert [c.token_ids.tolist() for c in group.completions] == [ids("is#2"), ids("is#3"), ids("none", end=False)]
    assert [score.correct for score in group.scores] == [True, False, False]
    assert [score.answer for score in group.scores] == ["2", "3", None]
    assert (found.size, found.ungraded, found.external) == (3, 0, {})


def test_a_verdict_in_the_file_outranks_the_verifier_which_still_finds_what_to_vote_for(tmp_path):
    found = read(lines(tmp_path / "c.jsonl", ROW | {"correct": [False, None, 1]}))
    assert [score.correct for score in found.groups[0].scores] == [False, False, True]
    assert [score.answer for score in found.groups[0].scores] == ["2", "3", None]


def test_without_answer_and_verdict_a_candidate_is_ungraded(tmp_path):
    row = {key: value for key, value in ROW.items() if key != "answer"}
    found = read(lines(tmp_path / "c.jsonl", row | {"correct": [True, None, None]}))
    assert [score.correct for score in found.groups[0].scores] == [True, None, None]
    assert found.ungraded == 2


def sampled(text):
    tokens = np.array(ids(text), np.int32)
    nothing = np.zeros(len(tokens), np.float32)
    return Completion(token_ids=tokens, text=text, rollout_logprobs=nothing, finish_reason="stop", policy_version=0)


def prompt(name="q", text="1+1=", answer="2"):
    return Prompt(id=name, text=text, token_ids=np.array(ids(text, False), np.int32), answer=answer, source="s")


def test_dumps_keep_tokens_and_verdicts_and_join_the_rows_of_their_question(tmp_path):
    score = Score(reward=1.0, streams={"math": 1.0}, correct=None, status="timeout")
    dump([Group(prompt=prompt(), completions=(sampled("x#9"),), scores=(score,))], tmp_path / "a.jsonl.zst")
    dump([Group(prompt=prompt("other", "2+2=", "4"), completions=(sampled("#4"),))], tmp_path / "b.jsonl")
    row = ROW | {"scores": {"rm": [1, 2.5, None]}}
    found = read(tmp_path / "a.jsonl.zst", lines(tmp_path / "c.jsonl", row), tmp_path / "b.jsonl")
    first, second = found.groups
    assert [c.text for c in first.completions] == ["x#9", "is#2", "is#3", "none"]
    assert [s.correct for s in first.scores] == [None, True, False, False]  # a timeout is not tried again
    assert [s.correct for s in second.scores] == [True]  # a dump without scores is verified
    assert found.merged == 1 and found.unscored("rm") == 3
    np.testing.assert_array_equal(found.external["rm"][0], [np.nan, 1, 2.5, np.nan])
    np.testing.assert_array_equal(found.external["rm"][1], [np.nan])


def test_scores_from_a_file_of_their_own(tmp_path):
    files = lines(tmp_path / "c.jsonl", ROW, ROW | {"id": "p"})
    more = lines(
        tmp_path / "s.jsonl", {"id": "p", "scores": {"rm": [3, 2, 1], "prm": [0, 0, 1]}}, {"id": "z", "scores": 0}
    )
    found = read(files, scores=more)
    assert found.external["rm"][1].tolist() == [3, 2, 1] and found.unscored("rm") == 3
    assert found.external["prm"][1].tolist() == [0, 0, 1]


def test_templates_and_prefix_are_those_of_training(tmp_path):
    data = DataConfig(prompt_template="Q: {prompt}\n", generation_prefix="is")
    (group,) = read(lines(tmp_path / "c.jsonl", ROW), data=data).groups
    assert group.prompt.text == "Q: 1+1=\nis"
    assert [c.text for c in group.completions] == ["#2", "#3", "none"]
    assert [s.correct for s in group.scores] == [True, False, False]


def test_a_prompt_over_the_limit_is_dropped_and_counted(tmp_path):
    files = lines(tmp_path / "c.jsonl", ROW, ROW | {"id": "long", "prompt": "1+1+1+1+1="})
    found = read(files, data=DataConfig(max_prompt_tokens=8))
    assert (len(found.groups), found.dropped) == (1, 1)
    with pytest.raises(ValueError, match="no question is left.*max_prompt_tokens"):
        read(files, data=DataConfig(max_prompt_tokens=2))


BAD = [
    ({"id": "p", "prompt": "1"}, "c.jsonl:2: no responses"),
    (ROW | {"id": 5, "responses": []}, "c.jsonl:2: responses must be a non-empty list"),
    (ROW | {"id": 5, "responses": ["a", 3]}, "c.jsonl:2: responses must be a non-empty list of texts"),
    (ROW | {"id": 5, "responses": ["a<eos>b"]}, "c.jsonl:2: response 0 holds the end-of-sequence token"),
    (ROW | {"id": 5, "correct": [True]}, "c.jsonl:2: correct has 1 verdicts for 3 responses"),
    (ROW | {"id": 5, "correct": ["yes", "no", "no"]}, "c.jsonl:2: correct must be a list of true, false and null"),
    (ROW | {"id": 5, "finish_reasons": ["stop"]}, "c.jsonl:2: finish_reasons must be"),
    (ROW | {"id": 5, "scores": [1, 2, 3]}, "c.jsonl:2: scores must look like"),
    (ROW | {"id": 5, "scores": {"rm": [1, 2]}}, "c.jsonl:2: scores.rm has 2 values for 3 responses"),
    (ROW | {"id": 5, "scores": {"rm": [1, float("nan"), 2]}}, "c.jsonl:2: scores.rm of response 1 is NaN"),
    (ROW | {"id": 5, "scores": {"rm": [1, "2", 2]}}, 'c.jsonl:2: scores.rm of response 1 is "2"'),
    (ROW, "c.jsonl:2: id 'q' stands already at"),
    (ROW | {"id": 5, "prompt": " "}, "c.jsonl:2: the prompt is empty"),
    ("{", "c.jsonl:2: not JSON"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_row_is_named_with_a_remedy(tmp_path, row, message):
    with pytest.raises(ValueError) as error:
        read(lines(tmp_path / "c.jsonl", ROW, row))
    assert message in str(error.value)


BAD_SCORES = [
    ({"scores": {"rm": [1, 2, 3]}}, "s.jsonl:1: a row of --scores needs an id"),
    ({"id": "q", "scores": {"rm": [1, 2]}}, "s.jsonl:1: scores.rm has 2 values for 3 responses"),
    ({"id": "q", "scores": {"rm": [1, 2, float("inf")]}}, "is Infinity, not a finite number"),
    ({"id": "q", "scores": {"own": [1, 2, 3]}}, "s.jsonl:1: scores.own stands already at"),
    ({"id": "nobody", "scores": {"rm": [1]}}, "none of its 1 ids belongs to a question"),
]


@pytest.mark.parametrize(("row", "message"), BAD_SCORES, ids=[message for _, message in BAD_SCORES])
def test_bad_external_scores_are_refused(tmp_path, row, message):
    files = lines(tmp_path / "c.jsonl", ROW | {"scores": {"own": [1, 2, 3]}})
    with pytest.raises(ValueError) as error:
        read(files, scores=lines(tmp_path / "s.jsonl", row))
    assert message in str(error.value)


def test_one_id_for_two_prompts_and_tokens_of_another_tokenizer_are_refused(tmp_path):
    lines(tmp_path / "c.jsonl", ROW)
    dump([Group(prompt=prompt(answer="3"), completions=(sampled("#3"),))], tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a.jsonl:1: id 'q' has another prompt or answer at .*c.jsonl:1"):
        read(tmp_path / "c.jsonl", tmp_path / "a.jsonl")
    foreign = Prompt(id="f", text="1+1=", token_ids=np.array([9, 9], np.int32), answer="2", source="s")
    dump([Group(prompt=foreign, completions=(sampled("#2"),))], tmp_path / "f.jsonl")
    with pytest.raises(ValueError, match="f.jsonl: its prompts have other tokens"):
        read(tmp_path / "f.jsonl")
    dump([Group(prompt=prompt(), completions=())], tmp_path / "e.jsonl")
    with pytest.raises(ValueError, match="e.jsonl: its groups have no completions"):
        read(tmp_path / "e.jsonl")
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        read(tmp_path / "nowhere.jsonl")
