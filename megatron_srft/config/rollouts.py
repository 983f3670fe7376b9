"""Where completions come from: sampling and rollout engines."""

from typing import Annotated, Literal

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
class LocalRolloutConfig(SamplingConfig):
    kind: Literal["local"] = "local"

    max_concurrent_sequences: int = 256
    """Sequences decoded together on each rank."""

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


RolloutConfig = Annotated[LocalRolloutConfig | ReplayRolloutConfig, pydantic.Field(discriminator="kind")]
