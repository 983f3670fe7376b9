"""Attention written out with a dense mask, and inputs for it in float64."""

import torch


def dense_attention(query, key, value, lengths, scale):
    """softmax(q k^T * scale) v with one block-diagonal causal mask; key heads repeated for their query heads."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner)).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), value)


def random_inputs(tokens, heads=4, key_heads=2, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, dim), (tokens, key_heads, dim), (tokens, key_heads, dim)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
