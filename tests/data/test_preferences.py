"""Pairs of answers: the forms of rows, what becomes of rows without a pair, and their way to sequences."""

import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_srft.advantages import to_sequences, with_advantages
from megatron_srft.config import ConfigError, DataConfig, SamplingConfig, from_dict
from megatron_srft.data import check_vocabulary, load_dataset, preferences, usable_prompts
from megatron_srft.data.packing import pair_units
from megatron_srft.sample import Group

END = 256
ROLLOUT = SamplingConfig(max_response_tokens=20)
PAIR = {"prompt": "7+5=", "chosen": "2", "rejected": "3"}
USER = {"role": "user", "content": "7+5="}


def said(text: str | None) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def load(tmp_path, plain_tokenizer):
    def loader(rows, tokenizer=plain_tokenizer, **settings):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(train=(str(path),), **settings)
        return load_dataset(config, ROLLOUT, tokenizer, with_preferences=True)

    return loader


FORMS = {
    "plain": PAIR,
    "a message each": {"prompt": "7+5=", "chosen": said("2"), "rejected": said("3")},
    "conversational": {"prompt": [USER], "chosen": [said("2")], "rejected": [said("3")]},
    "implicit prompt": {"chosen": [USER, said("2")], "rejected": [USER, said("3")]},
    "UltraFeedback": {"prompt": "7+5=", "chosen": [USER, said("2")], "rejected": [USER, said("3")]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tokens(load, chat_tokenizer, form):
    (prompt,) = load([FORMS[form]], chat_tokenizer).prompts
    assert prompt.text == "<|user|>7+5=<|turn|><|assistant|>"
    pair = prompt.preference
    assert (pair.chosen.text, pair.rejected.text, prompt.demonstrations) == ("2", "3", ())
    assert [answer.token_ids.tolist() for answer in (pair.chosen, pair.rejected)] == [[17, END], [18, END]]
    assert {pair.chosen.token_ids.dtype, pair.rejected.token_ids.dtype} == {np.dtype(np.int32)}


def test_a_conversation_of_several_turns_and_other_keys(load, chat_tokenizer):
    before = [{"role": "system", "content": "Add."}, USER, said("2"), {"role": "user", "content": "Sure?"}]
    row = {"better": {"text": [*before, said("yes")]}, "worse": [*before, said("no")]}
    (prompt,) = load([row], chat_tokenizer, chosen_key="better.text", rejected_key="worse").prompts
    assert prompt.text.startswith("<|system|>Add.<|turn|><|user|>7+5=<|turn|><|assistant|>2<|turn|><|user|>Sure?")
    assert (prompt.preference.chosen.text, prompt.preference.rejected.text) == ("yes", "no")


def test_parquet_reads_only_what_it_needs(tmp_path, plain_tokenizer):
    path = tmp_path / "pairs.parquet"
    rows = [{**PAIR, "chosen": [USER, said("2")], "rejected": [USER, said("3")], "score": 1.0}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    config = DataConfig(train=(str(path),))
    (prompt,) = load_dataset(config, ROLLOUT, plain_tokenizer, with_preferences=True).prompts
    assert (prompt.text, prompt.preference.chosen.text, prompt.preference.rejected.text) == ("7+5=", "2", "3")


def test_rows_without_a_pair_are_left_out_counted_and_named(load):
    rows = [
        PAIR,
        {"prompt": "q", "chosen": "2"},
        {"prompt": "q", "chosen": "2", "rejected": None},
        {"prompt": "q", "chosen": [], "rejected": "3"},
        {"prompt": "q", "chosen": "2", "rejected": " \n"},
        {"prompt": "q", "chosen": [said("")], "rejected": "3"},
        {"prompt": "q", "chosen": [said(None)], "rejected": "3"},
        {"prompt": "q", "chosen": "2", "rejected": "2"},
        {"prompt": "q", "chosen": "2", "rejected": "2<end>"},
        {"prompt": "q", "chosen": "2", "rejected": "x" * 20},
        {"prompt": "q" * 30, "chosen": "2", "rejected": "3"},
        {"chosen": [USER, said("2")], "rejected": [{**USER, "content": "other"}, said("3")]},
    ]
    data = load(rows, max_prompt_tokens=10)
    assert [prompt.text for prompt in data.prompts] == ["7+5="]
    total = data.report.total
    assert (total.rows, total.kept, total.pairs, total.dropped.total()) == (12, 1, 1, 11)
    expected = {
        "no rejected answer (rejected is missing or null)": (2, 2),
        "no chosen answer (chosen is missing or null)": (2, 4),
        "the rejected answer is empty (rejected)": (1, 5),
        "the chosen answer is empty (chosen)": (1, 6),
        preferences.EQUAL: (2, 8),
        preferences.TOO_LONG: (1, 10),
        "longer than data.max_prompt_tokens": (1, 11),
        preferences.OTHER_CONVERSATION: (1, 12),
    }
    assert total.dropped == Counter({reason: number for reason, (number, _) in expected.items()})
    for reason, (number, line) in expected.items():
        assert f"dropped {number}: {reason} (first at {total.first_dropped[reason]})" in data.report.summary()
        assert total.first_dropped[reason].endswith(f"pairs.jsonl:{line}")
    assert "1 answer pair, the longest 21 tokens; 1 answer dropped as too long" in data.report.summary()


def test_truncated_answers_that_have_become_equal_teach_nothing(load, plain_tokenizer):
    rows = [{"prompt": "q", "chosen": "abcdef", "rejected": text} for text in ("abcdxy", "abc")]
    data = load(rows, max_demonstration_tokens=4, overlong_demonstrations="truncate")
    (pair,) = [prompt.preference for prompt in data.prompts]
    assert (pair.chosen.token_ids.tolist(), pair.chosen.truncated) == (plain_tokenizer("abcd").input_ids, True)
    assert data.report.total.dropped == Counter({preferences.EQUAL: 1})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "rejected": 3}, r"pairs\.jsonl:1: rejected must be text, or chat messages of which the last"),
        ({**PAIR, "chosen": [USER]}, r"pairs\.jsonl:1: chosen must be text, or chat messages of which the last"),
        ({**PAIR, "chosen": [said(5)]}, r"pairs\.jsonl:1: the chosen answer must be text, not 5"),
        ({"chosen": "2", "rejected": "3"}, r"pairs\.jsonl:1: no prompt: none of the fields prompt, problem"),
        (
            {"prompt": "1+1=", "chosen": [USER, said("2")], "rejected": [USER, said("3")]},
            r"pairs\.jsonl:1: the prompt '1\+1=' is not in the conversation before chosen",
        ),
        ({**PAIR, "chosen": "2<end>2"}, r"pairs\.jsonl:1: the demonstration holds the end-of-sequence token"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_file_and_line(load, row, message):
    with pytest.raises(ValueError, match=message):
        load([row])


@pytest.mark.parametrize("rows", [[{"prompt": "q", "demonstration": "2"}], [{**PAIR, "rejected": "2"}] * 2])
def test_data_without_a_single_pair_are_refused_with_the_keys(load, rows):
    with pytest.raises(ConfigError, match=r"no pair of answers .*dropped.*data\.chosen_key .*data\.rejected_key"):
        load(rows)


def test_other_stages_do_not_look_at_pairs(tmp_path, plain_tokenizer):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**PAIR, "rejected": 3}))
    (prompt,) = load_dataset(DataConfig(train=(str(path),)), ROLLOUT, plain_tokenizer).prompts
    assert prompt.preference is None


