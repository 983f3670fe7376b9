import pytest

from megatron_srft.config import DataConfig
from megatron_srft.data.templates import prompt_format, strip_demonstration

USER = [{"role": "user", "content": "7+15="}]
BEGIN, TURN, ASSISTANT = 257, 258, 261


def text(tokenizer, messages=USER, **settings):
    return prompt_format(DataConfig(**settings), tokenizer).text(messages, "a:1")


def tokens(tokenizer, texts, **settings):
    return [ids.tolist() for ids in prompt_format(DataConfig(**settings), tokenizer).tokens(texts)]


def test_chat_prompt_is_what_the_tokenizer_itself_makes(chat_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "größer als 🙂?"}]
    rendered = text(chat_tokenizer, messages)
    assert rendered == "<|system|>Be brief.<|turn|><|user|>größer als 🙂?<|turn|><|assistant|>"
    expected = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokens(chat_tokenizer, [rendered]) == [expected]
    assert expected[0] != BEGIN and expected[-2:] == [TURN, ASSISTANT]


def test_system_prompt_stands_before_prompts_without_their_own(chat_tokenizer, plain_tokenizer):
    assert text(chat_tokenizer, system_prompt="S") == "<|system|>S<|turn|><|user|>7+15=<|turn|><|assistant|>"
    own = [{"role": "system", "content": "own"}, *USER]
    assert text(chat_tokenizer, own, system_prompt="S").startswith("<|system|>own<|turn|><|user|>")
    assert text(plain_tokenizer, system_prompt="S") == "S\n\n7+15="


def test_generation_prefix_ends_the_prompt_once(byte_tokenizer, chat_tokenizer):
    assert text(chat_tokenizer, generation_prefix="<think>\n").endswith("<|assistant|><think>\n")
    for ending in ("<think>", "<think>\\n", "<think>\\n\\n"):
        opens = byte_tokenizer("{{ messages[0].content + ':" + ending + "' }}")
        assert text(opens, generation_prefix="<think>\n") == "7+15=:<think>\n"
    assert text(byte_tokenizer("{{ 'q\\n' }}"), generation_prefix="\n") == "q\n\n"
    assert text(byte_tokenizer(), generation_prefix="7+15=") == "7+15=7+15="


def test_template_choice(chat_tokenizer, plain_tokenizer):
    assert text(chat_tokenizer, chat_template="never") == "7+15="
    assert text(plain_tokenizer, chat_template="auto") == "7+15="
    with pytest.raises(ValueError, match=r"data\.chat_template is always, but the tokenizer has no chat template"):
        text(plain_tokenizer, chat_template="always")


def test_conversations_need_a_template(plain_tokenizer, byte_tokenizer):
    turns = [*USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "and +1?"}]
    with pytest.raises(ValueError, match="a:1: without a chat template .* role assistant"):
        text(plain_tokenizer, turns)
    strict = byte_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="a:1: the chat template refuses messages of user: no system role"):
        text(strict)


def test_todays_date_does_not_enter_the_prompt(byte_tokenizer):
    dated = byte_tokenizer("{{ date_string if date_string is defined else strftime_now('%d %b %Y') }} {{ messages }}")
    assert text(dated).startswith("26 Jul 2024 ")


@pytest.mark.parametrize(
    ("single", "expected"),
    [("$A", [97, 98]), ("<begin> $A", [BEGIN, 97, 98]), ("<begin> $A <end>", [BEGIN, 97, 98]), ("$A <end>", [97, 98])],
)
def test_plain_prompts_begin_as_the_tokenizer_begins_and_never_end(byte_tokenizer, single, expected):
    tokenizer = byte_tokenizer(single=single)
    byte_a = tokenizer.convert_tokens_to_ids("a")
    assert tokens(tokenizer, ["ab"]) == [[i if i >= 256 else i - 97 + byte_a for i in expected]]


def test_beginning_written_in_the_text_is_not_doubled(byte_tokenizer):
    tokenizer = byte_tokenizer(single="<begin> $A")
    assert tokens(tokenizer, ["<begin>ab", "ab"])[0] == tokens(tokenizer, ["ab"])[0]


def test_cut_left_keeps_the_beginning(byte_tokenizer):
    with_beginning = prompt_format(DataConfig(), byte_tokenizer(single="<begin> $A"))
    (ids,) = with_beginning.tokens(["abcdef"])
    assert with_beginning.cut_left(ids, 3).tolist() == [BEGIN, *ids[-2:]]
    assert with_beginning.cut_left(ids, 1).tolist() == [ids[-1]]
    without = prompt_format(DataConfig(), byte_tokenizer())
    (ids,) = without.tokens(["abcdef"])
    assert without.cut_left(ids, 3).tolist() == ids[-3:].tolist()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("2#2", ("2#2", False)),
        ("<think>\n2#2", ("2#2", True)),
        ("<think>\n<think>\n2", ("<think>\n2", True)),
        ("2#2 \n", ("2#2 \n", False)),
        ("2#2 <end>", ("2#2 ", False)),
        ("2#2<end><end>\n <end> \n", ("2#2", False)),
        ("2<end>#2", ("2<end>#2", False)),
    ],
)
def test_strip_demonstration(written, expected):
    assert strip_demonstration(written, "<think>\n", "<end>") == expected
