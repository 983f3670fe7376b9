"""Counts of reflection keywords against counts by hand."""

import pytest

from megatron_srft.metrics.reflection import KEYWORDS, count_keywords, keyword_rates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wait, wait! WAIT", {"wait": 3}),
        ("await waiting waits wait_a wait", {"wait": 1}),
        ("recheck. Retry?", {"recheck": 1, "retry": 1}),
        ("Alternatively, x; alternative; alternatively", {"alternatively": 2}),
        ("However\nhowever2 (however)", {"however": 2}),
        ("waitwait wait-wait", {"wait": 2}),
        ("", {}),
    ],
)
def test_whole_words_in_any_case(text, expected):
    counts = count_keywords(text)
    assert {word: n for word, n in counts.items() if n} == expected
    assert set(counts) == set(KEYWORDS)


def test_rates_per_response_and_per_thousand_tokens():
    rates = keyword_rates(["Wait, no. Wait.", "However it is 7.", "7"], tokens=40)
    assert rates == {
        "reflection/wait": pytest.approx(2 / 3), "reflection/however": pytest.approx(1 / 3), "reflection/retry": 0,
        "reflection/recheck": 0, "reflection/alternatively": 0, "reflection/per_1k_tokens": 75.0,
    }  # fmt: skip
    assert keyword_rates([], tokens=0) == {}
    assert keyword_rates([""], tokens=0)["reflection/per_1k_tokens"] == 0
