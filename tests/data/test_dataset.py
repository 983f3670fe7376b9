import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_srft.config import DataConfig, SamplingConfig
from megatron_srft.data import encode as encoding
from megatron_srft.data import load_dataset, load_problems

END = 256
ROLLOUT = SamplingConfig(max_response_tokens=20)
ROWS = [
    {"id": "a", "prompt": "7+15=", "answer": "2", "demonstration": "7+15=2#2"},
    {"id": "b", "prompt": "3-1=", "answer": 2.0, "demonstrations": ["3-1=2#2", "2<end>\n"]},
    {"id": "c", "prompt": "größer?", "answer": None},
]


@pytest.fixture
def write(tmp_path):
    def writer(rows, name="train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return writer


@pytest.fixture
def load(write, plain_tokenizer):
    def loader(rows, tokenizer=plain_tokenizer, rollout=ROLLOUT, **settings):
        return load_dataset(DataConfig(train=(write(rows),), **settings), rollout, tokenizer)

    return loader


def test_prompts_and_demonstrations(load, plain_tokenizer):
    prompts = load(ROWS).prompts
    assert [(p.id, p.text, p.answer, p.source) for p in prompts] == [
        ("a", "7+15=", "2", "train.jsonl"), ("b", "3-1=", "2", "train.jsonl"), ("c", "größer?", None, "train.jsonl")
    ]  # fmt: skip
    assert [[d.text for d in p.demonstrations] for p in prompts] == [["7+15=2#2"], ["3-1=2#2", "2"], []]
    for p in prompts:
        assert p.token_ids.dtype == np.int32 and plain_tokenizer.decode(p.token_ids) == p.text
        for d in p.demonstrations:
            assert d.token_ids.dtype == np.int32 and not d.truncated
            assert plain_tokenizer.decode(d.token_ids) == d.text + "<end>"
    assert len(prompts[2].token_ids) == len("größer?".encode())


@pytest.mark.parametrize("ending", ["", "<end>", "<end><end>", "<end>\n"])
@pytest.mark.parametrize("single", ["$A", "$A <end>", "<begin> $A <end>"])
def test_demonstrations_end_exactly_once_and_prompts_never(load, byte_tokenizer, single, ending):
    rows = [{"prompt": "q", "answer": "1", "demonstration": "so 1" + ending}]
    (prompt,) = load(rows, byte_tokenizer(single=single)).prompts
    ids = prompt.demonstrations[0].token_ids.tolist()
    assert ids.count(END) == 1 and ids[-1] == END and len(ids) == 5
    assert END not in prompt.token_ids


def test_the_end_token_is_the_tokenizers_also_under_a_chat_template(load, chat_tokenizer):
    (prompt,) = load([{"prompt": "q", "demonstration": "1<|turn|>"}], chat_tokenizer).prompts
    assert prompt.text == "<|user|>q<|turn|><|assistant|>"
    assert prompt.demonstrations[0].token_ids.tolist()[-2:] == [258, END]


def test_end_token_inside_a_demonstration_is_an_error(load):
    with pytest.raises(ValueError, match=r"train\.jsonl:1: the demonstration holds the end-of-sequence token '<end>'"):
        load([{"prompt": "q", "demonstration": "1<end> and 2"}])


def test_prompt_and_demonstration_are_tokenised_apart(load, byte_tokenizer):
    """Joined, '=' and '2' would merge; a sampled answer starts after the prompt's own tokens."""
    tokenizer = byte_tokenizer(merges=(("=", "2"),))
    assert len(tokenizer("7-5=2")["input_ids"]) == 4
    (prompt,) = load([{"prompt": "7-5=", "demonstration": "2"}], tokenizer).prompts
    assert (len(prompt.token_ids), len(prompt.demonstrations[0].token_ids)) == (4, 2)


def test_generation_prefix_moves_from_demonstration_to_prompt(load):
    rows = [{"prompt": "q", "demonstration": "<think>\n1"}, {"prompt": "r", "demonstration": "2"}]
    data = load(rows, generation_prefix="<think>\n")
    assert [(p.text, p.response_prefix, p.demonstrations[0].text) for p in data.prompts] == [
        ("q<think>\n", "<think>\n", "1"), ("r<think>\n", "<think>\n", "2")
    ]  # fmt: skip
    assert data.report.total.without_prefix == 1


# ---------------------------------------------------------------- limits


LENGTHS = [{"prompt": "abcd", "demonstration": "x" * 4}, {"prompt": "abcde", "demonstration": "x" * 5}, {"prompt": "f"}]


def test_overlong_prompts(load, byte_tokenizer):
    dropped = load(LENGTHS, max_prompt_tokens=4)
    assert [p.text for p in dropped.prompts] == ["abcd", "f"]
    assert dropped.report.total.dropped == Counter({encoding.TOO_LONG: 1})
    cut = load(LENGTHS, max_prompt_tokens=4, overlong_prompts="truncate_left")
    assert [p.text for p in cut.prompts] == ["abcd", "bcde", "f"]
    assert (cut.report.total.kept, cut.report.total.truncated_prompts) == (3, 1)
    begun = load(LENGTHS, byte_tokenizer(single="<begin> $A"), max_prompt_tokens=4, overlong_prompts="truncate_left")
    assert [p.text for p in begun.prompts] == ["<begin>bcd", "<begin>cde", "f"]
    with pytest.raises(ValueError, match=r":2: the prompt has 5 tokens, more than data\.max_prompt_tokens = 4"):
        load(LENGTHS, max_prompt_tokens=4, overlong_prompts="error")


def test_overlong_demonstrations(load):
    dropped = load(LENGTHS, max_demonstration_tokens=5)
    assert [len(p.demonstrations) for p in dropped.prompts] == [1, 0, 0]
    total = dropped.report.total
    assert (total.kept, total.demonstrations, total.overlong_demonstrations, total.without_demonstration) == (
        3,
        1,
        1,
        2,
    )
    cut = load(LENGTHS, max_demonstration_tokens=5, overlong_demonstrations="truncate")
    whole, short = cut.prompts[0].demonstrations[0], cut.prompts[1].demonstrations[0]
    assert (whole.truncated, whole.token_ids[-1], short.truncated) == (False, END, True)
    assert len(short.token_ids) == 5 and END not in short.token_ids and short.text == "xxxxx"
    assert cut.report.total.truncated_demonstrations == 1
    with pytest.raises(
        ValueError, match=r":2: the demonstration has 6 tokens, more than data\.max_demonstration_tokens"
    ):
        load(LENGTHS, max_demonstration_tokens=5, overlong_demonstrations="error")


def test_the_response_limit_holds_for_demonstrations_by_default(load):
    total = load(LENGTHS, rollout=SamplingConfig(max_response_tokens=5)).report.total
    assert (total.demonstrations, total.overlong_demonstrations, total.longest_demonstration_tokens) == (1, 1, 6)


def test_require_demonstration(load):
    data = load(LENGTHS, max_demonstration_tokens=5, require_demonstration=True)
    assert [p.text for p in data.prompts] == ["abcd"]
    assert data.report.total.dropped == Counter({encoding.NO_DEMONSTRATION: 2})


def test_nothing_left_is_an_error(load):
    with pytest.raises(ValueError, match="no prompt is left: 0 prompts from 1 row.*dropped 1: longer than"):
        load([{"prompt": "abcd"}], max_prompt_tokens=2)


# ---------------------------------------------------------------- files and report


def test_counts_add_up_over_files_and_chunks(write, plain_tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "RECORDS_PER_CALL", 3)
    rows = [{"prompt": "x" * (1 + i % 5), "answer": ["1", "2"] if i == 4 else None} for i in range(10)]
    files = (
        write(rows, "one/a.jsonl"),
        write(rows[:7], "two/a.jsonl"),
        write([{"prompt": "x", "answer": 1}], "b.jsonl"),
    )
    data = load_dataset(DataConfig(train=files, max_prompt_tokens=4), ROLLOUT, plain_tokenizer)
    counts = data.report.files
    assert [(c.rows, c.kept, c.dropped.total()) for c in counts.values()] == [(10, 8, 2), (7, 6, 1), (1, 1, 0)]
    assert [label.split("/")[-2:] for label in counts][:2] == [["one", "a.jsonl"], ["two", "a.jsonl"]]
    total = data.report.total
    assert (total.rows, total.kept, total.dropped[encoding.TOO_LONG]) == (18, 15, 3)
    assert (total.without_answer, total.joined_answers, total.longest_prompt_tokens) == (14, 0, 5)
    assert [len(p.token_ids) for p in data.prompts] == [1, 2, 3, 4] * 2 + [1, 2, 3, 4, 1, 2] + [1]
    assert len({p.id for p in data.prompts}) == 15
    assert "15 prompts from 18 rows in 3 files" in data.report.summary()


def test_summary_tells_all_that_was_dropped_cut_or_missing(write, plain_tokenizer):
    train = write([*ROWS, {"id": "d", "prompt": "x" * 30}, {"id": "e", "prompt": "m", "answer": [1, 2]}])
    extra = write([{"id": "c", "demonstration": "y" * 30}, {"id": "z", "demonstration": "n"}], "expert.jsonl")
    config = DataConfig(
        train=(train,), demonstrations=(extra,), max_prompt_tokens=10, max_demonstration_tokens=8,
        overlong_demonstrations="truncate", generation_prefix="3",
    )  # fmt: skip
    assert str(load_dataset(config, ROLLOUT, plain_tokenizer).report) == (
        "4 prompts from 5 rows in 1 file, with no chat template; longest prompt 31 tokens; "
        f"dropped 1: longer than data.max_prompt_tokens (first at {train}:4); 1 prompt without an answer; "
        "1 answer given as a list, joined by commas; 4 demonstrations, the longest 31 tokens; 1 prompt without one; "
        "2 demonstrations truncated; 3 demonstrations not beginning with data.generation_prefix; "
        "1 row of data.demonstrations whose id no prompt has."
    )


def test_duplicate_ids(load, write, plain_tokenizer):
    with pytest.raises(ValueError, match=r"train\.jsonl:2: id 'a' stands already at .*train\.jsonl:1"):
        load([{"id": "a", "prompt": "q"}, {"id": "a", "prompt": "r"}])
    files = (write([{"id": 1, "prompt": "q"}], "one.jsonl"), write([{"id": "1", "prompt": "q"}], "two.jsonl"))
    with pytest.raises(ValueError, match=r"two\.jsonl:1: id '1' stands already at .*one\.jsonl:1"):
        load_dataset(DataConfig(train=files), ROLLOUT, plain_tokenizer)
    with pytest.raises(ValueError, match=r"data\.train names .*one\.jsonl twice"):
        load_dataset(DataConfig(train=files[:1] * 2), ROLLOUT, plain_tokenizer)


def test_demonstration_files_are_joined_by_id(write, plain_tokenizer):
    train = write([{"id": 1, "prompt": "q", "demonstration": "own"}, {"id": "2", "prompt": "r"}, {"prompt": "s"}])
    extra = write(
        [{"id": "1", "target": [{"role": "assistant", "content": "one"}]}, {"id": 2, "demonstration": "two"},
         {"id": "9", "demonstration": "nobody's"}, {"id": "1", "demonstrations": ["three", "four"]}],
        "expert.jsonl",
    )  # fmt: skip
    data = load_dataset(DataConfig(train=(train,), demonstrations=(extra,)), ROLLOUT, plain_tokenizer)
    shown = [[d.text for d in p.demonstrations] for p in data.prompts]
    assert shown == [["own", "one", "three", "four"], ["two"], []]
    assert (data.report.matched_demonstrations, data.report.unmatched_demonstrations) == (3, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": "x", "demonstration": "1"}],
            r"none of its 1 ids belongs to a prompt; ids of data\.train look like 'a'",
        ),
        ([{"id": "a", "demonstration": ""}], r"expert\.jsonl:1: .* needs the field demonstration or demonstrations"),
        ([{"demonstration": "1"}], r"expert\.jsonl:1: a row of data\.demonstrations needs the field id"),
    ],
)
def test_wrong_demonstration_files(write, plain_tokenizer, rows, message):
    config = DataConfig(train=(write(ROWS),), demonstrations=(write(rows, "expert.jsonl"),))
    with pytest.raises(ValueError, match=message):
        load_dataset(config, ROLLOUT, plain_tokenizer)


