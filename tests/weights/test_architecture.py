"""Reading config.json: rotary frequencies and parameter counts against transformers, and what is refused."""

import pytest
import torch
from tiny_models import LLAMA3_ROPE
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_srft.weights.architecture import inverse_frequencies, read_architecture
from megatron_srft.weights.tables import hf_shapes

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, max_position_embeddings=4096,
)  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3-tiny": LLAMA3_ROPE,
    "llama-3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rotary_frequencies_equal_transformers(rope):
    config = AutoConfig.for_model("llama", **SMALL | dict(head_dim=128), rope_parameters=rope)
    theirs = AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq
    ours = inverse_frequencies(read_architecture(config).rope, 128)
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)


def test_older_files_keep_rope_settings_elsewhere():
    new = AutoConfig.for_model("llama", **SMALL, rope_parameters=ROPES["llama-3.1"]).to_dict()
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    scaling = {k: v for k, v in ROPES["llama-3.1"].items() if k != "rope_theta"}
    old |= {"rope_theta": 500000.0, "rope_scaling": scaling}
    assert read_architecture(old) == read_architecture(new)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_shapes_and_counts_equal_transformers(family, tied):
    config = AutoConfig.for_model(family, **SMALL, tie_word_embeddings=tied)
    architecture = read_architecture(config)
    model = AutoModelForCausalLM.from_config(config)
    assert hf_shapes(architecture) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert architecture.parameters == sum(p.numel() for p in model.parameters())
    assert architecture.tied == tied


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("gpt2", {}, "'gpt2' is not supported; supported are qwen2, qwen3, llama, mistral"),
        ("llama", dict(attention_bias=True), "attention_bias = True"),
        ("llama", dict(mlp_bias=True), "mlp_bias = True"),
        ("llama", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        ("qwen2", dict(quantization_config={"quant_method": "awq"}), "quantization_config"),
        ("llama", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "'yarn'"),
        ("llama", dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    ],
)
def test_what_the_trainer_cannot_do_is_refused(family, changes, message):
    settings = AutoConfig.for_model(family).to_dict() | changes
    with pytest.raises(ValueError, match=message):
        read_architecture(settings)


@pytest.mark.parametrize(
    "family, changes, window",
    [
        ("mistral", dict(sliding_window=None), None),
        ("mistral", dict(sliding_window=100), 100),
        ("qwen2", dict(sliding_window=100), None),
        ("qwen2", dict(sliding_window=100, use_sliding_window=True, max_window_layers=1), 100),
        ("qwen2", dict(sliding_window=100, use_sliding_window=True, max_window_layers=2), None),
        ("llama", {}, None),
    ],
)
def test_attention_window(family, changes, window):
    assert read_architecture(AutoConfig.for_model(family, **SMALL | changes)).attention_window == window
