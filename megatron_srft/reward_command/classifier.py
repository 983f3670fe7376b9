"""`reward export`: a head on the last layer as a token classifier of vLLM's."""

import argparse

from megatron_srft.errors import launched_rank
from megatron_srft.hidden_reward import check_fits, load_head
from megatron_srft.reward_command.base import base_of, check_output
from megatron_srft.rollout.vllm.tokens import check_head, write_classifier


def export_head(options: argparse.Namespace) -> int:
    """Read model and head, see that they belong together, and write the folder."""
    check_output(options)
    head = load_head(options.head)
    check_head(head)
    with base_of(options) as (trainer, prompts):
        check_fits(head, trainer.base_model(), prompts)
        first = launched_rank() == 0
        write_classifier(options.output, trainer.hf_weights(), head, trainer.source, write=first)
    if first:
        print(f"labels gate and reward of every token, last token {head.config.last_token}: {options.output}")
    return 0
