"""What one stage of a run reads: the prompts it draws from, and its held-out problems."""

from dataclasses import dataclass
from typing import Any

from megatron_srft.config import RunConfig, require
from megatron_srft.data import (
    Dataset,
    PromptStream,
    check_vocabulary,
    choose_demonstration,
    load_dataset,
    usable_prompts,
)
from megatron_srft.evaluate import load_held_out
from megatron_srft.sample import Group, Prompt


@dataclass(frozen=True)
class StageData:
    dataset: Dataset
    stream: PromptStream
    """Of the prompts that the stage can use."""
    held_out: list[tuple[str, Dataset]]
    """Name and problems of each evaluation file."""

    def demonstrated(self, prompts: list[Prompt], step: int) -> list[Group]:
        """Groups without completions: each prompt with its demonstration of the step."""
        seed = self.stream.seed
        return [Group(prompt=p, completions=(), demonstration=choose_demonstration(p, seed, step)) for p in prompts]

    def prompts(self, ids: list[str]) -> list[Prompt]:
        """The prompts of these ids, which may have been queued before a resume.

        Raises:
            ConfigError: the data have none of that name.
        """
        known = {prompt.id: prompt for prompt in self.stream.prompts} if ids else {}
        missing = next((name for name in ids if name not in known), None)
        require(
            missing is None,
            f"the checkpoint has prompt {missing} waiting for a supervised update, and data.train has none of that "
            "name; go on with the data that it was made with, or choose another name for a new run",
        )
        return [known[name] for name in ids]

    def print_reports(self) -> None:
        print(f"data: {self.dataset.report}")
        for name, problems in self.held_out:
            print(f"evaluation {name}: {problems.report}", flush=True)


def read_stage_data(config: RunConfig, tokenizer: Any, vocab_size: int) -> StageData:
    """Read and check all files of a stage.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Raises:
        ConfigError, ValueError: a file, a row or a token does not fit; the message names it.
    """
    dataset = load_dataset(config.data, config.rollout, tokenizer, with_preferences=config.uses_preferences)
    prompts, held_out = usable_prompts(dataset, config), load_held_out(config, tokenizer)
    for some in (prompts, *(problems.prompts for _, problems in held_out)):
        check_vocabulary(some, vocab_size)
    return StageData(dataset, PromptStream(prompts, config.seed, config.data.shuffle), held_out)
