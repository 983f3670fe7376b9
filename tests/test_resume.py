"""Whole runs that are killed, signalled, starved of disk, and started again: the result is the uninterrupted run's."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import Run, final_weights, history, rewind, saved, write_inputs
from safetensors.numpy import load

from megatron_srft.metrics import read_metrics

STEPS = 4


class Workshop:
    """A config, its uninterrupted run, and a place for interrupted ones."""

    def __init__(self, folder: Path, **settings):
        self.folder = folder
        self.config = write_inputs(folder, **settings)
        self.runs = folder / "runs"
        self.reference = self.runs / "reference"

    def run(self, name: str, *overrides: str, **options) -> Run:
        return Run([str(self.config), f"name={name}", *overrides], self.folder / f"{name}.log", **options)

    def command(self, name: str, *overrides: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "megatron_srft.train", str(self.config), f"name={name}", *overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    def rewound(self, name: str, step: int) -> Path:
        return rewind(self.reference, self.runs / name, step)

    def resume(self, name: str, *overrides: str, **options) -> Run:
        run = self.run(name, *overrides, **options)
        assert run.wait() == 0, run.output
        return run

    def assert_as_uninterrupted(self, name: str) -> None:
        assert history(self.runs / name) == history(self.reference)
        assert final_weights(self.runs / name) == final_weights(self.reference)


@pytest.fixture(scope="module")
def srft(tmp_path_factory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("srft"))
    done = workshop.command("reference")
    assert done.returncode == 0, done.stderr
    assert [line[0] for line in history(workshop.reference)] == list(range(STEPS))
    assert saved(workshop.reference) == [f"step-{step:06d}" for step in range(1, STEPS + 1)]
    return workshop


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Workshop:
    workshop = Workshop(
        tmp_path_factory.mktemp("stages"),
        stages=[
            {"name": "imitate", "steps": 2, "objective": {"kind": "sft"}},
            {"name": "explore", "steps": 2, "objective": {"kind": "grpo"}, "optimizer": {"lr": 0.003}},
        ],
    )
    workshop.resume("reference")
    return workshop


# ---------------------------------------------------------------- killed

KILLED_AT = {
    "between logging and saving a step": ("os.rename", "rollouts/step-000001.jsonl.zst"),
    "first byte of the weights": ("open", "step-000002.partial/__0_0.distcp"),
    "index": ("open", "step-000002.partial/.metadata.tmp"),
    "manifest": ("open", "step-000002.partial/manifest.json"),
    "before the rename": ("os.rename", "step-000002.partial"),
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_killed_at_a_given_moment(srft, moment):
    name = moment.replace(" ", "-")
    killed = srft.run(name, event=(*KILLED_AT[moment], signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL, killed.output
    assert [entry for entry in saved(srft.runs / name) if not entry.endswith(".partial")] == ["step-000001"]
    assert "resumed from" in srft.resume(name).output
    assert saved(srft.runs / name) == saved(srft.reference)
    srft.assert_as_uninterrupted(name)


def test_killed_while_old_checkpoints_are_deleted(srft):
    killed = srft.run("prune", "checkpoint.keep=1", event=("os.rename", "step-000001.deleting", signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL, killed.output
    assert saved(srft.runs / "prune") == ["step-000001", "step-000002"]
    srft.resume("prune", "checkpoint.keep=1")
    assert saved(srft.runs / "prune") == ["step-000004"]
    srft.assert_as_uninterrupted("prune")


def test_killed_at_random_moments_until_it_is_done(srft):
    moments, kills = random.Random(0), 0
    while True:
        run = srft.run("random")
        deadline = time.monotonic() + moments.uniform(0.5, 2.0) + kills * 0.5
        while run.processes[0].is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not run.processes[0].is_alive():
            assert run.wait() == 0, run.output
            break
        run.kill()
        kills += 1
    assert kills
    srft.assert_as_uninterrupted("random")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(srft, number):
    name = number.name
    stopped = srft.run(name, "checkpoint.every=0", event=("os.rename", "rollouts/step-000001.jsonl.zst", number))
    assert stopped.wait() == 0, stopped.output
    assert "stopped by a signal after step 2" in stopped.output
    assert saved(srft.runs / name) == ["step-000002"]
    assert not (srft.runs / name / "hf").exists()
    srft.resume(name)
    srft.assert_as_uninterrupted(name)


# ---------------------------------------------------------------- stages


def test_killed_exactly_between_two_stages(stages):
    killed = stages.run("between", event=("open", "step-000003.partial/manifest.json", signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL, killed.output
    stages.resume("between")
    stages.assert_as_uninterrupted("between")


def test_killed_in_the_second_stage(stages):
    killed = stages.run("second", event=("open", "step-000004.partial/manifest.json", signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL, killed.output
    stages.resume("second")
    stages.assert_as_uninterrupted("second")


def test_a_stage_that_the_config_no_longer_has(stages):
    stages.rewound("renamed", 1)
    run = stages.run("renamed", 'stages=[{"name": "learn", "steps": 4}]')
    assert run.wait() == 2
    assert "stands in stage imitate, and the config has learn" in run.output


# ---------------------------------------------------------------- PSFT's old policy


@pytest.fixture(scope="module")
def psft(tmp_path_factory) -> Workshop:
    """Its old policy is refreshed before the first and the fourth step, so that steps 1 and 2 go on from an old one."""
    workshop = Workshop(
        tmp_path_factory.mktemp("psft"),
        objective={"kind": "psft", "refresh_every": 3},
        # An epsilon that keeps rounding in a small gradient from turning into a full-sized update.
        optimizer={"lr": 0.01, "adam_epsilon": 1e-4},
    )
    workshop.resume("reference", "parallel.tensor=2", ranks=2)
    lines = read_metrics(workshop.reference)
    assert [line["clip_fraction/demonstrations"] > 0 for line in lines] == [False, True, True, False]
    return workshop


@pytest.mark.parametrize("step", [1, 2, 3])
def test_killed_between_two_refreshes(psft, step):
    name, manifest = f"window-{step}", f"step-{step + 1:06d}.partial/manifest.json"
    killed = psft.run(name, "parallel.tensor=2", ranks=2, event=("open", manifest, signal.SIGKILL))
    assert killed.wait() == -signal.SIGKILL, killed.output
    kept = (psft.runs / name / "checkpoints" / f"step-{step:06d}" / "arrays.npz").exists()
    assert kept == (step < 3)
    psft.resume(name, "parallel.tensor=2", ranks=2)
    psft.assert_as_uninterrupted(name)


def test_an_old_policy_is_resumed_by_other_layouts(psft):
    expected = load(final_weights(psft.reference))
    for name, ranks, layout in (("tp1", 1, []), ("pp2", 2, ["parallel.pipeline=2"])):
        psft.rewound(name, 1)
        psft.resume(name, *layout, ranks=ranks)
        for (*_, loss, _, norm, _), (*_, wanted_loss, _, wanted_norm, _) in zip(
            history(psft.runs / name), history(psft.reference), strict=True
        ):
            assert (loss, norm) == pytest.approx((wanted_loss, wanted_norm), rel=1e-5), name
        weights = load(final_weights(psft.runs / name))
        difference = {key: abs(weights[key] - value).max() for key, value in expected.items()}
        assert max(difference.values()) < 1e-5, (name, difference)


def test_other_demonstrations_between_two_refreshes_are_refused(psft):
    psft.rewound("reseeded", 1)
    run = psft.run("reseeded", "seed=7")
    assert run.wait() == 2
    assert "between two refreshes of the old policy" in run.output


# ---------------------------------------------------------------- other settings and layouts


def test_without_resume_existing_checkpoints_are_refused(srft):
    srft.rewound("fresh", 2)
    run = srft.run("fresh", "checkpoint.resume=false")
    assert run.wait() == 2
    assert "already holds checkpoints and checkpoint.resume is false" in run.output
    assert saved(srft.runs / "fresh") == ["step-000001", "step-000002"]


def test_the_command_itself_goes_on_from_a_checkpoint(srft):
    srft.rewound("command", 3)
    done = srft.command("command")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    srft.assert_as_uninterrupted("command")


def test_saved_by_two_tensor_ranks_resumed_by_others(tmp_path):
    """SFT, so that no sampled token can tip over through another rounding."""
    sft = Workshop(tmp_path, objective={"kind": "sft"}, steps=3)
    sft.resume("reference", "parallel.tensor=2", ranks=2)
    expected = load(final_weights(sft.reference))
    for name, ranks, layout in (
        ("tp1", 1, []),
        ("pp2", 2, ["parallel.pipeline=2"]),
        ("dp2", 2, []),
    ):
        sft.rewound(name, 2)
        sft.resume(name, *layout, ranks=ranks)
        for (*_, loss, _, norm, _), (*_, wanted_loss, _, wanted_norm, _) in zip(
            history(sft.runs / name), history(sft.reference), strict=True
        ):
            assert (loss, norm) == pytest.approx((wanted_loss, wanted_norm), rel=1e-5), name
        weights = load(final_weights(sft.runs / name))
        difference = {key: abs(weights[key] - value).max() for key, value in expected.items()}
        assert max(difference.values()) < 1e-5, (name, difference)


def test_another_kind_of_optimizer_is_refused(srft):
    srft.rewound("replicated", 2)
    run = srft.run("replicated", "parallel.distributed_optimizer=false")
    assert run.wait() == 2
    assert "set parallel.distributed_optimizer to true to go on from it" in run.output


# ---------------------------------------------------------------- disks


def test_a_damaged_checkpoint_is_passed_over(srft):
    run = srft.rewound("damaged", 3)
    data = run / "checkpoints" / "step-000003" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1000])
    output = srft.resume("damaged", "checkpoint.keep=1").output
    assert "__0_0.distcp has" in output and "resumed from" in output and "step-000002" in output
    srft.assert_as_uninterrupted("damaged")


def test_only_damaged_checkpoints_end_the_run(srft):
    run = srft.rewound("hopeless", 2)
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").write_text("{")
    refused = srft.run("hopeless")
    assert refused.wait() == 1
    assert refused.output.splitlines()[-1].startswith(f"error: every checkpoint in {run / 'checkpoints'} is damaged")
    assert saved(run) == ["step-000001", "step-000002"]


def test_a_write_that_fails_loses_nothing(srft):
    run = srft.rewound("limit", 2)
    failed = srft.run("limit", max_file_bytes=100_000)
    assert failed.wait() == 1
    sentence = failed.output.splitlines()[-1]
    assert sentence.startswith(f"error: cannot save {run / 'checkpoints' / 'step-000003'}: ")
    assert sentence.endswith("File too large; earlier checkpoints are intact")
    assert "Traceback" not in failed.output
    assert saved(run) == ["step-000001", "step-000002"]
    srft.resume("limit")
    srft.assert_as_uninterrupted("limit")


def test_a_disk_that_is_full_when_rollouts_are_dumped(srft):
    """Step 2 cannot be dumped: the run ends with the file's name, and goes on from step 1 once there is room."""
    rollouts = srft.runs / "dump" / "rollouts"
    rollouts.mkdir(parents=True)
    full = rollouts / "step-000001.jsonl.zst.partial"
    full.symlink_to("/dev/full")
    failed = srft.run("dump")
    assert failed.wait() == 2, failed.output
    sentence = failed.output.splitlines()[-1]
    assert "No space left on device" in sentence and str(full.with_suffix("")) in sentence
    assert "Traceback" not in failed.output
    assert saved(srft.runs / "dump") == ["step-000001"] and not full.is_symlink()
    srft.resume("dump")
    srft.assert_as_uninterrupted("dump")


