"""What is kept of a problem's samples, by hand."""

import pytest

from megatron_srft.curation.selection import Selection, select
from megatron_srft.curation.sources import CurationError, Sample, failed
from megatron_srft.sample import Score

RIGHT, WRONG, NO_VERDICT = Score(reward=1, correct=True), Score(reward=0, correct=False), Score(reward=0, correct=None)


def right(text, tokens):
    return Sample(text=text, finish_reason="stop", tokens=tokens), RIGHT


PAIRS = [
    right("aaaa", 4),
    (Sample(text="no", finish_reason="stop", tokens=2), WRONG),
    right("aaaaaa", 6),
    (Sample(text="aaa", finish_reason="length", tokens=8), None),
    right("aa", 2),
    (Sample(text="?", finish_reason="stop", tokens=1), NO_VERDICT),
    right("aaaa", 4),
    right("bb", 2),
    (failed("a reason"), None),
    (Sample(text="a", finish_reason="other", tokens=1), None),
]


@pytest.mark.parametrize(
    ("rule", "texts", "counts"),
    [
        (dict(), ["aaaa", "aaaaaa", "aa", "bb"], dict(repeated=1)),
        (dict(keep="first"), ["aaaa"], dict(repeated=1, surplus=3)),
        (dict(keep="shortest"), ["aa"], dict(repeated=1, surplus=3)),
        (dict(keep="longest"), ["aaaaaa"], dict(repeated=1, surplus=3)),
        (dict(count=3), ["aaaa", "aaaaaa", "aa"], dict(repeated=1, surplus=1)),
        (dict(keep="shortest", count=3), ["aaaa", "aa", "bb"], dict(repeated=1, surplus=1)),
        (dict(keep="longest", count=2), ["aaaa", "aaaaaa"], dict(repeated=1, surplus=2)),
        (dict(min_tokens=3), ["aaaa", "aaaaaa"], dict(repeated=1, too_short=2)),
        (dict(max_tokens=4), ["aaaa", "aa", "bb"], dict(repeated=1, too_long=1)),
        (dict(min_tokens=3, max_tokens=5), ["aaaa"], dict(repeated=1, too_short=2, too_long=1)),
        (dict(min_tokens=7), [], dict(too_short=5, prompts_without_any=1)),
    ],
)
def test_rules(rule, texts, counts):
    kept, found = select(*zip(*PAIRS, strict=True), Selection(**rule))
    assert [sample.text for sample in kept] == texts
    fates = dict(failed=1, truncated=1, unfinished=1, unverified=1, wrong=1, correct=5)
    expected = dict(prompts=1, samples=10, kept=len(texts)) | fates | counts
    assert {name: n for name, n in found.items() if n} == {name: n for name, n in expected.items() if n}
    assert found["samples"] == sum(found[name] for name in fates)
    losses = ("repeated", "too_short", "too_long", "surplus", "kept")
    assert found["correct"] == sum(found[name] for name in losses)


def test_lengths_that_nobody_knows_cannot_be_compared():
    with pytest.raises(CurationError, match="usage.completion_tokens"):
        select([Sample(text="a", finish_reason="stop")], [RIGHT], Selection(keep="longest"))
    assert len(select([Sample(text="a", finish_reason="stop")], [RIGHT], Selection())[0]) == 1
