from collections import Counter

import numpy as np
import pytest

from megatron_srft.data import PromptStream, choose_demonstration
from megatron_srft.sample import Demonstration, Prompt


def prompt(identity, num_demonstrations=0):
    demonstrations = tuple(
        Demonstration(token_ids=np.array([i, 9], np.int32), text=str(i)) for i in range(num_demonstrations)
    )
    ids = np.array([1], np.int32)
    return Prompt(id=identity, text="q", token_ids=ids, answer="1", source="a", demonstrations=demonstrations)


def visits(stream, steps, prompts_per_step):
    return [p.id for step in range(steps) for p in stream.batch(step, prompts_per_step)]


PROMPTS = tuple(prompt(str(i)) for i in range(10))


@pytest.mark.parametrize("prompts_per_step", [1, 3, 4, 7, 10])
def test_each_epoch_visits_every_prompt_once(prompts_per_step):
    ids = visits(PromptStream(PROMPTS, seed=1), 10, prompts_per_step)
    for epoch in range(prompts_per_step):
        assert sorted(ids[10 * epoch : 10 * epoch + 10]) == sorted(p.id for p in PROMPTS)


def test_the_order_does_not_depend_on_the_batch_size_or_on_what_was_drawn_before():
    stream = PromptStream(PROMPTS, seed=1)
    assert visits(stream, 20, 3) == visits(stream, 12, 5) == visits(stream, 60, 1)
    assert [p.id for p in PromptStream(PROMPTS, seed=1).batch(7, 3)] == visits(stream, 8, 3)[-3:]


def test_seeds_and_epochs_differ():
    orders = {
        tuple(visits(PromptStream(PROMPTS, seed), 3, 10)[10 * e : 10 * e + 10]) for seed in (0, 1) for e in range(3)
    }
    assert len(orders) == 6


def test_without_shuffling_files_are_read_in_order():
    assert visits(PromptStream(PROMPTS, seed=1, shuffle=False), 4, 6) == [str(i % 10) for i in range(24)]


def test_positions_are_uniform():
    """Prompt 0 stands at each of 10 places equally often: chi-squared with 9 degrees of freedom, 99.99 % point 33.7."""
    ids = visits(PromptStream(PROMPTS, seed=0), 2000, 10)
    counts = Counter(place % 10 for place, identity in enumerate(ids) if identity == "0")
    assert sum((counts[i] - 200) ** 2 / 200 for i in range(10)) < 33.7


def test_the_order_is_the_same_on_every_machine_and_version():
    """A change here makes resumed runs read other prompts than unbroken ones."""
    assert "".join(visits(PromptStream(PROMPTS, seed=7), 1, 10)) == "6349028751"


def test_more_prompts_per_step_than_prompts_is_an_error():
    with pytest.raises(ValueError, match=r"batch\.prompts_per_step is 11, but the data hold only 10 prompts"):
        PromptStream(PROMPTS, seed=1).batch(0, 11)


def test_choose_demonstration_is_a_function_of_seed_step_and_id():
    three = prompt("a", 3)
    drawn = [choose_demonstration(three, 0, step).text for step in range(3000)]
    assert drawn == [choose_demonstration(prompt("a", 3), 0, step).text for step in range(3000)]
    assert all(abs(count - 1000) < 130 for count in Counter(drawn).values()), "five standard deviations of 26"
    assert drawn != [choose_demonstration(three, 1, step).text for step in range(3000)]
    assert drawn != [choose_demonstration(prompt("b", 3), 0, step).text for step in range(3000)]


def test_choose_demonstration_of_few():
    assert choose_demonstration(prompt("a"), 0, 0) is None
    assert {choose_demonstration(prompt("a", 1), 0, step).text for step in range(20)} == {"0"}
