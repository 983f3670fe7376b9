"""The training loop: each line of `train` is one stage of the flow. What the stages do is in session.py.

torchrun --nproc-per-node 2 -m megatron_srft.train CONFIG.yaml [key.path=value ...]
"""

import argparse
import sys

from megatron_srft import config as configuration
from megatron_srft import errors
from megatron_srft.advantages import to_sequences, with_advantages
from megatron_srft.config import RunConfig
from megatron_srft.presence import end_with_launcher
from megatron_srft.session import Session
from megatron_srft.trainer import parallel


def train(run: Session) -> None:
    """Run every remaining step of every stage; a signal ends it after the step in flight, with a checkpoint."""
    for stage in run.remaining_stages():
        run.begin_stage(stage)
        for stage_step in run.remaining_steps(stage):
            prompts = run.next_prompts()
            groups = run.roll_out(prompts)
            groups = run.score(groups)
            groups = run.refill(groups)
            sequences = to_sequences(groups)
            sequences = run.measure(sequences, stage_step)
            groups = run.reward_hidden_states(groups, sequences, stage_step)
            sequences = with_advantages(sequences, groups, run.config.advantage, run.config.rewards, run.config.kl)
            sequences = run.select(sequences, groups)
            metrics = run.update(sequences, stage_step)
            run.finish_step(groups, metrics)
            if run.interrupted():
                return
    run.finish()


def run_training(config: RunConfig) -> None:
    """Start the parallel machinery, train, and leave it in order."""
    end_with_launcher()
    groups = parallel.start(config.parallel, config.seed)
    try:
        with Session(config, groups) as run:
            train(run)
    finally:
        parallel.stop()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megatron_srft.train", description="Train as a config file says.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="key.path=value, applied over the file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake too")
    options = parser.parse_intermixed_args(arguments)

    def body() -> int:
        run_training(configuration.load(options.config, options.overrides))
        return 0

    return errors.run(body, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
