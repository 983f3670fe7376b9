"""Where completions come from: sampling and rollout engines."""

import re
from dataclasses import field, fields
from typing import Annotated, Any, Literal

import pydantic

from megatron_srft.config.base import require, require_at_least, section


@section
class SamplingConfig:
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy (evaluation only)."""

    top_p: float = 1.0
    """Nucleus sampling: keep the smallest set of tokens with this much probability."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""

    max_response_tokens: int = 1024
    """Longest completion, in tokens, with its end token."""

    stop: tuple[str, ...] = ()
    """Strings that end a completion; the stop string stays in the text."""

    def __post_init__(self):
        require_at_least(0, self, "rollout", "temperature", "top_k")
        require(0 < self.top_p <= 1, f"rollout.top_p must lie in (0, 1], not {self.top_p}")
        require_at_least(1, self, "rollout", "max_response_tokens")
        require("" not in self.stop, "rollout.stop holds an empty string, which would end every completion; remove it")


@section
class PartialConfig:
    """Partial rollouts: a step does not wait for its longest completions, they go on in later steps."""

    tokens_per_round: int
    """New tokens of each unfinished completion before it is seen whether enough prompts are finished. Divides
    rollout.max_response_tokens."""

    extra_prompts: int
    """Prompts in flight beyond batch.prompts_per_step, over all ranks: a step ends with the first prompts_per_step that
    are finished, the oldest first, and the others are carried over to the next."""

    max_age: int = 4
    """Steps after the one that it was begun in by which a completion is finished, however long the step then takes."""

    def __post_init__(self):
        require_at_least(1, self, "rollout.partial", "tokens_per_round", "extra_prompts", "max_age")


@section
class LocalRolloutConfig(SamplingConfig):
    kind: Literal["local"] = "local"

    max_concurrent_sequences: int = 256
    """Sequences decoded together on each rank."""

    steps_ahead: Literal[0, 1] = 0
    """1: sample the next step's completions while this step trains, with the weights before its update. They are then
    one step old, which parity.correction or parity.old_logprobs must correct."""

    partial: PartialConfig | None = None
    """Let long completions go on in later steps. They are then of several policies, which parity.correction or
    parity.old_logprobs must correct."""

    dump_every: int = 0
    """Write every Nth step's rollouts to runs/<name>/rollouts/; 0 never."""

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        require_at_least(1, self, "rollout", "max_concurrent_sequences")
        require_at_least(0, self, "rollout", "dump_every")


@section
class ReplayRolloutConfig(SamplingConfig):
    kind: Literal["replay"] = "replay"

    folder: str = ""
    """Folder with the dumped rollouts of an earlier run (step-*.jsonl or .jsonl.zst)."""

    dump_every: int = 0
    """Write every Nth step's rollouts to runs/<name>/rollouts/; 0 never."""

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        require(bool(self.folder), "rollout.folder must name a folder with dumped rollouts")
        require_at_least(0, self, "rollout", "dump_every")


VLLM_RESERVED = {
    "model": "model.path names the folder",
    "dtype": "model.dtype says it",
    "trust_remote_code": "model.trust_remote_code says it",
    "tokenizer": "the tokenizer is that of model.path",
    "tokenizer_mode": "the tokenizer is that of model.path",
    "skip_tokenizer_init": "vLLM needs a tokenizer only for rollout.stop",
    "generation_config": "sampling is set by rollout and evaluation",
    "runner": "the engine generates",
    "convert": "the engine generates",
    "load_format": "weights come from the trainer",
    "quantization": "weights come from the trainer, in its own type",
    "weight_transfer_config": "weights come from the trainer, in the same process",
    "enable_lora": "the whole model is trained",
    "seed": "every request has a seed of its own, made from the run's",
    "logprobs_mode": "it follows from rollout.temperature",
    "distributed_executor_backend": "torchrun starts the engine's processes",
    "worker_cls": "the bridge extends vLLM's own",
    "worker_extension_cls": "the bridge extends vLLM's worker itself",
    "pipeline_parallel_size": "an engine is cut by tensor_parallel_size alone",
    "data_parallel_size": "there is one engine for each tensor_parallel_size ranks",
}
"""vLLM's arguments that are not the user's to set, and why."""


MAX_NUM_SEQS = 256
"""vLLM's own default for most devices; only how often a command says how far it is rests on it."""


@section
class VllmRolloutConfig(SamplingConfig):
    kind: Literal["vllm"] = "vllm"

    vllm: dict[str, Any] = field(default_factory=dict)
    """Native engine arguments of vLLM under their own names, for example {tensor_parallel_size: 2, max_num_seqs: 512}.
    Unknown ones are refused before a model is loaded; docs/rollout.md lists the defaults and what is reserved."""

    checksum_every: int = 50
    """Compare a checksum of every tensor between trainer and vLLM at the first weight sync and every Nth; 0 only at the
    first."""

    sync_timeout: float = 600.0
    """Seconds that a weight sync may take; then the run ends and says which rank waits for which tensor."""

    partial: PartialConfig | None = None
    """Let long completions go on in later steps. They are then of several policies, which parity.correction or
    parity.old_logprobs must correct."""

    dump_every: int = 0
    """Write every Nth step's rollouts to runs/<name>/rollouts/; 0 never."""

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        require_at_least(0, self, "rollout", "checksum_every", "dump_every")
        require_at_least(1, self, "rollout", "sync_timeout")
        _check_native(self.vllm, VLLM_RESERVED)

    @property
    def engine_ranks(self) -> int:
        """Ranks that hold one engine between them."""
        return self.vllm.get("tensor_parallel_size", 1)

    @property
    def max_concurrent_sequences(self) -> int:
        """Sequences decoded together by an engine."""
        return self.vllm.get("max_num_seqs", MAX_NUM_SEQS)


