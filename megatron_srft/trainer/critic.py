"""PPO's critic: the policy's architecture with a value head, as a Megatron model with an optimizer of its own.

    V(s_t) = head . hidden_t        hidden_t: after the final norm, at the token before response token t

The head starts from zero, and so do all values. Every tensor-parallel rank has the whole head and computes the whole
loss, so the gradient of the hidden states is complete on each of them and is not added up.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_srft.config import ConfigError, CriticConfig, RunConfig
from megatron_srft.distributed import ProcessGroups, rank, size
from megatron_srft.objectives.value import value_loss
from megatron_srft.sample import Counts, PackedBatch
from megatron_srft.trainer.context import Part
from megatron_srft.trainer.conversion import parameters, read_hf_config
from megatron_srft.trainer.model import PolicyModel, build_model
from megatron_srft.trainer.optimizer import build_optimizer, clip_and_step, wrap
from megatron_srft.trainer.step import accumulate, measure, per_sequence
from megatron_srft.weights.architecture import Architecture, read_architecture
from megatron_srft.weights.folder import HfFolder
from megatron_srft.weights.streaming import check_names, load_hf

HEAD = "output_layer.weight"
"""The value head stands where the policy has its LM head: Megatron's checkpoint code asks for that name."""


SIZES = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
"""Fields of Architecture in which critic and policy agree."""


class ValueModel(PolicyModel):
    """One pipeline chunk of the critic; the last one has a head of one output."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{**options, "share_embeddings_and_output_weights": False})
        if self.post_process:
            self.output_layer = torch.nn.Linear(self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype)
            torch.nn.init.zeros_(self.output_layer.weight)


class Critic:
    """Use after a stage's policy has been built; `config` is resolved."""

    def __init__(self, config: RunConfig, policy: list[PolicyModel], groups: ProcessGroups):
        self.groups, self.config = groups, config
        settings: CriticConfig = config.critic
        check_folder(config, policy[0].architecture)
        folder = settings.path or config.model.path
        chunks = build_model(read_hf_config(folder, config.model.trust_remote_code), config, groups, ValueModel)
        if settings.path is None:
            _copy(policy, chunks)
        else:
            trunk = (parameter for parameter in parameters(chunks) if parameter.name != HEAD)
            architecture = chunks[0].architecture
            load_hf(trunk, HfFolder(folder).tensor, architecture, rank(groups.tensor), size(groups.tensor))
        self.chunks = wrap(chunks, config.parallel)
        self.optimizer = build_optimizer(self.chunks, settings.optimizer, config.parallel)

    @property
    def models(self) -> list[ValueModel]:
        """The model chunks without Megatron's DDP around them."""
        return [chunk.module for chunk in self.chunks]

    def outputs(self, hidden: torch.Tensor, model: ValueModel, part: Part) -> torch.Tensor:
        """[rows] float32 values from the last stage's hidden states."""
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tensor
            )
        rows = hidden[:, 0].index_select(0, part.rows)
        return part.whole((rows.float() @ model.output_layer.weight[0].float()).float())

    def values(self, microbatches: list[PackedBatch]) -> dict[int, np.ndarray]:
        """[response] values of every sequence of the step (by index), on every rank, without gradients."""
        for chunk in self.chunks:
            chunk.eval()
        return measure(self, microbatches, per_sequence)

    def update(self, microbatches: list[PackedBatch], counts: Counts, lr: float) -> dict[str, float]:
        """One optimizer update from sequences with values and returns; its metrics, equal on all ranks."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss(batch: PackedBatch, values: torch.Tensor):
            return value_loss(values, batch, counts, self.config.critic)

        metrics = accumulate(self, microbatches, loss)
        stepped, norm = clip_and_step(self.optimizer, self.config.critic.optimizer, lr)
        skipped = 0 if stepped else 1
        return {**metrics, "value/grad_norm": norm, "accounting/skipped_critic_updates": skipped}


def _copy(policy: list[PolicyModel], chunks: list[ValueModel]) -> None:
    """Every weight but the head's from the policy's chunk of the same place."""
    with torch.no_grad():
        for source, chunk in zip(policy, chunks, strict=True):
            weights = dict(source.named_parameters())
            for name, parameter in chunk.named_parameters():
                if name != HEAD:
                    parameter.copy_(weights[name])


def check_folder(config: RunConfig, policy: Architecture) -> None:
    """Look at critic.path before anything is built.

    Raises:
        ConfigError, ValueError: it is no model, or none of the policy's sizes.
    """
    path = config.critic.path
    if not config.uses_critic or path is None:
        return
    if not Path(path).is_dir():
        raise ConfigError(f"critic.path: {path} is not a folder; name a Hugging Face folder, or null for the policy")
    folder = HfFolder(path)
    found = read_architecture(read_hf_config(path, config.model.trust_remote_code))
    other = next((name for name in SIZES if getattr(found, name) != getattr(policy, name)), None)
    if other is not None:
        raise ConfigError(
            f"critic.path {path} has {other} {getattr(found, other)}, and model.path has {getattr(policy, other)}; "
            "name a model of the policy's sizes"
        )
    check_names(folder.shapes(), found, str(folder.path))
