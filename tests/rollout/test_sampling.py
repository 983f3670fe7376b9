"""Draws against the distribution they come from, computed in float64 by another way."""

import numpy as np
import pytest
import torch

from megatron_srft.config import SamplingConfig
from megatron_srft.rollout.sampling import sample, uniforms

DRAWS = 20_000
CRITICAL = {11: 31.26, 3: 16.27, 4: 18.47}
"""Upper 0.1 % point of chi-square by degrees of freedom."""

LOGITS = np.array([0.3, -1.2, 2.0, 0.0, 1.1, -0.4, 0.9, -2.5, 1.7, 0.2, -0.8, 0.5])


def expected(temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Probabilities after temperature, top-k and top-p, token by token from the likeliest down."""
    full = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    order = sorted(range(len(full)), key=lambda i: -full[i])[: top_k or None]
    within = full[order].sum()
    kept, held = np.zeros_like(full), 0.0
    for i in order:
        if held >= top_p:
            break
        kept[i] = full[i]
        held += full[i] / within
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("options", "freedom"),
    [
        (dict(temperature=0.7), 11),
        (dict(temperature=1.0, top_k=4), 3),
        (dict(temperature=1.0, top_p=0.75), 4),
        (dict(temperature=1.3, top_k=6, top_p=0.9), 4),
    ],
)
def test_draws_follow_the_distribution(options, freedom):
    logits = torch.tensor(LOGITS, dtype=torch.float32).expand(DRAWS, -1)
    draws = torch.from_numpy(uniforms(0, 0, "chi-square", 0, DRAWS))
    tokens, logprobs = sample(logits, draws, SamplingConfig(**options))
    probabilities = expected(**options)
    counts = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    inside = probabilities > 0
    assert inside.sum() == freedom + 1
    assert counts[~inside].sum() == 0
    chi_square = ((counts - DRAWS * probabilities)[inside] ** 2 / (DRAWS * probabilities[inside])).sum()
    assert chi_square < CRITICAL[freedom]
    untruncated = np.log(expected(options["temperature"]))
    np.testing.assert_allclose(logprobs.numpy(), untruncated[tokens.numpy()], atol=1e-6)


def test_greedy_takes_the_largest_logit_and_reports_temperature_one():
    tokens, logprobs = sample(torch.tensor(LOGITS)[None], torch.zeros(1), SamplingConfig(temperature=0.0))
    assert tokens.tolist() == [2]
    np.testing.assert_allclose(logprobs.numpy(), np.log(expected(1.0))[[2]], atol=1e-6)


@pytest.mark.parametrize("options", [dict(), dict(top_k=3), dict(top_p=0.999999)])
def test_impossible_tokens_are_never_drawn(options):
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(2, -1)
    lowest_and_highest = torch.tensor([0.0, 1 - 2.0**-23])
    tokens, _ = sample(logits, lowest_and_highest, SamplingConfig(**options))
    assert sorted(tokens.tolist()) == [1, 3]


def test_the_highest_uniform_stays_inside_a_large_vocabulary():
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample(logits, torch.full((64,), 1 - 2.0**-23), SamplingConfig())
    assert tokens.max() < 50_000


def test_streams_are_functions_of_their_key():
    stream = uniforms(1, 2, "train/3", 4, 16)
    np.testing.assert_array_equal(stream[:5], uniforms(1, 2, "train/3", 4, 5))
    others = [(0, 2, "train/3", 4), (1, 3, "train/3", 4), (1, 2, "train/4", 4), (1, 2, "train/3", 5)]
    assert all(not np.array_equal(stream, uniforms(*key, 16)) for key in others)
    many = np.concatenate([uniforms(0, 0, str(i), 0, 1) for i in range(4000)])
    assert abs(many.mean() - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    assert many.min() >= 0
    assert many.max() < 1