def _check_native(arguments: dict[str, Any], reserved: dict[str, str]) -> None:
    for name in arguments:
        require(name not in reserved, f"rollout.vllm.{name} is reserved: {reserved.get(name)}; remove it")
    size = arguments.get("tensor_parallel_size", 1)
    require(
        isinstance(size, int) and size >= 1,
        f"rollout.vllm.tensor_parallel_size must be a whole number of at least 1, not {size!r}",
    )


SERVER_RESERVED = {name: why for name, why in VLLM_RESERVED.items() if name != "distributed_executor_backend"} | {
    "weight_transfer_config": "rollout.transfer says it",
    "data_parallel_size": "start one server for each, and list them all in rollout.servers",
    "pipeline_parallel_size": "a server is cut by tensor_parallel_size alone",
}
"""Likewise for servers."""

SERVER_URL = re.compile(r"http://(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}")


@section
class VllmServerRolloutConfig(SamplingConfig):
    kind: Literal["vllm_server"] = "vllm_server"

    servers: tuple[str, ...] = ()
    """Servers that `megatron-srft serve` has started, as http://host:port; any number, anywhere."""

    transfer: Literal["auto", "tcp", "nccl"] = "auto"
    """How weights reach a server: tcp through the host's memory, nccl from GPU to GPU (not run on GPUs yet). auto is
    tcp."""

    max_concurrent_requests: int = 256
    """Requests that a server has at a time, of all ranks together; the others wait in the trainer."""

    retries: int = 3
    """Times that a request is sent again, to another server where there is one, before the run ends."""

    request_timeout: float = 1800.0
    """Seconds that a server may take for one completion before it is taken for dead."""

    server_timeout: float = 60.0
    """Seconds that a server may be silent (asked for its health, its settings, or in the midst of a weight sync) before
    it is taken for dead."""

    start_timeout: float = 600.0
    """Seconds that the start of the run waits for servers."""

    sync_timeout: float = 600.0
    """Seconds that a weight sync may take over all ranks; then the run ends and says which rank waits for which
    tensor."""

    bucket_bytes: int = 64 << 20
    """Bytes of weights that are copied to the host at a time. A rank that feeds servers holds three such buckets."""

    checksum_every: int = 50
    """Compare a checksum of every tensor between trainer and servers at the first weight sync and every Nth; 0 only at
    the first."""

    api_key_variable: str = ""
    """Environment variable that holds the servers' key, for `megatron-srft serve` and for runs. Empty: they have none,
    and whoever reaches one can change its weights."""

    vllm: dict[str, Any] = field(default_factory=dict)
    """Native engine arguments of vLLM that `megatron-srft serve` starts a server with, as of `kind: vllm`."""

    steps_ahead: Literal[0, 1] = 0
    """1: sample the next step's completions while this step trains, with the weights before its update. They are then
    one step old, which parity.correction or parity.old_logprobs must correct."""

    partial: PartialConfig | None = None
    """Let long completions go on in later steps. They are then of several policies, which parity.correction or
    parity.old_logprobs must correct."""

    dump_every: int = 0
    """Write every Nth step's rollouts to runs/<name>/rollouts/; 0 never."""

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        require(bool(self.servers), "rollout.servers names no server; list them as [http://host:port, ...]")
        for url in self.servers:
            require(
                SERVER_URL.fullmatch(url) is not None,
                f"rollout.servers: {url!r} is no address of a server; write it as http://host:port",
            )
        twice = sorted({url for url in self.servers if self.servers.count(url) > 1})
        require(not twice, f"rollout.servers names {', '.join(twice)} twice; remove one")
        require_at_least(0, self, "rollout", "retries", "checksum_every", "dump_every")
        require_at_least(1, self, "rollout", "max_concurrent_requests", "start_timeout", "sync_timeout")
        require_at_least(0.1, self, "rollout", "request_timeout", "server_timeout")
        require_at_least(1024, self, "rollout", "bucket_bytes")
        _check_native(self.vllm, SERVER_RESERVED)

    @property
    def max_concurrent_sequences(self) -> int:
        """Completions that all servers sample at a time."""
        return self.max_concurrent_requests * len(self.servers)

    @property
    def transfer_engine(self) -> str:
        """Name of the weight transfer engine that servers are started with."""
        return "nccl" if self.transfer == "nccl" else "srft_tcp"


def as_local(rollout: SamplingConfig) -> LocalRolloutConfig:
    """The local engine with another engine's sampling, for commands that have no other."""
    return _as(LocalRolloutConfig, rollout)


def as_vllm(rollout: SamplingConfig) -> VllmRolloutConfig:
    """vLLM with another engine's sampling."""
    return _as(VllmRolloutConfig, rollout)


def as_servers(rollout: SamplingConfig) -> VllmServerRolloutConfig:
    """Raises ConfigError when it is another engine's: nothing else names servers."""
    require(
        isinstance(rollout, VllmServerRolloutConfig),
        "--engine vllm_server needs --config with rollout.kind vllm_server, which names the servers",
    )
    return rollout


def _as(kind: type, rollout: SamplingConfig) -> Any:
    if isinstance(rollout, kind):
        return rollout
    return kind(**{f.name: getattr(rollout, f.name) for f in fields(SamplingConfig)})


RolloutConfig = Annotated[
    LocalRolloutConfig | ReplayRolloutConfig | VllmRolloutConfig | VllmServerRolloutConfig,
    pydantic.Field(discriminator="kind"),
]
