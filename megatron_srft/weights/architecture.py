"""What a Hugging Face config says about a dense decoder, and which ones this project can train.

The families are Qwen2/2.5, Qwen3, Llama (2, 3) and Mistral: pre-norm RMSNorm, rotary positions, grouped-query
attention, gated SiLU MLP. Whatever a config asks for beyond that is refused, never ignored.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding.

    Example (Llama 3.1): theta=500000.0, kind="llama3", factor=8.0, low=1.0, high=4.0, original_length=8192.
    """

    theta: float
    kind: str = "default"
    """default, linear or llama3."""
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes and switches of one model.

    Example (Qwen2.5-0.5B): family="qwen2", num_layers=24, hidden_size=896, ffn_size=4864, num_heads=14,
    num_kv_heads=2, head_dim=64, vocab_size=151936, norm_epsilon=1e-6, qkv_bias=True, qk_norm=False, tied=True.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    """The LM head is the embedding matrix."""
    rope: Rope
    max_positions: int
    attention_window: int | None = None
    """Tokens that attention looks back on (sliding window); None: all."""

    @property
    def layer_parameters(self) -> int:
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        matrices = self.hidden_size * (2 * query + 2 * key + 3 * self.ffn_size)
        bias = (query + 2 * key) * self.qkv_bias
        return matrices + bias + 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm

    @property
    def embedding_parameters(self) -> int:
        """One vocabulary matrix, without padding."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        matrices = 1 if self.tied else 2
        return self.num_layers * self.layer_parameters + matrices * self.embedding_parameters + self.hidden_size


def read_architecture(hf_config: Any) -> Architecture:
    """Read a transformers config (AutoConfig.from_pretrained) or its to_dict().

    Raises:
        ValueError: the family or one of its options is not supported; the message names the config.json key.
    """
    settings = hf_config if isinstance(hf_config, dict) else hf_config.to_dict()
    check_family(settings)
    _refuse_unsupported(settings)
    family, heads = settings["model_type"], settings["num_attention_heads"]
    return Architecture(
        family=family,
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        ffn_size=settings["intermediate_size"],
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        vocab_size=settings["vocab_size"],
        norm_epsilon=settings["rms_norm_eps"],
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=bool(settings["tie_word_embeddings"]),
        rope=_read_rope(settings),
        max_positions=settings["max_position_embeddings"],
        attention_window=_attention_window(settings),
    )


def check_family(settings: dict[str, Any]) -> None:
    """Raise ValueError unless the model_type of this config is one of FAMILIES."""
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")


def _refuse_unsupported(settings: dict[str, Any]) -> None:
    refused = [key for key in ("attention_bias", "mlp_bias", "quantization_config") if settings.get(key)]
    if refused:
        raise ValueError(f"config.json: {refused[0]} = {settings[refused[0]]!r} is not supported")
    if settings["hidden_act"] != "silu":
        raise ValueError(f"config.json: hidden_act {settings['hidden_act']!r} is not supported, only 'silu'")
    if settings.get("pretraining_tp", 1) not in (None, 1):
        raise ValueError("config.json: pretraining_tp above 1 is not supported; set it to 1")


def _attention_window(settings: dict[str, Any]) -> int | None:
    """Qwen's window counts only where use_sliding_window is set and some layer slides; Mistral's always counts."""
    if not settings.get("use_sliding_window", settings["model_type"] == "mistral"):
        return None
    if "sliding_attention" not in (settings.get("layer_types") or ["sliding_attention"]):
        return None
    return settings.get("sliding_window")


def _read_rope(settings: dict[str, Any]) -> Rope:
    """transformers 5 keeps everything in rope_parameters; older files have rope_theta and rope_scaling."""
    scaling = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or settings.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if scaling.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor below 1 is not supported")
    match kind:
        case "default":
            return Rope(theta=theta)
        case "linear":
            return Rope(theta=theta, kind=kind, factor=scaling["factor"])
        case "llama3":
            return Rope(
                theta=theta,
                kind=kind,
                factor=scaling["factor"],
                low=scaling["low_freq_factor"],
                high=scaling["high_freq_factor"],
                original_length=scaling["original_max_position_embeddings"],
            )
    raise ValueError(f"config.json: rope type {kind!r} is not supported; supported are default, linear, llama3")


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] float32; radians per position of each pair of channels.

    Llama 3's scaling divides the frequencies whose wavelength exceeds original_length / low by `factor`, keeps those
    below original_length / high, and interpolates between.
    """
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind != "llama3":
        return frequencies
    turns = rope.original_length * frequencies / (2 * math.pi)  # full turns over the original context
    smooth = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies
