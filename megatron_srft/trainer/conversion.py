"""Between the model's chunks and Hugging Face tensors: what weights/ needs to know of megatron."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_srft.distributed import ProcessGroups, rank, size
from megatron_srft.trainer.model import PolicyModel
from megatron_srft.weights.architecture import check_family
from megatron_srft.weights.folder import HfFolder, read_config
from megatron_srft.weights.streaming import Parameter, check_names, export_hf, load_hf


def read_hf_config(path: Path | str, trust_remote_code: bool = False) -> dict[str, Any]:
    """config.json with everything filled in that it leaves to the family's defaults.

    Raises:
        ValueError: config.json is missing or damaged, or the family is not supported.
    """
    check_family(read_config(path))  # before transformers, whose message for an unknown family helps nobody
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).to_dict()
    except StrictDataclassError as error:
        raise ValueError(f"{path}/config.json: {' '.join(str(error).split())}") from None


def parameters(chunks: list[PolicyModel]) -> Iterator[Parameter]:
    """This rank's parameters, with the place of their layers in the whole model."""
    for chunk in chunks:
        # megatron numbers layers from 1 over the whole model.
        offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        for name, tensor in chunk.named_parameters():
            yield Parameter(name, offset, tensor)


def load_policy(chunks: list[PolicyModel], folder: HfFolder, groups: ProcessGroups) -> None:
    """Fill the model from a Hugging Face folder; every rank reads its own share.

    Raises:
        ValueError: the folder's tensors are not those that its config.json promises.
    """
    architecture = chunks[0].architecture
    check_names(folder.shapes(), architecture, str(folder.path))
    load_hf(parameters(chunks), folder.tensor, architecture, rank(groups.tensor), size(groups.tensor))


def export_policy(chunks: list[PolicyModel], groups: ProcessGroups) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole model under Hugging Face names, on every rank; see weights.streaming.export_hf."""
    return export_hf(parameters(chunks), chunks[0].architecture, groups)
