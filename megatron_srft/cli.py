"""`megatron-srft COMMAND ...`. A command imports what it needs when it is called."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_srft import __version__, errors

USAGE = """usage: megatron-srft COMMAND ... [--debug]

commands:
  train CONFIG [key=value ...]   train as a config file says; --dry-run only checks it and prints what it comes to
  evaluate MODEL FILE ...        accuracy of a Hugging Face folder or a checkpoint on JSONL or parquet files
  generate MODEL FILE ...        sampled and verified answers as a rollout dump
  best-of-n MODEL HEAD FILE ...  score candidates with a reward head; how right each rule of choosing is, over N
  convert SOURCE TARGET          Hugging Face folder to checkpoint, or checkpoint to Hugging Face folder
  data TOOL ...                  make, check and measure data files: distil, act, filter, duplicates, statistics
  report RUN                     write report.html into a run folder
  analyze WHAT ...               probabilities, trajectory, clipped tokens, entropy of checkpoints; compare runs
  reward WHAT ...                train a reward head on hidden states, score rollouts with one, import or export one
  serve CONFIG [key=value ...]   a vLLM server for runs with rollout.kind vllm_server
  doctor                         what is installed, and what works on this machine

megatron-srft COMMAND --help lists a command's options. --debug shows the traceback of a mistake too.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the status is 0 done, 1 could not go on, 2 a mistake of the user, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    match given:
        case [] | ["-h" | "--help", *_]:
            print(USAGE, end="")
            return 0 if given else 2
        case ["--version", *_]:
            print(__version__)
            return 0
        case [name, *rest] if name in COMMANDS:
            parser = argparse.ArgumentParser(prog=f"megatron-srft {name}", description=COMMANDS[name].__doc__)
            parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake too")
            return COMMANDS[name](parser, rest)
    print(USAGE, end="", file=sys.stderr)
    print(f"\nerror: unknown command '{given[0]}'; choose from {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def train(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Train in this process, or with --dry-run only check. Several ranks: torchrun -m megatron_srft.train CONFIG."""
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="key.path=value, applied over the file")
    parser.add_argument("--dry-run", action="store_true", help="check config, data and layout; print sizes and memory")
    parser.add_argument("--ranks", type=int, help="processes that --dry-run reckons with (default: one model replica)")
    options = parser.parse_intermixed_args(arguments)

    def body() -> int:
        from megatron_srft import config

        settings = config.load(options.config, options.overrides)
        if options.dry_run:
            from megatron_srft import dry_run

            return dry_run.main([options.config, *options.overrides], settings, options.ranks)
        if options.ranks is not None:
            raise ValueError("--ranks belongs to --dry-run; to train on several ranks start with torchrun")
        from megatron_srft.train import run_training

        run_training(settings)
        return 0

    return errors.run(body, debug=options.debug)


