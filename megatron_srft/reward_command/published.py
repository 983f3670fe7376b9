"""`reward import`: a head of the paper's released code, whose file says nothing but its numbers, as one of ours."""

import argparse

from megatron_srft.config import ConfigError
from megatron_srft.errors import launched_rank
from megatron_srft.hidden_reward import from_published, read_published, save_head
from megatron_srft.reward_command.base import base_of, check_output
from megatron_srft.trainer.hidden_features import final_norm, lm_head


def import_head(options: argparse.Namespace) -> int:
    """Read the state dict, fill in what it does not say from the model and the options, and write the head."""
    check_output(options)
    if options.logits and (options.layers or options.apply_norm):
        raise ConfigError("--layers and --apply-norm are for hidden states; leave them away with --logits")
    state = read_published(options.state_dict)
    with base_of(options) as (trainer, prompts):
        head = from_published(
            state,
            trainer.base_model(),
            options.layers,
            prompt_format=prompts,
            last_token=options.last_token,
            final_norm=final_norm(trainer).cpu() if options.apply_norm else None,
            epsilon=trainer.models[0].architecture.norm_epsilon,
            lm_head=lm_head(trainer).cpu() if options.logits else None,
            source=str(options.state_dict),
        )
    if launched_rank() > 0:
        return 0
    save_head(head, options.output)
    gate = "" if head.config.gate else ", no gate"
    print(
        f"layers {' '.join(map(str, head.layers))}{gate}, {head.config.parameter_count} parameters, last token "
        f"{head.config.last_token}, for the weights {head.config.base.fingerprint[:12]}: {options.output}"
    )
    return 0
