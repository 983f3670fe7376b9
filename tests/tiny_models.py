"""Tiny Hugging Face model folders with random weights, and a character-level tokenizer."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<bos>")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
"""Llama 3's scaling with constants that differ from the published ones and matter at a few dozen positions."""


def make_model(
    family: str,
    folder: Path | str,
    *,
    tied: bool = False,
    vocab: int = len(SPECIAL) + len(CHARACTERS),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a model of this family ('qwen2', 'qwen3', 'llama', 'mistral', or 'llama3' for Llama with scaled rope).

    4 layers, hidden 32, 4 heads of 8 over 2 key-value heads (so that TP2 and PP2 x VPP2 fit); `overrides` go to the
    config. Weights are normal with std 0.1 (norm weights around 1), so that every parameter matters to the logits.
    """
    settings: dict[str, Any] = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    if family == "qwen3":
        settings["head_dim"] = 16  # not hidden / heads
    if family == "llama3":
        settings["rope_parameters"] = LLAMA3_ROPE
    if family == "mistral":
        settings["sliding_window"] = None
    config = AutoConfig.for_model("llama" if family == "llama3" else family, **settings | overrides)
    model = AutoModelForCausalLM.from_config(config)
    _randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1, generator=generator)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; unknown characters become <pad>."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<pad>"
    )
