"""The implementations of an op, which of them this installation has, and which one a call takes.

Every op has a plain torch `reference`; `native` is the compiled extension (C++ on a CPU, CUDA C++ on a GPU, sources in
csrc/); `triton` needs the triton package and a GPU, or a CPU under its interpreter (TRITON_INTERPRET=1). An op is
declared once, by `declare`, and is then torch.ops.srft_<implementation>.<name> with the same schema, fake tensors and
autograd formula in each of them; the compiled extension registers its kernels to the same names.

`auto` takes the first that can run a call, in the order of `PREFERENCE`. Asking for one that cannot is an error.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "native", "triton")

DEVICES = ("cpu", "cuda")

PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}
"""What `auto` tries on each kind of device, best first; the figures behind it are in csrc/README.md."""

NATIVE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Number types that native and triton kernels take; float64 is for the reference."""

_default = "auto"


def declare(
    name: str,
    schema: str,
    *,
    fake: Callable,
    reference: Callable | None = None,
    triton: str | None = None,
    composed: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Declare an op in every implementation.

    Args:
        schema: "(Tensor logits, ...) -> Tensor".
        fake: shapes and types of the results, see torch.library.register_fake.
        reference: the op in plain torch.
        composed: instead of the other two, an op made of other ops; takes the implementation's name first.
        triton: module whose function `name` launches the triton kernel; imported at the first call.
        setup_context, backward: see torch.library.register_autograd; ctx.implementation names the implementation.
    """
    for implementation in IMPLEMENTATIONS:
        qualified = f"srft_{implementation}::{name}"
        torch.library.define(qualified, schema)
        torch.library.register_fake(qualified, fake)
        if backward is not None:
            torch.library.register_autograd(
                qualified, backward, setup_context=_remembering(implementation, setup_context)
            )
        if composed is not None:
            torch.library.impl(qualified, DEVICES, partial(composed, implementation))
    if reference is not None:
        torch.library.impl(f"srft_reference::{name}", DEVICES, reference)
    if triton is not None:
        torch.library.impl(f"srft_triton::{name}", DEVICES, _imported_late(triton, name))


def kernel(name: str, implementation: str) -> torch._ops.OpOverload:
    """The op `name` in one implementation."""
    return getattr(getattr(torch.ops, f"srft_{implementation}"), name).default


def choose(wanted: str | None, tensor: Tensor) -> str:
    """The implementation that a call on `tensor` takes.

    Args:
        wanted: `auto`, one of IMPLEMENTATIONS, or None for what `set_default` said.

    Raises:
        ValueError: there is no such implementation, or it cannot run this call here; says why.
    """
    return _choose(wanted or _default, tensor.device.type, tensor.dtype)


@torch.compiler.assume_constant_result
def _choose(wanted: str, device: str, dtype: torch.dtype) -> str:
    if wanted == "auto":
        return preferred(device, dtype)
    if reason := reason_against(wanted, device, dtype):
        raise ValueError(f"ops.implementation {wanted!r}: {reason}; auto or reference would do")
    return wanted


def preferred(device: str, dtype: torch.dtype = torch.float32) -> str:
    """What `auto` takes."""
    order = PREFERENCE.get(device, ("reference",))
    return next(name for name in order if reason_against(name, device, dtype) is None)


def set_default(implementation: str, device: str) -> None:
    """What calls without an explicit implementation take from now on, in this process.

    Raises:
        ValueError: it cannot run on this type of device.
    """
    global _default
    choose(implementation, torch.empty(0, device=device))
    _default = implementation


def reason_against(implementation: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why an implementation cannot run on a device type here; None if it can."""
    match implementation:
        case "reference":
            return None
        case "native" | "triton" if dtype not in NATIVE_TYPES:
            return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        case "native":
            return _reason_against_native(device)
        case "triton":
            return _reason_against_triton(device)
    return f"no such implementation; known: auto, {', '.join(IMPLEMENTATIONS)}"


def _reason_against_native(device: str) -> str | None:
    if (failure := load_native()) is not None:
        return failure
    if device == "cpu" or (device == "cuda" and native_has_cuda()):
        return None
    return f"the compiled extension was built without kernels for {device}"


def _reason_against_triton(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"needs a GPU, or TRITON_INTERPRET=1, but the tensors are on {device}"


@cache
def load_native() -> str | None:
    """Load the compiled extension once; None, or why it is not there."""
    folder = Path(__file__).resolve().parent.parent
    found = sorted(folder.glob("_native*.so"))
    if not found:
        return "the compiled extension is not built (make setup, or pip install -e ., with a C++ compiler)"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the compiled extension {found[0].name} does not load: {error}"
    return None


def native_has_cuda() -> bool:
    """Whether the compiled extension, once loaded, has CUDA kernels."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("srft_native::softmax_statistics", "CUDA")


def _remembering(implementation: str, setup_context: Callable) -> Callable:
    def setup(ctx, inputs, output):
        ctx.implementation = implementation
        setup_context(ctx, inputs, output)

    return setup


def _imported_late(module: str, name: str) -> Callable:
    def launch(*args):
        return getattr(importlib.import_module(module), name)(*args)

    return launch
