"""The dense float64 softmax that the log-prob ops are compared with, and small problems for them."""

import torch


def reference(logits, labels, vocab_size, temperature):
    """Dense float64 log-probs and entropies over the valid columns; 0 log 0 = 0."""
    scaled = logits.double()[:, :vocab_size] / temperature
    logprobs = scaled.log_softmax(dim=-1)
    probabilities = logprobs.exp()
    entropy = -torch.where(probabilities > 0, probabilities * logprobs, 0.0).sum(-1)
    return logprobs.gather(1, labels[:, None])[:, 0], entropy


def reference_gradient(logits, labels, vocab_size, temperature, logprob_gradient, entropy_gradient):
    leaf = logits.detach().double().requires_grad_()
    logprobs, entropy = reference(leaf, labels, vocab_size, temperature)
    ((logprobs * logprob_gradient.double()).sum() + (entropy * entropy_gradient.double()).sum()).backward()
    return leaf.grad


def problem(rows, columns, vocab_size, *, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, columns, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    upstream = torch.randn(2, rows, generator=generator)
    return logits, labels, upstream[0], upstream[1]


def run(function, leaves, logprob_gradient, entropy_gradient):
    """Outputs and the leaves' gradients for the given upstream gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    logprobs, entropy = function(*leaves)
    torch.autograd.backward([logprobs, entropy], [logprob_gradient.to(logprobs), entropy_gradient.to(entropy)])
    return logprobs.detach(), entropy.detach(), *[leaf.grad for leaf in leaves]


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
