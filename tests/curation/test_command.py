"""The data command itself: help, options that every tool has, and what it costs to start."""

import os
import subprocess
import sys

import pytest

from megatron_srft.data_command import TOOLS


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_every_tool_has_help(data, tool):
    code, out, _ = data(tool, "--help")
    assert code == 0 and f"megatron-srft data {tool}" in out


def test_no_tool_or_an_unknown_one(data):
    assert data()[0] == data("distill")[0] == 2
    code, out, _ = data("--help")
    assert code == 0 and all(tool in out for tool in TOOLS)


def test_debug_shows_the_traceback(data):
    with pytest.raises(ValueError, match="no such file"):
        data("statistics", "nowhere.jsonl", "--debug")
    with pytest.raises(ValueError, match="no such file"):
        data("--debug", "statistics", "nowhere.jsonl")


def test_a_config_without_a_verifier(data, write, tmp_path):
    (tmp_path / "c.yaml").write_text("objective: {kind: sft}\nrewards: [{kind: repetition}]\n")
    rows = write("rows.jsonl", [{"prompt": "1+1", "answer": "2"}])
    code, _, error = data("filter", rows, "--output", tmp_path / "o.jsonl", "--config", tmp_path / "c.yaml")
    assert code == 2 and "c.yaml: rewards has no verifier" in error


def test_the_options_load_no_torch():
    code = "import sys, megatron_srft.data_command; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
