"""Hidden states on disk: written once by one forward pass, read at every epoch through the page cache.

    <folder>/rank-00003     the responses of this rank's data share, one record after the other: of each of its layers
                            [local tokens, local columns] in the model's type

A rank has a file of its own with what it computed, so nothing is exchanged. The file is mapped and then unlinked:
whatever ends the process, its space is free again. The scales of normalised states, one number per token and layer,
stay in memory.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_srft.distributed import Group, all_gather_objects, rank
from megatron_srft.hidden_reward.parts import portions
from megatron_srft.hidden_reward.states import LocalStates, Question
from megatron_srft.trainer.hidden_features import Piece, Recomputed, assembled

PORTIONS_AT_A_TIME = 16
"""Of the forward pass: many in a row keep a pipeline full; of all at once the tokens alone would fill a device."""


def cache_bytes(states: Recomputed) -> int:
    """What the files of all ranks together take."""
    layers, hidden = states.shape
    return int(states.lengths.sum()) * layers * hidden * states.trainer.models[0].config.params_dtype.itemsize


class Cached:
    """A `hidden_reward.States` that reads what `states` computed once. A question stays with one data rank.

    Args:
        states: what is to be cached.
        questions: all of them.
        folder: where the files are while they are written; made, and removed again.

    Raises:
        ValueError: a file cannot be written, on every rank; none is left.
    """

    def __init__(self, states: Recomputed, questions: Sequence[Question], folder: Path):
        self.groups, self.device, self.shape = states.groups, states.device, states.shape
        self.own_layers, self.columns, self.lengths = states.own_layers, states.columns, states.lengths
        self.portion_tokens = states.portion_tokens
        self._cut = states.token_group is not None
        self._dtype = states.trainer.models[0].config.params_dtype
        own = states.share(questions)
        chosen = set(own)
        self._is_own = {question: question in chosen for question in questions}
        self._records: dict[int, tuple[int, int, int, tuple[Tensor, ...]]] = {}
        """Of a response: its record's first number, its first token, how many it has, their scales."""
        with _File(folder / f"rank-{rank(self.groups.world):05d}") as file:

            def keep(index: int, piece: Piece) -> None:
                tokens = piece.layers[0].shape[0] if piece.layers else 0
                scales = tuple(scale.cpu() for scale in piece.scales)
                self._records[index] = (file.bytes // self._dtype.itemsize, piece.first, tokens, scales)
                file.append(piece.layers)

            for portion in portions(own, self.lengths, PORTIONS_AT_A_TIME * self.portion_tokens):
                states.visit(portion, keep)
            self._numbers = file.mapped(self._dtype, self.groups.world)

    def share(self, questions: Sequence[Question]) -> list[Question]:
        return [question for question in questions if self._is_own[question]]

    def read(self, responses: Sequence[int]) -> LocalStates:
        pieces = [self._piece(index) for index in responses]
        return assembled(pieces, self.lengths[list(responses)], self.device, cut=self._cut)

    def _piece(self, index: int) -> Piece:
        at, first, tokens, scales = self._records[index]
        layers, columns = len(self.own_layers), self.columns.stop - self.columns.start
        numbers = self._numbers[at : at + layers * tokens * columns].view(layers, tokens, columns)
        return Piece(first=first, layers=numbers.unbind(0), scales=scales)


class _File:
    """A rank's file while it is written. An error is kept until all ranks hear of it, so that none waits for ever."""

    def __init__(self, path: Path):
        self.path, self.bytes, self.file = path, 0, None
        self.error: OSError | None = None

    def __enter__(self) -> "_File":
        with self._remembering():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("wb")
        return self

    def __exit__(self, *unused) -> None:
        self._close()
        with contextlib.suppress(OSError):  # the folder, once the last rank's file is gone
            self.path.unlink(missing_ok=True)
            self.path.parent.rmdir()

    def append(self, parts: Sequence[Tensor]) -> None:
        """The bytes of all parts, in one copy from the device."""
        if self.file is None or not parts:
            return
        record = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]).cpu()
        with self._remembering():
            self.file.write(memoryview(record.numpy()))
            self.bytes += record.numel()

    def mapped(self, dtype: torch.dtype, world: Group) -> Tensor:
        """[numbers] of the whole file, which may then be unlinked.

        Raises:
            ValueError: a rank could not write its file; on every rank.
        """
        self._close()
        own = None if self.error is None else f"{self.path}: {self.error.strerror} after {self.bytes / 2**30:.2f} GiB"
        failed = [message for message in all_gather_objects(own, world) if message is not None]
        if failed:
            raise ValueError(
                f"the hidden states cannot be cached: {failed[0]}; name another folder with --cache-dir, or recompute "
                "them with --cache-gib 0"
            )
        if self.bytes == 0:
            return torch.zeros(0, dtype=dtype)
        return torch.from_file(str(self.path), shared=False, size=self.bytes // dtype.itemsize, dtype=dtype)

    def _close(self) -> None:
        if self.file is not None:
            with self._remembering():
                self.file.close()
        self.file = None

    @contextlib.contextmanager
    def _remembering(self):
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            file, self.file = self.file, None
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
