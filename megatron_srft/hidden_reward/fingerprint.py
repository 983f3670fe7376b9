"""A model's weights, and the form of its prompts, as one hash each: what a reward head has been made for."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch

from megatron_srft.config import DataConfig


def weights_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors, whatever their order.

    Args:
        tensors: full tensors under Hugging Face names, such as `Trainer.hf_weights()` or those of a folder; read one
            at a time. In another type the same model has another fingerprint: its states differ too.
    """
    digests = sorted(_digest(name, tensor) for name, tensor in tensors)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(name: str, tensor: torch.Tensor) -> bytes:
    header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
    digest = hashlib.sha256(header.encode() + b"\n")
    # numpy knows no bfloat16; bytes it knows. A scalar has no last dimension to read as bytes.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.digest()


def prompt_fingerprint(config: DataConfig, tokenizer: Any) -> str:
    """SHA-256 over what makes a prompt's text and tokens of a problem: templates, system prompt, prefix, vocabulary."""
    chat = tokenizer.chat_template is not None and config.chat_template != "never"
    settings = {
        "chat_template": tokenizer.chat_template if chat else None,
        "prompt_template": config.prompt_template,
        "system_prompt": config.system_prompt,
        "generation_prefix": config.generation_prefix,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
