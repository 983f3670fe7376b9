"""Merging the statistics of parts of a vocabulary."""

import torch

from megatron_srft.ops.softmax_statistics import merge, statistics_reference


def statistics(logits, labels, start):
    return statistics_reference(logits, labels, start, logits.shape[1], 1.0)


def test_merging_parts_gives_the_statistics_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(6, 20, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 3, 4, 11, 12, 19])
    parts = [statistics(logits[:, a:b], labels, a) for a, b in ((0, 4), (4, 12), (12, 12), (12, 20))]
    torch.testing.assert_close(merge(torch.stack(parts)), statistics(logits, labels, 0), rtol=1e-13, atol=1e-13)


def test_parts_without_any_finite_logit_are_neutral_even_among_themselves():
    logits, labels = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([1])
    whole = statistics(logits, labels, 0)
    masked = statistics(torch.full((1, 4), -torch.inf), labels, 3)
    padding = statistics(torch.zeros(1, 0), labels, 7)
    nothing = merge(torch.stack([masked, padding, masked]))
    assert nothing[:, 0].tolist() == [-torch.inf, 0, 0, 0]
    assert torch.equal(merge(torch.stack([nothing, whole])), whole)
