"""Where completions come from: sampling and rollout engines."""

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
        for name in self.vllm:
            require(name not in VLLM_RESERVED, f"rollout.vllm.{name} is reserved: {VLLM_RESERVED.get(name)}; remove it")
        ranks = self.engine_ranks
        require(
            isinstance(ranks, int) and ranks >= 1,
            f"rollout.vllm.tensor_parallel_size must be a whole number of at least 1, not {ranks!r}",
        )

    @property
    def engine_ranks(self) -> int:
        """Ranks that hold one engine between them."""
        return self.vllm.get("tensor_parallel_size", 1)


def as_local(rollout: SamplingConfig) -> LocalRolloutConfig:
    """The local engine with another engine's sampling, for commands that have no other."""
    if isinstance(rollout, LocalRolloutConfig):
        return rollout
    return LocalRolloutConfig(**{f.name: getattr(rollout, f.name) for f in fields(SamplingConfig)})


RolloutConfig = Annotated[
    LocalRolloutConfig | ReplayRolloutConfig | VllmRolloutConfig, pydantic.Field(discriminator="kind")
]
