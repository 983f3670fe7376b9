"""A reward head on the last layer as a model of vLLM's own kind: a classifier of tokens by gate and reward.

Layer L is what the final norm gives, and that is what vLLM's *ForSequenceClassification models put through their linear
layer `score`, token for token in the task token_classify. So such a head needs nothing of ours in vLLM: the folder that
`write_classifier` makes runs anywhere,

    LLM(model=FOLDER, dtype=HEAD'S, runner="pooling", pooler_config=PoolerConfig(task="token_classify"))
    llm.encode(prompts, PoolingParams(use_activation=False), pooling_task="token_classify")    # [tokens, 2] each

It is a pass of its own over finished responses; model.py reads any head, while responses are sampled.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_srft.config import require
from megatron_srft.hidden_reward import RewardHead
from megatron_srft.ops.gated_pooling import gated_mean
from megatron_srft.rollout.vllm import interface, versions
from megatron_srft.rollout.vllm.common import beside_trainer
from megatron_srft.sample import TrainingSequence
from megatron_srft.weights.folder import HfFolder, write_hf_folder
from megatron_srft.weights.tables import HEAD

LABELS = {"0": "gate", "1": "reward"}


def check_classifier(head: RewardHead) -> None:
    """What can be said before a model is loaded: vLLM is there, and this is one process.

    Raises:
        ConfigError: it is not, or the head reads more than the last layer as it is.
    """
    check_head(head)
    versions.require_vllm()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    require(ranks == 1, f"vLLM classifies tokens in one process, not in {ranks}; start without torchrun")


def check_head(head: RewardHead) -> None:
    """Raises ConfigError for a head that reads more than the last layer as it is."""
    last = head.config.base.num_layers
    require(
        head.layers == (last,) and head.config.normalisation == "none",
        f"{head.source} reads layers {' '.join(map(str, head.layers))} with normalisation {head.config.normalisation}, "
        f"and vLLM classifies tokens by layer {last} as it is; score by the trainer, or while sampling "
        "(`megatron-srft generate --engine vllm --head`)",
    )


def write_classifier(
    target: Path, tensors: Iterable[tuple[str, torch.Tensor]], head: RewardHead, source: HfFolder, write: bool = True
) -> None:
    """Write a Hugging Face folder of the model with the head in the place of its LM head.

    Args:
        tensors: of the model, under their Hugging Face names; may be a collective iterator.
        write: False on the ranks that only take part in the iteration.

    Raises:
        ConfigError: the head reads more than the last layer.
        ValueError, OSError: as of `write_hf_folder`.
    """
    check_head(head)
    (name,) = source.config["architectures"]
    config = {
        "architectures": [name.removesuffix("ForCausalLM") + "ForSequenceClassification"],
        "num_labels": len(LABELS),
        "id2label": LABELS,
        "label2id": {label: int(number) for number, label in LABELS.items()},
    }
    write_hf_folder(target, _classifier(tensors, head), source, write, config=config)


def _classifier(tensors: Iterable[tuple[str, torch.Tensor]], head: RewardHead) -> Iterator[tuple[str, torch.Tensor]]:
    yield "score.weight", head.weight[0].cpu()
    yield "score.bias", head.bias.cpu()
    for name, tensor in tensors:  # last, as their type becomes that of the folder
        if name != HEAD:
            yield name, tensor


def score_by_classifier(
    sequences: Sequence[TrainingSequence],
    tensors: Iterable[tuple[str, torch.Tensor]],
    head: RewardHead,
    source: HfFolder,
    beside: Path,
) -> list[float | None]:
    """The head's score of every sequence, by a vLLM in this process; None where there is no token to score.

    Args:
        beside: folder in which the classifier is written for as long as it takes; it is as large as the model.

    Raises:
        ConfigError: see `check_classifier`; or vLLM refuses the model.
    """
    check_classifier(head)
    scored = [sequence for sequence in sequences if _tokens(sequence, head)]
    if not scored:
        return [None] * len(sequences)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".classifier-") as folder:
        target = Path(folder) / "model"
        write_classifier(target, tensors, head, source)
        longest = max(len(sequence.token_ids) for sequence in scored)
        llm = interface.start_classifier(target, head.config.base.dtype, longest, beside_trainer())
        try:
            tables = interface.classify_tokens(llm, [sequence.token_ids.tolist() for sequence in scored])
        finally:
            interface.stop_engine(llm)
    found = iter([_pooled(table, sequence, head) for table, sequence in zip(tables, scored, strict=True)])
    return [next(found) if _tokens(sequence, head) else None for sequence in sequences]


def _tokens(sequence: TrainingSequence, head: RewardHead) -> int:
    """Scored tokens of a response."""
    return max(0, sequence.response_length - (head.config.last_token == "excluded"))


def _pooled(table: np.ndarray, sequence: TrainingSequence, head: RewardHead) -> float:
    """Of [prompt + response, 2] gates and rewards, the bias in them."""
    rows = torch.from_numpy(table[sequence.prompt_length :][: _tokens(sequence, head)]).float()
    bounds = torch.tensor([[0, len(rows)]])
    return float(gated_mean(rows, bounds, rows.new_zeros(2))[0])
