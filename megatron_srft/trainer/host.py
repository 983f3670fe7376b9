"""Lets megatron.core run on a machine without CUDA: what it calls 'cuda' becomes the CPU.

megatron-core hard-wires CUDA, but everything it does on the paths of a dense model has a CPU meaning. `install()` gives
those calls that meaning. It does nothing where CUDA is there, and it runs before the rest of trainer/ imports
megatron. Outside megatron only functions of `torch.cuda` change, which no other code calls without a device.
"""

import contextlib
import importlib
import sys
import warnings

import torch

CPU = torch.device("cpu")

MODULES = (
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.mapping",
    "dist_checkpointing.strategies.state_dict_saver",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "tensor_parallel.data",
    "transformer.utils",
    "utils",
)
"""Modules of megatron.core (0.16 to 0.19) that name device="cuda" on the paths of a dense model."""

FACTORIES = frozenset(
    ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "empty_like", "zeros_like", "ones_like")
)

_installed = False


def install() -> None:
    """Make megatron.core run on this machine; a no-op with CUDA and from the second call on."""
    global _installed
    # doctor says what is installed; a dozen warnings at every start would only hide other messages.
    for package in ("Transformer Engine and Apex are", "Apex is", "absl.logging is"):
        warnings.filterwarnings("ignore", message=f"{package} not installed", module="megatron.core")
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _patch_devices_and_streams()
    _patch_random_state()
    _patch_tensors()
    with _without_compilation():
        _patch_megatron()


@contextlib.contextmanager
def _without_compilation():
    """megatron decorates small fused functions with torch.compile while it is imported. The trainer calls none of them
    on the CPU, and there the decorator alone takes seconds of imports, and a call would need a C++ compiler."""
    compile_ = torch.compile
    torch.compile = lambda function=None, **options: function or (lambda f: f)
    try:
        yield
    finally:
        torch.compile = compile_


class _Stream:
    """Stands in for torch.cuda.Stream and Event: work on the CPU is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or self

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


def _patch_devices_and_streams() -> None:
    cuda = torch.cuda
    # megatron allocates on torch.cuda.current_device() in about 160 places.
    cuda.current_device = lambda: CPU
    # One new function for each name: torch.compile keeps a rule per function object and refuses shared ones.
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Stream())
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream = cuda.Event = _Stream


def _patch_random_state() -> None:
    """Tensor-parallel regions fork 'the CUDA generator' even without dropout; let it be the CPU's."""
    cuda = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda seed: torch.default_generator.manual_seed(seed))


def _patch_tensors() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    plain_type = torch.Tensor.type

    def type_(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        name = plain_type(self)
        # megatron's optimizers compare this string with 'torch.cuda.FloatTensor'; everyone else hears the truth.
        asked_by_megatron = sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core")
        return name.replace("torch.", "torch.cuda.") if asked_by_megatron else name

    torch.Tensor.type = type_


class _TorchOnHost:
    """The module `torch` as the modules in MODULES see it: factories read device="cuda" as the CPU."""

    def __getattr__(self, name):
        value = getattr(torch, name)
        if name not in FACTORIES:
            return value

        def factory(*args, **kwargs):
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = CPU
            return value(*args, **kwargs)

        return factory


def _patch_megatron() -> None:
    stand_in = _TorchOnHost()
    for name in MODULES:
        importlib.import_module(f"megatron.core.{name}").torch = stand_in
    # These two reach past torch.cuda into torch's C functions.
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
