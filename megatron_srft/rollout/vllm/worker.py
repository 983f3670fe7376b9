"""What runs inside vLLM's workers: taking over weights, and saying what their layers hold. vllm is imported only inside
functions.

On the CPU vLLM's linear layers compute with a packed copy of their weights and give the originals up. `reload_weights`
packs anew, except a tied output layer, which shares the embedding's tensor and goes on with the packed copy of the old
one. `WorkerExtension.srft_load` packs it again.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_srft.config import require
from megatron_srft.hidden_reward import RewardHead
from megatron_srft.rollout.vllm.model import find_sums
from megatron_srft.rollout.vllm.states import Rows, StateReader

PROBE_COLUMNS = 1024
"""Columns of a packed matrix that are read at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A part of a Hugging Face tensor as the engine computes with it on this rank.

    Example: name="model.layers.0.self_attn.k_proj.weight", place="model.layers.0.self_attn.qkv_proj", rows [64, 96).
    """

    name: str
    place: str
    """The engine's layer."""
    part: tuple[slice, ...]
    """Where the part lies in the full tensor, dimension by dimension."""
    read: Callable[[], torch.Tensor]
    """Makes the part; on the CPU from what the layer's packed copy computes."""


class WorkerExtension:
    """vLLM adds these methods to its worker; `LLM.collective_rpc` calls them by name."""

    def srft_load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take over full tensors under their Hugging Face names, a layer at a time."""
        with _without_warnings("vllm.model_executor.model_loader.reload.layerwise"):  # of a tied output layer
            self.reload_weights(weights_iterator=weights)
        if self.current_platform.is_cpu():
            _pack_again(self.model_runner.get_model())

    def srft_held(self) -> list[Held]:
        """Every part of every tensor that this worker's layers hold."""
        tied = self.model_config.hf_config.tie_word_embeddings
        layers = self.model_runner.get_model().named_modules()
        return [part for place, layer in layers for part in _held_by(place, layer, tied)]

    srft_reader: StateReader | None = None

    def srft_read_states(self, head: RewardHead | None) -> None:
        """Read this head's gate and reward of all tokens from now on; None: of none any more."""
        sums = find_sums(self.model_runner.get_model())
        if head is not None:
            require(sums is not None, "this vLLM was not started for a reward head; start it for one, or score without")
            _refuse_unread(self.vllm_config)
        runner, name = self.model_runner, "prepare_inputs" if self.use_v2_model_runner else "_prepare_inputs"
        if self.srft_reader is not None:
            self.srft_reader.remove()
            delattr(runner, name)
            self.srft_reader = None
        if head is not None:
            self.srft_reader = StateReader(head, sums)
            announced = _announced_second if self.use_v2_model_runner else _announced_first
            setattr(runner, name, announced(runner, self.srft_reader))

    def srft_take_scores(self, responses: dict[str, tuple[int, list[int]]]) -> dict[str, float | None]:
        """See `StateReader.take`."""
        return self.srft_reader.take(responses)


def _announced_first(runner: Any, reader: StateReader) -> Callable:
    """`_prepare_inputs` of model runner V1, which tells the reader what the next forward pass computes."""
    prepare = runner._prepare_inputs

    def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        reader.expect(Rows(list(runner.input_batch.req_ids), num_scheduled_tokens.tolist()))
        return prepare(scheduler_output, num_scheduled_tokens)

    return prepare_inputs


def _announced_second(runner: Any, reader: StateReader) -> Callable:
    """`prepare_inputs` of model runner V2, likewise."""
    prepare = runner.prepare_inputs

    def prepare_inputs(*arguments: Any, **named: Any) -> Any:
        batch = prepare(*arguments, **named)
        reader.expect(Rows(list(batch.req_ids), batch.num_scheduled_tokens.tolist()))
        return batch

    return prepare_inputs


