"""Triton kernels: one module per op, imported at its first call; each function is named like the op that it runs."""