def evaluate(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Accuracy on JSONL or parquet files: greedy and, at a temperature above 0, avg@k, pass@k and majority@k."""
    parser.add_argument("model", type=Path, help="Hugging Face folder or checkpoint (RUN/checkpoints/step-NNNNNN)")
    parser.add_argument("files", nargs="*", help="problems with answers (default: evaluation.files of the config)")
    parser.add_argument(
        "--config", type=Path, help="take data, rollout, rewards and evaluation settings from this file"
    )
    parser.add_argument("--samples", type=int, help="sampled answers per problem; needs --temperature")
    parser.add_argument("--temperature", type=float, help="of the sampled answers; 0 measures greedy ones only")
    parser.add_argument("--top-p", type=float, help="nucleus of the sampled answers")
    parser.add_argument("--max-problems", type=int, help="use only the first N of each file")
    _answer_options(parser)
    parser.add_argument("--json", type=Path, help="also write figures and greedy answers to this file")
    options = parser.parse_intermixed_args(arguments)

    def body() -> int:
        from megatron_srft import evaluate_command

        _check_answer_options(options)
        return evaluate_command.main(options)

    return errors.run(body, debug=options.debug)


def generate(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Sample answers, verify them, and write a rollout dump for reward train, best-of-n, analyze or a replay."""
    parser.add_argument("model", type=Path, help="Hugging Face folder or checkpoint (RUN/checkpoints/step-NNNNNN)")
    parser.add_argument("files", nargs="+", help="problems (JSONL or parquet); without answers they stay unverified")
    parser.add_argument("--output", type=Path, required=True, help="the dump, FILE.jsonl.zst")
    parser.add_argument("--config", type=Path, help="take data, rollout and rewards settings from this file")
    parser.add_argument("--samples", type=int, default=8, help="answers per problem (default: 8)")
    parser.add_argument("--temperature", type=float, help="of the answers (default: the config's rollout.temperature)")
    parser.add_argument("--top-p", type=float, help="nucleus of the answers (default: the config's rollout.top_p)")
    parser.add_argument("--seed", type=int, help="of the answers (default: the config's)")
    parser.add_argument("--max-problems", type=int, default=0, help="use only the first N of each file; 0 uses all")
    parser.add_argument("--head", type=Path, help="reward head; vLLM scores the answers with it while it samples them")
    _answer_options(parser)
    options = parser.parse_intermixed_args(arguments)

    def body() -> int:
        from megatron_srft import generate_command

        _check_answer_options(options)
        return generate_command.main(options)

    return errors.run(body, debug=options.debug)


def best_of_n(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Choose among N candidates by a reward head, votes, external scores and fusions: accuracy over N, and costs."""
    parser.add_argument("model", type=Path, help="Hugging Face folder or checkpoint that the head was trained on")
    parser.add_argument("head", type=Path, help="folder with reward_head.json (megatron-srft reward train)")
    parser.add_argument("candidates", nargs="+", type=Path, help="rollout dumps, or JSONL with prompt and responses")
    parser.add_argument("--scores", type=Path, help='JSONL of external scores, {"id": ..., "scores": {"NAME": [...]}}')
    parser.add_argument("--weights", type=float, nargs="+", help="of swift and each external score in scaled averaging")
    parser.add_argument("--max-n", type=int, help="largest N; leaves out questions with fewer (default: what all have)")
    parser.add_argument("--orders", type=int, default=64, help="orders of the candidates to average over (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the orders and of the intervals (default: 0)")
    parser.add_argument("--cost-candidates", type=int, default=64, help="candidates to time on; 0: none (default: 64)")
    parser.add_argument(
        "--engine",
        choices=("trainer", "vllm"),
        default="trainer",
        help="what reads the head; vllm: by token classification, for heads on the last layer alone (default: trainer)",
    )
    parser.add_argument("--config", type=Path, help="data and rewards settings (default: those of the model's run)")
    parser.add_argument("--reward", choices=("math", "exact"), help="how candidates without a verdict are verified")
    parser.add_argument("--answer-after", default="", help="the answer stands behind the last occurrence of this text")
    parser.add_argument("--hf-model", type=Path, help="Hugging Face folder behind a checkpoint (default: its run's)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size (under torchrun)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size (under torchrun)")
    parser.add_argument(
        "--output", type=Path, default=Path("best_of_n.html"), help="page; figures beside it (default: best_of_n.html)"
    )
    options = parser.parse_intermixed_args(arguments)

    def body() -> int:
        from megatron_srft import best_of_n_command

        _check_answer_options(options)
        return best_of_n_command.main(options)

    return errors.run(body, debug=options.debug)


def _answer_options(parser: argparse.ArgumentParser) -> None:
    """What `model_options.answer_settings` reads."""
    parser.add_argument(
        "--engine",
        choices=("local", "vllm", "vllm_server"),
        help="what samples (default: vllm where the config's rollout.kind is vllm, else local)",
    )
    parser.add_argument("--max-response-tokens", type=int, help="longest answer")
    parser.add_argument("--reward", choices=("math", "exact"), help="how answers are verified (default: math)")
    parser.add_argument("--answer-after", default="", help="the answer stands behind the last occurrence of this text")
    parser.add_argument("--hf-model", type=Path, help="Hugging Face folder behind a checkpoint (default: its run's)")


def _check_answer_options(options: argparse.Namespace) -> None:
    if options.answer_after and options.reward is None:
        raise ValueError("--answer-after needs --reward math or --reward exact")


def convert(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Hugging Face folder to checkpoint, or checkpoint (RUN/checkpoints/step-NNNNNN) to Hugging Face folder."""
    parser.add_argument("source", type=Path, help="Hugging Face folder or checkpoint")
    parser.add_argument("target", type=Path, help="Hugging Face folder to write, or run folder to make")
    parser.add_argument("--hf-model", type=Path, help="Hugging Face folder behind a checkpoint (default: its run's)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size, for models too large for one rank")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size, likewise (under torchrun)")
    options = parser.parse_args(arguments)

    def body() -> int:
        from megatron_srft.config import ParallelConfig
        from megatron_srft.convert import convert

        layout = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
        written = convert(options.source, options.target, layout, options.hf_model)
        if errors.launched_rank() == 0:
            print(written)
        return 0

    return errors.run(body, debug=options.debug)


def data(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Make, check and measure data files; megatron-srft data TOOL --help lists a tool's options."""
    from megatron_srft import data_command

    data_command.add_tools(parser)
    options = parser.parse_args(arguments)
    return errors.run(lambda: data_command.main(options), debug=options.debug)


def report(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Write report.html into a run folder, finished or in progress."""
    parser.add_argument("run", type=Path, help="run folder, for example runs/arithmetic")
    options = parser.parse_args(arguments)

    def body() -> int:
        from megatron_srft.analysis.report import write_report

        print(write_report(options.run))
        return 0

    return errors.run(body, debug=options.debug)


def analyze(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """What training changed: token probabilities, trajectory, clipped tokens, entropy; or several runs side by side."""
    from megatron_srft import analyze_command

    return analyze_command.main(parser, arguments)


def reward(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """A reward read off the model's own hidden states (SWIFT): train a head on verified rollouts, score with it."""
    from megatron_srft import reward_command

    return reward_command.main(parser, arguments)


def serve(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Become a vLLM server that samples for runs with rollout.kind vllm_server; its weights come from the trainer."""
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="key.path=value, applied over the file")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1); whoever reaches it can change the weights",
    )
    options = parser.parse_intermixed_args(arguments)

    def body() -> int:
        from megatron_srft import config
        from megatron_srft.rollout.servers import serve as server

        return server.main(config.load(options.config, options.overrides), options.host, options.port)

    return errors.run(body, debug=options.debug)


def doctor(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Print versions, devices and what works here; status 1 when something required does not."""
    options = parser.parse_args(arguments)

    def body() -> int:
        from megatron_srft import doctor

        return doctor.main()

    return errors.run(body, debug=options.debug)


COMMANDS: dict[str, Callable[[argparse.ArgumentParser, list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "best-of-n": best_of_n,
    "convert": convert,
    "data": data,
    "report": report,
    "analyze": analyze,
    "reward": reward,
    "serve": serve,
    "doctor": doctor,
}

if __name__ == "__main__":
    sys.exit(main())
