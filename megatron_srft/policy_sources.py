"""From paths on the command line to policies: checkpoints, Hugging Face folders, and all that a run has of both."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_srft import config as configuration
from megatron_srft.analysis.policy import PolicySource
from megatron_srft.config import ConfigError, ParallelConfig, RunConfig
from megatron_srft.convert import model_config, run_config
from megatron_srft.trainer.manifest import checkpoints, is_checkpoint, read_progress

ALONE = ParallelConfig()


def find_sources(paths: Sequence[Path], hf_model: Path | None) -> list[PolicySource]:
    """The policies of all paths in order; a run folder stands for its start, its checkpoints and its exports.

    Raises:
        ConfigError: a path is none of these, a run has no policy, or one policy is named twice.
    """
    found = [source for path in paths for source in _sources(path, hf_model)]
    twice = next((source for source in found if found.count(source) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice.path} is named twice")
    folders = {(source.run, _run_folder(source.path)) for source in found if _run_folder(source.path)}
    names = [name for name, _ in folders]
    clash = next((name for name in names if names.count(name) > 1), None)
    if clash is not None:
        raise ConfigError(f"two run folders are called {clash}, and their points could not be told apart; rename one")
    return found


def find_source(path: Path, hf_model: Path | None) -> PolicySource:
    """The one policy of a path."""
    if is_checkpoint(path):
        config = run_config(path, ALONE, hf_model)
        run = path.resolve().parent.parent
        return PolicySource(path=path, model=config.model, run=run.name, step=read_progress(path).step)
    if (path / "config.json").is_file():
        run = run_of_export(path)
        config = configuration.load(run / "config.yaml") if run else model_config(path, ALONE)
        model = replace(config.model, path=str(path))
        return PolicySource(
            path=path, model=model, run=(run or path.resolve()).name, step=_export_step(path, config) if run else 0
        )
    what = "does not exist" if not path.exists() else "is neither a checkpoint nor a Hugging Face folder"
    raise ConfigError(f"{path} {what}; name RUN/checkpoints/step-NNNNNN, or a folder with config.json")


def find_settings(source: PolicySource, config: Path | None) -> RunConfig:
    """Data, sampling, advantage and reward settings: of the config file, or of the source's own run, or the defaults.

    Of a run with stages, those of the last stage count.
    """
    run = _run_folder(source.path)
    if config is not None:
        settings = configuration.load(config)
    elif run is not None and (run / "config.yaml").is_file():
        settings = configuration.load(run / "config.yaml")
    else:
        settings = model_config(Path(source.model.path), ALONE)
    return replace(settings.stage_configs()[-1][1], model=source.model)


def _run_folder(path: Path) -> Path | None:
    """Of a checkpoint or an export; None of any other Hugging Face folder."""
    return path.resolve().parent.parent if is_checkpoint(path) else run_of_export(path)


def run_of_export(path: Path) -> Path | None:
    """The run folder that an export (RUN/hf/NAME) belongs to."""
    folder = path.resolve().parent
    return folder.parent if folder.name == "hf" and (folder.parent / "config.yaml").is_file() else None


def _sources(path: Path, hf_model: Path | None) -> list[PolicySource]:
    if is_checkpoint(path) or (path / "config.json").is_file() or not (path / "config.yaml").is_file():
        return [find_source(path, hf_model)]
    exports = sorted(p for p in (path / "hf").glob("*") if (p / "config.json").is_file())
    by_step: dict[int, PolicySource] = {}
    for place in [*reversed(checkpoints(path / "checkpoints")), *exports]:
        source = find_source(place, hf_model)
        by_step.setdefault(source.step, source)
    start = configuration.load(path / "config.yaml").model
    base = Path(start.path if hf_model is None else hf_model)
    if 0 not in by_step and (base / "config.json").is_file():
        model = replace(start, path=str(base))
        by_step[0] = PolicySource(path=base, model=model, run=path.resolve().name, step=0)
    if not by_step:
        raise ConfigError(f"{path} has no checkpoint and no Hugging Face export; set checkpoint.every or export_every")
    return [by_step[step] for step in sorted(by_step)]


def _export_step(path: Path, config: RunConfig) -> int:
    """step-000040 is 40; `final` is the last step of the run."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else sum(stage.steps for _, stage in config.stage_configs())
