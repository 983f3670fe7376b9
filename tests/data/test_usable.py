"""What a stage asks of its prompts before the model is built."""

import numpy as np
import pytest

from megatron_srft.config import ConfigError, from_dict
from megatron_srft.data import DataReport, Dataset, check_vocabulary, usable_prompts
from megatron_srft.sample import Demonstration, Prompt


def make_prompt(number: int, *, answer: str | None = "1", demonstrated: bool = False) -> Prompt:
    ids = np.array([number, number + 1], np.int32)
    demonstration = Demonstration(token_ids=np.array([9, 1], np.int32), text="x")
    return Prompt(
        id=f"p{number}", text="x", token_ids=ids, answer=answer, source="test",
        demonstrations=(demonstration,) if demonstrated else (),
    )  # fmt: skip


def dataset(*prompts: Prompt) -> Dataset:
    return Dataset(prompts, DataReport())


def settings(kind: str, prompts_per_step: int = 1):
    return from_dict({"objective": {"kind": kind}, "batch": {"prompts_per_step": prompts_per_step}})


@pytest.mark.parametrize("kind", ["sft", "psft"])
def test_sft_draws_from_demonstrated_prompts_and_needs_no_answer(kind):
    data = dataset(make_prompt(0), make_prompt(1, answer=None, demonstrated=True))
    assert [p.id for p in usable_prompts(data, settings(kind))] == ["p1"]
    with pytest.raises(ConfigError, match="prompts_per_step is 2, but data.train has only 1 prompts to draw from"):
        usable_prompts(data, settings(kind, 2))


@pytest.mark.parametrize("kind", ["sft", "sft_kl", "psft", "srft", "luffy"])
def test_an_objective_that_learns_from_demonstrations_wants_some(kind):
    data = dataset(make_prompt(0))
    with pytest.raises(ConfigError, match=f"objective {kind} learns from demonstrations, and data.train holds none"):
        usable_prompts(data, settings(kind))
    assert usable_prompts(data, settings("grpo")) == data.prompts


def test_a_prompt_without_an_answer_is_named():
    with pytest.raises(ConfigError, match="prompt p1 has no answer, and objective grpo needs one"):
        usable_prompts(dataset(make_prompt(0), make_prompt(1, answer=None)), settings("grpo"))


def test_tokens_beyond_the_models_vocabulary_are_refused_in_prompts_and_demonstrations():
    check_vocabulary([make_prompt(0, demonstrated=True)], 10)
    with pytest.raises(ConfigError, match="prompt p0 has token 9, and the model's vocabulary ends at 8"):
        check_vocabulary([make_prompt(0, demonstrated=True)], 9)
    with pytest.raises(ConfigError, match="prompt p4 has token 5, and the model's vocabulary ends at 4"):
        check_vocabulary([make_prompt(4)], 5)
