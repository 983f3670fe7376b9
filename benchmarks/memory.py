"""What this process holds, now and at most."""

import re
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident memory of this process so far.

    Not getrusage, which also counts what the parent held when it forked.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def held_bytes() -> int:
    """Resident memory now; `peak_bytes` counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
