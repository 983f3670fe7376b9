"""Mean and deviation of every column of the states, over the training part's scored tokens."""

from collections.abc import Sequence

import torch

from megatron_srft.distributed import all_reduce
from megatron_srft.hidden_reward.parametrisation import Standardisation
from megatron_srft.hidden_reward.parts import portions
from megatron_srft.hidden_reward.states import Question, States

LEAST_VARIANCE = 1e-12
"""A column that varies less, relative to its mean square, is taken as constant."""


@torch.no_grad()
def standardisation(states: States, questions: Sequence[Question]) -> Standardisation:
    """One pass over the states; collective, the same on every rank.

    Raises:
        ValueError: a state is not finite.
    """
    # [mean and mean square, layers, hidden]: zero where another rank has the layer, the column or the token.
    sums = torch.zeros(2, *states.shape, dtype=torch.float64, device=states.device)
    for portion in portions(states.share(questions), states.lengths, states.portion_tokens):
        local = states.read(portion)
        for place, hidden in enumerate(local.layers):
            values = hidden.double()
            if local.scales is not None:
                values = values * local.scales[place]
            own = sums[:, states.own_layers[place], states.columns]
            own += torch.stack((values.sum(dim=0), values.square().sum(dim=0)))
    all_reduce(sums, states.groups.world)
    if not sums.isfinite().all():
        raise ValueError(
            "hidden states of the training part are NaN or infinite; see that the model's weights are whole and that "
            "its type has the range (bfloat16 rather than float16)"
        )
    tokens = int(sum(states.lengths[list(question)].sum() for question in questions))
    mean, square = (sums / tokens).unbind(0)
    variance = square - mean.square()
    deviation = torch.where(variance > LEAST_VARIANCE * square, variance, 1.0).sqrt()
    return Standardisation(mean=mean.float(), deviation=deviation.float())