def test_a_stage_needs_no_answers_and_enough_pairs(load):
    prompts = load([PAIR, {**PAIR, "prompt": "8+5="}])
    settings = {"objective": {"kind": "dpo"}, "data": {"require_demonstration": True}}
    assert usable_prompts(prompts, from_dict({**settings, "batch": {"prompts_per_step": 2}})) == prompts.prompts
    with pytest.raises(ConfigError, match="prompts_per_step is 3, but data.train has only 2 prompts"):
        usable_prompts(prompts, from_dict({**settings, "batch": {"prompts_per_step": 3}}))
    with pytest.raises(ConfigError, match="has token 256"):
        check_vocabulary(prompts.prompts, 256)


def test_a_pair_becomes_two_neighbours_of_which_the_first_is_preferred(load):
    prompts = load([PAIR, {**PAIR, "chosen": "13"}]).prompts
    groups = [Group(prompt=prompt, completions=()) for prompt in prompts]
    config = from_dict({"objective": {"kind": "dpo"}}).resolved()
    sequences = with_advantages(to_sequences(groups), groups, config.advantage)
    assert [(s.group, s.preferred, s.is_demonstration) for s in sequences] == [
        (0, True, True), (0, False, True), (1, True, True), (1, False, True)
    ]  # fmt: skip
    assert [s.token_ids[s.prompt_length :].tolist() for s in sequences] == [
        [17, END],
        [18, END],
        [16, 18, END],
        [18, END],
    ]
    assert all(s.token_ids[: s.prompt_length].tolist() == prompts[0].token_ids.tolist() for s in sequences)
    assert not any(s.advantages.any() for s in sequences)
    assert pair_units(sequences) == [(0, 1), (2, 3)]
    assert pair_units(sequences[1:]) == [(0,), (1, 2)]  # what is measured beforehand may be half a pair
    assert pair_units([sequences[0], sequences[2]]) == [(0,), (1,)]
