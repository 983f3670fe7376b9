"""Heads as the paper's released code writes them, and heads trained on logits.

The released code concatenates the states of the kept layers, x_t of F = layers x hidden numbers, and has one linear
layer: `fused_layer.weight` [2, F] (row 0 the gate, row 1 the reward) and `fused_layer.bias` [2], or without a gate
`reward_layer.weight` [1, F] and `reward_layer.bias` [1]. The file is a pickled state dict and says nothing about
layers, model, prompts or switches: whoever converts it has to.

Its --apply_norm sends every state, the last one once more, through the base's final norm, y = w h / rms(h). Divided by
the root mean square (normalisation "rms") the rest of it is a factor of each column, and goes into W.

A head on logits z = U h is the head W_logit U on the last layer's h: the same scores, in 2 products of `hidden` numbers
instead of `vocabulary`. Not the same training: the geometry of the two differs.
"""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_srft.hidden_reward.head import LOGITS, BaseModel, HeadConfig, RewardHead

GATED, UNGATED = "fused_layer", "reward_layer"


def read_published(file: Path | str) -> dict[str, torch.Tensor]:
    """The state dict in a file of the released code. A file that would run code when read is refused.

    Raises:
        ValueError: it holds anything but named tensors, or is damaged; names the file.
        OSError: it cannot be read.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is not a state dict of plain tensors that is safe to read ({reason})") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict; a head of the released code has {GATED}.weight and .bias")
    return dict(state)


def from_published(
    state: Mapping[str, torch.Tensor],
    base: BaseModel,
    layers: Sequence[int] | None = None,
    *,
    prompt_format: str,
    last_token: str = "included",
    final_norm: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    lm_head: torch.Tensor | None = None,
    source: str = "published head",
) -> RewardHead:
    """A head of the released code as one of ours.

    Args:
        state: what `read_published` found.
        layers: as given to its --layers, in that order; None: all L + 1.
        last_token: its code includes the last token.
        final_norm: [hidden] weight of the base's final norm, if trained with --apply_norm; `epsilon` is that norm's.
        lm_head: [vocabulary, hidden] of the base, if trained with --logits_mode.

    Raises:
        ValueError: names or sizes are not those of a head for this base and these layers, a layer is named twice or
            does not exist, or a number is not finite.
    """
    weight, bias, gate = _linear(state, source)
    common = dict(base=base, gate=gate, last_token=last_token, prompt_format=prompt_format)
    if lm_head is not None:
        return fold_logits(
            weight, bias, lm_head, HeadConfig(layers=(base.num_layers,), trained_on=LOGITS, **common), source
        )
    order = list(range(base.num_layers + 1)) if layers is None else list(layers)
    width = len(order) * base.hidden_size
    if weight.shape[1] != width:
        raise ValueError(
            f"{source}: the linear layer has {weight.shape[1]} inputs, and {len(order)} layers of {base.name}'s "
            f"{base.hidden_size} channels are {width}; name the layers and the base that it was trained with"
        )
    # Trained with --layers in any order; ours are ascending. Twins would be one layer with two weights.
    ascending = sorted(range(len(order)), key=order.__getitem__)
    normalisation = "none" if final_norm is None else "rms"
    config = HeadConfig(
        layers=tuple(order[place] for place in ascending), normalisation=normalisation, epsilon=epsilon, **common
    )
    by_layer = weight.reshape(2, len(order), base.hidden_size).transpose(0, 1)[ascending]
    if final_norm is not None:
        by_layer = by_layer * final_norm.to(by_layer)
    return RewardHead(config=config, weight=by_layer.float().contiguous(), bias=bias.float(), source=source)


def fold_logits(
    weight: torch.Tensor, bias: torch.Tensor, lm_head: torch.Tensor, config: HeadConfig, source: str = "logits head"
) -> RewardHead:
    """The head on the last layer's states that scores as [2, vocabulary] weights on the logits do.

    Raises:
        ValueError: weights and LM head are not those of one vocabulary.
    """
    expected = (config.base.vocab_size, config.base.hidden_size)
    if lm_head.shape != expected or weight.shape != (2, expected[0]):
        raise ValueError(
            f"{source}: weights on logits are {list(weight.shape)} and the LM head {list(lm_head.shape)}; for "
            f"{config.base.name} they must be [2, {expected[0]}] and {list(expected)}"
        )
    folded = (weight.double() @ lm_head.double()).float()
    config = replace(config, trained_on=LOGITS)
    return RewardHead(config=config, weight=folded[None], bias=bias.float(), source=source)


def _linear(state: Mapping[str, torch.Tensor], source: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """([2, F] weight, [2] bias, whether there is a gate) in float64."""
    for name, rows in ((GATED, 2), (UNGATED, 1)):
        if set(state) != {f"{name}.weight", f"{name}.bias"}:
            continue
        weight, bias = state[f"{name}.weight"].double(), state[f"{name}.bias"].double()
        if weight.dim() != 2 or weight.shape[0] != rows or bias.shape != (rows,):
            raise ValueError(
                f"{source}: {name}.weight must be [{rows}, inputs] and {name}.bias [{rows}], "
                f"got {list(weight.shape)} and {list(bias.shape)}"
            )
        closed = (weight.new_zeros(2 - rows, weight.shape[1]), bias.new_zeros(2 - rows))
        return torch.cat((closed[0], weight)), torch.cat((closed[1], bias)), rows == 2
    raise ValueError(
        f"{source}: expected {GATED}.weight and {GATED}.bias, or {UNGATED}.weight and {UNGATED}.bias without a gate; "
        f"got {', '.join(sorted(state)) or 'nothing'}"
    )
