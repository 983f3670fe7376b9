"""The edge where errors meet the user: one sentence and an exit status for mistakes, a traceback for bugs.

    0     done
    1     the run could not go on: one sentence if this package saw it coming (a checkpoint that cannot be written, a
          failed parity gate), a traceback if it is a bug or a failed machine
    2     a mistake in config, data, files or layout: one sentence on stderr
    130   Ctrl-C
    141   whoever read the output has gone, as `head` does

A mistake is a ValueError (ConfigError included) that a `raise` statement of this package raised, or a file that cannot
be read or written. A ValueError out of torch, transformers or megatron is a bug of ours: its text would help no user.
"""

import dis
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

PACKAGE = __name__.partition(".")[0]

FILE_ERRORS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR,
    errno.EEXIST,
}  # fmt: skip
"""Errors of the file system that a user can act on."""

OTHER_RANKS_WAIT_SECONDS = 3.0
"""torchrun ends the other ranks well within this time after rank 0 has failed; a rank still alive has its own story."""


def run(body: Callable[[], int], *, debug: bool = False) -> int:
    """Call `body` and return its exit status; an error meant for the user becomes one sentence and status 1 or 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bar over loaded weights obeys it too
    try:
        status = body()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 141
        status = exit_status(error)
        if debug or status is None:
            raise
        tell(error)
        return status


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe without a reader; if so what is left of the output is dropped in silence."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def exit_status(error: Exception) -> int | None:
    """1 or 2 when the error's message is meant for the user (see the module docstring), else None."""
    if isinstance(error, OSError):
        return 2 if error.errno in FILE_ERRORS or _raised_here(error) else None
    ours = _belongs_here(type(error).__module__)
    if isinstance(error, ValueError):
        return 2 if ours or _raised_here(error) else None
    return 1 if ours else None


def _raised_here(error: Exception) -> bool:
    """Whether a `raise` statement of this package raised it; int("x") in our code is not a sentence to a user."""
    frame, instruction = None, 0
    for entry in _entries(error):
        frame, instruction = entry.tb_frame, entry.tb_lasti
    if frame is None:
        return False
    return _belongs_here(_module_of(frame)) and frame.f_code.co_code[instruction] == dis.opmap["RAISE_VARARGS"]


def _entries(error: Exception):
    entry = error.__traceback__
    while entry is not None:
        yield entry
        entry = entry.tb_next


def _module_of(frame: FrameType) -> str:
    name = frame.f_globals.get("__name__", "")
    spec = sys.modules["__main__"].__spec__ if name == "__main__" else None
    return spec.name if spec is not None else name  # python -m megatron_srft.train runs as __main__


def _belongs_here(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def sentence(error: Exception) -> str:
    """The error as one sentence; for a file error the path and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def launched_rank() -> int:
    """This process's number in the run, as torchrun or srun has set it."""
    return int(os.environ.get("RANK", "0"))


def tell(error: Exception) -> None:
    """Print the sentence once per run: by rank 0, and by another rank only when rank 0 has not failed too."""
    rank = launched_rank()
    prefix = "error: "
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training's handler would make the launcher wait for us
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
        prefix = f"error on rank {rank}: "
    print(prefix + sentence(error), file=sys.stderr, flush=True)
