"""An engine that samples nothing: it returns the dumped completions of the same step of an earlier run."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from megatron_srft.config import SamplingConfig
from megatron_srft.rollout.dump import dump_path, load_dump
from megatron_srft.rollout.engine import Request
from megatron_srft.sample import Completion, Group


class ReplayEngine:
    """Reads `step-*.jsonl.zst` or `.jsonl` from a folder. Completions keep the policy version that sampled them."""

    ranks = 1

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"rollout.folder {folder} does not exist; name a folder with dumped rollouts")
        self.folder = folder
        self.step: int | None = None
        self.groups: dict[str, list[Group]] = {}
        """The step's groups by prompt; a step that straddles two epochs can hold a prompt twice."""

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Nothing to do: the weights are not even gathered, on any rank."""

    def unlike(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """It holds no weights that could differ."""
        return []

    def generate(self, requests: list[Request], sampling: SamplingConfig) -> list[Completion]:
        """The dumped completions.

        Raises:
            ValueError: the step, a prompt or a sample is not in the dump, or a prompt has other tokens there.
        """
        asked = Counter((request.step, request.prompt.id) for request in requests)
        return [self._find(request, asked[request.step, request.prompt.id]) for request in requests]

    def rest(self) -> bool:
        """Nothing: it keeps its weights."""
        return False

    def take_metrics(self) -> dict[str, float]:
        """See `RolloutEngine`; there is nothing to tell."""
        return {}

    def close(self) -> None:
        self.groups = {}

    def _find(self, request: Request, n: int) -> Completion:
        if request.step != self.step:
            path = self._path(request.step)
            self.groups = {}
            for group in load_dump(path):
                self.groups.setdefault(group.prompt.id, []).append(group)
            self.step = request.step
        prompt, where = request.prompt, f"step {request.step} of {self.folder}"
        if prompt.id not in self.groups:
            raise ValueError(
                f"prompt {prompt.id} is not in {where}; a replay needs the seed, the data files and the batch of the "
                "run that dumped it, and cannot evaluate (set evaluation.files to [])"
            )
        groups = self.groups[prompt.id]
        if not np.array_equal(groups[0].prompt.token_ids, prompt.token_ids):
            raise ValueError(f"prompt {prompt.id} has other tokens in {where}; tokenizer or template have changed")
        size = len(groups[0].completions)
        number, sample = divmod(request.sample, size)
        if n % size or number >= len(groups):
            raise ValueError(
                f"prompt {prompt.id} has {size} completions in {where}, this run asks for {n}; "
                f"set batch.rollouts_per_prompt to {size}"
            )
        return groups[number].completions[sample]

    def _path(self, step: int) -> Path:
        packed = dump_path(self.folder, step)
        for path in (packed, packed.with_suffix("")):
            if path.is_file():
                return path
        found = sorted(path.name for path in self.folder.glob("step-*.jsonl*"))
        listing = f"it has {found[0]} .. {found[-1]}" if found else "it has no rollout files"
        raise ValueError(f"{self.folder} has no rollouts of step {step} ({packed.name}): {listing}")