def test_misspelled_keys(load):
    with pytest.raises(ValueError, match=r"data\.answer_key: no row of data\.train has the field 'gold'"):
        load(ROWS, answer_key="gold")
    with pytest.raises(ValueError, match=r"data\.demonstration_key: no row of data\.train has the field 'expert'"):
        load(ROWS, demonstration_key="expert")


def test_no_files_and_no_end_token(plain_tokenizer, load, byte_tokenizer):
    with pytest.raises(ValueError, match=r"data\.train names no file"):
        load_dataset(DataConfig(), ROLLOUT, plain_tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no end-of-sequence token"):
        load(ROWS, byte_tokenizer(eos_token=None))


def test_luffy_parquet_as_it_is(tmp_path, chat_tokenizer):
    path = tmp_path / "openr1.parquet"
    rows = [
        {
            "data_source": "openr1",
            "prompt": [{"content": "Think.", "role": "system"}, {"content": f"{i}+1=", "role": "user"}],
            "target": [{"content": f"<think>\nwell</think>\n{i + 1}", "role": "assistant"}],
            "ability": "math",
            "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
            "extra_info": {"index": 0, "split": "default"},
        }
        for i in range(3)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    config = DataConfig(train=(str(path),), generation_prefix="<think>\n")
    data = load_dataset(config, SamplingConfig(max_response_tokens=100), chat_tokenizer)
    assert [(p.id, p.answer, p.source) for p in data.prompts] == [
        (f"openr1.parquet:{i}", str(i + 1), "openr1") for i in range(3)
    ]
    assert data.prompts[1].text == "<|system|>Think.<|turn|><|user|>1+1=<|turn|><|assistant|><think>\n"
    assert data.prompts[1].demonstrations[0].text == "well</think>\n2"
    assert data.report.total.without_prefix == 0


# ---------------------------------------------------------------- evaluation


def test_problems_leave_demonstrations_out_and_ignore_require_demonstration(write, plain_tokenizer):
    config = DataConfig(max_prompt_tokens=5, require_demonstration=True)
    data = load_problems((write([*ROWS[:2], {"prompt": "too long", "answer": 1}]),), config, plain_tokenizer)
    assert [(p.text, p.answer, p.demonstrations) for p in data.prompts] == [("7+15=", "2", ()), ("3-1=", "2", ())]
    assert data.report.total.dropped == Counter({encoding.TOO_LONG: 1})


def test_problems_up_to_a_number_per_file(write, plain_tokenizer):
    files = [write([{"prompt": f"{i}", "answer": i} for i in range(5)], name) for name in ("a.jsonl", "b.jsonl")]
    data = load_problems(files, DataConfig(), plain_tokenizer, max_problems=2)
    assert [p.id for p in data.prompts] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]
    assert data.report.total.rows == 4


def test_problems_need_answers(write, plain_tokenizer):
    with pytest.raises(ValueError, match=r"train\.jsonl:3: an evaluation problem needs an answer"):
        load_problems((write(ROWS),), DataConfig(), plain_tokenizer)
