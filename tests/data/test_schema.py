from decimal import Decimal

import pytest

from megatron_srft.config import DataConfig
from megatron_srft.data.readers import Row
from megatron_srft.data.schema import columns, lookup, parse, parse_answer

QUESTION = {"role": "user", "content": "7+15="}


def record(fields, **settings):
    return parse(Row(fields, 3, "a.jsonl:3"), DataConfig(**settings), "a.jsonl")


def test_own_schema():
    got = record({"id": 17, "prompt": "7+15=", "answer": 2, "demonstration": "7+15=2#2", "note": ["ignored"]})
    assert (got.id, got.messages, got.answer, got.demonstrations) == ("17", [QUESTION], "2", ("7+15=2#2",))
    assert (got.source, got.file, got.where) == ("a.jsonl", "a.jsonl", "a.jsonl:3")


def test_benchmark_schema_and_generated_id():
    got = record({"problem": "7+15=", "answer": "\\boxed{2}", "demonstration": None})
    assert (got.id, got.messages, got.answer, got.demonstrations) == ("a.jsonl:3", [QUESTION], "\\boxed{2}", ())


def test_verl_and_luffy_schema():
    system = {"role": "system", "content": "Think."}
    got = record(
        {
            "data_source": "math",
            "prompt": [system, QUESTION | {"name": None}],
            "target": [{"role": "assistant", "content": "<think>\na</think>\n2"}],
            "ability": "math",
            "reward_model": {"ground_truth": "2", "style": "rule"},
            "extra_info": {"index": 9, "split": "default"},
        }
    )
    assert got.messages == [system, QUESTION]
    assert (got.answer, got.source, got.file, got.id) == ("2", "math", "a.jsonl", "a.jsonl:3")
    assert got.demonstrations == ("<think>\na</think>\n2",)


def test_keys_can_be_named_and_lead_inside():
    fields = {"text": {"q": "7+15="}, "extra.gold": "5", "extra": {"gold": "6", "r1": "so 6"}, "prompt": "other"}
    got = record(fields, prompt_key="text.q", answer_key="extra.gold", demonstration_key="extra.r1")
    assert (got.messages, got.answer, got.demonstrations) == ([QUESTION], "5", ("so 6",))
    assert record({"question": "q", "target": 42}, answer_key="target").demonstrations == ()
    assert {"text", "extra"} <= columns(DataConfig(prompt_key="text.q", answer_key="extra.gold"))
    assert lookup({"a": 1}, "a.b") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("18", "18"), (18, "18"), (18.0, "18"), (0.5, "0.5"), (1e-7, "0.0000001"), (-2.50, "-2.5"),
        (1e22, "1" + "0" * 22), (10**30 + 1, str(10**30 + 1)), (Decimal("7.500"), "7.5"),
        (Decimal("100"), "100"), (" x ", " x "), ("1,000", "1,000"),
        (None, None), ("", None), (" \n", None), (["a"], "a"), ([1, -2.0], "1, -2"), ([], None), ([None, "3"], "3"),
    ],
)  # fmt: skip
def test_answers_become_text(value, text):
    assert parse_answer(value, "a:1")[0] == text


@pytest.mark.parametrize("value", [True, {"target": "5"}, float("nan"), float("inf"), [["nested"]], b"5"])
def test_answers_that_are_refused(value):
    with pytest.raises(ValueError, match=r"^a:1: answer must be a string, a finite number or a list.*data\.answer_key"):
        parse_answer(value, "a:1")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one", ("one",)), (["one", "two"], ("one", "two")), ([], ()), ("", ()), (None, ()), (["", None, "x"], ("x",)),
        ([{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}], ("one", "two")),
        (" kept \n", (" kept \n",)),
    ],
)  # fmt: skip
def test_demonstrations(value, expected):
    assert record({"prompt": "q", "demonstrations": value}).demonstrations == expected


@pytest.mark.parametrize(
    ("value", "blank"), [("", 1), (["", None, " \n", "x"], 2), ([{"role": "assistant", "content": ""}], 1), (None, 0)]
)
def test_empty_demonstrations_are_counted(value, blank):
    assert record({"prompt": "q", "demonstrations": value}).blank_demonstrations == blank


def test_options_go_into_the_prompt_one_per_line():
    labelled = record({"problem": "Which?", "options": ["A)5(\u221a3 + 1)", "B)None"], "answer": "A"})
    assert labelled.messages[0]["content"] == "Which?\nA)5(\u221a3 + 1)\nB)None"
    bare = record({"problem": "Which?", "options": ["3.5", "4.5"], "answer": "B"}, prompt_template="Q: {prompt}\nA:")
    assert bare.messages[0]["content"] == "Q: Which?\nA) 3.5\nB) 4.5\nA:"
    chat = record({"prompt": [{"role": "system", "content": "s"}, QUESTION], "options": ["(a) x", "(b) y"]})
    assert [m["content"] for m in chat.messages] == ["s", "7+15=\n(a) x\n(b) y"]


def test_prompt_template_keeps_braces_and_leaves_messages_alone():
    template = "{prompt} in \\boxed{{}}"
    assert record({"prompt": "{x}"}, prompt_template=template).messages[0]["content"] == "{x} in \\boxed{}"
    assert record({"prompt": [QUESTION]}, prompt_template=template).messages == [QUESTION]
    with pytest.raises(ValueError, match=r"data\.prompt_template.*write \{\{ and \}\}"):
        record({"prompt": "q"}, prompt_template="{prompt} in \\boxed{}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "q", "answer": "1"}, r"no prompt: none of the fields prompt, problem.*\(fields: text, answer\)"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n\t"}, "the prompt is empty"),
        ({"prompt": 5}, "prompt must be a string or a non-empty list of messages, not 5"),
        ({"prompt": []}, "prompt must be a string or a non-empty list of messages"),
        ({"prompt": ["q"]}, "needs a role and a content, not 'q'"),
        ({"prompt": [{"content": "q"}]}, "needs a role and a content"),
        ({"prompt": [{"role": "user"}]}, "the content of the user message must be text, not None"),
        ({"prompt": [{"role": "user", "content": ""}]}, "the content of the user message is empty"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "must be text"),
        ({"prompt": [QUESTION, {"role": "assistant", "content": "2"}]}, "last message .* move an expert's answer"),
        ({"prompt": "half \ud83d pair"}, "half of a surrogate pair"),
        ({"prompt": "q", "id": ""}, "id must be a non-empty string or an integer"),
        ({"prompt": "q", "id": 1.5}, "id must be a non-empty string or an integer, not 1.5"),
        ({"prompt": "q", "id": True}, "id must be"),
        ({"prompt": "q", "options": "A, B"}, "options must be a non-empty list of strings"),
        ({"prompt": "q", "options": [1, 2]}, "the option must be text, not 1"),
        ({"prompt": "q", "demonstration": 5}, "a demonstration must be a string or a message of the assistant, not 5"),
        ({"prompt": "q", "target": [QUESTION]}, "a demonstration must be a string or a message of the assistant"),
    ],
)
def test_wrong_rows_are_named(fields, message):
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: .*" + message):
        record(fields)