def _refuse_unread(config: Any) -> None:
    """Raises ConfigError for what a reward head cannot be read under."""
    parallel = config.parallel_config
    unread = {
        "speculative_config": config.speculative_config is not None,
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "enable_dbo": parallel.enable_dbo,
        "enable_prompt_embeds": config.model_config.enable_prompt_embeds,
    }
    for name, used in unread.items():
        require(not used, f"a reward head cannot be read with rollout.vllm.{name}; leave it out")


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _pack_again(model: torch.nn.Module) -> None:
    """Renew the packed copy of output layers, of which a tied one has just been passed over."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, (ParallelLMHead, VocabParallelEmbedding)):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def _held_by(place: str, layer: torch.nn.Module, tied: bool) -> list[Held]:
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    match layer:
        case ParallelLMHead():
            return _vocabulary(place, layer, "model.embed_tokens.weight" if tied else f"{place}.weight", packed=True)
        case VocabParallelEmbedding():
            return _vocabulary(place, layer, f"{place}.weight", packed=False)
        case linear.QKVParallelLinear():
            return _stacked(place, layer, _query_key_value(layer))
        case linear.MergedColumnParallelLinear():
            return _stacked(place, layer, _gate_up(layer))
        case linear.RowParallelLinear():
            columns = layer.input_size_per_partition
            part = (slice(None), slice(layer.tp_rank * columns, (layer.tp_rank + 1) * columns))
            return [Held(f"{place}.weight", place, part, lambda: _matrix(layer))]
        case RMSNorm():
            return [Held(f"{place}.weight", place, (slice(None),), lambda: layer.weight.data)]
    return []


def _vocabulary(place: str, layer: Any, name: str, *, packed: bool) -> list[Held]:
    indices = layer.shard_indices
    rows = slice(indices.org_vocab_start_index, indices.org_vocab_end_index)
    count = rows.stop - rows.start
    read = (lambda: _matrix(layer)[:count]) if packed else (lambda: layer.weight.data[:count])
    return [Held(name, place, (rows, slice(None)), read)]


def _query_key_value(layer: Any) -> list[tuple[str, int, int]]:
    """(name, first row of the full matrix, rows) of what a rank's matrix stacks."""
    queries, keys = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
    group = layer.tp_rank // layer.num_kv_head_replicas
    return [
        ("q_proj", layer.tp_rank * queries, queries),
        ("k_proj", group * keys, keys),
        ("v_proj", group * keys, keys),
    ]


def _gate_up(layer: Any) -> list[tuple[str, int, int]]:
    rows = [size // layer.tp_size for size in layer.output_sizes]
    return [(name, layer.tp_rank * count, count) for name, count in zip(("gate_proj", "up_proj"), rows, strict=True)]


def _stacked(place: str, layer: Any, parts: list[tuple[str, int, int]]) -> list[Held]:
    prefix, out, start = place.rpartition(".")[0], [], 0
    for name, first, count in parts:
        own, rows = slice(start, start + count), slice(first, first + count)
        full = f"{prefix}.{name}"
        out.append(Held(f"{full}.weight", place, (rows, slice(None)), lambda own=own: _matrix(layer)[own]))
        if layer.bias is not None:
            out.append(Held(f"{full}.bias", place, (rows,), lambda own=own: layer.bias.data[own]))
        start += count
    return out


@torch.inference_mode()
def _matrix(layer: Any) -> torch.Tensor:
    """[outputs, inputs] of a linear layer, as it computes with it.

    On the CPU only a packed copy is left, which cannot be read but used: its products with unit vectors are its
    columns, exactly (one product with 1, the others with 0).
    """
    if not hasattr(layer, "cpu_linear"):
        return layer.weight.data
    inputs = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
    dtype = layer.params_dtype if hasattr(layer, "params_dtype") else layer.weight.dtype
    columns = []
    for start in range(0, inputs, PROBE_COLUMNS):
        count = min(PROBE_COLUMNS, inputs - start)
        units = torch.zeros(count, inputs, dtype=dtype)
        units[torch.arange(count), start + torch.arange(count)] = 1
        columns.append(layer.quant_method.apply(layer, units, bias=None).T)
    return torch.cat(columns, dim=1)


WORKER_EXTENSION = f"{__name__}.{WorkerExtension.__qualname__}"
"""What vLLM imports by name."""
