"""Rewards of a response's length, in tokens of the response with its end token.

With L tokens, the limit L_max, and T = min(L, L_max):

    cosine    rL + (r0 - rL) (1 + cos(pi T / L_max)) / 2,   r0, rL by the verdict        L + margin < L_max
              r_e                                                                        otherwise, and when cut
    length    at_zero + (at_limit - at_zero) T / L_max
    overlong  0 up to L_max - L_cache, then ((L_max - L_cache) - T) / L_cache, down to -1 at L_max

cosine: "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv 2502.03373), section 4.2 and appendix C.1. As
printed there, CosFn(t, T, eta_min, eta_max) = eta_min + (eta_max - eta_min) (1 + cos(pi t / T)) / 2 is called with the
value at length 0 as eta_min, which would exchange the two ends; the text, its tables and the released code mean the
formula above. overlong: DAPO (arXiv 2503.14476), eq. 13. A response cut at the engine's limit counts as one of L_max.
"""

import math

from megatron_srft.config import CosineRewardConfig, LengthRewardConfig, OverlongRewardConfig


def cosine(length: int, correct: bool, truncated: bool, config: CosineRewardConfig) -> float:
    """The cosine reward of a response of `length` tokens; what exceeds the limit is not asked whether it is right."""
    if truncated or length + config.exceed_margin >= config.max_tokens:
        return config.exceeded
    at_zero = config.correct_at_zero if correct else config.wrong_at_zero
    at_limit = config.correct_at_limit if correct else config.wrong_at_limit
    bend = math.cos(math.pi * length / config.max_tokens)
    return (at_zero * (1 + bend) + at_limit * (1 - bend)) / 2  # exactly at_zero at 0, never outside the two


def linear(length: int, truncated: bool, config: LengthRewardConfig) -> float:
    """A straight line from at_zero to at_limit, level beyond."""
    progress = 1.0 if truncated else min(1.0, length / config.max_tokens)
    return config.at_zero + (config.at_limit - config.at_zero) * progress


def overlong(length: int, truncated: bool, config: OverlongRewardConfig) -> float:
    """DAPO's soft overlong punishment, from 0 down to -1."""
    over = config.buffer_tokens if truncated else length - (config.max_tokens - config.buffer_tokens)
    return -min(max(over, 0), config.buffer_tokens) / config.buffer_tokens
