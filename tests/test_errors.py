import os
import subprocess
import sys

import pytest

from megatron_srft import config, errors


def test_a_mistake_becomes_one_sentence_and_status_2(capsys):
    status = errors.run(lambda: config.load("/no/such/file.yaml"))
    assert status == 2
    assert (
        capsys.readouterr().err == "error: cannot read the config file /no/such/file.yaml: No such file or directory\n"
    )


def test_a_missing_file_names_it(capsys, tmp_path):
    status = errors.run(lambda: (tmp_path / "data.jsonl").read_text())
    assert status == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/data.jsonl: No such file or directory\n"


def test_debug_keeps_the_traceback():
    with pytest.raises(config.ConfigError):
        errors.run(lambda: config.load("/no/such/file.yaml"), debug=True)


@pytest.mark.parametrize("bug", [lambda: int("x"), lambda: [][1], lambda: 1 // 0])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises((ValueError, IndexError, ZeroDivisionError)):
        errors.run(bug)


def in_package(source: str) -> dict:
    """Names defined by `source` as if it were a module of the package."""
    names = {"__name__": "megatron_srft.made_for_this_test"}
    exec(compile(source, "made_for_this_test.py", "exec"), names)
    return names


def test_only_a_raise_statement_of_this_package_is_a_mistake():
    source = "def said(): raise ValueError('rows.jsonl:3: no prompt')\ndef slipped(): return int('x')"
    names = in_package(source)
    for function, expected in (("said", 2), ("slipped", None)):
        with pytest.raises(ValueError) as caught:
            names[function]()
        assert errors.exit_status(caught.value) == expected, function


def test_a_mistake_survives_context_managers_and_finally():
    source = (
        "import contextlib\n"
        "def said():\n"
        "    try:\n"
        "        with contextlib.ExitStack():\n"
        "            raise ValueError('rows.jsonl:3: no prompt')\n"
        "    finally:\n"
        "        len('')\n"
    )
    with pytest.raises(ValueError) as caught:
        in_package(source)["said"]()
    assert errors.exit_status(caught.value) == 2


def test_an_error_class_of_this_package_is_a_sentence_with_status_1():
    error_class = in_package("class CheckpointError(RuntimeError): pass")["CheckpointError"]
    assert errors.exit_status(error_class("disk full")) == 1
    assert errors.exit_status(RuntimeError("CUDA error")) is None


def test_ctrl_c_is_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert errors.run(interrupted) == 130


def test_rank_1_speaks_only_if_it_outlives_rank_0():
    code = (
        "from megatron_srft import config, errors; errors.OTHER_RANKS_WAIT_SECONDS = 0.2;"
        "raise SystemExit(errors.run(lambda: config.load('missing.yaml')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ, RANK="1"), capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error on rank 1: cannot read the config file missing.yaml")


def test_a_reader_that_has_gone_is_no_error():
    code = "from megatron_srft import errors; raise SystemExit(errors.run(lambda: print('line ' * 99999) or 0))"
    command = f'{sys.executable} -c "{code}" | head -c 9; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("141\n")
    assert done.stderr == ""
