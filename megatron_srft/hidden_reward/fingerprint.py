"""A model's weights, and the form of its prompts, as one hash each: what a reward head has been made for. And a head
itself: what a score has been made by."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from megatron_srft.config import DataConfig
from megatron_srft.hidden_reward.head import RewardHead


def weights_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors, whatever their order.

    Args:
        tensors: full tensors under Hugging Face names, such as `Trainer.hf_weights()` or those of a folder; read one
            at a time. In another type the same model has another fingerprint: its states differ too.
    """
    watch = WeightsWatch()
    for _ in watch.passing(tensors):
        pass
    return watch.fingerprint()


class WeightsWatch:
    """Looks at weights on their way to somebody else."""

    def __init__(self):
        self.digests: list[bytes] = []

    def passing(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors."""
        for name, tensor in tensors:
            self.digests.append(_digest(name, tensor))
            yield name, tensor

    def fingerprint(self) -> str:
        """`weights_fingerprint` of those that have passed."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()


def head_fingerprint(head: RewardHead) -> str:
    """SHA-256 over a head's numbers and settings: equal for heads that give a model's responses the same scores."""
    settings = asdict(head.config)
    settings |= {"training": None, "base": settings["base"]["fingerprint"]}
    numbers = weights_fingerprint([("weight", head.weight), ("bias", head.bias)])
    return hashlib.sha256(json.dumps([settings, numbers], sort_keys=True).encode()).hexdigest()


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
