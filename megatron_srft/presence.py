"""One run folder, one run: a lock that ends with its process, and ranks that do not outlive their launcher."""

import ctypes
import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import TextIO

PR_SET_PDEATHSIG = 1
"""linux/prctl.h: the signal that a process gets when its parent dies."""


def claim_folder(folder: Path) -> TextIO:
    """Take the folder for this process until the returned file is closed or the process has ended, however it ends.

    Raises:
        OSError: another process holds it, or it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            text = "another process is training in this folder; wait until it has ended, or choose another name"
            raise OSError(errno.EBUSY, text, str(folder)) from None
        # A file system without locks: go on without one.
    return file


def end_with_launcher() -> None:
    """Under torchrun, get SIGTERM when torchrun dies, also by kill -9, which it cannot pass on (Linux).

    Ranks left alone would train on and write into the folder of the run that is started in their place.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
