"""What a checkpoint consists of, which one is intact, and whether its index may be unpickled.

checkpoints/step-000100/                megatron's files, readable under any layout
checkpoints/step-000100/manifest.json   progress, and size and CRC-32 of every file; written last
"""

import json
import logging
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_srft.distributed import ProcessGroups, all_gather_objects, broadcast_object, rank, size

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
INDEX = ".metadata"
REQUIRED = (INDEX, "common.pt", "metadata.json")
"""Files without which megatron cannot load; what else there is depends on the ranks that saved."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is damaged; the message says what is intact."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands.

    Example: step=120, stage="grpo", stage_step=20, policy_version=120.
    """

    step: int
    """Steps finished, over all stages."""
    stage: str
    stage_step: int
    """Steps of that stage finished."""
    policy_version: int
    """Optimizer updates made."""
    batches_drawn: int | None = None
    """Batches of prompts drawn over all stages; None: one per step (dynamic sampling draws more)."""
    skipped_in_a_row: int = 0
    """Latest optimizer updates that were skipped for a gradient that was not finite."""


# ---------------------------------------------------------------- finding and checking


def is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in the folder, newest first; they may still be damaged."""
    return sorted((p for p in folder.glob("step-[0-9]*") if p.is_dir() and not p.suffix), reverse=True)


def newest_intact(folder: Path, groups: ProcessGroups) -> tuple[Path, Progress] | None:
    """The newest checkpoint whose every file matches its manifest; damaged ones are logged and passed over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    problems = []
    for path in broadcast_object(checkpoints(folder), groups.world):
        problem = verify(path, groups)
        if problem is None:
            return path, read_progress(path)
        problems.append(f"{path.name}: {problem}")
        if rank(groups.world) == 0:
            log.warning("checkpoint %s is damaged (%s); trying the one before it", path, problem)
    if problems:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({'; '.join(problems)}); move the folder away to start afresh"
        )
    return None


def verify(path: Path, groups: ProcessGroups) -> str | None:
    """What is wrong with the checkpoint, or None, the same on every rank; files are shared over the ranks."""
    problem = _bad_manifest(path)
    if problem is None:
        files = _read_manifest(path)["files"]
        problem = first([_bad_file(path / name, files[name]) for name in share(sorted(files), groups)])
        if problem is None and rank(groups.world) == 0:
            problem = _foreign_code(path / INDEX)
    return first(all_gather_objects(problem, groups.world))


def read_progress(path: Path) -> Progress:
    return Progress(**_read_manifest(path)["progress"])


def read_layout(path: Path) -> dict[str, Any]:
    """Sizes of the parallel groups that saved it, the kind of optimizer (distributed, replicated or none), and the
    model's sizes."""
    return _read_manifest(path)["layout"]


def _read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def _bad_manifest(path: Path) -> str | None:
    try:
        if not (path / MANIFEST).is_file():
            return f"{MANIFEST} is missing"
        manifest = _read_manifest(path)
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, written by another version of megatron_srft"
        read_progress(path), read_layout(path)["optimizer"], read_layout(path)["model"]
        missing = sorted({*manifest["files"], *REQUIRED} - set(data_files(path)))
        unlisted = sorted({*REQUIRED} - {*manifest["files"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"
    if missing:
        return f"{missing[0]} is missing"
    return f"{MANIFEST} does not list {unlisted[0]}" if unlisted else None


def _bad_file(path: Path, expected: list[int]) -> str | None:
    try:
        found = fingerprint(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if found == expected:
        return None
    if found[0] != expected[0]:
        return f"{path.name} has {found[0]} bytes instead of {expected[0]}"
    return f"{path.name} has changed since it was written"


# ---------------------------------------------------------------- trust

TRUSTED_NAMES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", name) for name in (
        "Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool",
    )),
    ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip
"""All that the index of a torch_dist checkpoint is made of. Names, not modules: `torch.distributed.checkpoint.metadata`
followed by `os.system` is a valid reference for pickle."""


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TRUSTED_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no part of a checkpoint")


def _foreign_code(index: Path) -> str | None:
    """torch unpickles the index without a check; refuse one that could run code."""
    try:
        with index.open("rb") as file:
            _IndexReader(file).load()
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        return f"{index.name} cannot be trusted: {error}"
    return None


# ---------------------------------------------------------------- files


def data_files(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_file() and p.name != MANIFEST)


def share(names: list[str], groups: ProcessGroups) -> list[str]:
    """This rank's part of the names."""
    return names[rank(groups.world) :: size(groups.world)]


def fingerprint(path: Path) -> list[int]:
    """[size in bytes, CRC-32]."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def first(problems: list[str | None]) -> str | None:
    return next((p for p in problems if p), None)
