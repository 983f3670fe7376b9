"""Other projects' log-probs of labels, under one signature, where they are installed or checked out.

A folder of peers (`--peers`) holds any of

    site-packages/       what `pip install --no-deps --target` put there
    verl/                a checkout of verl, of which two files are loaded
    Liger-Kernel/        a checkout of Liger-Kernel
    ml-cross-entropy/    a checkout of cut-cross-entropy

It comes after the environment's own packages. From hidden states [rows, width] and the head's weight [vocabulary,
width], or from logits [rows, vocabulary], a peer gives (log-probs, entropy or None).
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Scores = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Peer:
    load: Callable[["Workload"], Callable[..., Scores]]
    package: str
    note: str = ""
    needs_gpu: bool = True


@dataclass(frozen=True)
class Workload:
    labels: Tensor
    vocabulary: int
    widest: int
    """The largest width of any setting."""
    folder: Path | None


def find(folder: Path | None) -> None:
    """Let packages in the folder be imported."""
    for place in ("site-packages", "Liger-Kernel/src", "ml-cross-entropy") if folder else ():
        if (path := str((folder / place).resolve())) not in sys.path and Path(path).is_dir():
            sys.path.append(path)
            importlib.invalidate_caches()


def reason_against(peer: Peer, folder: Path | None, device: str) -> str | None:
    """Why a peer cannot run here; None if it may."""
    find(folder)
    if peer.package == "verl":
        if folder is None or not (folder / "verl/verl/utils/kernel/kernels.py").is_file():
            return "no checkout (verl/ in the folder of --peers)"
    elif importlib.util.find_spec(peer.package) is None:
        return f"not installed ({peer.package})"
    return "needs a GPU" if peer.needs_gpu and device != "cuda" else None


def version(peer: Peer) -> str:
    try:
        return importlib.metadata.version(peer.package.partition(".")[0].replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


# ---------------------------------------------------------------- from hidden states


def _verl(work: Workload) -> Callable[..., Scores]:
    """The two files alone; the package around them would bring its own dependencies, the device's functions among
    them."""
    device = ModuleType("verl.utils.device")
    device.is_cuda_available = torch.cuda.is_available()
    device.get_device_name = lambda: "cuda"
    device.get_torch_device = lambda: torch.cuda
    device.get_device_capability = torch.cuda.get_device_capability
    package = ModuleType("verl.utils.kernel")
    package.__path__ = [str((work.folder / "verl/verl/utils/kernel").resolve())]
    sys.modules |= {name: ModuleType(name) for name in ("verl", "verl.utils")}
    sys.modules |= {module.__name__: module for module in (device, package)}
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda hidden, weight: function(hidden, weight, work.labels, 1.0, "none", None)


def _liger(reduction: str) -> Callable[[Workload], Callable[..., Scores]]:
    def load(work: Workload) -> Callable[..., Scores]:
        module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        function = module.LigerFusedLinearCrossEntropyFunction.apply
        more = (None, None, -100, 0.0, 0.0, reduction)  # no bias, no weights, smoothing, z-loss
        return lambda hidden, weight: (-function(hidden, weight, work.labels, *more)[0], None)

    return load


def _liger_scaled(work: Workload) -> Callable[..., Scores]:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda hidden, weight: _negated(function(hidden, weight, work.labels, 1.0, -100, 1, True))


def _liger_native(work: Workload) -> Callable[..., Scores]:
    """The compiled kernels, which want a process group, even of one, and their largest problem in advance."""
    settings = importlib.import_module("liger_kernel.ops.configure")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    world = torch.distributed.group.WORLD
    most = settings.FusedLinearCrossEntropyConfig(len(work.labels), work.widest, work.vocabulary, group="tp")
    device = work.labels.device
    if not settings.configure(process_groups={"tp": world}, bootstrap_group=world, device=device, flsce=most):
        raise RuntimeError("liger-cute-kernels does not take this device")
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyTPFunction.apply
    return lambda hidden, weight: _negated(function(hidden, weight, work.labels, world, 1.0, -100, 1, True))


def _negated(outputs: tuple[Tensor, Tensor]) -> Scores:
    return -outputs[0], outputs[1]


def _cut(**options: object) -> Callable[[Workload], Callable[..., Scores]]:
    def load(work: Workload) -> Callable[..., Scores]:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return lambda hidden, weight: (
            -function(hidden, weight, work.labels, reduction="none", impl="cce", **options),
            None,
        )

    return load


# ---------------------------------------------------------------- from logits


def _liger_logits(work: Workload) -> Callable[..., Scores]:
    function = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction.apply
    more = (None, -100, 0.0, 0.0, "none")
    return lambda logits: (-function(logits, work.labels, *more)[0], None)


LINEAR = {
    "verl": Peer(_verl, "verl"),
    "Liger FSLCE CuTe DSL": Peer(_liger_scaled, "liger_kernel", "torch off compute capability 9.0", False),
    "Liger FSLCE CUDA": Peer(_liger_native, "liger_cute_kernels"),
    "Liger FLCE": Peer(_liger("none"), "liger_kernel", "no entropy"),
    "Liger FLCE sum": Peer(_liger("sum"), "liger_kernel", "no entropy; one sum, gradients in the forward pass"),
    "cut-cross-entropy": Peer(_cut(), "cut_cross_entropy", "no entropy; leaves small gradients out"),
    "cut-cross-entropy exact": Peer(_cut(filter_eps=None), "cut_cross_entropy", "no entropy"),
}

LOGITS = {
    "Liger cross entropy": Peer(
        _liger_logits, "liger_kernel", "no entropy; gradients in the forward pass, over the logits"
    ),
}
