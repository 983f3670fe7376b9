"""Do the prompts of a data set suit a stage? Asked before the model is built, so that no work is lost."""

from collections.abc import Sequence

from megatron_srft.config import ConfigError, RunConfig, require
from megatron_srft.data.dataset import Dataset
from megatron_srft.sample import Prompt


def usable_prompts(dataset: Dataset, config: RunConfig) -> tuple[Prompt, ...]:
    """The prompts that a stage draws from: those with a demonstration if it learns from nothing else; otherwise all,
    and these need an answer where it samples.

    Raises:
        ConfigError: they are too few for one step, lack an answer, or hold no demonstration for an objective that is
            there to learn from them.
    """
    prompts, kind = dataset.prompts, config.objective.kind
    demonstrated = tuple(prompt for prompt in prompts if prompt.demonstrations)
    if config.objective.learns_from_demonstrations and not demonstrated:
        too_long = dataset.report.total.overlong_demonstrations
        remedy = (
            f"{too_long} were dropped as longer than data.max_demonstration_tokens, so raise that"
            if too_long
            else "name their field with data.demonstration_key, or choose objective.kind grpo"
        )
        raise ConfigError(f"objective {kind} learns from demonstrations, and data.train holds none; {remedy}")
    if config.objective.learns_from_demonstrations and not config.samples_rollouts:
        prompts = demonstrated
    elif not config.uses_preferences:
        missing = next((prompt.id for prompt in prompts if prompt.answer is None), None)
        require(missing is None, f"prompt {missing} has no answer, and objective {kind} needs one; see data.answer_key")
    wanted = config.batch.prompts_per_step
    require(
        wanted <= len(prompts),
        f"batch.prompts_per_step is {wanted}, but data.train has only {len(prompts)} prompts to draw from; lower it, "
        "or use more data",
    )
    return prompts


def check_vocabulary(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """Raise ConfigError when the tokenizer made a token for which the model has no embedding."""
    for prompt in prompts:
        answers = list(prompt.demonstrations)
        if prompt.preference is not None:
            answers += [prompt.preference.chosen, prompt.preference.rejected]
        largest = max(int(row.max()) for row in [prompt.token_ids, *(answer.token_ids for answer in answers)])
        require(
            largest < vocab_size,
            f"prompt {prompt.id} has token {largest}, and the model's vocabulary ends at {vocab_size - 1} (vocab_size "
            "in config.json); model.path holds a tokenizer of another model",
        )
