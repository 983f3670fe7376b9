"""`megatron-srft convert`: a Hugging Face folder to a checkpoint, or a checkpoint to a Hugging Face folder.

A checkpoint belongs to a run folder, whose config.yaml names the model it was made from:

    RUN/config.yaml
    RUN/checkpoints/step-000100/

so conversion to a checkpoint writes such a folder (with weights and no optimizer), and conversion back reads one.
Checkpoints do not depend on the layout: one process can convert what any number of ranks has written, and several
(torchrun, --tensor, --pipeline) can share a model that is too large for one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_srft import config as configuration
from megatron_srft.config import ConfigError, DataConfig, LocalRolloutConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_srft.distributed import ProcessGroups, barrier, is_main
from megatron_srft.trainer import checkpoint, manifest, parallel
from megatron_srft.trainer.conversion import export_policy, load_policy, read_hf_config
from megatron_srft.trainer.manifest import CheckpointError, Progress, is_checkpoint
from megatron_srft.trainer.model import PolicyModel, build_model
from megatron_srft.weights.architecture import read_architecture
from megatron_srft.weights.folder import HfFolder, check_target, write_hf_folder

DTYPES = {"F32": "float32", "BF16": "bfloat16"}
"""Types of Hugging Face tensors that can be trained as they are."""

STAGE = "converted"
"""What a converted checkpoint says about where its run stands."""


def convert(source: Path, target: Path, layout: ParallelConfig, model: Path | None) -> Path:
    """Convert in the direction that `source` tells; returns the folder written.

    Args:
        source: a Hugging Face folder, or a checkpoint (RUN/checkpoints/step-NNNNNN).
        target: a Hugging Face folder to write, or a run folder to make.
        model: for a checkpoint, the Hugging Face folder it was made from; None: its run's config.yaml says.

    Raises:
        ValueError: `source` is neither, or `target` holds something else.
        CheckpointError: the checkpoint is damaged, or cannot be written.
    """
    if is_checkpoint(source):
        return to_hf(source, target, layout, model)
    if model is not None:
        raise ConfigError(f"--hf-model belongs to a checkpoint, and {source} has no {manifest.MANIFEST}")
    return to_checkpoint(source, target, layout)


def to_checkpoint(source: Path, target: Path, layout: ParallelConfig) -> Path:
    """Write target/config.yaml and target/checkpoints/step-000000 with the folder's weights."""
    folder = HfFolder(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty; choose another folder for the checkpoint")
    if folder.dtype() not in DTYPES:
        raise ConfigError(f"{source} holds {folder.dtype()} tensors; only {' and '.join(DTYPES)} can be converted")
    config = replace(model_config(source.resolve(), layout), name=target.name, run_dir=str(target.parent))
    with model_of(config) as (chunks, groups):
        load_policy(chunks, folder, groups)
        progress = Progress(step=0, stage=STAGE, stage_step=0, policy_version=0)
        written = checkpoint.save(target / "checkpoints", chunks, None, progress, groups, keep=1)
        if is_main():
            (target / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
        barrier(groups.world)
    return written


def to_hf(source: Path, target: Path, layout: ParallelConfig, model: Path | None) -> Path:
    """Write the checkpoint's weights as a Hugging Face folder."""
    check_target(target)
    config = run_config(source, layout, model)
    with checkpoint_model(source, config) as (chunks, groups):
        write_hf_folder(target, export_policy(chunks, groups), HfFolder(config.model.path), write=is_main())
        barrier(groups.world)
    return target


# ---------------------------------------------------------------- shared with evaluate


def run_config(source: Path, layout: ParallelConfig, model: Path | None) -> RunConfig:
    """Settings of the run that a checkpoint belongs to, in another layout; with `model`, settings of that model."""
    if model is not None:
        return model_config(model, layout)
    path = source.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{source}: no {path} says which model it was made from; add --hf-model HUGGING_FACE_FOLDER")
    return replace(configuration.load(path), parallel=layout)


def model_config(model: Path, layout: ParallelConfig) -> RunConfig:
    """Settings for a model alone, without data; the default lengths, or what the model has positions for."""
    folder = HfFolder(model)
    architecture = read_architecture(read_hf_config(model))
    tokens = min(DataConfig.max_prompt_tokens, (architecture.attention_window or architecture.max_positions) // 2)
    return RunConfig(
        model=ModelConfig(path=str(model), dtype=DTYPES.get(folder.dtype(), "float32")),
        parallel=layout,
        data=DataConfig(max_prompt_tokens=tokens),
        rollout=LocalRolloutConfig(max_response_tokens=tokens),
    )


@contextmanager
def model_of(config: RunConfig) -> Iterator[tuple[list[PolicyModel], ProcessGroups]]:
    """The empty model in the config's layout, with the parallel machinery running around it."""
    groups = parallel.start(config.parallel, config.seed)
    try:
        hf_config = read_hf_config(config.model.path, config.model.trust_remote_code)
        with torch.no_grad():
            yield build_model(hf_config, config, groups), groups
    finally:
        parallel.stop()


@contextmanager
def checkpoint_model(source: Path, config: RunConfig) -> Iterator[tuple[list[PolicyModel], ProcessGroups]]:
    """The model filled from a checkpoint, whatever layout wrote it."""
    with model_of(config) as (chunks, groups):
        problem = manifest.verify(source, groups)
        if problem is not None:
            raise CheckpointError(f"{source} is damaged ({problem}); use another checkpoint")
        checkpoint.load(source, chunks, None, groups)
        yield chunks, groups
