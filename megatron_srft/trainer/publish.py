"""Files appear and disappear as a whole: a checkpoint is complete or absent, whenever the process is killed.

    checkpoints/step-000100/            complete
    checkpoints/step-000200.partial/    being written, or left by a kill; the next save removes it
    checkpoints/step-000050.deleting/   being deleted, or left by a kill

A folder loses its `.partial` when every rank has finished and every byte is on disk.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_srft.distributed import ProcessGroups, all_gather_objects, rank
from megatron_srft.trainer.manifest import (
    FORMAT,
    MANIFEST,
    Progress,
    checkpoints,
    data_files,
    fingerprint,
    first,
    share,
)

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- what every rank has to agree on


def attempt(action: Callable[[], None], groups: ProcessGroups, *, main_only: bool = False) -> str | None:
    """Run `action` on every rank (or the first) and return the first problem any rank had, on every rank.

    No rank may leave alone when a write fails: the others would wait for it in their next collective.
    """
    problem = None
    try:
        if not main_only or rank(groups.world) == 0:
            action()
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        problem = _describe(error)
        log.debug("writing a checkpoint failed", exc_info=True)
    return first(all_gather_objects(problem, groups.world))


def _describe(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(failure for failure, _ in error.failures.values())
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__  # torch's archive writer reports a full disk as its own "unexpected position"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------- writing


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def partial_of(final: Path) -> Path:
    return final.with_suffix(".partial")


def prepare(partial: Path, needed: int) -> None:
    """Make an empty folder to write to; OSError when that fails, or when fewer than `needed` bytes are free."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise OSError(
            f"about {needed / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB are free on the disk of {partial}"
        )


def discard(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Find out before the first step, not at the first save: OSError when a file cannot be made in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"probe-{os.getpid()}"
    try:
        _write_durably(probe, "x")
    finally:
        probe.unlink(missing_ok=True)


def complete(
    partial: Path, final: Path, progress: Progress, layout: dict[str, Any], groups: ProcessGroups
) -> str | None:
    """Force every file to disk and take its checksum (shared over the ranks), write the manifest, rename.

    Returns the problem of any rank, on every rank, or None.
    """
    mine: dict[str, list[int]] = {}

    def seal() -> None:
        for name in share(data_files(partial), groups):
            _sync(partial / name)
            mine[name] = fingerprint(partial / name)

    problem = attempt(seal, groups)
    if problem is not None:
        return problem
    files = {name: entry for share in all_gather_objects(mine, groups.world) for name, entry in share.items()}

    def publish() -> None:
        content = {
            "format": FORMAT,
            "progress": asdict(progress),
            "layout": layout,
            "files": files,
        }
        _write_durably(partial / MANIFEST, json.dumps(content, indent=1, sort_keys=True))
        _sync(partial)
        if final.exists():  # a damaged one: intact, the run would have gone on from it
            _remove(final)
        partial.rename(final)
        _sync(final.parent)

    return attempt(publish, groups, main_only=True)


def prune(folder: Path, newest: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `newest`, and what killed saves have left.

    Later ones were found damaged when the run was resumed. They do not count, lest they push out an intact one.
    """
    for old in [path for path in checkpoints(folder) if path.name <= newest.name][keep:]:
        _remove(old)
    for leftover in [*folder.glob("step-*.partial"), *folder.glob("step-*.deleting")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(path: Path) -> None:
    """Rename first, so that a kill leaves no half-deleted folder under a checkpoint's name."""
    doomed = path.with_suffix(".deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
