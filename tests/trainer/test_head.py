"""The LM head's part in Megatron's bookkeeping of gradients."""

import pytest
import torch
import torch.distributed as dist
from spawning import spawn

from megatron_srft.ops.token_logprob import token_logprob


@pytest.mark.parametrize("tied_on_one_stage", [False, True])
def test_the_weight_gradient_goes_into_main_grad_and_ddp_is_told(tied_on_one_stage):
    [outcome] = spawn(1, _head_gradient, tied_on_one_stage)
    buffer, expected, marked, gradient = outcome
    assert abs(buffer - 1 - expected).max() < 1e-5
    # DDP adds what autograd brings unless the mark says that it is without meaning; a tied weight's is the embedding's.
    assert marked != tied_on_one_stage
    assert (gradient is None) == tied_on_one_stage


def _head_gradient(tied_on_one_stage):
    from megatron_srft.trainer import host

    host.install()
    dist.init_process_group("gloo")
    from megatron_srft.trainer.context import Part
    from megatron_srft.trainer.head import token_stats

    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 1, 8), torch.nn.Parameter(torch.randn(16, 8))
    rows, labels = torch.tensor([1, 2, 5]), torch.tensor([0, 12, 7])
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(16, 8), False
    if tied_on_one_stage:
        weight.zero_out_wgrad = True
    part = Part(batch=None, token_ids=None, position_ids=None, rows=rows, labels=labels, params=None)
    stats = token_stats(
        hidden.requires_grad_(), weight, part, vocab_size=13, temperature=0.7, saved_logits_bytes=0,
        sequence_parallel=False, tensor_group=dist.group.WORLD,
    )  # fmt: skip
    (stats.logprobs.sum() + stats.entropy.square().sum()).backward()
    leaf = weight.detach().double().requires_grad_()
    logits = hidden.detach()[rows, 0].double() @ leaf.t()
    logprobs, entropy = token_logprob(logits, labels, vocab_start=0, vocab_size=13, temperature=0.7)
    (logprobs.sum() + entropy.square().sum()).backward()
    marked = weight.grad_added_to_main_grad
    return weight.main_grad.double().numpy(), leaf.grad.numpy(), marked, weight.grad is not None or None
