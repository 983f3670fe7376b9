"""Text and tokens of prompts and demonstrations.

Prompt and demonstration are tokenised apart: a sampled response also starts on a fresh token, so training sees the
same token boundary as sampling. Tokenising the joined text can merge tokens over that boundary, and would teach the
policy a boundary it never meets.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from megatron_srft.config import DataConfig

# Llama 3.2's template writes today's date unless it is given one: a run resumed tomorrow would see other prompts.
# Templates without this variable ignore it.
FIXED_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class PromptFormat:
    """How chat messages become the text and the tokens of a prompt. Made by `prompt_format`."""

    tokenizer: Any
    chat: bool
    """Render with the tokenizer's chat template; else contents are joined by blank lines."""
    system_prompt: str | None
    generation_prefix: str
    beginning: tuple[int, ...]
    """The beginning-of-sequence token, if tokenizer and rendering call for one; chat templates write their own."""

    def text(self, messages: list[dict[str, str]], where: str) -> str:
        """The prompt as the model sees it, up to where its response starts.

        Raises:
            ValueError: the chat template refuses the messages, or there is none and they hold assistant turns.
        """
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if not self.chat:
            return _plain_text(messages, where) + self.generation_prefix
        # Templates of reasoning models may open the response themselves, with or without a line end after <think>.
        opening = self.generation_prefix.rstrip()
        text = self._chat_text(messages, where)
        opened = opening and text.rstrip().endswith(opening)
        return (text.rstrip().removesuffix(opening) if opened else text) + self.generation_prefix

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of prompt texts, [prompt tokens] int32 each."""
        beginning = list(self.beginning)
        rows = tokenize(texts, self.tokenizer)
        return [np.array(ids if ids[:1] == beginning else beginning + ids, dtype=np.int32) for ids in rows]

    def cut_left(self, token_ids: np.ndarray, limit: int) -> np.ndarray:
        """The last `limit` tokens, the beginning-of-sequence token kept."""
        kept = [token for token in self.beginning if limit > 1]
        return np.concatenate([np.array(kept, np.int32), token_ids[len(token_ids) - (limit - len(kept)) :]])

    def _chat_text(self, messages: list[dict[str, str]], where: str) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, date_string=FIXED_DATE
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"{where}: the chat template refuses messages of {roles}: {error}") from None


def prompt_format(config: DataConfig, tokenizer: Any) -> PromptFormat:
    """Decide on template and beginning-of-sequence token.

    Raises:
        ValueError: data.chat_template is `always` and the tokenizer has none.
    """
    has_template = tokenizer.chat_template is not None
    if config.chat_template == "always" and not has_template:
        raise ValueError(
            "data.chat_template is always, but the tokenizer has no chat template; set it to auto or never"
        )
    chat = has_template and config.chat_template != "never"
    # Not tokenizer(..., add_special_tokens=True): some tokenizers would also end the prompt with an end token.
    start = tokenizer("a")["input_ids"][:1]
    wants_beginning = not chat and tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id]
    return PromptFormat(
        tokenizer=tokenizer,
        chat=chat,
        system_prompt=config.system_prompt,
        generation_prefix=config.generation_prefix,
        beginning=tuple(start) if wants_beginning else (),
    )


def _plain_text(messages: list[dict[str, str]], where: str) -> str:
    strange = [message["role"] for message in messages if message["role"] not in ("system", "user")]
    if strange:
        raise ValueError(
            f"{where}: without a chat template a prompt cannot hold a message of role {strange[0]}; "
            "use a tokenizer with a chat template, or write the prompt as one string"
        )
    return "\n\n".join(message["content"] for message in messages)


def tokenize(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids without added special tokens; one call for many texts, as fast tokenizers work in parallel."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def strip_demonstration(text: str, generation_prefix: str, end_token: str) -> tuple[str, bool]:
    """Remove the generation prefix, which stands in the prompt, and end tokens written as text.

    Returns:
        The demonstration (its white space kept, except after an end token), and whether it began with the prefix.
    """
    had_prefix = text.startswith(generation_prefix)
    return re.sub(rf"(?:{re.escape(end_token)}\s*)+\Z", "", text.removeprefix(generation_prefix)), had_prefix
