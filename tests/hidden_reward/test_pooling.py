"""One layer's share: sums over layers, columns and tokens in any cut are the whole, and normalisation is per state."""

import pytest
import torch
from reward_heads import TINY, make_head

from megatron_srft.hidden_reward import add_layer
from megatron_srft.hidden_reward.pooling import inverse_rms
from megatron_srft.ops.gated_pooling import gated_mean

TOKENS = 13
CUTS = [slice(0, 5), slice(5, 8)]


def states(dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(TOKENS, 8, generator=generator) * 4**layer).to(dtype) for layer in range(5)]


def whole(layers: list[torch.Tensor], head) -> torch.Tensor:
    """[tokens, 2] in float64, from concatenated states."""
    layers = [layer.double() for layer in layers]
    if head.config.normalisation == "rms":
        layers = [h / (h.square().mean(1, keepdim=True) + head.config.epsilon).sqrt() for h in layers]
    return torch.cat(layers, dim=1) @ torch.cat(list(head.weight), dim=1).double().T


@pytest.mark.parametrize("settings", [{}, {"normalisation": "rms", "epsilon": 1e-3}])
@pytest.mark.parametrize("cut", ["layers", "columns", "tokens", "order"])
def test_every_cut_adds_up_to_the_whole(settings, cut):
    head, layers = make_head(**settings), states()
    total = torch.zeros(TOKENS, 2)
    order = [3, 0, 4, 1, 2] if cut == "order" else range(5)
    for place in order:
        weight = head.weight[place]
        match cut:
            case "columns":
                for columns in CUTS:
                    total = add_layer(total, layers[place], weight, head.config, columns)
            case "tokens":
                parts = [add_layer(None, part, weight, head.config) for part in layers[place].split([4, 9])]
                total = total + torch.cat(parts)
            case "layers":
                total = total + add_layer(None, layers[place], weight, head.config)  # as stages do
            case _:
                total = add_layer(total, layers[place], weight, head.config)
    expected = whole(layers, head)
    assert (total - expected).abs().max() < 2e-6 * expected.abs().max()


def test_half_precision_states_are_added_in_float32():
    head, layers = make_head(normalisation="rms"), states(torch.bfloat16)
    total = None
    for place, layer in enumerate(layers):
        total = add_layer(total, layer, head.weight[place], head.config)
    assert total.dtype == torch.float32
    expected = whole(layers, head)
    assert (total - expected).abs().max() < 2e-6 * expected.abs().max()


def test_normalised_states_do_not_know_their_size():
    head = make_head(normalisation="rms", epsilon=0.0)
    own = states()[2]
    small, large = (add_layer(None, own * scale, head.weight[2], head.config) for scale in (1e-3, 1e3))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)
    assert inverse_rms(torch.full((1, 8), 3.0), 7.0).item() == pytest.approx(0.25)


def test_without_a_gate_the_score_is_the_plain_mean():
    head, layers = make_head(gate=False), states()
    total = None
    for place, layer in enumerate(layers):
        total = add_layer(total, layer, head.weight[place], head.config)
    found = gated_mean(total, torch.tensor([[2, 11]]), head.bias)[0].item()
    assert found == pytest.approx((whole(layers, head)[2:11, 1].mean() + head.bias[1]).item(), rel=1e-5)


def test_the_bias_of_the_reward_moves_every_score_alike():
    head, layers = make_head(), states()
    total = None
    for place, layer in enumerate(layers):
        total = add_layer(total, layer, head.weight[place], head.config)
    spans = torch.tensor([[0, 3], [3, 12]])
    before, _ = gated_mean(total, spans, head.bias)
    after, _ = gated_mean(total, spans, head.bias + torch.tensor([0.0, 2.5]))
    torch.testing.assert_close(after - before, torch.full((2,), 2.5), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_weights_only():
    head, own = make_head(TINY, normalisation="rms"), states()[1]
    weight = head.weight[1].clone().requires_grad_()
    add_layer(None, own, weight, head.config).sum().backward()
    expected = (own.double() / (own.double().square().mean(1, keepdim=True) + head.config.epsilon).sqrt()).sum(0)
    torch.testing.assert_close(weight.grad, expected.float().expand(2, 8), rtol=1e-5, atol=1e-5)
    assert not own.requires_grad
