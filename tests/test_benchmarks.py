"""The benchmarks' words and figures, and the GPU suite where there is no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def run(*words, **variables) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_exact_scores_are_those_of_autograd(with_entropy):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(600, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, 600, (1000,), generator=generator)
    found = module("dense").exact_scores([hidden, weight], labels, with_entropy)
    distribution = torch.distributions.Categorical(logits=hidden @ weight.t())
    logprobs, entropy = distribution.log_prob(labels), distribution.entropy()
    (logprobs.sum() + with_entropy * entropy.sum()).backward()
    for own, right in (
        (found.logprobs, logprobs),
        (found.entropy, entropy),
        (found.gradients[0], hidden.grad[:16]),
        (found.gradients[1], weight.grad[:512]),
    ):
        torch.testing.assert_close(own, right.detach(), rtol=1e-10, atol=1e-12)


def test_report_of_a_run(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    stages = [("build", "passed", "12", "python setup.py"), ("linear", "FAILED: status 1", "3", "python x.py")]
    (work / "stages.tsv").write_text("".join("\t".join(stage) + "\n" for stage in stages))
    (work / "build.log").write_text("compiled\n")
    (work / "linear.log").write_text("a line\nRuntimeError: no\n")
    sides = {
        "eager": {"forward": [0.002, 0.001], "both": [0.008, 0.001], "memory MiB": 1234.5},
        "ours": {"forward": [0.001, 0.001], "both": [0.002, 0.001], "memory MiB": 3.14159, "note": "quick"},
        "peer": {"failed": "not installed (a|b)"},
    }
    setting = {"setting": "width 8", "sides": sides}
    linear = {
        "title": "Title",
        "command": "python x.py",
        "parts": ["forward", "both"],
        "ceilings": {"copy GB/s": 4321.0},
    }
    (work / "linear.json").write_text(json.dumps(linear | {"settings": [setting]}))
    result = run(sys.executable, "benchmarks/report.py", work, out)
    assert result.returncode == 0, result.stderr
    written = json.loads((out / "results.json").read_text())
    assert written["benchmarks"][0]["settings"][0]["sides"] == sides
    assert [stage["outcome"] for stage in written["stages"]] == ["passed", "FAILED: status 1"]
    assert written["facts"]["torch"] == torch.__version__
    page = (out / "results.md").read_text()
    assert "| side | forward ms | both ms | ratio | memory MiB | note |" in page
    assert "| eager | 2.000 | 8.000 | 1.00x | 1234 |  |" in page
    assert "| ours | 1.000 | 2.000 | 4.00x | 3.14 | quick |" in page
    assert "| peer | not installed (a/b) |  |  |  |  |" in page
    assert "| linear | FAILED: status 1 | 3 | RuntimeError: no |" in page
    assert "a line\nRuntimeError: no" in page and "\ncompiled\n" not in page
    assert "copy GB/s 4321" in page


@pytest.mark.slow
def test_a_benchmark_reports_errors_rates_and_absent_peers(tmp_path):
    out = tmp_path / "figures.json"
    size = ("--rows", 20, "--vocabulary", 100, "--width", 16, "--repeats", 1)
    result = run(
        sys.executable, "benchmarks/token_logprob.py", *size, "--only", "reference kept", "verl", "--json", out
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert found["command"].endswith("--repeats 1 --only 'reference kept' verl")  # without this machine's folders
    sides = found["settings"][0]["sides"]
    assert sides["verl"] == {"failed": "no checkout (verl/ in the folder of --peers)"}
    ours = sides["reference kept"]
    for name in ("logprob error", "entropy error", "gradient error", "weight error"):
        assert 0 < ours[name] < 1e-5, name
    operations = 3 * 2 * 20 * 100 * 16
    assert ours["both TFLOP/s"] == pytest.approx(operations / ours["both"][0] / 1e12)
    assert ours["both of best"] == pytest.approx(ours["both TFLOP/s"] / found["ceilings"]["matmul TFLOP/s"])


@pytest.mark.slow
def test_the_sides_of_the_hidden_reward_score_alike():
    size = ("--width", 64, "--ffn", 96, "--heads", 4, "--vocabulary", 200, "--layers", 2)
    steps = ("--tokens", 64, "--length", 16, "--repeats", 1)
    result = run(sys.executable, "benchmarks/hidden_reward.py", *size, *steps)
    assert result.returncode == 0, result.stderr
    title, scores, *sides, own_work = result.stdout.splitlines()
    assert "2 layers of 64, 64 tokens in float32" in title
    assert 0 < float(scores.rpartition(" ")[2]) < 1e-5
    assert [line.split()[0] for line in sides] == ["alone", "streamed", "kept"]
    assert sides[0].count(" 1.0000x") == 2
    assert own_work.startswith("head's own work 0.0")


@pytest.mark.slow
def test_one_and_two_context_ranks_make_the_same_update():
    size = ("--length", 128, "--layers", 2, "--vocabulary", 200, "--repeats", 1)
    result = run(sys.executable, "benchmarks/context_parallel.py", *size)
    assert result.returncode == 0, result.stderr
    (one, *_, one_norm), (two, *_, two_norm) = (line.split() for line in result.stdout.splitlines()[1:])
    assert (one, two) == ("1", "2")
    assert float(two_norm) == pytest.approx(float(one_norm), rel=1e-4) and float(one_norm) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_suite_without_a_gpu_says_so(tmp_path):
    result = run("tools/gpu_suite.sh", tmp_path / "out", PYTHON=sys.executable)
    assert result.returncode == 2
    assert result.stderr == f"gpu_suite: there is no GPU here that {sys.executable}'s torch can use\n"
    assert not (tmp_path / "out").exists()
