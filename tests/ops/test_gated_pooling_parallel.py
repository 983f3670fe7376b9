"""Gated pooling with hidden columns, tokens and layers cut over gloo processes, against stacked states in float64."""

import pytest
import torch
import torch.distributed as dist
from pooling_cases import Problem, assert_near, gradients, problem, stacked
from spawning import spawn

from megatron_srft.ops.gated_pooling import (
    gated_mean,
    gated_projection,
    local_sequences,
    share_of_hidden,
    sum_projections,
)

WIDTHS = [7, 70]
"""The first leaves all ranks but one without columns."""


def all_layers(states, weights, **options):
    accumulated = None
    for of_layer, weight in zip(states, weights, strict=True):
        accumulated = gated_projection(accumulated, of_layer, weight, **options)
    return accumulated


def tensor_parallel(given: Problem, group) -> tuple:
    columns = share_of_hidden(given.states[0].shape[1], group)
    share = all_layers(
        [states[:, columns] for states in given.states], [weight[:, columns] for weight in given.weights]
    )
    return gated_mean(sum_projections(share, group), given.sequences, given.bias)


def pipeline(given: Problem, group) -> tuple:
    """Layers 0 and 1 on the first rank, one on each other."""
    rank = dist.get_rank()
    own = slice(0, 2) if rank == 0 else slice(rank + 1, rank + 2)
    total = sum_projections(all_layers(given.states[own], given.weights[own]), group)
    return gated_mean(total, given.sequences, given.bias)


def sequence_parallel(given: Problem, group) -> tuple:
    """Uneven shares that cut responses; the first rank holds nothing but a prompt's token."""
    first, end = [(0, 1), (1, 30), (30, 53)][dist.get_rank()]
    accumulated = all_layers([states[first:end] for states in given.states], given.weights)
    return gated_mean(accumulated, local_sequences(given.sequences, first, end - first), given.bias, group=group)


def compare_on_one_rank() -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    for cut in (tensor_parallel, pipeline, sequence_parallel):
        for width in WIDTHS:
            given = problem(width, layers=group.size() + 1)
            exact = given.in_float64()
            outputs, expected = cut(given, group), stacked(exact)
            for output, wanted in zip(outputs, expected, strict=True):
                assert_near(output, wanted, 1e-6, f"{cut.__name__} output")
                copy = output.detach().clone()
                dist.broadcast(copy, 0)
                assert torch.equal(copy, output), f"{cut.__name__}: ranks disagree"
            loss_gradients = _gradients(outputs, given)
            wanted_gradients = gradients(expected, exact.leaves())
            for leaf, found, wanted in zip(given.leaves(), loss_gradients, wanted_gradients, strict=True):
                whole_everywhere = leaf is given.bias and cut is not sequence_parallel
                if not whole_everywhere:
                    dist.all_reduce(found)
                assert_near(found, wanted, 1e-5, f"{cut.__name__} gradient of {list(leaf.shape)}")
    with pytest.raises(ValueError, match="response 1 has no token"):
        gated_mean(torch.zeros(4, 2), torch.tensor([[0, 2], [3, 3]]), torch.zeros(2), group=group)
    dist.destroy_process_group()


def _gradients(outputs, given: Problem) -> list[torch.Tensor]:
    """This rank's part of each gradient, 0 where it has none."""
    loss = sum((output * torch.linspace(-1.0, 2.0, len(output))).sum() for output in outputs)
    found = torch.autograd.grad(loss, given.leaves(), allow_unused=True)
    return [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(given.leaves(), found, strict=True)]


def test_every_cut_gives_what_stacked_states_give():
    spawn(3, compare_on_one_rank)


@pytest.mark.parametrize("width", [1, 7, 8, 70, 896, 3584])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_of_hidden_are_whole_vectors_and_cover_the_width(width, ranks, monkeypatch):
    monkeypatch.setattr("megatron_srft.distributed.size", lambda group: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr("megatron_srft.distributed.rank", lambda group, rank=rank: rank)
        shares.append(share_of_hidden(width, None))
    assert [column for share in shares for column in range(width)[share]] == list(range(width))
    assert all(share.start % 8 == 0 or share.start == width for share in shares)
