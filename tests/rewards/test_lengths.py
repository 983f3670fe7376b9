"""Length rewards against values worked by hand, and the identities of their curves."""

import math

import pytest

from megatron_srft.config import ConfigError, CosineRewardConfig, LengthRewardConfig, OverlongRewardConfig
from megatron_srft.rewards.lengths import cosine, linear, overlong

PAPER = CosineRewardConfig(max_tokens=14336)
HALF_ROOT = math.sqrt(2) / 2


@pytest.mark.parametrize(
    ("length", "correct", "expected"),
    [
        (0, True, 2.0),
        (0, False, -10.0),
        (3584, True, 1 + 0.5 * (1 + HALF_ROOT)),  # a quarter: cos(pi / 4)
        (3584, False, -5 * (1 + HALF_ROOT)),
        (7168, True, 1.5),
        (7168, False, -5.0),
        (10752, True, 1 + 0.5 * (1 - HALF_ROOT)),
        (10752, False, -5 * (1 - HALF_ROOT)),
        (14335, True, 1 + (math.pi / 14336) ** 2 / 4),  # cos(pi - x) = -1 + x^2 / 2
        (14335, False, -10 * (math.pi / 14336) ** 2 / 4),
        (14336, True, -10.0),
        (14336, False, -10.0),
        (28672, True, -10.0),  # where a cosine without a clamp is at its start again
    ],
)
def test_the_papers_constants_by_hand(length, correct, expected):
    assert cosine(length, correct, False, PAPER) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_constants_are_the_papers():
    values = ("correct_at_zero", "correct_at_limit", "wrong_at_zero", "wrong_at_limit", "exceeded", "exceed_margin")
    assert [getattr(CosineRewardConfig(), name) for name in values] == [2, 1, -10, 0, -10, 0]


@pytest.mark.parametrize("correct", [True, False])
def test_a_cut_response_has_exceeded_whatever_its_length_and_verdict(correct):
    assert cosine(5, correct, True, PAPER) == -10.0


def test_the_released_codes_margin():
    config = CosineRewardConfig(max_tokens=14336, exceed_margin=16, exceeded=-3.0)
    assert cosine(14319, True, False, config) == pytest.approx(1, abs=1e-5)
    assert cosine(14320, True, False, config) == -3.0


ODD = CosineRewardConfig(
    correct_at_zero=0.3, correct_at_limit=7.0, wrong_at_zero=-0.25, wrong_at_limit=-4.0, exceeded=-1, max_tokens=101
)


@pytest.mark.parametrize(("correct", "ends"), [(True, (0.3, 7.0)), (False, (-0.25, -4.0))])
def test_cosine_identities(correct, ends):
    """Point symmetry about the middle, and monotone from one end to the other."""
    values = [cosine(length, correct, False, ODD) for length in range(101)]
    assert values[0] == ends[0]
    for length in range(1, 101):
        assert values[length] + values[101 - length] == pytest.approx(sum(ends), rel=1e-14)
    steps = [math.copysign(1, b - a) for a, b in zip(values, values[1:], strict=False)]
    assert set(steps) == {math.copysign(1, ends[1] - ends[0])}
    assert all(min(ends) <= value <= max(ends) for value in values)


def test_equal_ends_are_a_plain_reward():
    flat = CosineRewardConfig(correct_at_zero=1, correct_at_limit=1, wrong_at_zero=0, wrong_at_limit=0, max_tokens=9)
    assert [cosine(n, n % 2 == 0, False, flat) for n in range(9)] == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_dapos_soft_overlong_punishment():
    """Eq. 13 with the paper's 16384 + 4096 tokens."""
    config = OverlongRewardConfig(max_tokens=20480)
    expected = {0: 0, 16384: 0, 16385: -1 / 4096, 17408: -0.25, 18432: -0.5, 20479: -4095 / 4096, 20480: -1, 30000: -1}
    assert {length: overlong(length, False, config) for length in expected} == expected
    assert math.copysign(1, overlong(0, False, config)) == 1  # no negative zero in the logs
    assert overlong(7, True, config) == -1


def test_a_straight_line():
    config = LengthRewardConfig(at_zero=0.5, at_limit=-1.5, max_tokens=8)
    assert [linear(n, False, config) for n in (0, 2, 4, 8, 9)] == [0.5, 0.0, -0.5, -1.5, -1.5]
    assert linear(2, True, config) == -1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CosineRewardConfig(wrong_at_zero=0.1),
            "wrong_at_zero of a cosine reward must not be above 0, got 0.1",
        ),
        (lambda: CosineRewardConfig(wrong_at_limit=1), "wrong_at_limit of a cosine reward must not be above 0, got 1"),
        (lambda: CosineRewardConfig(max_tokens=0), "max_tokens of a cosine reward must be at least 1, not 0"),
        (lambda: CosineRewardConfig(max_tokens=16, exceed_margin=16), "below its limit of 16 tokens, not 16"),
        (lambda: CosineRewardConfig(exceed_margin=-1), "exceed_margin of a cosine reward must be at least 0"),
        (lambda: CosineRewardConfig(exceeded=math.nan), "exceeded of a cosine reward must be a finite number, not nan"),
        (lambda: CosineRewardConfig(weight=math.inf), "weight of a cosine reward must be a finite number, not inf"),
        (lambda: CosineRewardConfig(gamma=1.01), r"gamma of a cosine reward must lie in \[0, 1\], not 1.01"),
        (lambda: CosineRewardConfig(gamma=math.nan), r"gamma of a cosine reward must lie in \[0, 1\], not nan"),
        (lambda: LengthRewardConfig(max_tokens=-3), "max_tokens of a length reward must be at least 1, not -3"),
        (lambda: LengthRewardConfig(at_limit=math.inf), "at_limit of a length reward must be a finite number"),
        (lambda: OverlongRewardConfig(buffer_tokens=0), "buffer_tokens of an overlong reward must be at least 1"),
        (lambda: OverlongRewardConfig(max_tokens=100), "at most its limit of 100 tokens, not 4096"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
