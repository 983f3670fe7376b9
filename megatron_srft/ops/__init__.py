"""Numerical kernels: token log-prob and entropy, policy losses, gated pooling; in plain torch, C++/CUDA and Triton.

`implementations` says which of them an installation has. Importing this package declares all ops.
"""

from megatron_srft.ops import (
    clipped_ratio,
    gated_pooling,
    linear_kl,
    linear_token_logprob,
    softmax_statistics,
    token_logprob,
)

__all__ = [
    "clipped_ratio",
    "gated_pooling",
    "linear_kl",
    "linear_token_logprob",
    "softmax_statistics",
    "token_logprob",
]
