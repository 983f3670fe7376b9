"""Which megatron parameter holds which Hugging Face tensors, and how tensor parallelism cuts it.

One table serves all families: a parameter that a family lacks simply does not occur. Both names of the two norms that
TransformerEngine fuses into the following linear layer are listed.
"""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_srft.weights.architecture import Architecture

Cut = Literal["whole", "columns", "vocabulary", "qkv", "gate_up"]
"""How a parameter is shared over the tensor-parallel ranks.

whole       every rank holds all of it
columns     cut along the input dimension
vocabulary  cut along the vocabulary, after padding it with zero rows
qkv         query, key and value rows interleaved by key-value head (q q q k v | q q q k v | ...), then cut
gate_up     gate and up projections, each cut along the output dimension, stacked on each rank
"""

LAYER: dict[str, tuple[Cut, tuple[str, ...]]] = {
    "input_layernorm.weight": ("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": ("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (
        "qkv",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attention.linear_qkv.bias": (
        "qkv",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ),
    "self_attention.q_layernorm.weight": ("whole", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("whole", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": ("columns", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": ("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("columns", ("mlp.down_proj.weight",)),
}
"""Below decoder.layers.N. (megatron) and model.layers.N. (Hugging Face)."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

TOP: dict[str, tuple[Cut, tuple[str, ...]]] = {
    "embedding.word_embeddings.weight": ("vocabulary", (EMBEDDING,)),
    "decoder.final_layernorm.weight": ("whole", ("model.norm.weight",)),
    "output_layer.weight": ("vocabulary", (HEAD,)),
}

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Rule:
    """Example: cut="gate_up", hf_names=("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight")."""

    cut: Cut
    hf_names: tuple[str, ...]


def rule_for(name: str, layer_offset: int) -> Rule:
    """The rule of a megatron parameter.

    Args:
        name: its name within its model chunk.
        layer_offset: layers of the model before this chunk's first one.

    Raises:
        ValueError: no table has the name.
    """
    layer = _LAYER_NAME.fullmatch(name)
    if layer and layer[2] in LAYER:
        cut, hf_names = LAYER[layer[2]]
        prefix = f"model.layers.{int(layer[1]) + layer_offset}."
        return Rule(cut, tuple(prefix + hf_name for hf_name in hf_names))
    if name in TOP:
        return Rule(*TOP[name])
    raise ValueError(f"the megatron parameter {name} has no Hugging Face counterpart in weights/tables.py")


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model's Hugging Face folder; a tied LM head is not one of them."""
    a = architecture
    query, key = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (a.hidden_size,),
        "self_attn.q_proj.weight": (query, a.hidden_size),
        "self_attn.k_proj.weight": (key, a.hidden_size),
        "self_attn.v_proj.weight": (key, a.hidden_size),
        "self_attn.o_proj.weight": (a.hidden_size, query),
        "post_attention_layernorm.weight": (a.hidden_size,),
        "mlp.gate_proj.weight": (a.ffn_size, a.hidden_size),
        "mlp.up_proj.weight": (a.ffn_size, a.hidden_size),
        "mlp.down_proj.weight": (a.hidden_size, a.ffn_size),
    }
    if a.qkv_bias:
        layer |= {f"self_attn.{p}_proj.bias": (query if p == "q" else key,) for p in "qkv"}
    if a.qk_norm:
        layer |= {f"self_attn.{p}_norm.weight": (a.head_dim,) for p in "qk"}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (a.vocab_size, a.hidden_size)}
    for number in range(a.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (a.hidden_size,)
    if not a.tied:
        shapes[HEAD] = (a.vocab_size, a.hidden_size)
    return shapes
