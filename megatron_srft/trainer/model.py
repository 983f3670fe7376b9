"""The policy: megatron's GPTModel whose last stage returns hidden states instead of logits.

Log-probs and entropy are computed from the hidden states and the LM-head shard elsewhere, for the response rows only,
so that no rank ever holds the logits of a whole micro-batch.
"""

import inspect
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_srft.config import RunConfig
from megatron_srft.distributed import ProcessGroups
from megatron_srft.trainer.architecture import padded_vocab_size, transformer_config, uses_transformer_engine
from megatron_srft.trainer.attention import PackedAttention, rotation
from megatron_srft.weights.architecture import Architecture, inverse_frequencies, read_architecture

HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters
"""Whether this megatron-core (0.19, not 0.16) lets its caller say what the last stage makes of the hidden states."""


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor and the mark that megatron expects."""

    def __init__(self, config, hidden_size, eps=1e-5, **unused):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism each tensor-parallel rank sees other tokens; this makes megatron add the gradients.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch has a kernel for CUDA; on the CPU it strings together a dozen passes forwards and backwards.
        if x.is_cuda or x.dtype != torch.float32:
            return super().forward(x)
        return _NormInFewPasses.apply(x, self.weight, self.eps)


class _NormInFewPasses(torch.autograd.Function):
    """y = x r w, r = 1 / sqrt(mean x^2 + eps); with u = x r and g = dy w: dx = r (g - u mean(g u)), dw = sum dy u."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        along = unit * grad
        grad_weight = along.sum(tuple(range(x.dim() - 1)))
        mean = (along @ weight).div_(x.shape[-1]).unsqueeze(-1)
        return (grad * weight).addcmul_(unit, mean, value=-1).mul_(scale), grad_weight, None


def _hidden_states(hidden_states: torch.Tensor, **unused) -> torch.Tensor:
    return hidden_states


class PolicyModel(GPTModel):
    """One pipeline chunk of the policy.

    `model(token_ids, position_ids, None, packed_seq_params=packed_params(cu_seqlens))`, with token_ids and position_ids
    of shape [1, tokens] on every stage, returns [tokens, 1, hidden]: after the final norm on the last stage, otherwise
    what the next stage takes in. With sequence parallelism the rows are this rank's share of the tokens.
    """

    def __init__(self, config: TransformerConfig, spec, architecture: Architecture, **options: Any):
        super().__init__(config, spec, position_embedding_type="rope", rotary_base=architecture.rope.theta, **options)
        self.architecture = architecture
        # megatron fixes all but one of the constants of Llama 3's scaling, so the frequencies come from our own reader.
        frequencies = inverse_frequencies(architecture.rope, architecture.head_dim)
        self.rotary_pos_emb.inv_freq = frequencies.to(self.rotary_pos_emb.inv_freq.device)
        # Else it would cut its angles over the context ranks in its own way; see _preprocess for who uses them.
        self.rotary_pos_emb.cp_group = None

    def _preprocess(self, *args, position_ids, packed_seq_params, **kwargs):
        outputs = super()._preprocess(*args, position_ids=position_ids, packed_seq_params=packed_seq_params, **kwargs)
        if packed_seq_params.qkv_format == "thd":
            return outputs
        # megatron has the angles of positions 0 ... longest, and takes their cosines in every layer anew; a packed row
        # needs one angle per token, and PackedAttention turns queries and keys itself.
        frequencies = self.rotary_pos_emb.inv_freq.to(position_ids.device)
        packed_seq_params.rotation = rotation(position_ids[0], frequencies, self.config.params_dtype)
        return (outputs[0], None, *outputs[2:])

    if HAS_OUTPUT_PROCESSOR:

        def forward(self, *args, **kwargs) -> torch.Tensor:
            return super().forward(*args, output_processor=_hidden_states, **kwargs)
    else:

        def _postprocess(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            return hidden_states

    def output_weight(self) -> torch.Tensor:
        """[padded vocab / tensor, hidden]; this rank's rows of the LM head. Last stage only."""
        assert self.post_process, "only the last pipeline stage has the LM head"
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_model(
    hf_config: Any, run: RunConfig, groups: ProcessGroups, kind: type[PolicyModel] = PolicyModel
) -> list[PolicyModel]:
    """This rank's chunks of the model (one, or virtual_pipeline many), with weights not yet filled.

    Args:
        hf_config: a transformers config or its to_dict().
        groups: what parallel.start returned.
        kind: class of the chunks.

    Raises:
        ValueError: the model is not supported, the layout does not fit it, or `megatron` has a wrong key.
    """
    architecture = read_architecture(hf_config)
    config = transformer_config(architecture, run)
    stage, stages = groups.pipeline.rank(), groups.pipeline.size()
    chunks = run.parallel.virtual_pipeline or 1
    return [
        kind(
            config,
            layer_specs(config, number if chunks > 1 else None),
            architecture,
            vocab_size=padded_vocab_size(architecture.vocab_size, run.parallel.tensor),
            max_sequence_length=architecture.max_positions,
            pre_process=stage == 0 and number == 0,
            post_process=stage == stages - 1 and number == chunks - 1,
            share_embeddings_and_output_weights=architecture.tied,
            vp_stage=number if chunks > 1 else None,
        ).to(torch.cuda.current_device())
        for number in range(chunks)
    ]


def layer_specs(config: TransformerConfig, virtual_stage: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    """The modules that this chunk's layers are made of."""
    if uses_transformer_engine(config):
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    modules, attention = layer.submodules, layer.submodules.self_attention.submodules
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
