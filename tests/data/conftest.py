"""Tokenizers small enough to count by hand: one token per byte."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<end>", "<begin>", "<|turn|>", "<|system|>", "<|user|>", "<|assistant|>")


def _byte_tokenizer(
    chat_template: str | None = None, single: str = "$A", merges: tuple = (), eos_token: str | None = "<end>"
) -> PreTrainedTokenizerFast:
    """One id per byte, special tokens 256 and up. `single` is the pattern of automatically added tokens."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {token: 256 + index for index, token in enumerate(SPECIAL)}
    vocabulary |= {left + right: len(vocabulary) + index for index, (left, right) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocabulary, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<end>", 256), ("<begin>", 257)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos_token, bos_token="<begin>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _byte_tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """No chat template, adds no tokens."""
    return _byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A chat template whose turns end otherwise than the text does; adds <begin> to plain text."""
    return _byte_tokenizer(CHAT_TEMPLATE, "<begin> $A")
