"""One checkpoint across layouts, and every way in which its files can be wrong."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from spawning import spawn
from tiny_models import make_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_srft import config as configuration
from megatron_srft.config import RunConfig
from megatron_srft.distributed import ProcessGroups
from megatron_srft.sample import TrainingSequence
from megatron_srft.trainer import manifest, publish
from megatron_srft.trainer.manifest import CheckpointError, Progress

ALONE = ProcessGroups()
PROGRESS = Progress(step=2, stage="sft", stage_step=2, policy_version=2)


# ---------------------------------------------------------------- layouts


def make_sequences(step: int) -> list[TrainingSequence]:
    random = np.random.default_rng(step)
    return [
        TrainingSequence(
            token_ids=random.integers(3, 97, 4 + 3 * group).astype(np.int32),
            prompt_length=2,
            is_demonstration=True,
            advantages=np.zeros(2 + 3 * group, np.float32),
            correct=True,
            group=group,
            rollout_logprobs=None,
            old_logprobs=None,
        )
        for group in range(4)
    ]


def run_config(model: str, layout: dict) -> RunConfig:
    tree = {
        "model": {"path": model, "dtype": layout.pop("dtype", "float32")},
        "parallel": layout,
        "objective": {"kind": "sft"},
        # The epsilon keeps rounding in a gradient near zero (key biases) from turning into a full-sized update.
        "optimizer": {"lr": 0.01, "adam_epsilon": 1e-3},
        "data": {"max_prompt_tokens": 16},
        "rollout": {"kind": "local", "max_response_tokens": 16},
    }
    return configuration.from_dict(tree).resolved()


def weights_of(trainer) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy().copy() for name, tensor in trainer.hf_weights()}


def save_in_one_layout_and_load_in_others(folder: str, saving: dict, loading: list[dict]) -> tuple:
    """Two steps, a checkpoint and a third step; then in each layout the checkpoint and the third step."""
    from megatron.core import parallel_state

    from megatron_srft.trainer import checkpoint, parallel
    from megatron_srft.trainer.trainer import Trainer

    def begin(layout: dict):
        config = run_config(str(Path(folder) / "model"), dict(layout))
        groups = parallel.start(config.parallel, seed=1)
        return Trainer(config, groups), groups

    def step(trainer, number: int) -> tuple:
        metrics = trainer.step(make_sequences(number), number)
        return metrics["loss"], metrics["grad_norm"], weights_of(trainer)

    trainer, groups = begin(saving)
    step(trainer, 0), step(trainer, 1)
    before = weights_of(trainer)
    path = checkpoint.save(Path(folder) / "checkpoints", trainer.models, trainer.optimizer, PROGRESS, groups, keep=1)
    saved = before, *step(trainer, 2)
    parallel_state.destroy_model_parallel()
    loaded = []
    for layout in loading:
        trainer, groups = begin(layout)
        assert manifest.verify(path, groups) is None
        assert checkpoint.load(path, trainer.models, trainer.optimizer, groups) == PROGRESS
        trainer.policy_version = PROGRESS.policy_version
        loaded.append((weights_of(trainer), *step(trainer, 2)))
        parallel_state.destroy_model_parallel()
    return saved, loaded


def make_folder(folder: Path) -> str:
    make_model("qwen2", folder / "model", tied=True, vocab=97, tokenizer=False)
    return str(folder)


def assert_equal(saved: tuple, loaded: tuple, layout: dict, tolerance: float) -> None:
    (before, loss, norm, after), (found, found_loss, found_norm, found_after) = saved, loaded
    assert set(found) == set(before)
    for name, weight in before.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=f"{layout} {name}")
        np.testing.assert_allclose(found_after[name], after[name], rtol=0, atol=tolerance, err_msg=f"{layout} {name}")
    assert (found_loss, found_norm) == pytest.approx((loss, norm), rel=1e-5), layout
    assert max(np.abs(after[name] - before[name]).max() for name in after) > 1e-3  # the third step is no small thing


LAYOUTS = [
    {"tensor": 2},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {},
    {"overlap_communication": True},
    {"tensor": 2, "sequence_parallel": True, "recompute": "full"},
    {"context": 2},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, tuple, list[tuple]]:
    """A checkpoint of two tensor-parallel ranks, what it was saved from, and what every layout made of it."""
    folder = make_folder(tmp_path_factory.mktemp("made"))
    saved, loaded = spawn(2, save_in_one_layout_and_load_in_others, folder, {"tensor": 2}, LAYOUTS)[0]
    return Path(folder) / "checkpoints" / "step-000002", saved, loaded


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=map(str, LAYOUTS))
def test_weights_and_moments_carry_over_from_tensor_parallel_ranks(made, number):
    _, saved, loaded = made
    assert_equal(saved, loaded[number], LAYOUTS[number], 1e-5)


def test_weights_and_moments_carry_over_from_pipeline_stages(tmp_path):
    """The tied embedding has a bucket of its own here, behind one that ends with padding."""
    folder, layouts = make_folder(tmp_path), [{"pipeline": 2}, {"tensor": 2}, {}]
    saved, loaded = spawn(2, save_in_one_layout_and_load_in_others, folder, {"pipeline": 2}, layouts)[0]
    for layout, result in zip(layouts, loaded, strict=True):
        assert_equal(saved, result, layout, 1e-5)


def test_weights_and_moments_carry_over_with_a_replicated_optimizer(tmp_path):
    folder, replicated = make_folder(tmp_path), {"distributed_optimizer": False}
    layouts = [{"tensor": 2, **replicated}, {"pipeline": 2, **replicated}, replicated]
    saved, loaded = spawn(2, save_in_one_layout_and_load_in_others, folder, replicated, layouts)[0]
    for layout, result in zip(layouts, loaded, strict=True):
        assert_equal(saved, result, layout, 1e-5)


# ---------------------------------------------------------------- damage


@pytest.fixture
def pair(made, tmp_path) -> tuple[Path, Path]:
    """An intact older and a newer checkpoint, the latter to be damaged."""
    older, newer = tmp_path / "step-000001", tmp_path / "step-000002"
    shutil.copytree(made[0], older)
    shutil.copytree(made[0], newer)
    return older, newer


def data_file(path: Path) -> Path:
    return max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)


def flip_a_byte(path: Path) -> None:
    content = bytearray(data_file(path).read_bytes())
    content[len(content) // 2] ^= 1
    data_file(path).write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(data_file(path), data_file(path).stat().st_size - 10)


def edit_manifest(path: Path, **changes) -> None:
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, **changes}))


def refresh_manifest(path: Path) -> None:
    """What someone who tampers with the files would do."""
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    edit_manifest(path, files={name: [len(content), zlib.crc32(content)] for name, content in files.items()})


DAMAGE = {
    "flipped byte": (flip_a_byte, ".distcp has changed since it was written"),
    "truncated": (truncate, " bytes instead of "),
    "deleted": (lambda path: data_file(path).unlink(), ".distcp is missing"),
    "index deleted": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "common deleted": (lambda path: (path / "common.pt").unlink(), "common.pt is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "garbled manifest": (lambda path: (path / "manifest.json").write_bytes(b"\xff{"), "manifest.json cannot be read"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "no files listed": (lambda path: edit_manifest(path, files={}), "manifest.json does not list .metadata"),
    "foreign progress": (lambda path: edit_manifest(path, progress={"epoch": 1}), "manifest.json cannot be read"),
    "other format": (lambda path: edit_manifest(path, format=99), "has format 99, written by another version"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_it_used(pair, kind, caplog):
    older, newer = pair
    inflict, message = DAMAGE[kind]
    assert manifest.newest_intact(older.parent, ALONE) == (newer, PROGRESS)
    inflict(newer)
    assert message in manifest.verify(newer, ALONE)
    assert manifest.newest_intact(older.parent, ALONE) == (older, PROGRESS)
    assert message in caplog.text and str(newer) in caplog.text


def test_no_intact_checkpoint_is_an_error_that_names_every_problem(pair):
    older, newer = pair
    truncate(older)
    (newer / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="step-000002: .metadata is missing; step-000001: .* bytes instead of"):
        manifest.newest_intact(older.parent, ALONE)


def test_unfinished_folders_are_no_checkpoints(pair):
    older, newer = pair
    newer.rename(newer.with_suffix(".partial"))
    shutil.copytree(older, older.with_name("step-000009.deleting"))
    assert manifest.newest_intact(older.parent, ALONE) == (older, PROGRESS)
    assert manifest.newest_intact(older.parent / "nowhere", ALONE) is None


def test_pruning_keeps_the_newest_and_never_counts_a_damaged_later_one(tmp_path):
    for step in (1, 2, 3, 7):
        publish.path_of(tmp_path, step).mkdir()
    (tmp_path / "step-000004.partial").mkdir()
    (tmp_path / "step-000000.deleting").mkdir()
    publish.prune(tmp_path, publish.path_of(tmp_path, 3), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003", "step-000007"]


def test_too_little_space_is_found_out_before_writing(tmp_path):
    problem = publish.attempt(lambda: publish.prepare(tmp_path / "step-000001.partial", 2**60), ALONE)
    assert "MiB are needed" in problem and "MiB are free" in problem


# ---------------------------------------------------------------- malice


class Malice:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def dotted_reference(trace: Path) -> bytes:
    """`torch.distributed.checkpoint.filesystem` `os.system`: pickle follows dots through a module's own imports."""
    opcodes = [b"\x80\x04"]
    for text in ("torch.distributed.checkpoint.filesystem", "os.system"):
        opcodes.append(b"\x8c" + bytes([len(text)]) + text.encode())
    command = f"touch {trace}".encode()
    return b"".join([*opcodes, b"\x93", b"X", len(command).to_bytes(4, "little"), command, b"\x85R."])


