"""A run whose hidden-state reward is read by vLLM while it samples, beside what the trainer reads."""

import pytest
from spawning import spawn
from vllm_runs import write_run
from vllm_stream_runs import trained

from megatron_srft.metrics import read_metrics
from megatron_srft.rollout import dump_path, load_dump

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps; the head is trained on after the second; parity, and so the trainer's scores, in the first and third.
    The fourth step is that of a resumed run, which checks parity when it begins."""
    folder = tmp_path_factory.mktemp("vllm-stream")
    swift = {"kind": "swift", "head": str(folder / "head"), "weight": 0.2, "scored_by": "engine", "refresh_every": 2}
    rewards = [{"kind": "exact"}, swift]
    settings = {"steps": 4, "rewards": rewards, "optimizer": {"lr": 1e-4}, "parity": {"every": 2}}
    path = write_run(folder, name="swift", rollout={"dump_every": 1, "max_response_tokens": 8}, **settings)
    spawn(1, trained, folder, path)
    return folder / "runs" / "swift"


def test_the_engines_scores_are_the_runs(run):
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        groups = load_dump(dump_path(run / "rollouts", line["step"]))
        scores = [c.hidden_score for group in groups for c in group.completions if c.hidden_score is not None]
        assert line["swift/score"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)


def test_the_trainer_has_the_same_where_it_measures_and_makes_no_pass_elsewhere(run):
    """With the head of the start, with the one that was trained on, and with the one that a checkpoint held."""
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [("swift/engine_difference" in line) for line in lines] == [True, False, True, True]
    assert all(0 < line["swift/engine_difference"] < 1e-5 for line in lines if "swift/engine_difference" in line)
    assert [line["swift/staleness"] for line in lines] == [0, 1, 0, 1]
    assert lines[1]["accounting/skipped_refreshes"] == 0 and lines[1]["swift/refresh_loss"] > 0
