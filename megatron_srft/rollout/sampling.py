"""Next-token sampling by inverse CDF, with one uniform number per token.

A token is the first one whose cumulative probability exceeds u. The uniforms of a completion come from a stream keyed
by (seed, step, prompt id, sample number), so a completion is the same whichever rank samples it, in whichever batch,
up to rounding of the logits.
"""

import hashlib

import numpy as np
import torch

from megatron_srft.config import SamplingConfig

UNIFORM_LEVELS = 2**23
"""u is a multiple of 2^-23: with 24 bits u * total can round up to total in float32, which lies behind every token."""


def uniforms(seed: int, step: int, prompt_id: str, sample: int, count: int) -> np.ndarray:
    """[count] float32 in [0, 1): the stream of one completion; a longer count extends the same stream."""
    key = hashlib.blake2b(f"{seed}/{step}/{sample}/{prompt_id}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    levels = generator.integers(0, UNIFORM_LEVELS, size=count, dtype=np.int64)
    return (levels / UNIFORM_LEVELS).astype(np.float32)


def sample(logits: torch.Tensor, uniform: torch.Tensor, config: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick one token per row.

    Args:
        logits: [rows, vocabulary], any float type.
        uniform: [rows] float32 in [0, 1); unused when greedy.

    Returns:
        tokens [rows] int64, and their log-probs [rows] float32 under softmax(logits / temperature), before top-k and
        top-p. Greedy (temperature 0) picks the largest logit and reports log-probs at temperature 1.
    """
    scaled = logits.float()
    if config.temperature not in (0, 1):
        scaled = scaled / config.temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    if config.temperature == 0:
        tokens = logprobs.argmax(dim=-1)
    elif config.top_k or config.top_p < 1:
        tokens = _pick_truncated(logprobs, uniform, config.top_k, config.top_p)
    else:
        tokens = _invert(logprobs.exp(), uniform)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _invert(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index of the first column whose cumulative sum exceeds uniform * total; a zero column is never picked."""
    cumulative = probabilities.cumsum(dim=-1)
    if cumulative.is_cuda:
        cumulative = cumulative.cummax(dim=-1).values  # CUDA adds in blocks, so rounding can make a sum step back
    threshold = uniform[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return picked.clamp_(max=probabilities.shape[-1] - 1)  # NaN would point behind the last column


def _pick_truncated(logprobs: torch.Tensor, uniform: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Sample among the top_k likeliest tokens, then among the fewest of them that hold top_p of their probability."""
    if top_k:
        candidates, token = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1)
    else:
        candidates, token = logprobs.sort(dim=-1, descending=True, stable=True)
    probabilities = candidates.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The likeliest token stays whatever top_p is: nothing comes before it.
    kept = torch.where(before < top_p, probabilities, 0.0)
    return token.gather(-1, _invert(kept, uniform)[:, None])[:, 0]