@pytest.mark.parametrize("payload", [lambda trace: pickle.dumps(Malice(trace)), dotted_reference])
def test_code_in_the_index_is_refused_and_not_run(pair, tmp_path, payload):
    older, newer = pair
    trace = tmp_path / "trace"
    content = payload(trace)
    pickle.loads(content)
    assert trace.exists()  # it does run when it is unpickled
    trace.unlink()
    (newer / ".metadata").write_bytes(content)
    refresh_manifest(newer)
    assert ".metadata cannot be trusted: it refers to" in manifest.verify(newer, ALONE)
    assert manifest.newest_intact(older.parent, ALONE) == (older, PROGRESS)
    assert not trace.exists()


def plant_in_objects(path: Path, trace: Path) -> None:
    """Append a pickle that runs code to a data file, and let every stored object that is no tensor point to it."""
    archive = io.BytesIO()
    torch.save(Malice(trace), archive)
    with data_file(path).open("ab") as file:
        start = file.tell()
        file.write(archive.getvalue())
    index = pickle.loads((path / ".metadata").read_bytes())
    objects = [key for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    assert objects
    for key, where in list(index.storage_data.items()):
        if key.fqn in objects:
            index.storage_data[key] = dataclasses.replace(
                where, relative_path=data_file(path).name, offset=start, length=len(archive.getvalue())
            )
    (path / ".metadata").write_bytes(pickle.dumps(index))


def load_alone(folder: str, path: str) -> str:
    """The message of the failing load of a checkpoint that passed all other checks."""
    from megatron_srft.trainer import checkpoint, parallel
    from megatron_srft.trainer.trainer import Trainer

    config = run_config(str(Path(folder) / "model"), {})
    groups = parallel.start(config.parallel, seed=1)
    trainer = Trainer(config, groups)
    assert manifest.verify(Path(path), groups) is None
    try:
        checkpoint.load(Path(path), trainer.models, trainer.optimizer, groups)
    except (Exception, CheckpointException) as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("place", ["objects", "common"])
def test_code_among_the_stored_objects_is_refused_and_not_run(made, pair, tmp_path, place):
    trace = tmp_path / "trace"
    if place == "objects":
        plant_in_objects(pair[1], trace)
    else:
        torch.save(Malice(trace), pair[1] / "common.pt")
    refresh_manifest(pair[1])
    message = spawn(1, load_alone, str(made[0].parent.parent), str(pair[1]))[0]
    assert "system" in message and "Weights only load failed" in message
    assert not trace.exists()
