"""What a person reads while a run goes on."""

import io
import os
import pty
import re

import pytest

from megatron_srft.config import LoggingConfig
from megatron_srft.metrics import MetricSink
from megatron_srft.metrics.progress import cells, duration, evaluation_text, stage_times

STEP = {
    "reward/mean": 0.52,
    "accuracy": 0.512,
    "loss": 0.25,
    "entropy/rollouts": 0.31,
    "entropy/demonstrations": 0.42,
    "response_length/mean": 34.06,
    "tokens/s": 12345.6,
    "time/generate": 2.91,
    "time/train": 1.24,
    "time/step": 4.2,
}


def log_three_steps(folder, stream):
    with MetricSink(folder, LoggingConfig(), total_steps=4, start_step=1, stream=stream) as sink:
        sink.log(1, {"eval/heldout/greedy": 0.0625, "eval/heldout/length": 20.5, "eval/hard/greedy": 0.0}, "srft")
        for step in (1, 2, 3):
            sink.log(step, STEP, "srft")


def test_a_stream_that_is_no_terminal_gets_one_plain_line_per_step(tmp_path):
    stream = io.StringIO()
    log_three_steps(tmp_path, stream)
    evaluation, *steps = stream.getvalue().splitlines()
    assert evaluation == "evaluation after 1/4 steps: heldout greedy 0.0625 length 20.5; hard greedy 0"
    assert len(steps) == 3 and "\x1b" not in stream.getvalue()
    assert re.fullmatch(
        r"step 3/4  srft  reward 0\.520  accuracy 51\.2%  entropy r/d 0\.310/0\.420  loss 0\.2500  length 34\.1  "
        r"tokens/s 12,346  time 4\.2s \(generate 2\.9, train 1\.2\)  eta 0:00",
        steps[1],
    )


def test_a_terminal_gets_a_heading_rows_a_bar_and_its_cursor_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        log_three_steps(tmp_path, stream)
        stream.flush()
        os.set_blocking(controller, False)
        written = b""
        while not written.endswith(b"\x1b[?25h"):
            written += os.read(controller, 1 << 16)
    os.close(controller)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert plain.count("entropy r/d") == 1
    for number in (2, 3, 4):
        assert re.search(rf"{number}/4 +0\.520 +51\.2% +0\.310/0\.420 +0\.2500 +34\.1 +12,346", plain)
    assert "eta 0:00  4.2s (generate 2.9, train 1.2)" in plain
    # The cursor comes back right after the bar is first drawn, so that a killed run does not leave it hidden.
    assert written.index(b"\x1b[?25h") < written.index(b"evaluation")


def test_what_was_not_measured_is_left_out_and_what_was_not_finite_is_a_dash():
    assert cells({"loss": None, "entropy/demonstrations": 0.5}) == [("loss", "-"), ("entropy r/d", "-/0.500")]
    assert stage_times({"time/step": 3.0}) == "" and evaluation_text({"loss": 1.0}) == ""


def test_the_eta_is_the_pace_of_the_last_steps_times_what_is_left(tmp_path, monkeypatch):
    """Steps of 10 s after a slow first one of 100 s; the ETA averages over the steps seen, at most ten."""
    now = [0.0]
    monkeypatch.setattr("megatron_srft.metrics.sink.time.perf_counter", lambda: now[0])
    stream = io.StringIO()
    with MetricSink(tmp_path, LoggingConfig(), total_steps=100, stream=stream) as sink:
        for step in range(12):
            now[0] += 100.0 if step == 0 else 10.0
            sink.log(step, {"loss": 1.0}, "srft")
            now[0] += 1000.0  # an evaluation between two steps is not a step's time
            sink.log(step, {"eval/a/accuracy": 0.5}, "srft")
    etas = re.findall(r"eta (\S+)", stream.getvalue())
    assert etas[0] == duration(100.0 * 99)
    assert etas[1] == duration((100.0 + 10.0) / 2 * 98)
    assert etas[11] == duration(10.0 * 88)


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (75, "1:15"), (3675, "1:01:15"), (59.6, "1:00")])
def test_duration(seconds, text):
    assert duration(seconds) == text
