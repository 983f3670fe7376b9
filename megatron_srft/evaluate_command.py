"""`megatron-srft evaluate`: from command-line options to an evaluation of a Hugging Face folder or a checkpoint."""

import argparse
from dataclasses import replace

from megatron_srft import distributed
from megatron_srft.config import RunConfig
from megatron_srft.evaluate import evaluate_folder
from megatron_srft.model_options import answer_settings, weights_of


def main(options: argparse.Namespace) -> int:
    """Evaluate, print a table, and write the JSON file that was asked for."""
    config = settings(options)
    with weights_of(options.model, config) as (world, weights):
        result = evaluate_folder(config.model.path, config, world, weights)
        if distributed.is_main():
            print(result.table())
            if options.json is not None:
                result.write_json(options.json)
    return 0


def settings(options: argparse.Namespace) -> RunConfig:
    """The settings of the config file (or of a checkpoint's run), with what the command line says in their place.

    Raises:
        ConfigError: an option has an impossible value, or there is nothing to evaluate on.
    """
    config = answer_settings(options)
    if options.files:
        config = replace(config, evaluation=replace(config.evaluation, files=tuple(options.files)))
    named = {"samples": options.samples, "temperature": options.temperature, "top_p": options.top_p}
    named["max_problems"] = options.max_problems
    evaluation = replace(config.evaluation, **{k: v for k, v in named.items() if v is not None})
    return replace(config, evaluation=evaluation)
