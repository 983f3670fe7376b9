"""Checksums of tensors: against the formula in plain integers, and what has to change them."""

import pytest
import torch

from megatron_srft.weights import digest as module
from megatron_srft.weights.digest import digest


def by_hand(values: torch.Tensor, bits: int) -> int:
    """The formula of the module's docstring in Python's own integers, as an int64."""
    total, mask = 0, 2**64 - 1
    for i, value in enumerate(values.flatten().view({32: torch.int32, 16: torch.int16}[bits]).tolist()):
        product = (i * 0x9E3779B97F4A7C15) & mask
        signed = product - 2**64 if product >> 63 else product
        total += value * ((signed ^ (signed >> 29)) | 1)
    total &= mask
    return total - 2**64 if total >> 63 else total


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 16)])
def test_the_formula(dtype, bits, monkeypatch):
    values = torch.randn(13, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = by_hand(values, bits)
    assert digest(values).item() == expected
    monkeypatch.setattr(module, "CHUNK", 10)
    assert digest(values).item() == expected
    assert digest(values.T).item() != expected
    assert digest(values.T.contiguous().T).item() == expected


def test_every_single_bit_and_every_exchange_changes_it():
    values = torch.randn(50, generator=torch.Generator().manual_seed(1))
    seen = {digest(values).item()}
    for bit in range(31):
        changed = values.clone()
        changed.view(torch.int32)[17] ^= 1 << bit
        seen.add(digest(changed).item())
    assert len(seen) == 32
    for other in range(49):
        exchanged = values.clone()
        exchanged[[other, 49]] = values[[49, other]]
        seen.add(digest(exchanged).item())
    assert len(seen) == 32 + 49


def test_what_a_matrix_unit_does_not_tell_apart_has_one_checksum():
    assert digest(torch.tensor([0.0, 1.0])) == digest(torch.tensor([-0.0, 1.0]))
    assert digest(torch.tensor([1e-40, 1.0])) == digest(torch.tensor([0.0, 1.0]))
