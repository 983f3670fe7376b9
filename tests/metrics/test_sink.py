"""What a sink writes: metrics.jsonl under kills and resumes, values that are not finite, TensorBoard, W&B."""

import dataclasses
import io
import json
import subprocess
import sys
import time

import pytest

from megatron_srft.config import LoggingConfig
from megatron_srft.metrics import MetricSink, NullSink, Timer, discard_from, read_lines, read_metrics


def open_sink(folder, config=None, **options):
    options = {"total_steps": 10, "stream": io.StringIO(), **options}
    return MetricSink(folder, config or LoggingConfig(), **options)


def run_steps(folder, first, last, scale=1.0):
    with open_sink(folder, start_step=first) as sink:
        for step in range(first, last):
            sink.log(step, {"loss": scale * step / 7, "accuracy": 1 / (step + 3)}, "srft")


def test_what_is_logged_is_read_back_to_the_bit(tmp_path):
    values = {"loss": 1 / 3, "grad_norm": 1e-30, "lr": 5e-324, "reward/mean": -0.0}
    with open_sink(tmp_path / "new" / "run") as sink:
        sink.log(0, {"eval/a/b.jsonl/accuracy": 0.25}, "srft")
        sink.log(0, values, "srft")
    evaluation, line = read_metrics(tmp_path / "new" / "run")
    assert evaluation["eval/a/b.jsonl/accuracy"] == 0.25
    assert (line["step"], line["stage"]) == (0, "srft")
    assert {key: line[key] for key in values} == values
    assert abs(line["timestamp"] - time.time()) < 60


def test_a_line_is_on_disk_before_the_sink_is_closed(tmp_path):
    """A process that dies right after log() without closing anything loses no line."""
    program = (
        "import os, sys, types; from megatron_srft.metrics import MetricSink\n"
        "options = types.SimpleNamespace(tensorboard=False, wandb_project=None)\n"
        "MetricSink(sys.argv[1], options, total_steps=3).log(0, {'loss': 1.5}, 'sft')\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path], stdout=subprocess.DEVNULL).returncode == 9
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.5]


def test_a_resumed_run_shows_each_step_once_with_its_new_values(tmp_path):
    run_steps(tmp_path, 0, 8)
    run_steps(tmp_path, 5, 10, scale=2.0)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(10))
    assert [line["loss"] for line in lines] == [(2.0 if step >= 5 else 1.0) * step / 7 for step in range(10)]


def test_removing_lines_is_announced(tmp_path):
    run_steps(tmp_path, 0, 8)
    stream = io.StringIO()
    open_sink(tmp_path, start_step=5, stream=stream).close()
    assert "removed 3 lines of step 5 and later" in stream.getvalue()


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_half_written_last_line_is_left_out_and_never_glued_to_the_next(tmp_path, cut):
    run_steps(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1][:-cut])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]
    run_steps(tmp_path, 2, 4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_damaged_line_inside_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object; delete that line"):
        read_lines(path)


def test_discarding_nothing_leaves_the_file_untouched(tmp_path):
    run_steps(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert discard_from(path, 3) == 0
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_values_that_are_not_finite_become_null_counted_and_told(tmp_path):
    stream = io.StringIO()
    with open_sink(tmp_path, stream=stream) as sink:
        sink.log(4, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-6}, "srft")
        sink.log(5, {"loss": 1.0}, "srft")
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    bad, good = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert (bad["loss"], bad["grad_norm"], bad["lr"]) == (None, None, 1e-6)
    assert bad["accounting/nonfinite_metrics"] == 2
    assert "accounting/nonfinite_metrics" not in good
    assert "warning: step 5: not finite, written as null: loss, grad_norm" in stream.getvalue()


def test_tensorboard_events_hold_the_same_numbers_and_a_resume_replaces_repeated_steps(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = LoggingConfig(tensorboard=True)
    with open_sink(tmp_path, config) as sink:
        for step in range(4):
            sink.log(step, {"loss": step + 0.5, "accuracy": float("nan") if step == 1 else 0.25}, "srft")
    with open_sink(tmp_path, config, start_step=2) as sink:
        sink.log(2, {"loss": 20.0, "accuracy": 0.5}, "srft")
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.5), (1, 1.5), (2, 20.0)]
    assert [(e.step, e.value) for e in events.Scalars("accuracy")] == [(0, 0.25), (2, 0.5)]


@pytest.mark.parametrize("key, package", [("wandb_project", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_named_with_key_and_command_before_anything_is_written(
    tmp_path, monkeypatch, key, package
):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    (tmp_path / package).mkdir()  # what W&B leaves in a working directory must not pass for the package
    config = dataclasses.replace(LoggingConfig(), **{key: "demo" if key == "wandb_project" else True})
    with pytest.raises(ValueError, match=rf"logging\.{key} .*`pip install {package}`"):
        open_sink(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for first in (0, 1):
        with open_sink(tmp_path, LoggingConfig(wandb_project="demo"), start_step=first, settings={"seed": 1}) as sink:
            sink.log(first, {"loss": 1.0}, "srft")
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1]
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_null_sink_has_the_same_methods_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with NullSink() as sink:
        sink.log(0, {"loss": 1.0}, "srft")
    public = {name for name in vars(MetricSink) if not name.startswith("_")}
    assert public == {name for name in vars(NullSink) if not name.startswith("_")}
    assert not list(tmp_path.iterdir())


def test_timer_adds_up_stages_and_starts_afresh():
    timer = Timer()
    for _ in range(2):
        with timer("generate"):
            time.sleep(0.02)
    with pytest.raises(KeyError), timer("train"):
        raise KeyError
    first = timer.take()
    assert 0.04 <= first["time/generate"] <= first["time/step"]
    assert first["time/train"] < first["time/generate"]
    second = timer.take()
    assert set(second) == {"time/step"} and second["time/step"] < first["time/step"]


def test_importing_pulls_in_only_the_standard_library():
    program = (
        "import sys; before = set(sys.modules); import megatron_srft.metrics\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'megatron_srft'}))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def log_with_evaluations(folder, config=None):
    with open_sink(folder, config) as sink:
        for step in range(11):
            if step in (0, 4, 8, 10):
                sink.log(step, {"eval/a/greedy": step / 16}, "srft")
            if step < 10:
                sink.log(step, {"loss": 1.0}, "srft")


@pytest.mark.parametrize("start, evaluated", [(0, []), (4, [0, 4]), (10, [0, 4, 8])])
def test_an_evaluation_right_before_the_checkpoint_stays(tmp_path, start, evaluated):
    """Nobody makes it again, but for the ones before the first step and after the last."""
    log_with_evaluations(tmp_path)
    open_sink(tmp_path, start_step=start).close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "eval/a/greedy" in line] == evaluated
    assert [line["step"] for line in lines if "loss" in line] == list(range(start))


def test_tensorboard_too_keeps_the_evaluation_right_before_the_checkpoint(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_with_evaluations(tmp_path, LoggingConfig(tensorboard=True))
    open_sink(tmp_path, LoggingConfig(tensorboard=True), start_step=4).close()
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/a/greedy")] == [(0, 0.0), (4, 0.25)]
