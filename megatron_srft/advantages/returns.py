"""Discounted returns of the tokens of a response, one discount per reward (arXiv 2502.03373, section 4.6), and what a
critic's values make of them."""

import numpy as np
import torch

from megatron_srft.config import KlConfig, RewardConfig
from megatron_srft.ops.divergence import divergence
from megatron_srft.sample import Score, TrainingSequence


def discounted(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = sum over l >= 0 of gamma^l r_{t + l}, float64; after pass k every sum has its first 2^k terms."""
    returns, reach = rewards.astype(np.float64), 1
    while reach < len(returns):
        returns[:-reach] += gamma**reach * returns[reach:]
        reach *= 2
    return returns


def token_returns(score: Score, length: int, streams: dict[str, RewardConfig]) -> np.ndarray:
    """[length] returns of one response, every stream discounted by its own gamma and weighted.

    A response without tokens has one return, its reward.
    """
    by_gamma: dict[float, np.ndarray] = {}
    for name, total in score.streams.items():
        config = streams[name]
        rewards = by_gamma.setdefault(config.gamma, np.zeros(max(length, 1)))
        if length and name in score.dense:
            assert len(score.dense[name]) == length, f"{name} has {len(score.dense[name])} values for {length} tokens"
            rewards += config.weight * np.array(score.dense[name])
        else:
            rewards[-1] += config.weight * total
    return sum(discounted(rewards, gamma) for gamma, rewards in by_gamma.items())


def divergence_returns(sequence: TrainingSequence, kl: KlConfig) -> np.ndarray:
    """[response] discounted returns of paying kl.coefficient times the divergence from the reference at every token."""
    assert sequence.policy_logprobs is not None and sequence.reference_logprobs is not None, "measure them first"
    policy, reference = (
        torch.from_numpy(np.asarray(logprobs, np.float64))
        for logprobs in (sequence.policy_logprobs, sequence.reference_logprobs)
    )
    return discounted(-kl.coefficient * divergence(policy, reference, kl.estimator).numpy(), kl.gamma)


def generalised_advantages(returns: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """GAE (arXiv 1506.02438): A_t = sum over l >= 0 of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    With the value 0 behind the last token, r_t = G_t - gamma G_{t+1} gives delta_t = e_t - gamma e_{t+1}, where
    e_t = G_t - V_t. For lam = 1 the sum is e_t, whatever the discounts in G_t are.

    Args:
        returns: [response] G_t, discounted by gamma alone unless lam is 1.
        values: [response] V_t, before token t.
    """
    errors = np.asarray(returns, np.float64) - values
    if lam == 1:
        return errors
    return discounted(errors - gamma * np.append(errors[1:], 0.0), gamma * lam)
