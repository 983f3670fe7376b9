"""From a Hugging Face config and a run's settings to megatron's TransformerConfig, with the layout checked first."""

import dataclasses
import difflib
import importlib.util
import math
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_srft.config import ConfigError, ParallelConfig, RunConfig
from megatron_srft.weights.architecture import Architecture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

OWNED = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "sequence_parallel": "parallel.sequence_parallel",
    "recompute_granularity": "parallel.recompute",
    "recompute_method": "parallel.recompute",
    "recompute_num_layers": "parallel.recompute",
    "recompute_modules": "parallel.recompute",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}
"""TransformerConfig fields that a key of the run's own config decides."""

FROM_MODEL = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "layernorm_epsilon", "gated_linear_unit", "activation_func", "add_bias_linear", "add_qkv_bias",
    "qk_layernorm",
)  # fmt: skip
"""TransformerConfig fields that the model's config.json decides."""

FIXED = {
    "expert_model_parallel_size": 1,
    "num_moe_experts": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "calculate_per_token_loss": True,
    "perform_initialization": True,
}
"""TransformerConfig fields with only one value that the trainer supports."""


def uses_transformer_engine(config: TransformerConfig) -> bool:
    """Whether this model's layers come from TransformerEngine."""
    return _engine_fits(config.params_dtype, config.context_parallel_size)


def _engine_fits(dtype: torch.dtype, context: int) -> bool:
    """In half precision, where it is installed and there is CUDA: its attention has no kernel for packed float32
    sequences. Context ranks cut the row of tokens in their own way (trainer/context.py), not sequence by sequence as it
    does."""
    has_engine = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    return has_engine and dtype != torch.float32 and context == 1


def transformer_config(architecture: Architecture, run: RunConfig) -> TransformerConfig:
    """Megatron's description of the model in this run's layout.

    Raises:
        ConfigError: the layout does not fit the model, or `megatron` has an unknown or reserved key.
    """
    check_layout(architecture, run)
    settings = _model_settings(architecture) | _layout_settings(run) | _numeric_settings(run) | FIXED
    return TransformerConfig(**settings | _native_settings(run.megatron))


def check_layout(architecture: Architecture, run: RunConfig) -> None:
    """Raise ConfigError where the model cannot be cut as `parallel` says or attends less far than the data needs."""
    layout = run.parallel
    for name, size in (
        ("attention heads", architecture.num_heads),
        ("key-value heads", architecture.num_kv_heads),
        ("MLP channels", architecture.ffn_size),
    ):
        if size % layout.tensor:
            raise ConfigError(f"parallel.tensor = {layout.tensor} does not divide the model's {size} {name}")
    chunks = layout.pipeline * (layout.virtual_pipeline or 1)
    if architecture.num_layers % chunks:
        raise ConfigError(
            f"the model's {architecture.num_layers} layers cannot be shared evenly by parallel.pipeline x "
            f"parallel.virtual_pipeline = {layout.pipeline} x {layout.virtual_pipeline or 1} = {chunks} chunks"
        )
    _check_length(architecture, run)


def _check_length(architecture: Architecture, run: RunConfig) -> None:
    responses = max(run.rollout.max_response_tokens, run.data.max_demonstration_tokens or 0)
    longest = run.data.max_prompt_tokens + responses
    window = architecture.attention_window
    if window is not None and longest > window:
        raise ConfigError(
            f"the model attends only {window} tokens back (sliding_window in config.json), which is not supported for "
            f"sequences of up to {longest} tokens; lower data.max_prompt_tokens, rollout.max_response_tokens or "
            f"data.max_demonstration_tokens so that prompt + response <= {window}"
        )
    if longest > architecture.max_positions:
        raise ConfigError(
            f"sequences of up to {longest} tokens exceed the model's {architecture.max_positions} positions "
            "(max_position_embeddings in config.json); lower data.max_prompt_tokens or rollout.max_response_tokens"
        )


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the vocabulary matrices: a multiple of 64 and of the tensor-parallel size.

    The same for every power of two up to 64, so that a checkpoint fits another layout.
    """
    multiple = math.lcm(64, tensor)
    return (vocab_size + multiple - 1) // multiple * multiple


def _leave_as_allocated(weight: torch.Tensor) -> torch.Tensor:
    """Stands in for megatron's random initialisation: every weight is overwritten from the HF folder."""
    return weight


def _model_settings(architecture: Architecture) -> dict[str, Any]:
    return dict(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
    )


def _layout_settings(run: RunConfig) -> dict[str, Any]:
    layout = run.parallel
    settings: dict[str, Any] = dict(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        expert_tensor_parallel_size=layout.tensor,
    )
    settings |= _communication_settings(layout)
    match layout.recompute:
        case "full":
            settings |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
        case "selective":
            settings |= dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return settings


def _communication_settings(layout: ParallelConfig) -> dict[str, Any]:
    # Batched point-to-point calls are NCCL's; gloo stops in them under the interleaved schedule.
    if layout.virtual_pipeline is None:
        return {}
    return dict(overlap_p2p_comm=True, batch_p2p_comm=False)


def _numeric_settings(run: RunConfig) -> dict[str, Any]:
    dtype = DTYPES[run.model.dtype]
    fused = _engine_fits(dtype, run.parallel.context)
    return dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        init_method=_leave_as_allocated,
        output_layer_init_method=_leave_as_allocated,
        embedding_init_method=_leave_as_allocated,
        apply_rope_fusion=fused,
        persist_layer_norm=fused,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def _native_settings(native: dict[str, Any]) -> dict[str, Any]:
    """Check `megatron:` of the run's config, which names TransformerConfig's fields directly."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for key in native:
        if key in OWNED:
            raise ConfigError(f"megatron.{key} is decided by {OWNED[key]}; set that instead")
        if key in FROM_MODEL:
            raise ConfigError(f"megatron.{key} is decided by the model's config.json; remove it")
        if key in FIXED:
            raise ConfigError(f"megatron.{key} can only be {FIXED[key]} here; remove it")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean megatron.{close[0]}?" if close else "TransformerConfig has no such field"
            raise ConfigError(f"unknown key megatron.{key}; {hint}")
    return native
