"""Key/value cache with one slot per position, and the attention that reads it.

Row r of a batch keeps the keys of its own position p in slot p, so rows of different lengths stand side by side
without padding: a finished row is replaced by a new prompt, or by the last row of the batch, without touching the
others. Slots past a row's length hold old (finite) values and are hidden by the mask.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

SLOT_ATTENTION = "megatron_srft_slots"
"""Name of `slot_attention` among transformers' attention implementations."""

SLOT_BLOCK = 16
"""The slots in use are rounded up to this many, for aligned masks and few re-allocations."""


@dataclass(eq=False)
class Layout:
    """What all layers share. (Not the cache itself: a cycle would keep its memory until the garbage collector runs.)"""

    rows: int = 0
    slots: int = 0
    width: int = 0
    """Slots in use."""
    row_numbers: torch.Tensor | None = None
    """[rows in use] int64: 0, 1, 2, ..."""
    positions: torch.Tensor | None = None
    """[rows in use] int64: the slot of every row's next token."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [rows, heads, slots, head size] each."""

    is_sliding = False

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self._zeros(key_states)
        self.values = self._zeros(value_states)
        self.is_initialized = True

    def _zeros(self, states: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN would still be NaN.
        return states.new_zeros(self.layout.rows, states.shape[1], self.layout.slots, states.shape[3])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store one new token per row ([rows, heads, 1, head size]) and return everything the rows may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, positions, width = self.layout.row_numbers, self.layout.positions, self.layout.width
        self.keys[rows, :, positions] = key_states[:, :, 0]
        self.values[rows, :, positions] = value_states[:, :, 0]
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]

    def fill(self, rows: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write the first slots of `rows` ([rows, heads, length, head size])."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[rows, :, : key_states.shape[2]] = key_states
        self.values[rows, :, : value_states.shape[2]] = value_states

    def resize(self) -> None:
        """Move into tensors of the layout's new size; rows beyond it are given up."""
        for name in ("keys", "values"):
            old = self.__dict__[name]
            new = self._zeros(old)
            new[:, :, : old.shape[2]] = old[: len(new)]
            self.__dict__[name] = new

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Overwrite rows `target` by rows `source`."""
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layout.width, 0

    def get_seq_length(self) -> int:
        return self.layout.width

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """All layers' slots. Before a forward `reserve` makes room and `place` says where every row's next token goes."""

    def __init__(self, layers: int, device: torch.device):
        self.device = device
        self.layout = Layout()
        super().__init__(layers=[SlotLayer(self.layout) for _ in range(layers)])

    def reserve(self, slots: int, rows: int) -> None:
        """Make room for this many slots per row, by half as much again at a time, in the first `rows` rows.

        Rows are given up only where the tensors have to move anyway: late in a batch, when few rows are left and those
        are long, the cache stays small.
        """
        if slots > self.layout.slots:
            self.layout.slots, self.layout.rows = _blocks(max(slots, self.layout.slots * 3 // 2)), rows
            for layer in self.layers:
                if layer.is_initialized:
                    layer.resize()

    def place(self, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Prepare a forward of one token per row.

        Args:
            positions: [rows in use] int64, on the cache's device; `reserve` has made room for them.
            longest: the largest of them (known to the caller without asking the device).

        Returns:
            [rows in use, 1, 1, width] bool: which slots each row sees.
        """
        layout = self.layout
        layout.width, layout.positions = _blocks(longest + 1), positions
        layout.row_numbers = torch.arange(len(positions), device=self.device)
        visible = torch.arange(layout.width, device=self.device) <= positions[:, None]
        return visible[:, None, None, :]

    def fill(self, rows: torch.Tensor, prefilled: Cache, members: torch.Tensor) -> None:
        """Copy row `members[i]` of a prefilled cache into row `rows[i]`."""
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.fill(rows, source.keys[members], source.values[members])

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.move(source, target)


def _blocks(slots: int) -> int:
    return -(-slots // SLOT_BLOCK) * SLOT_BLOCK


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Prefill (no mask: causal, padding on the right) and decoding (one query per row, slots chosen by the mask).

    Grouped-query heads that share a key head are laid out as queries of that head, so keys are not copied per head.

    Args:
        query: [rows, heads, queries, head size]; key, value: [rows, key heads, slots, head size].
        attention_mask: [rows, 1, 1, slots] bool, or None for a prefill.
    """
    rows, heads, queries, size = query.shape
    if attention_mask is None:
        mask = _window_mask(queries, sliding_window, query.device)
        grouped = heads != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2), None
    if sliding_window is not None and key.shape[2] > sliding_window:
        slots = torch.arange(key.shape[2], device=key.device)
        attention_mask = attention_mask & (slots > position_ids[:, :, None, None] - sliding_window)
    query = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, size), None


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """[length, length] bool, or None where plain causality is enough."""
    if sliding_window is None or length <= sliding_window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < sliding_window)


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
