"""Length and repetition rewards against TRL 1.16.0, whose figures stand here (TRL is no dependency of the tests).

Where the definitions differ: TRL's cosine stays at the value of the limit beyond it, and ours is `exceeded` there, like
the paper; TRL has no exceed margin, no penalty per token, and calls its bounds by value, not by length.
"""

import pytest

from megatron_srft.config import CosineRewardConfig, OverlongRewardConfig
from megatron_srft.rewards.lengths import cosine, overlong
from megatron_srft.rewards.repetition import share

COSINE = CosineRewardConfig(
    correct_at_zero=1.0, correct_at_limit=0.25, wrong_at_zero=-2.0, wrong_at_limit=-0.5, max_tokens=100
)


@pytest.mark.parametrize(
    ("length", "right", "wrong"),
    [
        (0, 1.0, -2.0),
        (25, 0.8901650429449552, -1.7803300858899105),
        (60, 0.5091186271093948, -1.0182372542187896),
        (99, 0.2501850398628507, -0.5003700797257014),
    ],
)
def test_cosine(length, right, wrong):
    """get_cosine_scaled_reward(100, -2.0, -0.5, 0.25, 1.0) of a right and a wrong boxed answer."""
    found = [cosine(length, verdict, False, COSINE) for verdict in (True, False)]
    assert found == pytest.approx([right, wrong], rel=1e-12)


@pytest.mark.parametrize(("length", "expected"), [(12, 0.0), (13, -0.125), (17, -0.625), (20, -1.0), (21, -1.0)])
def test_overlong(length, expected):
    """get_soft_overlong_punishment(20, 8)."""
    assert overlong(length, False, OverlongRewardConfig(max_tokens=20, buffer_tokens=8)) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([1, 2, 3, 1, 2, 3, 1, 2], -0.25), ([4, 4, 4, 4, 4], -0.33333333333333337), ([1, 2], 0.0)],
)
def test_repetition(tokens, expected):
    """get_repetition_penalty_reward(3, -0.5)."""
    assert -0.5 * share(tokens, 3) == pytest.approx(expected, rel=1e-12)
