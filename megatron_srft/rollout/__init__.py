"""Completions from the current policy: engine protocol, local, replay and vLLM engines, sharing over ranks, parity."""

from megatron_srft.rollout.build import (
    build_engine,
    check_engine,
    load_local_engine,
    load_tokenizer,
    load_vllm_engine,
)
from megatron_srft.rollout.collect import Share, assemble, collect, deal
from megatron_srft.rollout.dump import dump, dump_path, from_lines, load_dump, to_lines
from megatron_srft.rollout.engine import Request, RolloutEngine
from megatron_srft.rollout.partial import InFlight

__all__ = [
    "InFlight",
    "Request",
    "RolloutEngine",
    "Share",
    "assemble",
    "build_engine",
    "check_engine",
    "collect",
    "deal",
    "dump",
    "dump_path",
    "from_lines",
    "load_dump",
    "load_local_engine",
    "load_tokenizer",
    "load_vllm_engine",
    "to_lines",
]
