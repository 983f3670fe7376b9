"""A 64-bit number for the contents of a tensor, by which two holders of it find out whether they hold the same.

    digest = sum_i bits(x_i) * h(i)  mod 2^64        h(i) odd

One element that differs always changes it, because h(i) is odd; so, but for a chance of about 2^-64, do any others, two
that have changed places included. Zeros have one sign and subnormal numbers are zero, since matrix units differ there.
"""

import torch

CHUNK = 1 << 22
"""Elements that are added up at a time; the intermediate numbers take 8 bytes each."""

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, as an int64: consecutive multiples of it share no pattern."""

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """[] int64, on the tensor's device; nothing is moved to the host."""
    flat = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), CHUNK):
        total += _chunk(flat[start : start + CHUNK], start)
    return total


def _chunk(values: torch.Tensor, start: int) -> torch.Tensor:
    smallest = torch.finfo(values.dtype).tiny
    values = torch.where(values.abs() < smallest, torch.zeros_like(values), values)
    bits = values.view(BITS[values.dtype]).to(torch.int64)
    position = torch.arange(start, start + len(values), device=values.device)
    mixed = position * GOLDEN
    return (bits * ((mixed ^ (mixed >> 29)) | 1)).sum()
