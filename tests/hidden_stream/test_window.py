"""Which completions a refresh learns from, and that a checkpoint in between holds them."""

from dataclasses import replace

import numpy as np
import pytest
from advantage_cases import group, score

from megatron_srft.config import SwiftRewardConfig
from megatron_srft.hidden_stream.window import Window
from megatron_srft.sample import Score

FAILED = Score(reward=0.0, correct=None, status="crash")


def groups(step: int):
    """Two groups whose prompts say which step it is; one completion has no verdict."""
    made = [group([1, 3], [score(1.0), FAILED]), group([2], [score(0.0)])]
    prompt = replace(made[0].prompt, token_ids=np.array([step, 90], np.int32))
    return [replace(one, prompt=prompt) for one in made]


@pytest.mark.parametrize(
    ("every", "size", "at_refresh"),
    [
        (3, 2, {3: [1, 2], 6: [4, 5]}),
        (3, 3, {3: [0, 1, 2], 6: [3, 4, 5]}),
        (2, 5, {2: [0, 1], 4: [0, 1, 2, 3], 6: [1, 2, 3, 4, 5]}),
        (1, 1, {1: [0], 2: [1], 6: [5]}),
        (None, 3, {6: []}),
    ],
)
def test_the_steps_before_a_refresh(every, size, at_refresh):
    """Also when every step ends with a checkpoint and the next one begins from it."""
    config = SwiftRewardConfig(head="h", refresh_every=every, refresh_window=size)
    window = Window(config)
    for step in range(6):
        resumed = Window(config)
        resumed.restore(window.arrays())
        window = resumed
        window.add(groups(step), step)
        if step + 1 in at_refresh:
            steps = sorted({int(one.token_ids[0]) for one in window.judged})
            assert steps == at_refresh[step + 1] == sorted({one.step for one in window.judged})


def test_what_it_knows_of_a_completion():
    window = Window(SwiftRewardConfig(head="h", refresh_every=1))
    window.add(groups(7), 0)
    first, second = window.judged
    assert (first.step, first.group, first.prompt_length, first.correct) == (0, 0, 2, True)
    assert first.token_ids.tolist() == [7, 90, 0]
    assert (second.group, second.correct, second.token_ids.tolist()) == (1, False, [7, 90, 0, 1])
    restored = Window(window.config)
    restored.restore(window.arrays())
    for mine, theirs in zip(restored.judged, window.judged, strict=True):
        assert mine.token_ids.dtype == np.int32 and mine.token_ids.tolist() == theirs.token_ids.tolist()
        assert mine._replace(token_ids=None) == theirs._replace(token_ids=None)
