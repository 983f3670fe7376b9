"""tools/check_verifier.py on a file of one's own."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "check_verifier.py"


def run(tmp_path, answers):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"answer": a, "demonstration": f"so it is {a}"}) + "\n" for a in answers))
    return subprocess.run([sys.executable, str(TOOL), str(path)], capture_output=True, text=True, timeout=60)


def test_good_references_pass_and_changed_ones_do_not(tmp_path):
    done = run(tmp_path, ["18", "1,234", "C", r"\frac{14}{3}", r"\text{east}", "(3,4]", "4.5e33", "x=5", "1e-8"])
    header, row = (line.split() for line in done.stdout.splitlines())
    counts = dict(zip(header, row[1:], strict=True))
    assert done.returncode == 0, done.stderr
    assert [counts[name] for name in ("total", "boxed", "sentence", "accepted", "failed")] == ["9", "9", "9", "0", "0"]


def test_references_that_nothing_can_match_fail(tmp_path):
    done = run(tmp_path, ["18", "", "$$"])
    assert done.returncode == 1
    assert "own.jsonl: fewer than 98% of the references are recognised" in done.stderr
