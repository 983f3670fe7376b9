"""A reward head on hidden states, as SWIFT has it: Mining Intrinsic Rewards from LLM Hidden States (arXiv 2505.12225).

    [a_t, r_t] = b + sum_l W_l h_l,t        g_t = sigmoid(a_t)        score = sum_t g_t r_t / max(sum_t g_t, 1e-8)

(ops/gated_pooling.py). The score is a logit. What the letters stand for, for training and serving alike:

Layers are numbered as Hugging Face's `output_hidden_states` numbers them: 0 is the embedding's output, l in 1 ... L - 1
the residual stream after block l, and L what comes out of the final norm after block L. That is L + 1 layers; the
stream after block L before the norm is none of them.

Tokens are those of the response, each at the position where it is the model's input; the prompt does not count. A
response of n tokens has n states in training, but while it was generated its last token was never fed to the model, so
an engine that scores as it decodes has n - 1. `last_token` says which of the two: `excluded` scores n - 1 tokens, and
so means the same in training and in such an engine; `included` scores n, as the paper's released code does.

A response without a token to score (no token, or one under `excluded`) has no score: None, never a number.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

HIDDEN, LOGITS = "hidden", "logits"
CHOICES = {
    "trained_on": (HIDDEN, LOGITS),
    "normalisation": ("none", "rms"),
    "last_token": ("excluded", "included"),
}
"""Values of the fields that have few."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model whose states a head reads.

    Example: name="Qwen2.5-0.5B", fingerprint="9f2c...", num_layers=24, hidden_size=896, vocab_size=151936,
    dtype="bfloat16".
    """

    name: str
    """For people; not compared."""
    fingerprint: str
    """`fingerprint.weights_fingerprint` of its weights in `dtype`; "" where nobody knows it, which fits no model."""
    num_layers: int
    """Blocks, L; the highest layer that a head can read."""
    hidden_size: int
    vocab_size: int
    dtype: str
    """Type that it runs in: float32 or bfloat16."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Everything about a head but its numbers.

    Raises:
        ValueError: layers, epsilon or a combination that means nothing; names the field.
    """

    base: BaseModel
    layers: tuple[int, ...]
    """Layers that it reads, ascending."""
    trained_on: Literal["hidden", "logits"] = HIDDEN
    """logits: it was trained on the base's logits; its weights are W_logit U with U the LM head, on layer L."""
    gate: bool = True
    """False: all gates are the same, a plain mean; row 0 is zero."""
    normalisation: Literal["none", "rms"] = "none"
    """rms: every state is divided by its own sqrt(mean square + epsilon) first."""
    epsilon: float = 1e-6
    """Of the normalisation; the base's rms_norm_eps for heads of the released code's --apply_norm."""
    last_token: Literal["excluded", "included"] = "excluded"
    """Whether a response's last token counts; see the module."""
    prompt_format: str
    """`fingerprint.prompt_fingerprint` of the prompts that it was trained on."""
    training: dict[str, float | int | str] = field(default_factory=dict)
    """How it was trained and what came out, for people; not compared."""

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
        last, layers = self.base.num_layers, self.layers
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must be ascending, each once, at least one; got {list(layers)}")
        if layers[0] < 0 or layers[-1] > last:
            raise ValueError(
                f"layers must be within 0 (the embedding) and {last} (after the final norm) of {self.base.name}; "
                f"got {list(layers)}"
            )
        if self.trained_on == LOGITS and (layers != (last,) or self.normalisation != "none"):
            raise ValueError(
                f"trained_on logits means layer {last} without normalisation; got layers {list(layers)} and "
                f"normalisation {self.normalisation}"
            )
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a finite number of at least 0, got {self.epsilon}")
        absent = [name for name, own in self.training.items() if isinstance(own, float) and not math.isfinite(own)]
        if absent:
            raise ValueError(f"training.{absent[0]} is {self.training[absent[0]]}; leave out figures that do not exist")

    @property
    def features(self) -> int:
        """F, inputs of the linear layer."""
        return len(self.layers) * self.base.hidden_size

    @property
    def parameter_count(self) -> int:
        """Numbers in the head as it is served: 2 F + 2, or F + 1 without a gate."""
        return (2 if self.gate else 1) * (self.features + 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardHead:
    """Gate and reward of every token, linear in its states.

    Raises:
        ValueError: shapes or types do not fit the config, or a number is not finite; names `source`.
    """

    config: HeadConfig
    weight: torch.Tensor
    """[layers, 2, hidden] float32: a layer's rows are gate and reward."""
    bias: torch.Tensor
    """[2] float32."""
    source: str = "reward head"
    """Where it comes from, for messages."""

    def __post_init__(self):
        expected = (len(self.config.layers), 2, self.config.base.hidden_size)
        for name, tensor, shape in (("weight", self.weight, expected), ("bias", self.bias, (2,))):
            if tensor.shape != shape or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{self.source}: {name} must be float32 of shape {list(shape)} for layers "
                    f"{list(self.config.layers)}, got {list(tensor.shape)} of {tensor.dtype}"
                )
            if not tensor.isfinite().all():
                raise ValueError(f"{self.source}: {name} has values that are not finite; train the head again")
        if not self.config.gate and (self.weight[:, 0].any() or self.bias[0] != 0):
            raise ValueError(f"{self.source}: without a gate, row 0 of weight and bias must be zero")

    @property
    def layers(self) -> tuple[int, ...]:
        return self.config.layers

    def to(self, device: torch.device | str) -> "RewardHead":
        """The same head with its tensors on `device`."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))


def check_fits(head: RewardHead, base: BaseModel, prompt_format: str | None = None, *, weights: bool = True) -> None:
    """Refuse a head that was not made for this model and these prompts.

    Args:
        base: the model that is to be scored with.
        prompt_format: `prompt_fingerprint` of the prompts; None where there are none yet.
        weights: whether the weights must be those that the head was trained on. False where they are known to have
            moved on, as a policy's in training.

    Raises:
        ValueError: one sentence for each thing that does not fit.
    """
    found = _mismatches(head, base, prompt_format, weights)
    if found:
        raise ValueError("; ".join(found))


def _mismatches(head: RewardHead, base: BaseModel, prompt_format: str | None, weights: bool) -> list[str]:
    where, own = head.source, head.config.base
    found = [
        f"{where} is for a model with {name} {getattr(own, name)} ({own.name}), and {base.name} has "
        f"{getattr(base, name)}; name a head that was trained for {base.name}"
        for name in ("num_layers", "hidden_size", "vocab_size")
        if getattr(own, name) != getattr(base, name)
    ]
    if found:
        return found
    if weights and own.dtype != base.dtype:
        found.append(
            f"{where} was trained on states in {own.dtype}, and {base.name} runs in {base.dtype}; "
            f"set model.dtype to {own.dtype}, or train a head in {base.dtype}"
        )
    elif weights and own.fingerprint != base.fingerprint:
        found.append(
            f"{where} was trained on other weights ({own.name}, {_short(own.fingerprint)}) than those of {base.name} "
            f"({_short(base.fingerprint)}); name the model it was trained on, or train it again for this one"
        )
    if prompt_format is not None and prompt_format != head.config.prompt_format:
        found.append(
            f"{where} was trained on prompts of another form ({_short(head.config.prompt_format)}, these are "
            f"{_short(prompt_format)}); set data.chat_template, data.prompt_template, data.system_prompt and "
            "data.generation_prefix as they were then, or train it again"
        )
    return found


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "unknown"
