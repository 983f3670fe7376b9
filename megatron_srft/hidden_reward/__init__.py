"""A reward read off the policy's own hidden states: SWIFT (arXiv 2505.12225).

head         what a head is, what it fits, and the convention of layers and tokens
folder       a head on disk: safetensors and JSON, whole or not at all
published    heads of the paper's released code; heads trained on logits
pooling      from states to scores: one layer's share, the tokens of a response that count
fingerprint  a model's weights, a prompt's form and a head as one hash each
losses       bce, hinge, pairwise, infonca, nca
quality      AUROC within questions and overall, calibration
states       what one rank holds of the states that a head is trained on
parametrisation, standardise, parts, descent, fit     training
"""

from megatron_srft.hidden_reward.fingerprint import (
    WeightsWatch,
    head_fingerprint,
    prompt_fingerprint,
    weights_fingerprint,
)
from megatron_srft.hidden_reward.folder import load_head, save_head
from megatron_srft.hidden_reward.head import BaseModel, HeadConfig, RewardHead, check_fits
from megatron_srft.hidden_reward.pooling import add_layer, scored_sequences
from megatron_srft.hidden_reward.published import fold_logits, from_published, read_published

__all__ = [
    "BaseModel",
    "HeadConfig",
    "RewardHead",
    "WeightsWatch",
    "add_layer",
    "check_fits",
    "fold_logits",
    "from_published",
    "head_fingerprint",
    "load_head",
    "prompt_fingerprint",
    "read_published",
    "save_head",
    "scored_sequences",
    "weights_fingerprint",
]
