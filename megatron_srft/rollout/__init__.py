"""Completions from the current policy: engine protocol, local, replay and vLLM engines, sharing over ranks, parity."""

from megatron_srft.rollout.build import build_engine, check_engine, load_local_engine, load_tokenizer
from megatron_srft.rollout.collect import collect
from megatron_srft.rollout.dump import dump, dump_path, load_dump
from megatron_srft.rollout.engine import Request, RolloutEngine

__all__ = [
    "Request",
    "RolloutEngine",
    "build_engine",
    "check_engine",
    "collect",
    "dump",
    "dump_path",
    "load_dump",
    "load_local_engine",
    "load_tokenizer",
]
