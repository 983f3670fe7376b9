"""vLLM's own models with a reward head's gate and reward of every token summed up along the way, for engines that are
started for one: an out-of-tree model in vLLM's terms. vllm is imported only inside functions.

Hooks do not fire where vLLM compiles a model or replays CUDA graphs. Here the projection is part of the forward pass
itself, so it is compiled and recorded with it. All it reads and writes are buffers that stay where they are from the
start on: a head is copied into them (none: zeros), and what the latest pass gave is copied out of them.

By the numbers of hidden_reward/head.py, layer 0 is what the embedding gives, l < L the sum of the two parts in which
vLLM's block l returns the residual stream, L the first part of what the final norm gives. In bfloat16 a compiler may
leave that sum unrounded, where the trainer rounds it. After each of them every tensor-parallel rank has whole states,
so each rank projects all of them and has all scores.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_srft.config import require
from megatron_srft.hidden_reward import RewardHead
from megatron_srft.hidden_reward.pooling import inverse_rms
from megatron_srft.ops import implementations

MODELS = "vllm.model_executor.models"

FAMILIES = {
    "LlamaForCausalLM": ("llama", "LlamaModel"),
    "MistralForCausalLM": ("mistral", "MistralModel"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2Model"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3Model"),
}
"""vLLM's model classes that a head can be read in: module, and name there of the class between embedding and norm."""

PREFIX = "Scored"
"""Before an architecture's name: the same with a reward head's sums."""


def register(architecture: str) -> str:
    """Make vLLM know the architecture with a head's sums; its name.

    Raises:
        ConfigError: there is none.
    """
    require(
        architecture in FAMILIES,
        f"a reward head cannot be read in vLLM's {architecture}, only in {', '.join(FAMILIES)}; score the responses "
        "with `megatron-srft reward score`",
    )
    from vllm import ModelRegistry

    name = PREFIX + architecture
    if name not in ModelRegistry.models:
        ModelRegistry.register_model(name, _scored_class(architecture))
    return name


def _scored_class(architecture: str) -> type[torch.nn.Module]:
    file, trunk = FAMILIES[architecture]
    module = importlib.import_module(f"{MODELS}.{file}")
    scored_trunk = type(PREFIX + trunk, (ScoredTrunk, getattr(module, trunk)), {})

    class Scored(getattr(module, architecture)):
        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            with _replaced(module, trunk, scored_trunk):
                super().__init__(vllm_config=vllm_config, prefix=prefix)

    Scored.__name__ = Scored.__qualname__ = PREFIX + architecture
    return Scored


@contextlib.contextmanager
def _replaced(module: Any, name: str, other: type) -> Iterator[None]:
    """vLLM's classes find their trunk under its name in their module; not all of them can be told another one."""
    own = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, own)


class StateSums(torch.nn.Module):
    """The buffers: a head's numbers, and what they gave of the tokens of the latest pass."""

    def __init__(self, num_layers: int, hidden_size: int, tokens: int):
        """
        Args:
            tokens: most of one pass.
        """
        super().__init__()
        self.project = implementations.kernel(
            "gated_projection", implementations.choose(None, torch.empty(0, dtype=torch.get_default_dtype()))
        )
        buffers = {
            "weight": torch.zeros(num_layers + 1, 2, hidden_size, dtype=torch.float32),
            "marks": torch.zeros(num_layers + 1, dtype=torch.int64),
            "normalises": torch.zeros((), dtype=torch.bool),
            "epsilon": torch.zeros((), dtype=torch.float32),
            "sums": torch.zeros(tokens, 2, dtype=torch.float32),
            "positions": torch.zeros(tokens, dtype=torch.int64),
            "token_ids": torch.zeros(tokens, dtype=torch.int64),
            "read": torch.zeros((), dtype=torch.int64),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    @torch.no_grad()
    def take(self, head: RewardHead | None) -> None:
        """Compute this head's sums from now on; None: zeros."""
        for name in ("weight", "marks", "normalises", "epsilon", "read"):
            getattr(self, name).zero_()
        if head is not None:
            self.weight.copy_(self._spread(head))
            self.marks[list(head.layers)] = 1
            self.normalises.fill_(head.config.normalisation == "rms")
            self.epsilon.fill_(head.config.epsilon)

    def holds(self, head: RewardHead) -> bool:
        """Whether the buffers still have the head's numbers, which `take` put there."""
        return torch.equal(self.weight, self._spread(head))

    def _spread(self, head: RewardHead) -> torch.Tensor:
        """The head's weight over all layers."""
        weight = torch.zeros_like(self.weight)
        weight[list(head.layers)] = head.weight.to(weight.device)
        return weight

    # ------------------------------------------------------------ in the forward pass

    def add(
        self, before: tuple[torch.Tensor, torch.Tensor] | None, layer: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a layer's share of gate and reward, and its mark: 1 if the head reads it.

        Args:
            before: ([tokens, 2] sums, number of layers read); None for the first layer.
            hidden: [tokens, hidden].
        """
        share = self.project(self.sums.new_zeros(hidden.shape[0], 2), hidden, self.weight[layer])
        share = share * torch.where(self.normalises, inverse_rms(hidden, self.epsilon), 1.0)
        if before is None:
            return share, self.marks[layer]
        return before[0] + share, before[1] + self.marks[layer]

    def keep(self, found: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Put into the buffers what a pass gave."""
        sums, read = found
        count = sums.shape[0]
        self.sums[:count].copy_(sums)
        self.positions[:count].copy_(positions)
        self.token_ids[:count].copy_(token_ids)
        self.read.copy_(read)


class ScoredTrunk:
    """Stands before one of vLLM's trunks: the same pass, with the layers' sums."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **named: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **named)
        sizes = vllm_config.model_config.hf_config
        self.state_sums = StateSums(sizes.num_hidden_layers, sizes.hidden_size, _most_tokens(vllm_config))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden, residual = self.embed_input_ids(input_ids), None
        found = self.state_sums.add(None, 0, hidden)
        last = len(self.layers)
        for number, block in enumerate(self.layers, start=1):
            hidden, residual = block(positions, hidden, residual)
            if number < last:
                found = self.state_sums.add(found, number, hidden + residual)
        hidden, _ = self.norm(hidden, residual)
        found = self.state_sums.add(found, last, hidden)
        self.state_sums.keep(found, positions, input_ids)
        return hidden


def _most_tokens(vllm_config: Any) -> int:
    """Of one pass; recorded graphs and tensor parallelism can pad it."""
    recorded = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    most = max(vllm_config.scheduler_config.max_num_batched_tokens, recorded)
    return most + vllm_config.parallel_config.tensor_parallel_size


def find_sums(model: torch.nn.Module) -> StateSums | None:
    """The buffers of a model of vLLM's worker; None when it was not started for a head."""
    return getattr(getattr(model, "model", None), "state_sums", None)
