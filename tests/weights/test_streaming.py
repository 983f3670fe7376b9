"""Reading weights into parameters, without megatron."""

import pytest
import torch
from tiny_models import make_model

from megatron_srft.weights.architecture import read_architecture
from megatron_srft.weights.folder import HfFolder
from megatron_srft.weights.streaming import Parameter, load_hf

NAME = "decoder.layers.0.mlp.linear_fc2.weight"


def load(folder: HfFolder, dtype: torch.dtype, rank: int) -> torch.Tensor:
    target = torch.zeros(32, 24)  # half of [32, 48]
    architecture = read_architecture(folder.config)
    load_hf([Parameter(NAME, 1, target)], lambda name: folder.tensor(name).to(dtype), architecture, rank, 2)
    return target


def test_a_rank_gets_its_columns_of_the_right_layer(tmp_path):
    folder = HfFolder(make_model("qwen2", tmp_path / "model", tokenizer=False))
    full = folder.tensor("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(torch.cat([load(folder, torch.float32, rank) for rank in (0, 1)], dim=1), full)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    folder = HfFolder(make_model("qwen2", tmp_path / "model", tokenizer=False))
    with pytest.raises(ValueError, match="down_proj.weight hold torch.int8.*quantised"):
        load(folder, torch.int8, 0)
