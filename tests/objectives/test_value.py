"""The critic's loss against numbers by hand and autograd in float64, and what is reported of its values."""

import numpy as np
import pytest
import torch
from training_sequences import make_sequences

from megatron_srft.config import CriticConfig
from megatron_srft.data.packing import pack
from megatron_srft.objectives.value import value_figures, value_loss
from megatron_srft.sample import TrainingSequence, count


def sequence(values: list[float], returns: list[float]) -> TrainingSequence:
    response = len(values)
    return TrainingSequence(
        token_ids=np.arange(3, 5 + response, dtype=np.int32),
        prompt_length=2,
        is_demonstration=False,
        advantages=np.zeros(response, np.float32),
        correct=False,
        group=0,
        values=np.array(values, np.float32),
        returns=np.array(returns, np.float32),
    )


def share(sequences, members, values, config):
    batch = pack(sequences, members, 100)
    return value_loss(values, batch, count(sequences), config)


def test_three_tokens_by_hand():
    """Old values 0; the second has moved 0.5 towards its return 1, of which 0.2 count; the third away from it."""
    sequences = [sequence([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])]
    values = torch.tensor([0.1, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    output = share(sequences, (0,), values, CriticConfig())
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.5 * (0.9**2 + 0.8**2 + 1.5**2) / 3)
    assert values.grad.tolist() == pytest.approx([-0.9 / 3, 0.0, -1.5 / 3])
    assert output.metrics["value/clip_fraction"].item() == pytest.approx(1 / 3)
    assert output.metrics["value/loss"].item() == pytest.approx(output.loss.item())


def test_without_a_clip_it_is_half_the_mean_squared_error():
    sequences = [sequence([0.0, 3.0], [1.0, -1.0])]
    values = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    output = share(sequences, (0,), values, CriticConfig(value_clip=None))
    expected = 0.5 * torch.nn.functional.mse_loss(values, torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert output.loss.item() == pytest.approx(expected.item())
    (wanted,) = torch.autograd.grad(expected, values)
    output.loss.backward()
    assert values.grad.tolist() == pytest.approx(wanted.tolist())
    assert output.metrics["value/clip_fraction"].item() == 0


def test_the_gradient_is_that_of_finite_differences():
    random = np.random.default_rng(0)
    old, returns = random.normal(size=(2, 12))
    sequences = [sequence(old.tolist(), returns.tolist())]
    values = torch.tensor(old + random.normal(0, 0.3, 12), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: share(sequences, (0,), v, CriticConfig()).loss, values)


def test_micro_batches_add_up():
    sequences = [sequence([0.0, 0.1], [1.0, 0.0]), sequence([0.3], [0.5]), sequence([-0.2, 0.9, 0.0], [0.0, 0.0, 1.0])]
    values = torch.linspace(-1, 1, 6, dtype=torch.float64)
    whole = share(sequences, (0, 1, 2), values, CriticConfig())
    parts = [share(sequences, members, values[rows], CriticConfig()) for members, rows in (
        ((0,), slice(0, 2)), ((1, 2), slice(2, 6)), ((), slice(0, 0)),
    )]  # fmt: skip
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item())
    for name in whole.metrics:
        assert sum(part.metrics[name].item() for part in parts) == pytest.approx(whole.metrics[name].item())


def test_figures_of_values_that_explain_some_of_the_returns():
    """Returns 0, 2, 4 and values 1, 2, 3: errors -1, 0, 1, so a quarter of the variance is left."""
    figures = value_figures([sequence([1.0, 2.0], [0.0, 2.0]), sequence([3.0], [4.0])])
    assert figures == pytest.approx({"value/mean": 2.0, "value/return": 2.0, "value/explained_variance": 0.75})
    assert "value/explained_variance" not in value_figures([sequence([1.0, 2.0], [1.0, 1.0])])
    assert value_figures([]) == {}


def test_values_are_asked_for():
    with pytest.raises(AssertionError, match="not measured"):
        batch = pack(make_sequences([(False,)], 0), (0,), 30)
        value_loss(torch.zeros(len(batch.rows)), batch, count(make_sequences([(False,)], 0)), CriticConfig())