def test_a_write_that_fails_on_one_of_two_ranks_ends_both(srft):
    """Neither waits for the other: the run ends within seconds, not at the collectives' timeout."""
    failed = srft.run("ranks", "parallel.tensor=2", ranks=2, max_file_bytes=100_000)
    assert failed.wait() == 1
    assert "File too large; earlier checkpoints are intact" in failed.output
    assert saved(srft.runs / "ranks") == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(srft, small_disk):
    shutil.copytree(srft.reference / "checkpoints" / "step-000001", small_disk / "full" / "checkpoints" / "step-000001")
    failed = srft.run("full", f"run_dir={small_disk}")
    assert failed.wait() == 1
    sentence = failed.output.splitlines()[-1]
    assert sentence.endswith("; earlier checkpoints are intact")
    assert "are free on the disk" in sentence or "No space left on device" in sentence
    assert "Traceback" not in failed.output
    assert saved(small_disk / "full")[0] == "step-000001"
    assert not [entry for entry in saved(small_disk / "full") if entry.endswith(".partial")]


def test_a_read_only_disk_is_reported_before_the_first_step(srft, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = srft.run("read-only", f"run_dir={small_disk}")
    assert refused.wait() == 1
    assert refused.output.splitlines()[-1].endswith("Read-only file system")


def test_a_file_in_place_of_the_folder_is_reported_before_the_first_step(srft):
    run = srft.runs / "file"
    run.mkdir()
    (run / "checkpoints").write_text("")
    refused = srft.run("file")
    assert refused.wait() == 1
    assert refused.output.splitlines()[-1] == (
        f"error: checkpoints cannot be written: {run / 'checkpoints'}: File exists"
    )
    assert not (run / "metrics.jsonl").exists()
