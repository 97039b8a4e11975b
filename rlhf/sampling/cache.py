"""The cache of the engine `loop`: keys and values with room for the next tokens.

The cache of transformers copies all keys and values for each new token. Here a token is written
next to those before it, and they are copied once in `BLOCK` tokens. The numbers are the same.
Left out: layers with a sliding window or another kind of state, which keep those of transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 64  # tokens


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, as the first part of tensors that are longer."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Add keys and values of new tokens; return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room: dict[str, Tensor] = {}
        self.keys = self._grown("keys", self.keys, key_states)
        self.values = self._grown("values", self.values, value_states)
        return self.keys, self.values

    def _grown(self, name: str, kept: Any, new: Tensor) -> Tensor:
        start = kept.shape[-2] if kept.numel() else 0
        end, room = start + new.shape[-2], self.room.get(name)
        # rows that were selected since are in a tensor of their own
        if room is None or room.shape[-2] < end or room.data_ptr() != kept.data_ptr():
            room = new.new_empty(*new.shape[:-2], end + BLOCK, new.shape[-1])
            if start:
                room[..., :start, :] = kept
            self.room[name] = room
        room[..., start:end, :] = new
        return room[..., :end, :]


def room_of(num_read: int, num_new: int) -> int:
    """Tokens for which a layer has room at the end, after `num_read` at once and `num_new` singly.

    100 at once: 164; the 65th after them: 165 + 64.
    """
    further = max(0, num_new - BLOCK)
    return num_read + BLOCK + (BLOCK + 1) * -(-further // (BLOCK + 1))


def roomy_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:  # layers are made as they are needed
        cache.layer_class_to_replicate = RoomyLayer
    return cache
