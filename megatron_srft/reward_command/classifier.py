"""`reward export`: a head on the last layer as a token classifier of vLLM's."""

import argparse

from megatron_srft.analysis.policy import measuring, reading
from megatron_srft.config import ConfigError, ParallelConfig, as_local
from megatron_srft.errors import launched_rank
from megatron_srft.hidden_reward import check_fits, load_head, prompt_fingerprint
from megatron_srft.policy_sources import find_settings, find_source
from megatron_srft.rollout import load_tokenizer
from megatron_srft.rollout.vllm_tokens import check_head, write_classifier


def export_head(options: argparse.Namespace) -> int:
    """Read model and head, see that they belong together, and write the folder."""
    if options.output.exists():
        raise ConfigError(f"--output {options.output} is there already; name a folder that is to be made")
    head = load_head(options.head)
    check_head(head)
    source = find_source(options.model, options.hf_model)
    settings = find_settings(source, options.config)
    settings = measuring(settings, as_local(settings.rollout))
    prompts = prompt_fingerprint(settings.data, load_tokenizer(source.model))
    with reading(settings, ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)) as reader:
        trainer = reader.trainer_with(source)
        check_fits(head, trainer.base_model(), prompts)
        first = launched_rank() == 0
        write_classifier(options.output, trainer.hf_weights(), head, trainer.source, write=first)
    if first:
        print(f"labels gate and reward of every token, last token {head.config.last_token}: {options.output}")
    return 0
