"""Engines and tokenizers from a config and a Hugging Face folder."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from megatron_srft import distributed
from megatron_srft.config import ConfigError, ModelConfig, RunConfig
from megatron_srft.hidden_reward import RewardHead, WeightsWatch, check_fits, prompt_fingerprint
from megatron_srft.rollout.cache import SLOT_ATTENTION
from megatron_srft.rollout.engine import RolloutEngine
from megatron_srft.rollout.local import LocalEngine
from megatron_srft.rollout.replay import ReplayEngine
from megatron_srft.rollout.servers import engine as servers
from megatron_srft.rollout.vllm import engine as vllm
from megatron_srft.weights.folder import HfFolder

log = logging.getLogger(__name__)

PROBES = (
    "So x^2 + 12y = 345.",
    "  two lines:\n\n\tdef f(a, b): return a",
    "\u00e9t\u00e9, \u03c0 \u2248 3.14 \u4f60\u597d",
)
"""Texts that tokenizers cut into words in different ways: spaces, digits, lines, other scripts."""


def build_engine(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    world: distributed.Group = None,
    *,
    scored: bool = False,
) -> RolloutEngine:
    """The engine of `config.rollout`; it waits for its first `update_weights`.

    Args:
        world: the ranks that vLLM's engines are cut from.
        scored: start vLLM so that a reward head can be set, see `VllmEngine.score_with`.

    Raises:
        ValueError: the model's folder or the replay's folder is not there, or vLLM refuses what it is told.
    """
    if config.rollout.kind == "replay":
        return ReplayEngine(Path(config.rollout.folder))
    folder = _model_folder(config.model)
    if config.rollout.kind == "vllm":
        return vllm.VllmEngine(config, tokenizer, world, scored=scored)
    if config.rollout.kind == "vllm_server":
        return servers.VllmServerEngine(config, tokenizer, world)
    trust = config.model.trust_remote_code
    architecture = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            architecture,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=SLOT_ATTENTION,
            trust_remote_code=trust,
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return LocalEngine(model, tokenizer, max_concurrent_sequences=config.rollout.max_concurrent_sequences)


def check_engine(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError for a mistake in `config.rollout` that can be found before a model is loaded."""
    if config.rollout.kind == "vllm":
        vllm.check_engine(config, world_size)
    if config.rollout.kind == "vllm_server":
        servers.check_engine(config)


def load_local_engine(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device, max_concurrent_sequences: int
) -> LocalEngine:
    """A local engine with the weights of the folder `config.path`, as policy version 0."""
    model = AutoModelForCausalLM.from_pretrained(
        _model_folder(config),
        dtype=getattr(torch, config.dtype),
        attn_implementation=SLOT_ATTENTION,
        trust_remote_code=config.trust_remote_code,
    )
    engine = LocalEngine(model.to(device), tokenizer, max_concurrent_sequences=max_concurrent_sequences)
    engine.policy_version = 0
    return engine


def load_vllm_engine(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    world: distributed.Group,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
    head: RewardHead | None = None,
) -> vllm.VllmEngine | servers.VllmServerEngine:
    """vLLM, in these processes or on servers, with the weights of the folder config.model.path or those given, as
    policy version 0. Collective; torch.distributed must have been started.

    Args:
        head: scores what is sampled; not on servers.

    Raises:
        ValueError: the folder or vLLM's arguments are wrong, or the head is not one for these weights and prompts.
    """
    check_engine(config, distributed.size(world))
    folder = _model_folder(config.model)
    engine = build_engine(config, tokenizer, device, world, scored=head is not None)
    watch = WeightsWatch()
    tensors = (
        _weights_of(folder, engine.shapes, getattr(torch, config.model.dtype), device) if weights is None else weights
    )
    if head is not None:
        engine.score_with(head)
        tensors = watch.passing(tensors)
    engine.update_weights(tensors, 0)
    if head is not None:
        base = replace(engine.base, fingerprint=watch.fingerprint())
        check_fits(head, base, prompt_fingerprint(config.data, tokenizer))
    return engine


def _weights_of(
    folder: Path, names: Iterable[str], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    source = HfFolder(folder)
    for name in names:
        yield name, source.tensor(name).to(device, dtype)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder. Raises ConfigError when the folder has none, or a damaged one."""
    folder = _model_folder(config)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ConfigError(f"model.path {folder} has no tokenizer (tokenizer.json); copy the tokenizer's files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        if difference := _misread(folder / "tokenizer.json", tokenizer):
            if distributed.is_main():
                log.warning("%s", difference)
        return tokenizer
    except Exception as error:  # tokenizers raises bare Exception, json and transformers their own
        raise ConfigError(
            f"model.path {folder}: its tokenizer cannot be read ({type(error).__name__}: {error}); copy its files anew"
        ) from error


def _misread(file: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What transformers makes of the folder's tokenizer.json otherwise than the file says; None when nothing.

    By the model's type transformers 5 may take a class that cuts text into words in its own way, whatever the file has.
    """
    if not file.is_file():
        return None
    written = Tokenizer.from_file(str(file))
    for text in PROBES:
        wanted = written.encode(text, add_special_tokens=False).ids
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != wanted and written.decode(wanted) == text:  # else the vocabulary does not have these characters
            return (
                f"transformers reads {file} as a {type(tokenizer).__name__}, which makes other tokens of {text!r} than "
                f"the file says ({len(found)} instead of {len(wanted)}; in text again: {tokenizer.decode(found)!r}); a "
                "model that was trained by the file is given tokens that it does not know"
            )
    return None


def _model_folder(config: ModelConfig) -> Path:
    # Checked here because transformers takes a path that is not there for a model name to download.
    folder = Path(config.path)
    if not config.path or not (folder / "config.json").is_file():
        raise ConfigError(f"model.path '{config.path}' must name a Hugging Face folder; there is no config.json in it")
    return folder
