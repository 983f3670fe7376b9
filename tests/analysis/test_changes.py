"""Probability change, clipped tokens, distances and entropies: numbers by hand on hand-made statistics."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_srft.analysis import clipped, entropies, output, probabilities, probability_page, trajectory
from megatron_srft.config import ConfigError
from megatron_srft.sample import TrainingSequence
from megatron_srft.trainer.step import SequenceStats


def text(tokens: list[int], advantage: float = 1.0) -> TrainingSequence:
    """A prompt of one token, and these response tokens."""
    return TrainingSequence(
        token_ids=np.array([99, *tokens], np.int32),
        prompt_length=1,
        is_demonstration=True,
        advantages=np.full(len(tokens), advantage, np.float32),
        correct=False,
        group=0,
    )


def stats(values: list[float], entropy: float = 0.0) -> SequenceStats:
    """Of these probabilities."""
    return SequenceStats(
        logprobs=np.log(np.array(values)).astype(np.float32), entropy=np.full(len(values), entropy, np.float32)
    )


TEXTS = [text([5, 6, 7]), text([5, 8])]
BEFORE = [stats([0.5, 0.2, 0.9]), stats([0.3, 0.4])]
AFTER = [stats([0.9, 0.2, 0.85]), stats([0.2, 0.1])]
"""Changes: 0.4, 0, -0.05 and -0.1, -0.3."""


@pytest.fixture
def change():
    return probabilities.change(TEXTS, BEFORE, AFTER)


def test_changes_and_shares_are_those_computed_by_hand(change):
    np.testing.assert_allclose(change.all, [0.4, 0.0, -0.05, -0.1, -0.3], atol=1e-6)
    part = probabilities.shares(change.all, -0.2, 0.3)
    assert (part.lower, part.higher, part.changed) == (0.2, 0.2, 0.4)
    assert probabilities.shares(change.all, -0.01, 0.01).changed == pytest.approx(0.8)
    assert probabilities.shares(change.all, -1, 1) == probabilities.Shares(lower=0.0, similar=1.0, higher=0.0)


def test_tokens_are_listed_from_the_most_lowered_to_the_most_raised(change):
    rows = probabilities.token_changes(change, -0.2, 0.2)
    assert [row.token for row in rows] == [8, 7, 6, 5]
    assert [row.count for row in rows] == [1, 1, 1, 2]
    assert rows[-1].mean == pytest.approx(0.15) and (rows[-1].lower, rows[-1].higher) == (0.0, 0.5)
    assert rows[0].lower == 1.0


def test_the_histogram_has_every_token(change):
    edges, counts = probabilities.histogram(np.array([-1.0, -0.999, 0.001, 1.0]))
    assert (edges[0], edges[-1], sum(counts)) == (-1.0, 1.0, 4)
    assert (counts[0], counts[len(counts) // 2], counts[-1]) == (2, 1, 1)


@pytest.mark.parametrize("bounds", [(0.1, 0.2), (-0.1, -0.05), (-2.0, 0.1), (-0.1, float("nan"))])
def test_thresholds_that_cannot_be_are_refused(bounds):
    with pytest.raises(ConfigError, match="--lower"):
        probabilities.check_thresholds(*bounds)


def test_the_page_colours_what_is_beyond_the_thresholds_and_escapes_the_rest(change, tmp_path):
    words = {5: "<b>", 6: "six", 7: "\n", 8: "eight"}
    texts = [{"prompt": "<script>1</script>", "response": "r"}, {"prompt": "second prompt", "response": "r"}]
    options = dict(lower=-0.2, higher=0.3, show=1, min_count=2)
    parts = probability_page.sections(change, texts, words.get, **options)
    page, figures = output.write(tmp_path / "p.html", "t", "a", parts, probabilities.to_json(change, texts, -0.2, 0.3))
    html = page.read_text()
    assert "<script" not in html and "http" not in html and "second prompt" not in html
    spans = re.findall(r'<span class="token" title="([^"]*)"( style="[^"]*")?>([^<]*)</span>', html)
    assert [(title.split(" ")[-1], bool(style), shown) for title, style, shown in spans] == [
        ("(+0.4000)", True, "&lt;b&gt;"), ("(+0.0000)", False, "six"), ("(-0.0500)", False, "\n\N{OPEN BOX}"),
    ]  # fmt: skip
    assert "var(--good)" in spans[0][1]
    assert "40.00%" in html and "1 more texts are in the JSON file" in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    tree = json.loads(figures.read_text())
    assert tree["shares"]["changed"] == pytest.approx(0.4) and tree["shares_at"]["0.01"]["changed"] == pytest.approx(
        0.8
    )
    assert tree["texts"][1]["after"] == pytest.approx([0.2, 0.1], abs=1e-6)
    raised = html[html.index(">Raised<") : html.index(">Lowered<")]
    assert "<b>" not in raised and "+0.1500" in raised and "eight" not in raised  # min_count


def test_clipping_depends_on_the_sign_of_the_advantage():
    sequences = [text([5, 6, 7], 0.5), text([5, 6, 7], -2.0), text([5, 5], 0.0)]
    old = [stats([0.2, 0.2, 0.2])] * 2 + [stats([0.1, 0.1])]
    new = [stats([0.3, 0.25, 0.1])] * 2 + [stats([0.9, 0.9])]  # ratios 1.5, 1.25, 0.5; and 9, 9 without an advantage
    found = clipped.clipped_tokens(sequences, old, new, clip_low=0.2, clip_high=0.28)
    assert (found.tokens, found.without_advantage) == (6, 2)
    assert found.above == pytest.approx(1 / 6) and found.below == pytest.approx(1 / 6)
    rows = {row.token: row for row in found.by_token}
    assert (rows[5].count, rows[5].above, rows[5].below, rows[5].share) == (2, 1, 0, 0.5)
    assert (rows[7].count, rows[7].above, rows[7].below) == (2, 0, 1)
    assert (rows[6].above, rows[6].below, rows[6].mean_clipped_ratio) == (0, 0, None)
    assert rows[5].mean_ratio == pytest.approx(1.5, rel=1e-5)
    assert rows[7].mean_clipped_ratio == pytest.approx(0.5, rel=1e-5)
    assert found.by_token[-1].token == 6  # the least often clipped
    wider = clipped.clipped_tokens(sequences, old, new, clip_low=0.6, clip_high=0.2)
    assert (wider.above, wider.below) == (pytest.approx(2 / 6), 0.0)


def test_the_same_policy_clips_nothing_and_changes_nothing():
    found = clipped.clipped_tokens(TEXTS, BEFORE, BEFORE, 0.0, 0.0)
    assert (found.above, found.below, found.mean_ratio) == (0.0, 0.0, 1.0)
    assert not probabilities.change(TEXTS, BEFORE, BEFORE).all.any()


@pytest.mark.parametrize("sequences", [[text([5], 0.0)], []])
def test_without_an_advantage_nothing_could_be_clipped(sequences):
    with pytest.raises(ConfigError, match="no token has an advantage"):
        clipped.clipped_tokens(sequences, [stats([0.5])], [stats([0.5])], 0.2, 0.2)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (1.2, 0.2, "--clip-low must lie in [0, 1], not 1.2"),
        (0.2, -0.1, "--clip-high must be a number of at least 0, not -0.1"),
        (0.2, float("nan"), "--clip-high must be a number of at least 0, not nan"),
    ],
)
def test_impossible_clips_are_refused(low, high, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        clipped.check_clips(low, high)


def test_distances_are_means_over_tokens_and_not_over_texts():
    assert trajectory.distance(BEFORE, "miss") == pytest.approx((0.5 + 0.8 + 0.1 + 0.7 + 0.6) / 5, abs=1e-6)
    expected = -np.log([0.5, 0.2, 0.9, 0.3, 0.4]).mean()
    assert trajectory.distance(BEFORE, "nll") == pytest.approx(expected, abs=1e-6)


def test_a_trajectory_page_has_a_plot_for_each_pair_of_references():
    points = [
        trajectory.Point(run=run, step=step, path="x", distances={"a": 1.0 - step / 9, "b": step / 5, "c": 0.5})
        for run in ("one", "two")
        for step in (0, 3)
    ]
    about = {name: {"texts": 2, "tokens": 9, "from": "f"} for name in ("a", "b", "c")}
    parts = trajectory.sections(points, "nll", about)
    assert parts["Trajectories"].count("<svg") == 3
    assert "0.6667" in parts["Distances, nats per token"]
    assert list(trajectory.sections(points, "nll", {"a": about["a"]})) == ["Distances, nats per token", "References"]


def test_entropies_are_means_over_tokens_and_both_definitions_are_named():
    assert entropies.entropy([stats([0.5] * 3, 0.3), stats([0.5], 0.7)]) == (pytest.approx(0.4), 4)
    points = [
        entropies.Point(
            run="r",
            step=step,
            path="x",
            entropy={"demonstrations": 0.1, "samples": 0.5},
            tokens={"demonstrations": 4, "samples": 5},
        )
        for step in (0, 2)
    ]
    parts = entropies.sections(points)
    assert parts["Curves"].count("<svg") == 2
    assert "On demonstrations (teacher-forced)" in parts["Curves"] and "On own samples" in parts["Curves"]
