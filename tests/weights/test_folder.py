"""Model folders in and out: sharding, bytes, companions, atomic replacement, and messages for broken folders."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_srft.weights import folder as folder_module
from megatron_srft.weights.architecture import read_architecture
from megatron_srft.weights.folder import HfFolder, write_hf_folder
from megatron_srft.weights.streaming import check_names


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = make_model("qwen2", tmp_path_factory.mktemp("original"))
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (path / "README.md").write_text("about the base model")
    return path


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def stream(path):
    source = HfFolder(path)
    return [(name, source.tensor(name)) for name in source.shapes()]


def all_tensors(path):
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("max_shard_bytes, shards", [(10**9, 1), (40_000, 4)])
def test_a_written_folder_is_the_model_it_came_from(original, tmp_path, max_shard_bytes, shards):
    write_hf_folder(tmp_path / "new", stream(original), HfFolder(original), max_shard_bytes=max_shard_bytes)
    new = tmp_path / "new"
    assert len(list(new.glob("*.safetensors"))) == shards
    assert_same(all_tensors(new), all_tensors(original))
    assert_same(dict(stream(new)), dict(stream(original)))  # through our reader: index and shards agree
    tokens = torch.arange(5)[None]
    theirs = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (original, new)]
    assert torch.equal(*theirs)
    assert (
        AutoTokenizer.from_pretrained(new)("7+1=").input_ids
        == AutoTokenizer.from_pretrained(original)("7+1=").input_ids
    )
    assert (new / "chat_template.jinja").exists() and not (new / "README.md").exists()
    assert (new / "generation_config.json").read_bytes() == (original / "generation_config.json").read_bytes()
    assert json.loads((new / "config.json").read_text()) == json.loads((original / "config.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]


def test_config_names_the_dtype_of_the_tensors(original, tmp_path):
    tensors = [(name, t.bfloat16()) for name, t in stream(original)]
    write_hf_folder(tmp_path / "new", tensors, HfFolder(original))
    assert HfFolder(tmp_path / "new").dtype() == "BF16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").dtype == torch.bfloat16


def test_a_model_folder_is_replaced_even_by_itself(copy):
    doubled = [(name, 2 * t) for name, t in stream(copy)]
    before = all_tensors(copy)
    write_hf_folder(copy, doubled, HfFolder(copy))
    assert_same(all_tensors(copy), {name: 2 * t for name, t in before.items()})


def test_a_folder_with_other_files_is_not_overwritten(original, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("x")
    with pytest.raises(ValueError, match="not overwritten"):
        write_hf_folder(tmp_path / "thesis", stream(original), HfFolder(original))
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "x"


def test_a_full_disk_leaves_the_old_folder_and_drains_the_stream(copy, monkeypatch):
    """Other ranks wait inside the stream's collectives, so it must be exhausted although nothing can be written."""
    before, taken = all_tensors(copy), []

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folder_module, "save_file", full)
    tensors = stream(copy)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_hf_folder(copy, (taken.append(n) or (n, t) for n, t in tensors), HfFolder(copy), max_shard_bytes=40_000)
    assert taken == [name for name, _ in tensors]
    assert_same(all_tensors(copy), before)
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_a_kill_between_the_two_renames_loses_nothing(copy, monkeypatch):
    before = all_tensors(copy)
    copy.rename(copy.with_name(".copy.old"))  # what such a kill leaves

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folder_module, "save_file", full)
    with pytest.raises(OSError):
        write_hf_folder(copy, [("a", torch.zeros(1))], HfFolder(copy.with_name(".copy.old")))
    assert_same(all_tensors(copy), before)
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_ranks_that_do_not_write_only_take_part(original, tmp_path):
    taken = []
    write_hf_folder(
        tmp_path / "new", (taken.append(n) or (n, t) for n, t in stream(original)), HfFolder(original), write=False
    )
    assert len(taken) == len(stream(original)) and not list(tmp_path.iterdir())


def test_missing_parts_are_named(copy, tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        HfFolder(tmp_path / "nowhere")
    (copy / "config.json").rename(copy / "config.bak")
    with pytest.raises(ValueError, match="has no config.json"):
        HfFolder(copy)
    (copy / "config.bak").rename(copy / "config.json")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is not read: convert it .* safetensors"):
        HfFolder(copy)


def test_a_truncated_or_missing_shard_is_named(original, tmp_path):
    write_hf_folder(tmp_path / "new", stream(original), HfFolder(original), max_shard_bytes=40_000)
    shard = tmp_path / "new" / "model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="model-00002-of-00004.safetensors is not a complete safetensors file"):
        HfFolder(tmp_path / "new")
    shard.unlink()
    with pytest.raises(ValueError, match="files that are not there: model-00002-of-00004.safetensors"):
        HfFolder(tmp_path / "new")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks .* model.norm.weight"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(1)}), "unexpected .*mlp.up_proj.bias"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(3, 32)}),
            r"lm_head.weight is \[3, 32\] instead of \[99, 32\]",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1)}), None),
    ],
)
def test_wrong_tensors_are_named(copy, change, message):
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    folder = HfFolder(copy)
    architecture = read_architecture(folder.config)
    if message is None:
        check_names(folder.shapes(), architecture, "copy")
        return
    with pytest.raises(ValueError, match=message):
        check_names(folder.shapes(), architecture, "copy")
