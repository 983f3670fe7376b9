"""Rank selection and scaled averaging against cases worked by hand."""

import numpy as np
import pytest

from megatron_srft.best_of_n.fusion import ranks, scaled, scaled_average, worst_rank

NAN = float("nan")


def test_ranks_with_ties_keep_the_order():
    #                     2nd  1st  1st's twin  last
    assert ranks(np.array([0.5, 0.9, 0.9, -1.0])).tolist() == [2, 0, 1, 3]
    assert ranks(np.array([1.0, 1.0, 1.0])).tolist() == [0, 1, 2]
    assert ranks(np.array([NAN, 3.0, NAN, 5.0])).tolist() == [2, 1, 3, 0]


def test_rank_selection_by_hand():
    """Candidate:      A    B    C    D
    ranks of one       0    1    2    3
    ranks of another   3    1    0    2
    the worse one      3    1    2    3      so B, which is first nowhere, is chosen."""
    one, another = np.array([4.0, 3.0, 2.0, 1.0]), np.array([0.1, 0.5, 0.9, 0.3])
    assert worst_rank([one, another]).tolist() == [3, 1, 2, 3]


def test_two_candidates_that_swap_their_ranks_are_tied_and_the_first_is_chosen():
    one, another = np.array([2.0, 1.0]), np.array([1.0, 2.0])
    combined = worst_rank([one, another])
    assert combined.tolist() == [1, 1] and combined.argmin() == 0
    assert worst_rank([one[::-1], another[::-1]]).argmin() == 0


def test_the_choice_depends_on_the_group():
    """Of three candidates A is chosen; two more push it from rank 1 to 3 in the second score, and C is chosen."""
    one, another = np.array([3.0, 2.0, 1.0]), np.array([0.2, 0.1, 0.5])
    assert worst_rank([one, another]).tolist() == [1, 2, 2]
    one, another = np.array([3.0, 2.0, 1.0, 0.0, -1.0]), np.array([0.2, 0.1, 0.5, 0.4, 0.3])
    assert worst_rank([one, another]).tolist() == [3, 4, 2, 3, 4]


def test_scaled_by_hand():
    assert scaled(np.array([2.0, 6.0, 3.0])).tolist() == [0.0, 1.0, 0.25]
    assert scaled(np.array([7.0, 7.0])).tolist() == [1.0, 1.0]
    assert scaled(np.array([-3.0])).tolist() == [1.0]
    np.testing.assert_array_equal(scaled(np.array([NAN, 1.0, 3.0])), [NAN, 0.0, 1.0])
    np.testing.assert_array_equal(scaled(np.array([NAN, 4.0])), [NAN, 1.0])
    np.testing.assert_array_equal(scaled(np.array([NAN, NAN])), [NAN, NAN])


def test_scaled_average_by_hand():
    one, another = np.array([0.0, 10.0, 5.0]), np.array([30.0, 10.0, 26.0])
    # scaled: [0, 1, .5] and [1, 0, .8]
    assert scaled_average([one, another]) == pytest.approx([0.5, 0.5, 0.65])
    assert scaled_average([one, another], [3, 1]) == pytest.approx([0.25, 0.75, 0.575])
    # A constant score says nothing: 1 for all.
    assert scaled_average([one, np.full(3, -2.0)]) == pytest.approx([0.5, 1.0, 0.75])
    assert scaled_average([one, np.array([1.0, NAN, 0.0])]).tolist() == [0.5, -np.inf, 0.25]


def test_groups_of_a_batch_do_not_see_each_other():
    batch = np.array([[1.0, 2.0, 4.0], [9.0, 9.0, 9.0]])
    assert ranks(batch).tolist() == [[2, 1, 0], [0, 1, 2]]
    np.testing.assert_allclose(scaled(batch), [[0, 1 / 3, 1], [1, 1, 1]])


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -0.5], [1.0, NAN]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        scaled_average([np.zeros(2), np.zeros(2)], weights)
